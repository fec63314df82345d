"""`FolderTask`: a task in the files of a folder or on the hub, the one mechanism behind every task here."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Literal

from ...data.read import TextRow
from ..answers import number_of
from .base import SPLITS, canonical_split, nearest
from .files import Record, records
from .hub import HubSet, hub_configs, hub_records, hub_splits, looks_like_hub_name
from .layout import DataFile, Layout, find
from .table import Table

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FolderTask:
    """A task whose languages stand in files of a folder, or in configurations of a hub set.

    Fields:
        name: the task's name in reports.
        labels: label names; string labels are looked up here, integer labels count from the table's `base`. For a
            choice task "1", "2", ..., one per choice; for a generated one none.
        tables: how a file may be written; the first that fits its first row is used.
        english: the set's code of English.
        mt_codes: the set's codes -> MT codes, None where the MT model has none; a code that is not in it has none. If
            `mt_codes` is None itself, folder names are taken as MT codes.
        label_files: where labels that are not in the data files stand, relative to the folder, with "{split}"; a table
            with a `label` column, one line per row.
        hubs: how the set is laid out on the hub; the first one is the default source and the pattern for mirrors.
        layouts: how its files may be named.
        kind: "choice" where rows have choices; "generated" where the table's `label` is the answer that is to be
            written, with a number in it (see `answers`).
        notes: remarks on how a language is read, e.g. where the MT code is that of a near relative.
        home: the default source where there is no hub set.
        about: what a model has to do, for readers of a report who know nothing of it.
        fixed_words: English text that stands at the end of rows in every language and is not to be translated.
    """

    name: str
    labels: tuple[str, ...]
    tables: tuple[Table, ...] = (Table(),)
    english: str = "eng_Latn"
    mt_codes: Mapping[str, str | None] | None = None
    label_files: tuple[str, ...] = ()
    hubs: tuple[HubSet, ...] = ()
    layouts: tuple[Layout, ...] = (Layout(),)
    kind: Literal["classification", "choice", "generated"] = "classification"
    notes: Mapping[str, str] = field(default_factory=dict)
    home: str | None = None
    fixed_words: tuple[str, ...] = ()
    about: str = ""

    def __post_init__(self) -> None:
        if self.kind == "generated" and self.labels:
            raise ValueError(f"labels={self.labels!r}: a generated task has none")
        if self.kind != "generated" and (len(self.labels) < 2 or len(set(self.labels)) != len(self.labels)):
            raise ValueError(f"labels={self.labels!r}: expected at least two different names")
        for table in self.tables:
            if len(table.choices) != (len(self.labels) if self.kind == "choice" else 0):
                raise ValueError(
                    f"task {self.name!r}: {len(table.choices)} choice columns for {len(self.labels)} labels"
                )

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        *,
        name: str | None = None,
        labels: Sequence[str] | None = None,
        text_column: str = "text",
        pair_column: str | None = None,
        label_column: str = "label",
        id_column: str | None = None,
        english: str = "eng_Latn",
        mt_codes: Mapping[str, str | None] | None = None,
        quoted: bool = True,
    ) -> FolderTask:
        """A task from any folder `<folder>/<language>/<split>.<tsv|csv|jsonl|json|parquet>[.gz]` with named columns.

        Labels are those given, else the lines of `<folder>/labels.txt`, else the sorted labels of the English files.
        `quoted`: csv quoting; False reads quote marks as text.

        Raises:
            ValueError: no labels can be found.
        """
        table = Table(text=text_column, pair=pair_column, label=label_column, id=id_column, quoted=quoted)
        names = tuple(labels) if labels else _labels_of(Path(folder), english, table)
        return cls(name or Path(folder).name, names, (table,), english=english, mt_codes=mt_codes, home=str(folder))

    @property
    def default_source(self) -> str | None:
        return self.home or (self.hubs[0].name or None if self.hubs else None)

    def mt_code(self, language: str) -> str | None:
        return language if self.mt_codes is None else self.mt_codes.get(language)

    def languages(self, source: str | Path) -> list[str]:
        folder = self._folder(source)
        if folder is None:
            return self._hub(source).languages(hub_configs(str(source)))
        languages = sorted({file.language for file in find(folder, self.layouts, known=self.mt_codes)})
        if not languages:
            raise ValueError(f"source={str(source)!r}: no <language>/<split> files in it for the task {self.name!r}")
        return languages

    def splits(self, source: str | Path, language: str) -> tuple[str, ...]:
        folder = self._folder(source)
        if folder is None:
            return hub_splits(str(source), self._hub(source).config(language))
        present = {file.split for file in self._files(source, folder, language)}
        return tuple(split for split in SPLITS if split in present)

    def empty_folders(self, source: str | Path) -> list[str]:
        """Folders named like a language that hold no data file; such a language is not among `languages`."""
        folder = self._folder(source)
        if folder is None:
            return []
        names = {path.name for path in folder.iterdir() if path.is_dir()}
        codes = (
            {name for name in names if _CODE.fullmatch(name)} if self.mt_codes is None else names & set(self.mt_codes)
        )
        return sorted(codes - {file.language for file in find(folder, self.layouts, known=self.mt_codes)})

    def rows(
        self, source: str | Path, language: str, split: str = "test", *, limit: int | None = None, labelled: bool = True
    ) -> list[TextRow]:
        """All rows of a split, in file order, with ids and labels, or targets. Rows with a blank text are kept.

        Args:
            source: folder or hub name.
            language: the set's code.
            split: "train", "dev" (also "valid", "validation") or "test".
            limit: only the first `limit` rows.
            labelled: whether labels are needed; False leaves `label` None where the set gives none.

        Raises:
            ValueError: no such language or split in `source`; a malformed file; no labels; a label outside `labels`; a
                target without a number.
        """
        split = canonical_split(split)
        if limit is not None and limit < 1:
            raise ValueError(f"limit={limit}: expected a positive number of rows")
        folder = self._folder(source)
        if folder is None:
            config = self._hub(source).config(language)
            where = f"{source}:{config}:{split}"
            content = hub_records(str(source), config, split)
            table = next((t for t in self.tables if content and all(c in content[0] for c in t.required())), None)
        else:
            path = self._file(source, folder, language, split).path
            where = str(path)
            table = next((t for t in self.tables if t.fits(path)), None)
            content = list(records(path, header=table.header, quoted=table.quoted)) if table else []
        if table is None:
            wanted = " or ".join("+".join(t.required()) for t in self.tables)
            raise ValueError(
                f"source={str(source)!r}: {where!r} does not have the columns {wanted} of the task {self.name!r}"
            )
        content = self._chosen(table, content, language, split, where)
        values = self._label_column(folder, table, content, split, where, labelled)
        generated = self.kind == "generated"
        targets = self._targets(values, where) if generated else [None] * len(values)
        labels = [None] * len(values) if generated else self._classes(table, values, where)
        code = self.mt_code(language) or language
        written = zip(content, labels, targets, strict=True)
        rows = []
        for index, (record, label, target) in enumerate(islice(written, limit)):
            row = table.row(record, label, code, index, where)
            rows.append(row if target is None else replace(row, target=target))
        return rows

    def _chosen(self, table: Table, content: list[Record], language: str, split: str, where: str) -> list[Record]:
        """The records of one language and split that have a label; those without are counted."""
        if table.language is not None:
            content = [record for record in content if record[table.language] == language]
        if table.split is not None:
            content = [record for record in content if record[table.split] in SPLITS[split]]
        if not content:
            which = f" of {language!r}, {split!r}" if table.language or table.split else ""
            raise ValueError(f"source: {where!r} holds no rows{which}")
        kept = [record for record in content if record.get(table.label) not in table.unlabelled]
        if len(kept) < len(content):
            log.warning(
                "%s: %d of %d rows were never given a label and are left out",
                where,
                len(content) - len(kept),
                len(content),
            )
        return kept

    def _label_column(
        self, folder: Path | None, table: Table, content: list[Record], split: str, where: str, labelled: bool
    ) -> list[object]:
        """The label of each row as it is written, None throughout for an unlabelled split that need not be labelled."""
        values = [_or_none(record.get(table.label)) for record in content]
        if all(value is None for value in values):
            tried = [folder / pattern.format(split=split) for pattern in self.label_files] if folder else []
            path = next((path for path in tried if path.is_file()), None)
            if path is not None:
                values = [_or_none(record.get(table.label)) for record in records(path)]
                if len(values) != len(content):
                    raise ValueError(f"{str(path)!r}: {len(values)} labels for the {len(content)} rows of {where!r}")
            elif labelled:
                hint = f"; {' or '.join(map(str, tried))} could hold them" if tried else ""
                column = "empty" if content and table.label in content[0] else "no"
                raise ValueError(f"split={split!r}: {where!r} has no labels ({column} column {table.label!r}){hint}")
        if labelled and None in values:
            count = sum(value is None for value in values)
            raise ValueError(
                f"split={split!r}: {where!r} row {values.index(None)} has no label ({count} of {len(values)} have none)"
            )
        return values

    def _targets(self, values: Sequence[object], where: str) -> list[str | None]:
        """The answers of a generated task as text."""
        targets = [None if value is None else _answer(value) for value in values]
        for index, target in enumerate(targets):
            if target is not None and number_of(target) is None:
                raise ValueError(f"{where!r} row {index}: the answer {target!r} holds no number to compare with")
        return targets

    def _classes(self, table: Table, values: Sequence[object], where: str) -> list[int | None]:
        choice = self.kind == "choice"
        classes = [None if value is None else table.index(value, self.labels, choice) for value in values]
        wrong = [i for i, (value, label) in enumerate(zip(values, classes)) if value is not None and label is None]
        if wrong:
            more = f" (and {len(wrong) - 1} rows more)" if len(wrong) > 1 else ""
            right = (
                f"{table.base} to {table.base + len(self.labels) - 1}" if choice else f"one of {', '.join(self.labels)}"
            )
            raise ValueError(f"{where!r} row {wrong[0]}: label {values[wrong[0]]!r} is not {right}{more}")
        return classes

    def _folder(self, source: str | Path) -> Path | None:
        """The local folder, or None when `source` is to be read from the hub."""
        path = Path(source).expanduser()
        if path.is_dir():
            return path
        if path.exists():
            raise ValueError(f"source={str(source)!r}: expected a folder with one folder per language, got a file")
        if isinstance(source, str) and looks_like_hub_name(source):
            return None
        raise ValueError(f"source={str(source)!r}: no such folder (and not the form of a hub name)")

    def _hub(self, source: str | Path) -> HubSet:
        named = (hub for hub in self.hubs if hub.name == str(source))
        return next(named, self.hubs[0] if self.hubs else HubSet())

    def _files(self, source: str | Path, folder: Path, language: str) -> list[DataFile]:
        files = find(folder, self.layouts, language, self.mt_codes)
        if not files:
            if (folder / language).is_dir():
                raise ValueError(f"language={language!r}: {str(folder / language)!r} holds no data files")
            near = nearest(language, self.languages(source))
            raise ValueError(f"language={language!r}: not in {str(source)!r}; nearest: {near}")
        return files

    def _file(self, source: str | Path, folder: Path, language: str, split: str) -> DataFile:
        files = self._files(source, folder, language)
        chosen = [file for file in files if file.split == split]
        if not chosen:
            place = folder / language if (folder / language).is_dir() else folder
            has = ", ".join(dict.fromkeys(file.split for file in files))
            raise ValueError(f"split={split!r}: {str(place)!r} has only {has} for {language!r}")
        if len(chosen) > 1:
            paths = " and ".join(str(file.path) for file in chosen)
            raise ValueError(f"split={split!r}: {paths} could both be meant; keep one")
        return chosen[0]


_CODE = re.compile(r"[a-z]{2,3}(_[A-Z][a-z]{3})?")


def _or_none(value: object) -> object:
    return None if value == "" or (value == -1 and not isinstance(value, bool)) else value


def _answer(value: object) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _labels_of(folder: Path, english: str, table: Table) -> tuple[str, ...]:
    listed = folder / "labels.txt"
    if listed.is_file():
        return tuple(line.strip() for line in listed.read_text(encoding="utf-8").split("\n") if line.strip())
    seen: set[str] = set()
    for item in find(folder, (Layout(),), english):
        for record in records(item.path, quoted=table.quoted):
            label = record.get(table.label)
            if isinstance(label, str):
                seen.add(label)
    if len(seen) < 2:
        raise ValueError(
            f"source={str(folder)!r}: no labels given, no labels.txt, "
            f"and fewer than two in the column {table.label!r} of {english!r}"
        )
    return tuple(sorted(seen))
