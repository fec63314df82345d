"""Translations that exist already, joined to the rows of a task: translate-test without running an MT model.

Two formats are read. *Fields*, as `mtllm translate --task` writes them: one record per text, with the columns id,
language (the set's code), field ("text", "text_pair", "choice1", ...), translation, and where they are known source and
split; without a field column, every record is a "text". *Rows*: the task's own columns in the target language, as the
authors of MT-LLM published them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from ..data.read import TextRow
from ..data.text_fields import text_fields, with_text_fields
from .tasks import SPLITS, Layout, Table, Task, canonical_split
from .tasks.files import ENDINGS, Record, columns, records
from .tasks.layout import find

_LAYOUTS = (Layout(), Layout("{language}_{split}"), Layout("{language}-{split}"), Layout("{split}/{language}"))


@dataclass(frozen=True)
class Joined:
    """Rows of a task in another language.

    Fields:
        rows: translated rows with the ids and labels of the task's rows, in their order.
        indices: position of each among the rows that were asked for.
        missing: ids of rows without a translation, or whose text is not the one that was translated, or whose id is
            that of several rows and of another number of translations.
        unused: ids of translations that belong to no row.
        by: "id", or "row" where the translations have no ids and were joined by their number.
        duplicates: translations whose id was there before; the first one is used.
    """

    rows: list[TextRow]
    indices: list[int]
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    by: str
    duplicates: int = 0

    def counts(self) -> dict[str, int]:
        return {
            "joined": len(self.rows),
            "missing": len(self.missing),
            "unused": len(self.unused),
            "duplicates": self.duplicates,
        }


def has_translations(path: str | Path, task: Task, language: str, split: str = "test") -> bool:
    """Whether there is anything for a language and split. Raises ValueError for no such path and for damaged files."""
    _, records, rows = _content(Path(path), task, language, canonical_split(split))
    return bool(records or rows)


def join_translations(
    path: str | Path,
    task: Task,
    rows: Sequence[TextRow],
    *,
    language: str,
    split: str = "test",
    target: str = "eng_Latn",
) -> Joined:
    """The rows of one language and split with their texts from `path`.

    Args:
        path: a parquet, jsonl, csv or tsv file, or a folder with `<language>/<split>`, `<language>_<split>` or
            `<split>/<language>` files, in one of the formats above. Files of a folder with other names need a column
            language, unless there is only one.
        rows: from `task.rows`.
        language: the set's code.
        target: MT code of the language of the translations.

    Raises:
        ValueError: nothing at `path` for this language and split, a format that is neither, no translation that joins,
            labels that differ from the rows', another number of rows where there are no ids, or one of several files
            that does not say its language. It names the file.
    """
    where, records, translated = _content(Path(path), task, language, canonical_split(split))
    if not (records or translated):
        raise ValueError(f"translations={str(path)!r}: {where} holds none of {language!r}, {split!r}")
    if translated:
        return _join_rows(where, translated, rows, target)
    return _join_fields(where, records, rows, target)


def _content(path: Path, task: Task, language: str, split: str) -> tuple[str, list[Record], list[TextRow]]:
    """Where the translations of a language and split stand, and they: records of fields, or rows."""
    path, named = path.expanduser(), False
    if path.is_dir():
        files = [item.path for item in find(path, _LAYOUTS, language) if item.split == split]
        named = bool(files)
        files = files or _unnamed(path)
        if named and len(files) > 1:
            raise ValueError(f"translations: {' and '.join(map(str, files))} could both be meant; keep one")
    elif path.is_file():
        files = [path]
    else:
        raise ValueError(f"translations={str(path)!r}: no such file or folder")
    where = str(files[0]) if len(files) == 1 else str(path)
    of_fields, rows = [], []
    for file in files:
        if "translation" in columns(file):
            of_fields += _records(file, language, split)
        else:
            rows += _rows(file, task, language, split, whole=named)
    return where, of_fields, rows


def _unnamed(folder: Path) -> list[Path]:
    """The files whose records say what they are; not those that are named after some language and split."""
    files = [item for item in sorted(folder.iterdir()) if item.is_file() and item.name.endswith(ENDINGS)]
    mute = [file for file in files if "language" not in columns(file)]
    of_others = {item.path for item in find(folder, _LAYOUTS)}
    for file in mute if len(files) > 1 else ():
        if file not in of_others:
            raise ValueError(
                f"translations: {file} stands beside others and does not say its language; name it "
                "<language>_<split>, or give it a column language"
            )
    return [file for file in files if not (file in mute and file in of_others)]


def _records(file: Path, language: str, split: str) -> list[Record]:
    """The records of one language and split; a file without such a column holds only that one."""
    state = file.stat()
    grouped = _grouped(file, state.st_mtime_ns, state.st_size)
    splits = (None, *SPLITS[split])
    return [record for code in (None, language) for name in splits for record in grouped.get((code, name), ())]


@lru_cache(maxsize=2)
def _grouped(file: Path, mtime_ns: int, size: int) -> dict[tuple[str | None, str | None], list[Record]]:
    """The records of a file by language and split: one file may hold hundreds, which are asked for one by one."""
    grouped: dict[tuple[str | None, str | None], list[Record]] = {}
    for record in records(file):
        grouped.setdefault((record.get("language"), record.get("split")), []).append(record)
    return grouped


def _rows(file: Path, task: Task, language: str, split: str, *, whole: bool) -> list[TextRow]:
    tables: Sequence[Table] = getattr(task, "tables", ())
    table = next((table for table in tables if table.fits(file)), None)
    if table is None:
        wanted = " or ".join("+".join(table.required()) for table in tables)
        raise ValueError(
            f"translations={str(file)!r}: has the columns {', '.join(columns(file))}, expected id+translation "
            f"or those of the task {task.name!r} ({wanted})"
        )
    content = list(records(file, header=table.header, quoted=table.quoted))
    if not whole:
        content = [
            record
            for record in content
            if record.get("language", language) == language and record.get("split", split) in SPLITS[split]
        ]
    out = []
    for index, record in enumerate(content):
        value = record.get(table.label)
        label = None if value is None else table.index(value, task.labels, task.kind == "choice")
        row = table.row(record, label, "", index, str(file))
        out.append(row if table.id is not None else replace(row, id=None))
    return out


def _join_rows(where: str, translated: Sequence[TextRow], rows: Sequence[TextRow], target: str) -> Joined:
    unused: tuple[str, ...] = ()
    if any(row.id is None for row in translated):
        if len(translated) != len(rows):
            raise ValueError(
                f"translations: {where} has no ids and {len(translated)} rows: cannot be joined to {len(rows)} rows"
            )
        pairs: list[tuple[int, TextRow]] = list(enumerate(translated))
        by, duplicates = "row", 0
    else:
        by_id: dict[str | None, list[TextRow]] = {}
        for row in translated:
            by_id.setdefault(row.id, []).append(row)
        ids = [row.id for row in rows]
        wanted = set(ids)
        pairs = [(index, row) for index, row in enumerate(_by_name(ids, by_id)) if row is not None]
        by, duplicates = "id", _repeated(ids, by_id)
        unused = tuple(str(name) for name in by_id if name not in wanted)
    joined = []
    for index, translation in pairs:
        row = rows[index]
        if translation.label is not None and row.label is not None and translation.label != row.label:
            raise ValueError(
                f"translations: {where} has the label {translation.label} for row {row.id!r}, the task has "
                f"{row.label}: it translates other rows"
            )
        joined.append(with_text_fields(row, text_fields(translation), target))
    return _joined(where, joined, [index for index, _ in pairs], rows, unused, by, duplicates)


def _join_fields(where: str, content: Sequence[Record], rows: Sequence[TextRow], target: str) -> Joined:
    sourced: dict[tuple[str, str, str], str] = {}
    plain: dict[tuple[str, str], list[str]] = {}
    duplicates = 0
    for record in content:
        if record.get("id") is None or not isinstance(record.get("translation"), str):
            raise ValueError(f"translations: {where} holds a record without id or translation: {dict(record)!r}"[:300])
        name, field = str(record["id"]), str(record.get("field") or "text")
        if source := record.get("source"):  # a table has "" for none
            duplicates += (name, field, source) in sourced
            sourced.setdefault((name, field, source), record["translation"])
        else:
            plain.setdefault((name, field), []).append(record["translation"])
    asked = [(str(row.id), name) for row in rows for name in text_fields(row)]
    by_name = iter(_by_name(asked, plain))
    duplicates += _repeated(asked, plain)
    joined, indices = [], []
    for index, row in enumerate(rows):
        names, texts = text_fields(row), {}
        for name, text in names.items():
            unsourced = next(by_name)
            if (translation := sourced.get((str(row.id), name, text), unsourced)) is not None:
                texts[name] = translation
        if len(texts) == len(names):
            joined.append(with_text_fields(row, texts, target))
            indices.append(index)
    wanted = {str(row.id) for row in rows}
    ids = (*(name for name, _, _ in sourced), *(name for name, _ in plain))
    unused = tuple(dict.fromkeys(name for name in ids if name not in wanted))
    numbered = all(row.id == str(index) for index, row in enumerate(rows))
    if numbered and unused and not sourced and 0 < len(joined) < len(rows):
        raise ValueError(
            f"translations: {where} has the id {unused[0]!r}, but the rows have no ids and are numbered 0 to "
            f"{len(rows) - 1}: numbered otherwise, or of other rows"
        )
    return _joined(where, joined, indices, rows, unused, "id", duplicates)


Name = TypeVar("Name")
Value = TypeVar("Value")


def _by_name(names: Sequence[Name], values: Mapping[Name, Sequence[Value]]) -> list[Value | None]:
    """What each name stands for; None where that is not known.

    A name that several rows share needs as many translations, which are theirs in order: one cannot be that of two
    different texts. Of more than are needed for one row, the first is used.
    """
    times, seen = Counter(names), Counter[Name]()
    out: list[Value | None] = []
    for name in names:
        many = values.get(name, ())
        fits = len(many) == times[name] or (many and times[name] == 1)
        out.append(many[seen[name]] if fits else None)
        seen[name] += 1
    return out


def _repeated(names: Sequence[Name], values: Mapping[Name, Sequence[Value]]) -> int:
    """Translations beyond those that rows of their name ask for."""
    times = Counter(names)
    return sum(max(0, len(many) - max(times[name], 1)) for name, many in values.items())


def _joined(
    where: str,
    joined: list[TextRow],
    indices: list[int],
    rows: Sequence[TextRow],
    unused: tuple[str, ...],
    by: str,
    duplicates: int,
) -> Joined:
    if not joined:
        ids = ", ".join(str(row.id) for row in rows[:3])
        raise ValueError(
            f"translations: none in {where} belongs to a row (ids {ids}, ...): other ids, or other source texts"
        )
    there = set(indices)
    missing = tuple(str(row.id) for index, row in enumerate(rows) if index not in there)
    return Joined(joined, indices, missing, unused, by, duplicates)
