"""Rows in windows: tokenised, equal ones once, sorted by length and cut into packs, by a background thread."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from ..data.batch import Batch, TokenizedRows
from ..data.layout import TokenizedSide
from ..data.pack import consecutive_packs
from ..data.read import TextRow, UnusableRow
from ..data.text_tokens import of_readable
from ..data.tokenise import StackTokenizer
from .texts import OnBadText

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Window:
    """Consecutive rows of a stream on the host, ready to run.

    Fields:
        index: of the window; start: of its first row in the stream.
        truncated: rows that were cut to the tokenizer's limit.
        place: (n,) which row of the batches, one after the other, is each row of the window; -1 for none.
    """

    index: int
    start: int
    ids: list[str | None]
    languages: list[str | None]
    truncated: int
    batches: list[Batch]
    place: NDArray[np.int64]

    def named(self, row: int) -> str:
        name = "" if self.ids[row] is None else f" (id {self.ids[row]!r})"
        return f"row {self.start + row}{name}"


@dataclass(frozen=True)
class WindowReader:
    """Makes the windows of a stream. Fields as in `Engine`; side: "mt" or "llm"; pin: page-lock the batches."""

    tokenizer: StackTokenizer
    side: str
    size: int
    max_tokens: int
    ahead: int
    pin: bool

    def read(
        self,
        rows: Iterable[TextRow | UnusableRow],
        on_bad_text: OnBadText,
        skip: Callable[[int], bool] | None = None,
    ) -> Iterator[Window]:
        """The windows in order, but those that `skip(index)` says to read past."""
        stream = iter(rows)
        index = -1

        def following() -> Window | None:
            nonlocal index
            while True:
                index += 1
                chunk = list(islice(stream, self.size))
                if not chunk:
                    return None
                if skip is None or not skip(index):
                    return self._window(index, chunk, on_bad_text)

        if self.ahead == 0:
            while (window := following()) is not None:
                yield window
            return
        # one worker: the rows are read and given out in order, whatever the timing
        with ThreadPoolExecutor(1, thread_name_prefix="mtllm-tokenise") as pool:
            waiting: deque[Future[Window | None]] = deque(pool.submit(following) for _ in range(self.ahead))
            while (window := waiting.popleft().result()) is not None:
                waiting.append(pool.submit(following))
                yield window

    def _window(self, index: int, rows: list[TextRow | UnusableRow], on_bad_text: OnBadText) -> Window:
        usable = [(k, row) for k, row in enumerate(rows) if isinstance(row, TextRow)]
        start = index * self.size
        side, bad = of_readable(
            [row for _, row in usable], lambda some: self.tokenizer.side(self.side, some, ends=False)
        )
        window = Window(
            index,
            start,
            [row.id for row in rows],
            [row.language for row in rows],
            side.truncated,
            [],
            np.full(len(rows), -1, np.int64),
        )
        if bad:
            first_bad = min(bad)
            named = f"{window.named(usable[first_bad][0])}: {bad[first_bad]}"
            if on_bad_text == "fail":
                raise ValueError(f"{named}; on_bad_text='nan' gives it a row of NaN")
            logger.warning("%d rows cannot be read; the first is %s", len(bad), named)
        places = np.array([k for at, (k, _) in enumerate(usable) if at not in bad], np.int64)
        lengths = np.array([len(tokens) for tokens in side.ids], np.int64)
        if len(empty := places[lengths == 0]):
            first_empty = window.named(int(empty[0]))
            if on_bad_text == "fail":
                raise ValueError(f"{first_empty}: its text has no token; on_bad_text='nan' gives it a row of NaN")
            logger.warning(
                "%d rows have no token, so there is nothing to read; the first is %s", len(empty), first_empty
            )
            kept = np.flatnonzero(lengths)
            spans = [side.spans[i] for i in kept] if side.spans else None
            beside = None if side.partners is None else [side.partners[i] for i in kept]
            side = TokenizedSide([side.ids[i] for i in kept], [], side.truncated, spans, beside)
            places = places[kept]
        if not len(places):
            return window
        first, inverse = _distinct(side)
        lengths = np.array(side.lengths)[first]
        choices = np.array([len(side.spans[i]) if side.spans else 0 for i in first])
        # rows of similar length share a pack, so that attention pads little where the backend has to pad
        order = np.lexsort((-lengths, choices))
        among = np.empty(len(order), np.int64)
        among[order] = np.arange(len(order))
        window.place[places] = among[inverse]
        tokenised = TokenizedRows({self.side: side}, [None] * len(places), [None] * len(places))
        costs = [(length,) for length in lengths[order].tolist()]
        for pack in consecutive_packs(costs, self.max_tokens, even=True, kinds=choices[order].tolist()):
            batch = tokenised.batch([first[order[k]] for k in pack], align=False)
            window.batches.append(batch.pin_memory() if self.pin else batch)
        return window


def _distinct(side: TokenizedSide) -> tuple[list[int], list[int]]:
    """(index of the first of each group of equal rows, group of every row)."""
    groups: dict[bytes, int] = {}
    first: list[int] = []
    inverse: list[int] = []
    for index, ids in enumerate(side.ids):
        key = ids.tobytes() if side.spans is None else ids.tobytes() + b"|" + side.spans[index].tobytes()
        if side.partners is not None:
            key = len(key).to_bytes(8, "little") + key + side.partners[index].tobytes()
        group = groups.setdefault(key, len(first))
        if group == len(first):
            first.append(index)
        inverse.append(group)
    return first, inverse
