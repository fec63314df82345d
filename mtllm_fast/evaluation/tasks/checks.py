"""What is odd in the rows of a set, named and counted: blank texts, ids that occur twice, evaluation rows that stand in
the training split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ...data.read import TextRow
from ...data.text_fields import has_blank, text_fields


@dataclass(frozen=True)
class RowIssues:
    """What is odd in some rows, as ids.

    Fields:
        rows: number of rows looked at.
        blank: rows with an empty text, second text or choice.
        duplicate_ids: ids that several rows share.
        in_train: rows whose texts also stand in the training split.
    """

    rows: int
    blank: tuple[str, ...] = ()
    duplicate_ids: tuple[str, ...] = ()
    in_train: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.blank or self.duplicate_ids or self.in_train)


def overlap(rows: Sequence[TextRow], train_rows: Iterable[TextRow]) -> list[int]:
    """Indices of rows whose texts (text, pair and choices, without outer white space) also stand in `train_rows`."""
    seen = {_key(row) for row in train_rows}
    return [index for index, row in enumerate(rows) if _key(row) in seen]


def check_rows(rows: Sequence[TextRow], train_rows: Iterable[TextRow] = ()) -> RowIssues:
    """What is odd in the rows of one language and split. Nothing is left out or changed."""
    names = [row.id if row.id is not None else str(index) for index, row in enumerate(rows)]
    counts = Counter(names)
    return RowIssues(
        rows=len(rows),
        blank=tuple(name for name, row in zip(names, rows) if has_blank(row)),
        duplicate_ids=tuple(name for name, count in counts.items() if count > 1),
        in_train=tuple(names[index] for index in overlap(rows, train_rows)),
    )


def _key(row: TextRow) -> tuple[str, ...]:
    return tuple(text.strip() for text in text_fields(row).values())
