"""How an evaluation is done, whatever it compares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import get_args

from ..data.prompt import Prompt
from ..inference.respond import Decoding
from .cells import CellStore
from .rows import TaskRows
from .scorers import check_codes
from .statistics import RESAMPLES
from .systems import Dtype
from .tasks import Task, nearest

PROBE_ROWS = 20_000


@dataclass(frozen=True, eq=False)
class Settings:
    """The arguments of `evaluate` (see there) but for the models.

    Raises:
        ValueError: a value out of range, a `language_map` of languages that the source does not have, or a `centre`
            without English text for it.
    """

    task: Task
    source: str | Path
    split: str = "test"
    limit: int | None = None
    language_map: Mapping[str, str] = field(default_factory=dict)
    probe_source: str | Path | None = None
    probe_rows: int = PROBE_ROWS
    alignment: bool = False
    centre: int = 0
    prompt: Prompt | None = None
    max_new_tokens: int = Decoding.max_new_tokens
    resamples: int = RESAMPLES
    max_tokens: int | None = None
    device: str | None = None
    dtype: Dtype | None = None
    store: CellStore | None = None

    def __post_init__(self) -> None:
        if (self.max_tokens is not None and self.max_tokens < 1) or self.probe_rows < 2 or self.resamples < 1:
            raise ValueError(
                f"max_tokens={self.max_tokens}, probe_rows={self.probe_rows}, resamples={self.resamples}: expected at "
                "least 1, 2 and 1"
            )
        if self.dtype not in (None, *get_args(Dtype)):
            raise ValueError(f"dtype={self.dtype!r}: expected one of {', '.join(get_args(Dtype))}")
        if self.centre < 0:
            raise ValueError(f"centre={self.centre}: expected a number of texts, 0 for none")
        if self.task.kind == "generated":
            self.decoding  # noqa: B018
        check_codes(self.language_map, self.data.available, None)
        if self.centre:
            self.data.unlabelled(self.task.english, self.centre)

    @property
    def decoding(self) -> Decoding:
        """How answers are written. Raises ValueError for a number of tokens out of range."""
        return Decoding(self.max_new_tokens, max_tokens=self.max_tokens or Decoding.max_tokens)

    @cached_property
    def data(self) -> TaskRows:
        """The rows, read when they are first asked for."""
        return TaskRows(self.task, self.source, self.split, self.limit)

    def choose(self, languages: str | Sequence[str]) -> list[str]:
        """The languages asked for. Those that are named one by one must be there, and readable.

        Raises:
            ValueError: none, one that the source does not have, or one that cannot be read.
        """
        available = self.data.available
        if languages == "all":
            return list(available)
        names = [name.strip() for name in languages.split(",")] if isinstance(languages, str) else list(languages)
        names = [name for name in dict.fromkeys(names) if name]
        if not names:
            raise ValueError("languages: none given; name some of the set's codes, or 'all'")
        for name in names:
            if name not in available:
                raise ValueError(f"languages: {name!r} is not in this source; nearest are {nearest(name, available)}")
        for name in names:
            splits = self.task.splits(self.source, name)
            if self.split not in splits:
                present = ", ".join(splits) or "nothing"
                raise ValueError(f"split={self.split!r}: {str(self.source)!r} has only {present} for {name!r}")
            if problem := self.data.problem(name):
                raise ValueError(problem)
        return names
