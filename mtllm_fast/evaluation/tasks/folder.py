"""`FolderTask`: a task laid out as `<folder>/<language>/<split>.<ending>`, the one mechanism behind every task here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from ...data.read import TextRow
from .base import SPLITS, canonical_split, nearest
from .files import ENDINGS, columns, kind, records
from .hub import HubSet, hub_configs, hub_records, hub_splits, looks_like_hub_name


@dataclass(frozen=True)
class Table:
    """How the files of a set are written.

    Fields:
        text, pair, label, id: column names. `pair` and `id` may be None: no second text; the row number is the id.
        header: column names of a table that has no header line (the last ones may be absent), or None.
        quoted: csv quoting (see `files.records`).
    """

    text: str = "text"
    pair: str | None = None
    label: str = "label"
    id: str | None = None
    header: tuple[str, ...] | None = None
    quoted: bool = True

    def required(self) -> list[str]:
        return [column for column in (self.text, self.pair, self.id) if column is not None]

    def fits(self, path: Path) -> bool:
        if self.header is not None and kind(path) not in ("tsv", "csv"):
            return False
        present = columns(path, header=self.header, quoted=self.quoted)
        return all(column in present for column in self.required())


@dataclass(frozen=True)
class FolderTask:
    """A task in a folder per language, or on the hub with a configuration per language.

    Fields:
        name: the task's name in reports.
        labels: label names; string labels are looked up here, integer labels (parquet, JSON, hub) index it.
        tables: how a file may be written; the first that fits its first row is used.
        english: the set's code of English.
        mt_codes: the set's codes -> MT codes, None where the MT model has none; a code that is not in it has none. If
            `mt_codes` is None itself, folder names are taken as MT codes.
        label_files: where labels that are not in the data files stand, relative to the folder, with "{split}"; a table
            with a `label` column, one line per row.
        hub: how the set is laid out on the hub.
    """

    name: str
    labels: tuple[str, ...]
    tables: tuple[Table, ...] = (Table(),)
    english: str = "eng_Latn"
    mt_codes: Mapping[str, str | None] | None = None
    label_files: tuple[str, ...] = ()
    hub: HubSet = field(default_factory=HubSet)

    def __post_init__(self) -> None:
        if len(self.labels) < 2 or len(set(self.labels)) != len(self.labels):
            raise ValueError(f"labels={self.labels!r}: expected at least two different names")

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
    ) -> FolderTask:
        """A task from any folder `<folder>/<language>/<split>.<tsv|csv|jsonl|json|parquet>[.gz]` with named columns.

        Labels are those given, else the lines of `<folder>/labels.txt`, else the sorted labels of the English files.

        Raises:
            ValueError: no labels can be found.
        """
        table = Table(text=text_column, pair=pair_column, label=label_column, id=id_column)
        names = tuple(labels) if labels else _labels_of(Path(folder), english, table)
        return cls(name or Path(folder).name, names, (table,), english=english, mt_codes=mt_codes)

    def mt_code(self, language: str) -> str | None:
        return language if self.mt_codes is None else self.mt_codes.get(language)

    def languages(self, source: str | Path) -> list[str]:
        folder = self._folder(source)
        if folder is None:
            return sorted(self.hub.language(config) for config in hub_configs(str(source)) if config not in _UNIONS)
        found = sorted(path.name for path in folder.iterdir() if path.is_dir() and _split_files(path))
        if not found:
            raise ValueError(f"source={str(source)!r}: no <language>/<split> files in it for the task {self.name!r}")
        return found

    def splits(self, source: str | Path, language: str) -> tuple[str, ...]:
        folder = self._folder(source)
        if folder is None:
            return hub_splits(str(source), self.hub.config(language))
        return tuple(_split_files(self._language_folder(source, folder, language)))

    def rows(
        self, source: str | Path, language: str, split: str = "test", *, limit: int | None = None, labelled: bool = True
    ) -> list[TextRow]:
        """All rows of a split, in file order, with ids and labels. Rows with a blank text are kept.

        Args:
            source: folder or hub name.
            language: the set's code.
            split: "train", "dev" (also "valid", "validation") or "test".
            limit: only the first `limit` rows.
            labelled: whether labels are needed; False leaves `label` None where the set gives none.

        Raises:
            ValueError: no such language or split in `source`; a malformed file; no labels; a label outside `labels`.
        """
        split = canonical_split(split)
        if limit is not None and limit < 1:
            raise ValueError(f"limit={limit}: expected a positive number of rows")
        folder = self._folder(source)
        if folder is None:
            where = f"{source}:{self.hub.config(language)}:{split}"
            content = hub_records(str(source), self.hub.config(language), split)
            table = next((t for t in self.tables if content and all(c in content[0] for c in t.required())), None)
        else:
            path = self._file(source, folder, language, split)
            where = str(path)
            table = next((t for t in self.tables if t.fits(path)), None)
            content = list(records(path, header=table.header, quoted=table.quoted)) if table else []
        if table is None:
            wanted = " or ".join("+".join(t.required()) for t in self.tables)
            raise ValueError(
                f"source={str(source)!r}: {where!r} does not have the columns {wanted} of the task {self.name!r}"
            )
        if not content:
            raise ValueError(f"source={str(source)!r}: {where!r} holds no rows")
        labels = self._label_column(folder, table, content, split, where, labelled)
        code = self.mt_code(language) or language
        rows = zip(content, labels, strict=True)
        return [
            self._row(table, record, label, code, index, where)
            for index, (record, label) in enumerate(islice(rows, limit))
        ]

    def _row(self, table: Table, record: dict[str, Any], label: Any, code: str, index: int, where: str) -> TextRow:
        texts = [record.get(column) for column in (table.text, table.pair) if column is not None]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{where!r} row {index}: {table.text!r} and {table.pair!r} must be text, got {texts!r}")
        return TextRow(
            text=str(texts[0]),
            language=code,
            text_pair=str(texts[1]) if table.pair is not None else None,
            label=None if label is None else self._label_index(label, where, index),
            id=str(record[table.id]) if table.id is not None else str(index),
        )

    def _label_index(self, label: Any, where: str, index: int) -> int:
        if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(self.labels):
            return label
        if isinstance(label, str) and label in self.labels:
            return self.labels.index(label)
        raise ValueError(f"{where!r} row {index}: label {label!r} is not one of {', '.join(self.labels)}")

    def _label_column(
        self, folder: Path | None, table: Table, content: list[dict[str, Any]], split: str, where: str, labelled: bool
    ) -> list[Any]:
        """The raw label of each row, None throughout for an unlabelled split that need not be labelled."""
        labels = [record.get(table.label) for record in content]
        if all(label is None for label in labels):
            tried = [folder / pattern.format(split=split) for pattern in self.label_files] if folder else []
            path = next((path for path in tried if path.is_file()), None)
            if path is not None:
                labels = [record.get(table.label) for record in records(path)]
                if len(labels) != len(content):
                    raise ValueError(f"{str(path)!r}: {len(labels)} labels for the {len(content)} rows of {where!r}")
            elif labelled:
                hint = f"; {' or '.join(map(str, tried))} could hold them" if tried else ""
                raise ValueError(f"split={split!r}: {where!r} has no labels (no column {table.label!r}){hint}")
        if labelled and None in labels:
            raise ValueError(f"split={split!r}: {where!r} row {labels.index(None)} has no label")
        return labels

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

    def _language_folder(self, source: str | Path, folder: Path, language: str) -> Path:
        path = folder / language
        if not path.is_dir():
            raise ValueError(
                f"language={language!r}: not in {str(source)!r}; nearest: {nearest(language, self.languages(source))}"
            )
        return path

    def _file(self, source: str | Path, folder: Path, language: str, split: str) -> Path:
        path = self._language_folder(source, folder, language)
        found = _split_files(path)
        if split not in found:
            raise ValueError(f"split={split!r}: {str(path)!r} has only {', '.join(found) or 'no data files'}")
        if len(found[split]) > 1:
            raise ValueError(f"split={split!r}: {' and '.join(map(str, found[split]))} could both be meant; keep one")
        return found[split][0]


# configurations of multilingual hub sets that are unions of the others
_UNIONS = ("all_languages", "all")


def _split_files(folder: Path) -> dict[str, list[Path]]:
    """Canonical split -> its files in a language's folder."""
    found = {}
    for split, aliases in SPLITS.items():
        paths = [folder / f"{alias}{ending}" for alias in aliases for ending in ENDINGS]
        if existing := [path for path in paths if path.is_file()]:
            found[split] = existing
    return found


def _labels_of(folder: Path, english: str, table: Table) -> tuple[str, ...]:
    listed = folder / "labels.txt"
    if listed.is_file():
        return tuple(line.strip() for line in listed.read_text(encoding="utf-8").split("\n") if line.strip())
    seen: set[str] = set()
    for paths in _split_files(folder / english).values():
        for record in records(paths[0], quoted=table.quoted):
            label = record.get(table.label)
            if isinstance(label, str):
                seen.add(label)
    if len(seen) < 2:
        raise ValueError(
            f"source={str(folder)!r}: no labels given, no labels.txt, "
            f"and fewer than two in the column {table.label!r} of {english!r}"
        )
    return tuple(sorted(seen))
