"""The rows of a task, read once, with what is wrong or odd about them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..data.read import TextRow
from ..data.text_fields import text_fields
from ..inference.translate import Source
from .tasks import RowIssues, Task, check_rows
from .translations import has_translations, join_translations

SAMPLE_SEED = 0


def sample(rows: Sequence[TextRow], limit: int | None, seed: int = SAMPLE_SEED) -> list[int]:
    """Positions of at most `limit` rows, drawn at random and in their order; all without a limit.

    Every id has its own place in a random order (for ids that occur again: with its number), and the first `limit` are
    taken. So rows with one id are drawn alike in all languages, in whatever order they stand, and the rows of a smaller
    limit are among those of a larger one.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: expected a positive number of rows")
    if limit is None or limit >= len(rows):
        return list(range(len(rows)))
    seen: Counter[str | None] = Counter()
    places = []
    for index, row in enumerate(rows):
        name = f"{seed} {seen[row.id]} {row.id}"
        seen[row.id] += 1
        places.append((hashlib.sha256(name.encode()).digest(), index))
    return sorted(index for _, index in sorted(places)[:limit])


def task_sources(
    task: Task,
    source: str | Path,
    languages: Sequence[str],
    codes: Mapping[str, str],
    split: str = "test",
    limit: int | None = None,
) -> Iterator[Source]:
    """Every text of a task's rows, or of those that an evaluation with that `limit` draws, to be translated.

    `codes`: the set's code -> MT code.
    """
    for language in languages:
        rows = task.rows(source, language, split, labelled=False)
        for row in (rows[index] for index in sample(rows, limit)):
            for name, text in text_fields(row).items():
                yield Source(text, codes[language], str(row.id), language, split, name)


class TaskRows:
    """Labelled rows of one split, by language. A language that cannot be read is a problem, not an end."""

    def __init__(self, task: Task, source: str | Path, split: str, limit: int | None) -> None:
        sample((), limit)  # a limit out of range
        self.task, self.source, self.split, self.limit = task, source, split, limit
        self.available = task.languages(source)
        self._all: dict[str, list[TextRow]] = {}
        self._sampled: dict[str, list[int]] = {}
        self._rows: dict[str, list[TextRow]] = {}
        self._problems: dict[str, str] = {}
        self._unlabelled: dict[str, list[TextRow]] = {}
        self._translated: dict[str, tuple[list[TextRow], dict[str, int]] | None] = {}
        self._places: dict[str, list[int]] = {}  # of the translated rows among the rows

    def problem(self, language: str) -> str:
        """Why a language cannot be read: no such split, or what is wrong in its file. "" if it can."""
        if language not in self._rows and language not in self._problems:
            splits = self.task.splits(self.source, language)
            if self.split not in splits:
                self._problems[language] = f"no {self.split} split"
                return self._problems[language]
            try:
                self._all[language] = rows = self.task.rows(self.source, language, self.split)
                self._sampled[language] = sample(rows, self.limit)
                self._rows[language] = [rows[index] for index in self._sampled[language]]
            except ValueError as error:
                self._problems[language] = str(error)
        return self._problems.get(language, "")

    def rows(self, language: str) -> list[TextRow]:
        """Its rows. Raises ValueError where there is a problem."""
        if problem := self.problem(language):
            raise ValueError(problem)
        return self._rows[language]

    def unlabelled(self, language: str, count: int) -> list[TextRow]:
        """`count` rows of its training split, their labels unread.

        English rows are drawn from one end of a random order by id, those of other languages from the other end: with
        twice as many rows in the split, no English row is the translation of one of theirs.

        Raises:
            ValueError: the split is not there, is damaged, or has fewer rows.
        """
        if language not in self._unlabelled:
            if "train" not in self.task.splits(self.source, language):
                raise ValueError(f"centre={count}: {language!r} has no train split to take unlabelled text from")
            rows = self.task.rows(self.source, language, "train", labelled=False)
            if (rest := len(rows) - count) < 0:
                raise ValueError(f"centre={count}: the train split of {language!r} has {len(rows)} rows")
            if language == self.task.english:
                left_out = set(sample(rows, rest)) if rest else set()
                self._unlabelled[language] = [row for index, row in enumerate(rows) if index not in left_out]
            else:
                self._unlabelled[language] = [rows[index] for index in sample(rows, count)]
        return self._unlabelled[language]

    def available_rows(self, language: str) -> int:
        """How many rows it has, those outside of `limit` included; 0 where there is a problem."""
        return 0 if self.problem(language) else len(self._all[language])

    def translated(self, language: str, path: str | Path, target: str) -> tuple[list[TextRow], dict[str, int]] | None:
        """Its rows with their texts from existing translations, and what was counted in joining them; None without any.

        Raises:
            ValueError: there are translations for it, but none that joins a row.
        """
        if language not in self._translated:
            if not has_translations(path, self.task, language, self.split):
                self._translated[language] = None
                return None
            rows, sampled = self._all[language], set(self._sampled[language])
            joined = join_translations(path, self.task, rows, language=language, split=self.split, target=target)
            kept = [row for index, row in zip(joined.indices, joined.rows, strict=True) if index in sampled]
            own = {index: place for place, index in enumerate(self._sampled[language])}
            self._places[language] = [own[index] for index in joined.indices if index in own]
            if not kept:
                raise ValueError(
                    f"translations={str(path)!r}: those of {language!r} belong to none of the {len(sampled)} rows that "
                    f"limit={self.limit} draws from {len(rows)}"
                )
            counts = {**joined.counts(), "missing": len(sampled) - len(kept)}
            counts = {f"translations_{name}": n for name, n in counts.items() if n and name != "joined"}
            self._translated[language] = (kept, counts)
        return self._translated[language]

    def with_partners(self, language: str, path: str | Path, target: str) -> tuple[list[TextRow], dict[str, int]]:
        """Its rows, those that have an existing translation with it as their `teacher_text` (and `teacher_pair`), and
        what was counted.

        Raises:
            ValueError: as `translated`; rows with choices, which have no partner.
        """
        rows = list(self.rows(language))
        found = self.translated(language, path, target)
        if found is None:
            return rows, {"translations_missing": len(rows)}
        for place, translation in zip(self._places[language], found[0], strict=True):
            rows[place] = replace(rows[place], teacher_text=translation.text, teacher_pair=translation.text_pair)
            rows[place].for_teacher()
        return rows, found[1]

    def check_translations(self, languages: Sequence[str], path: str | Path, target: str) -> None:
        """Join all of them, before any model is loaded.

        Raises:
            ValueError: translations that join no row, or none for any language that is not the target itself.
        """
        foreign = [code for code in languages if not self.problem(code) and self.rows(code)[0].language != target]
        joined = [self.translated(code, path, target) for code in foreign]
        if foreign and not any(joined):
            raise ValueError(
                f"translations={str(path)!r}: holds none of the {len(foreign)} languages ({', '.join(foreign[:5])}"
                f"{', ...' if len(foreign) > 5 else ''}), {self.split!r}"
            )

    def issues(self, languages: Sequence[str]) -> list[str]:
        """What is odd in the rows of these languages, counted, one line per kind. Local sources are compared with their
        training split too."""
        issues: dict[str, RowIssues] = {}
        local = Path(self.source).is_dir()
        for language in languages:
            if self.problem(language):
                continue
            train: list[TextRow] = []
            if local and self.split != "train" and "train" in self.task.splits(self.source, language):
                try:
                    train = self.task.rows(self.source, language, "train", labelled=False)
                except ValueError:
                    train = []  # a damaged training split does not concern the rows that are scored
            if odd := check_rows(self.rows(language), train):
                issues[language] = odd
        lines = []
        for kind, what in (
            ("blank", "with an empty text (scored all the same)"),
            ("duplicate_ids", "with an id that occurs more than once (kept)"),
            ("in_train", "whose text also stands in the training split of the same language (kept)"),
        ):
            counts = {code: len(ids) for code, odd in issues.items() if (ids := getattr(odd, kind))}
            if counts:
                which = ", ".join(f"{code} {count}" for code, count in counts.items())
                lines.append(f"{sum(counts.values())} rows {what}: {which}")
        unreadable = {code: problem for code, problem in self._problems.items() if code in languages}
        lines += [f"{code} left out: {problem}" for code, problem in unreadable.items()]
        empty: list[str] = getattr(self.task, "empty_folders", lambda source: [])(self.source)
        if empty:
            lines.append(f"{len(empty)} folders named like a language hold no data file: {', '.join(empty)}")
        return lines + [f"{code}: {self.task.notes[code]}" for code in languages if code in self.task.notes]
