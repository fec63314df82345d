"""How the records of a set become text rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...data.read import TextRow
from .files import Record, columns, kind


@dataclass(frozen=True)
class Table:
    """How the files of a set are written.

    Fields:
        text: the column of the text, or several that are joined by a space (a passage and its question).
        pair: column of the second text, or None.
        choices: columns of the answers of a multiple-choice row.
        label: column of the label.
        id: column of the row's name, or several that are joined by "#"; None: the row number is the name.
        header: column names of a table that has no header line (the last ones may be absent), or None.
        quoted: csv quoting (see `files.records`).
        base: the integer that stands for the first class, or the first choice.
        language, split: columns that tell the rows of a file apart that holds several languages or splits.
        unlabelled: label values of rows that never got a label ("-" in MultiNLI); such rows are left out and counted.
        words: column -> what its values are read as, for text columns that hold a code ("cause") and not text.
    """

    text: str | tuple[str, ...] = "text"
    pair: str | None = None
    choices: tuple[str, ...] = ()
    label: str = "label"
    id: str | tuple[str, ...] | None = None
    header: tuple[str, ...] | None = None
    quoted: bool = True
    base: int = 0
    language: str | None = None
    split: str | None = None
    unlabelled: tuple[str | int, ...] = ()
    words: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def required(self) -> list[str]:
        """Columns without which a file is not this table; labels may stand elsewhere."""
        parts = [*_names(self.text), self.pair, *self.choices, *_names(self.id), self.language, self.split]
        return [column for column in parts if column is not None]

    def fits(self, path: Path) -> bool:
        if self.header is not None and kind(path) not in ("tsv", "csv"):
            return False
        present = columns(path, header=self.header, quoted=self.quoted)
        return all(column in present for column in self.required())

    def row(self, record: Record, label: int | None, code: str, index: int, where: str) -> TextRow:
        """One record as a row.

        Raises:
            ValueError: a column that should be text is not; a value that `words` does not know.
        """
        names = _names(self.text)
        pair = [self.pair] if self.pair is not None else []
        texts = [record[column] for column in (*names, *pair, *self.choices)]
        if not all(isinstance(text, str) for text in texts):
            column = next(c for c, text in zip((*names, *pair, *self.choices), texts) if not isinstance(text, str))
            raise ValueError(f"{where!r} row {index}: {column!r} must be text, got {record[column]!r}")
        parts = [self._word(column, text, where, index) for column, text in zip(names, texts)]
        ids = _names(self.id)
        return TextRow(
            text=" ".join(parts),
            language=code,
            text_pair=texts[len(names)] if pair else None,
            label=label,
            id="#".join(str(record[column]) for column in ids) if ids else str(index),
            choices=tuple(texts[len(names) + len(pair) :]) if self.choices else None,
        )

    def _word(self, column: str, text: str, where: str, index: int) -> str:
        known = self.words.get(column)
        if known is None:
            return text
        if text not in known:
            raise ValueError(f"{where!r} row {index}: {column!r} is {text!r}, expected one of {', '.join(known)}")
        return known[text]

    def index(self, value: object, labels: Sequence[str], choice: bool) -> int | None:
        """The class that a label value stands for; None where it is none of `labels`."""
        if isinstance(value, str):
            names = self.choices if choice else labels  # SuperGLUE's hub set names the column of the right choice
            if value in names:
                return names.index(value)
            if not value.strip().isdecimal():
                return None
            value = int(value)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not choice and not isinstance(value, bool) and all(n.removeprefix("-").isdecimal() for n in labels):
            return labels.index(str(value)) if str(value) in labels else None  # a name, not an index
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value - self.base < len(labels):
            return None
        return value - self.base


def _names(columns: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if columns is None else (columns,) if isinstance(columns, str) else columns
