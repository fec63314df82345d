"""The rows of a task, read once, with what is wrong or odd about them."""

from __future__ import annotations

from pathlib import Path

from ..data.read import TextRow
from .tasks import RowIssues, Task, check_rows
from .translations import has_translations, join_translations


class TaskRows:
    """Labelled rows of one split, by language. A language that cannot be read is a problem, not an end."""

    def __init__(self, task: Task, source: str | Path, split: str, limit: int | None) -> None:
        if limit is not None and limit < 1:
            raise ValueError(f"limit={limit}: expected a positive number of rows")
        self.task, self.source, self.split, self.limit = task, source, split, limit
        self.available = task.languages(source)
        self._rows: dict[str, list[TextRow]] = {}
        self._problems: dict[str, str] = {}
        self._translated: dict[str, tuple[list[TextRow], dict[str, int]] | str] = {}

    def problem(self, language: str) -> str:
        """Why a language cannot be read: no such split, or what is wrong in its file. "" if it can."""
        if language not in self._rows and language not in self._problems:
            splits = self.task.splits(self.source, language)
            if self.split not in splits:
                self._problems[language] = f"no {self.split} split"
                return self._problems[language]
            try:
                self._rows[language] = self.task.rows(self.source, language, self.split, limit=self.limit)
            except ValueError as error:
                self._problems[language] = str(error)
        return self._problems.get(language, "")

    def rows(self, language: str) -> list[TextRow]:
        """Its rows. Raises ValueError where there is a problem."""
        if problem := self.problem(language):
            raise ValueError(problem)
        return self._rows[language]

    def translated(self, language: str, path: str | Path, target: str) -> tuple[list[TextRow], dict[str, int]] | str:
        """Its rows with their texts from existing translations, and what was counted in joining them; or why not."""
        if language not in self._translated:
            try:
                joined = join_translations(
                    path, self.task, self.rows(language), language=language, split=self.split, target=target
                )
            except ValueError as error:
                known = has_translations(path, self.task, language, self.split)
                self._translated[language] = str(error) if known else "no translations"
            else:
                counts = {f"translations_{name}": n for name, n in joined.counts().items() if n and name != "joined"}
                self._translated[language] = (joined.rows, counts)
        return self._translated[language]

    def issues(self, languages: list[str]) -> list[str]:
        """What is odd in the rows of these languages, counted, one line per kind. Local sources are compared with their
        training split too."""
        found: dict[str, RowIssues] = {}
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
            if issues := check_rows(self.rows(language), train):
                found[language] = issues
        lines = []
        for kind, what in (
            ("blank", "with an empty text (scored all the same)"),
            ("duplicate_ids", "with an id that occurs more than once (kept)"),
            ("in_train", "whose text also stands in the training split of the same language (kept)"),
        ):
            counts = {code: len(getattr(one, kind)) for code, one in found.items() if getattr(one, kind)}
            if counts:
                which = ", ".join(f"{code} {count}" for code, count in counts.items())
                lines.append(f"{sum(counts.values())} rows {what}: {which}")
        unreadable = {code: problem for code, problem in self._problems.items() if code in languages}
        lines += [f"{code} left out: {problem}" for code, problem in unreadable.items()]
        empty: list[str] = getattr(self.task, "empty_folders", lambda source: [])(self.source)
        if empty:
            lines.append(f"{len(empty)} folders named like a language hold no data file: {', '.join(empty)}")
        return lines + [f"{code}: {self.task.notes[code]}" for code in languages if code in self.task.notes]
