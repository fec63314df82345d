"""What is odd in a set, named and counted: blank texts, ids that occur twice, evaluation rows that stand in the
training split, languages without the split that is wanted."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...data.read import TextRow
from .base import Task, canonical_split

log = logging.getLogger(__name__)


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

    def summary(self) -> str:
        """E.g. "3 blank (25576, 25577, 25578), 1 also in train (41)"; "" where nothing is odd."""
        named = (("blank", self.blank), ("repeated ids", self.duplicate_ids), ("also in train", self.in_train))
        return ", ".join(f"{len(ids)} {name} ({_first(ids)})" for name, ids in named if ids)


@dataclass
class SourceIssues:
    """What is odd in a source.

    Fields:
        split: the split that was looked at.
        languages: the set's code -> what is odd in its rows; languages without issues are left out.
        without_split: languages that have other splits only.
        empty_folders: folders named like a language that hold no data file.
    """

    split: str
    languages: dict[str, RowIssues] = field(default_factory=dict)
    without_split: tuple[str, ...] = ()
    empty_folders: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """One line per finding."""
        out = [f"{code}: {issues.summary()}" for code, issues in self.languages.items()]
        if self.without_split:
            out.append(f"no {self.split} split: {len(self.without_split)} languages ({_first(self.without_split)})")
        if self.empty_folders:
            out.append(f"no data files: {len(self.empty_folders)} folders ({_first(self.empty_folders)})")
        return out


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
        blank=tuple(name for name, row in zip(names, rows) if not all(text.strip() for text in _texts(row))),
        duplicate_ids=tuple(name for name, count in counts.items() if count > 1),
        in_train=tuple(names[index] for index in overlap(rows, train_rows)),
    )


def check_source(
    task: Task, source: str | Path, split: str = "test", languages: Sequence[str] | None = None
) -> SourceIssues:
    """Look through the rows of every language (or of `languages`), and warn of what was found, once per kind.

    Raises:
        ValueError: as `task.rows`.
    """
    split = canonical_split(split)
    found = SourceIssues(split)
    missing = []
    for language in languages if languages is not None else task.languages(source):
        splits = task.splits(source, language)
        if split not in splits:
            missing.append(language)
            continue
        train = task.rows(source, language, "train") if split != "train" and "train" in splits else []
        if issues := check_rows(task.rows(source, language, split), train):
            found.languages[language] = issues
    found.without_split = tuple(missing)
    found.empty_folders = tuple(getattr(task, "empty_folders", lambda source: ())(source))
    for kind, what in (
        ("blank", "an empty text (kept)"),
        ("duplicate_ids", "an id that occurs more than once (kept)"),
        ("in_train", "a text that also stands in the training split (kept)"),
    ):
        counts = {code: len(getattr(issues, kind)) for code, issues in found.languages.items() if getattr(issues, kind)}
        if counts:
            which = ", ".join(f"{code} {count}" for code, count in list(counts.items())[:8])
            more = ", ..." if len(counts) > 8 else ""
            log.warning("%s %s: %d rows with %s: %s%s", source, split, sum(counts.values()), what, which, more)
    for names, what in (
        (found.without_split, f"languages without a {split} split"),
        (found.empty_folders, "empty folders"),
    ):
        if names:
            log.warning("%s: %d %s: %s", source, len(names), what, _first(names, 8))
    return found


def _texts(row: TextRow) -> tuple[str, ...]:
    return (row.text, *(() if row.text_pair is None else (row.text_pair,)), *(row.choices or ()))


def _key(row: TextRow) -> tuple[str, ...]:
    return tuple(text.strip() for text in _texts(row))


def _first(names: Sequence[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
