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
from typing import Any, TypeVar

from ..data.read import TextRow
from .tasks import SPLITS, Layout, Table, Task, canonical_split
from .tasks.files import ENDINGS, columns, records
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


def fields(row: TextRow) -> dict[str, str]:
    """The texts of a row by name: text, text_pair, choice1, choice2, ..."""
    pair = {} if row.text_pair is None else {"text_pair": row.text_pair}
    return {"text": row.text, **pair, **{f"choice{i}": text for i, text in enumerate(row.choices or (), 1)}}


def with_fields(row: TextRow, texts: Mapping[str, str], language: str) -> TextRow:
    """A row with its texts replaced by those of the same names."""
    return replace(
        row,
        text=texts["text"],
        language=language,
        text_pair=None if row.text_pair is None else texts["text_pair"],
        choices=None if row.choices is None else tuple(texts[f"choice{i + 1}"] for i in range(len(row.choices))),
    )


def has_translations(path: str | Path, task: Task, language: str, split: str = "test") -> bool:
    """Whether there is anything for a language and split. Raises ValueError for no such path and for damaged files."""
    return bool(_content(Path(path), task, language, canonical_split(split))[1])


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
    where, content = _content(Path(path), task, language, canonical_split(split))
    if not content:
        raise ValueError(f"translations={str(path)!r}: {where} holds none of {language!r}, {split!r}")
    if isinstance(content[0], TextRow):
        return _join_rows(where, content, rows, target)
    return _join_fields(where, content, rows, target)


def _content(path: Path, task: Task, language: str, split: str) -> tuple[str, list[Any]]:
    """Where the translations of a language and split stand, and they: records of fields, or TextRows."""
    path, named = path.expanduser(), False
    if path.is_dir():
        found = [item.path for item in find(path, _LAYOUTS, language) if item.split == split]
        named = bool(found)
        found = found or _unnamed(path)
        if named and len(found) > 1:
            raise ValueError(f"translations: {' and '.join(map(str, found))} could both be meant; keep one")
    elif path.is_file():
        found = [path]
    else:
        raise ValueError(f"translations={str(path)!r}: no such file or folder")
    where = str(found[0]) if len(found) == 1 else str(path)
    content: list[Any] = []
    for file in found:
        if "translation" in columns(file):
            content += _of(file, language, split)
        else:
            content += _rows(file, task, language, split, whole=named)
    return where, content


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


def _of(file: Path, language: str, split: str) -> list[dict[str, Any]]:
    """The records of one language and split; a file without such a column holds only that one."""
    state = file.stat()
    grouped = _grouped(file, state.st_mtime_ns, state.st_size)
    splits = (None, *SPLITS[split])
    return [record for code in (None, language) for name in splits for record in grouped.get((code, name), ())]


@lru_cache(maxsize=2)
def _grouped(file: Path, mtime_ns: int, size: int) -> dict[tuple[str | None, str | None], list[dict[str, Any]]]:
    """The records of a file by language and split: one file may hold hundreds, which are asked for one by one."""
    grouped: dict[tuple[str | None, str | None], list[dict[str, Any]]] = {}
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
        theirs = _by_name([row.id for row in rows], by_id)
        pairs = [(index, row) for index, row in enumerate(theirs) if row is not None]
        wanted = {row.id for row in rows}
        by, unused = "id", tuple(str(name) for name in by_id if name not in wanted)
        duplicates = _repeated([row.id for row in rows], by_id)
    joined = []
    for index, found in pairs:
        if found.label is not None and rows[index].label is not None and found.label != rows[index].label:
            raise ValueError(
                f"translations: {where} has the label {found.label} for row {rows[index].id!r}, the task has "
                f"{rows[index].label}: it translates other rows"
            )
        joined.append(with_fields(rows[index], fields(found), target))
    return _joined(where, joined, [index for index, _ in pairs], rows, unused, by, duplicates)


def _join_fields(where: str, content: Sequence[Mapping[str, Any]], rows: Sequence[TextRow], target: str) -> Joined:
    sourced: dict[tuple[str, str, str], str] = {}
    plain: dict[tuple[str, str], list[str]] = {}
    duplicates = 0
    for record in content:
        if record.get("id") is None or not isinstance(record.get("translation"), str):
            raise ValueError(f"translations: {where} holds a record without id or translation: {dict(record)!r}"[:300])
        name, field, source = (
            str(record["id"]),
            str(record.get("field") or "text"),
            record.get("source") or None,
        )  # a table has "" for none
        if source in (None, ""):  # a table has "" for none
            plain.setdefault((name, field), []).append(record["translation"])
        else:
            duplicates += (name, field, source) in sourced
            sourced.setdefault((name, field, source), record["translation"])
    asked = [(str(row.id), name) for row in rows for name in fields(row)]
    by_name = iter(_by_name(asked, plain))
    duplicates += _repeated(asked, plain)
    joined, indices = [], []
    for index, row in enumerate(rows):
        found: dict[str, str | None] = {}
        for name, text in fields(row).items():
            unsourced = next(by_name)
            found[name] = sourced.get((str(row.id), name, text), unsourced)
        texts = {name: text for name, text in found.items() if text is not None}
        if len(texts) == len(found):
            joined.append(with_fields(row, texts, target))
            indices.append(index)
    wanted = {str(row.id) for row in rows}
    names = (*(name for name, _, _ in sourced), *(name for name, _ in plain))
    unused = tuple(dict.fromkeys(name for name in names if name not in wanted))
    numbered = all(row.id == str(index) for index, row in enumerate(rows))
    if numbered and unused and not sourced and 0 < len(joined) < len(rows):
        raise ValueError(
            f"translations: {where} has the id {unused[0]!r}, but the rows have no ids and are numbered 0 to "
            f"{len(rows) - 1}: numbered otherwise, or of other rows"
        )
    return _joined(where, joined, indices, rows, unused, "id", duplicates)


Name = TypeVar("Name")
Found = TypeVar("Found")


def _by_name(names: Sequence[Name], found: Mapping[Name, Sequence[Found]]) -> list[Found | None]:
    """What each name stands for; None where that is not known.

    A name that several rows share needs as many translations, which are theirs in order: one cannot be that of two
    different texts. Of more than are needed for one row, the first is used.
    """
    times, seen = Counter(names), Counter[Name]()
    out: list[Found | None] = []
    for name in names:
        many = found.get(name, ())
        fits = len(many) == times[name] or (many and times[name] == 1)
        out.append(many[seen[name]] if fits else None)
        seen[name] += 1
    return out


def _repeated(names: Sequence[Name], found: Mapping[Name, Sequence[Found]]) -> int:
    """Translations beyond those that rows of their name ask for."""
    times = Counter(names)
    return sum(max(0, len(many) - max(times[name], 1)) for name, many in found.items())


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
