"""Rows to batches: tokenise, pack, align; and the stream of batches that a training run reads (by `loader`).

The unit of work is a window: consecutive rows, tokenised together and packed best-fit. Windows are made by
worker processes in any number, and turned into batches in order in the main process, so the batches of an epoch are a
function of the rows, the options, `seed` and `epoch` alone.
"""

import dataclasses
import logging
import random
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from mtllm_fast.data.balance import deal, pack_cost
from mtllm_fast.data.batch import SIDES, Batch, TokenizedRows, check_sides, tokenise_readable, tokenise_rows
from mtllm_fast.data.pack import token_budget_packs
from mtllm_fast.data.prompt import Prompt, Writing
from mtllm_fast.data.read import RowCounts, TextRow
from mtllm_fast.data.store import StoredRows, TokenStore
from mtllm_fast.data.tokenise import StackTokenizer

T = TypeVar("T")

_WINDOW_PACKS, _LEAST_ROWS, _MOST_ROWS = 64, 1024, 65536  # of a window, where its rows are not given

logger = logging.getLogger(__name__)
_SHOWN = 10  # bad rows of an epoch that are named in the log


def collate(
    rows: Sequence[TextRow],
    tokenizer: StackTokenizer,
    *,
    sides: Sequence[str] = SIDES,
    align: bool = True,
    prompt: Prompt | None = None,
) -> Batch:
    """All rows as one batch, in the order given.

    Args:
        rows: at least one row.
        sides: which of "mt" and "llm" to make.
        align: find the row pairs that end at the same character; needs both sides.
        prompt: what the LLM reads around a text and its target, where rows have targets that are to be written; the
            "llm" side is then all of it in the LLM's own tokens, and there are no other pairs.

    Raises:
        ValueError: no rows, an unknown side, rows of which only some have a label, or different numbers of choices.
    """
    rows = list(rows)
    if not rows:
        raise ValueError("rows must hold at least one TextRow, got none")
    sides = check_sides(sides, tokenizer)
    if prompt is None:
        return tokenise_rows(rows, tokenizer, sides).batch(range(len(rows)), align)
    return tokenise_rows(rows, tokenizer, sides, Writing(prompt)).batch(range(len(rows)), align=False)


@dataclass(frozen=True, eq=False)
class Window:
    """What a worker sends: tokenised rows and how they are packed; or the end of its stream; or an error."""

    index: int
    rows: TokenizedRows | StoredRows | None = None
    packs: tuple[tuple[int, ...], ...] = ()
    costs: tuple[float, ...] = ()
    fallbacks: Counter[str] = dataclasses.field(default_factory=Counter)
    source: RowCounts | None = None
    error: Exception | None = None
    bad: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, eq=False)
class _Pack:
    rows: TokenizedRows | StoredRows
    index: tuple[int, ...]
    cost: float
    weight: float = 1.0


@dataclass
class StreamCounts:
    """What has been read since the start of the epoch, over all ranks.

    Fields:
        windows, rows, packs: windows read, the rows in them, packs they went into.
        tokens: tokens per side.
        truncated: rows cut to the limit, per side.
        budget: tokens that the packs could have held on one side.
        fallbacks: rows per language code that was read as another one.
        unreadable: rows left out because a tokenizer fails on them.
        source: the reader's own counts (rows, empty, failed, reasons), where it has them.
    """

    windows: int = 0
    rows: int = 0
    packs: int = 0
    tokens: Counter[str] = dataclasses.field(default_factory=Counter)
    truncated: Counter[str] = dataclasses.field(default_factory=Counter)
    budget: int = 0
    fallbacks: Counter[str] = dataclasses.field(default_factory=Counter)
    unreadable: int = 0
    source: RowCounts | None = None

    @property
    def efficiency(self) -> float:
        """Share of the token budget that is filled, on the fuller side."""
        return max(self.tokens.values(), default=0) / self.budget if self.budget else 0.0

    def state(self) -> dict[str, Any]:
        """Plain data; the reader's counts are left out, since whoever goes on reads the rows before again."""
        data = {name: getattr(self, name) for name in ("windows", "rows", "packs", "budget", "unreadable")}
        return data | {name: dict(getattr(self, name)) for name in ("tokens", "truncated", "fallbacks")}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "StreamCounts":
        values: dict[str, Any] = {n: Counter(one) if isinstance(one, dict) else one for n, one in state.items()}
        return cls(**values)


class PackedDataset(IterableDataset):
    """Batches of packed rows, in an order that depends on `seed` and `epoch` but not on the number of workers.

    Iterate it directly, or through `PackedLoader` for worker processes.

    Args:
        rows: a re-iterable of TextRow, such as `read_rows(...)` or a list, or a TokenStore of rows tokenised before:
            the batches are the same, but every rank reads no more than its own.
        tokenizer: StackTokenizer.
        max_tokens: budget of one batch on each side; at least the tokenizer's limits, twice that of the MT side where
            texts are read with their partners.
        max_rows: at most so many rows in a batch.
        sides, align: as in `collate`.
        writing: how the rows' targets are written, where the student is to write them; then there is nothing to align.
        lookahead: rows of one window; more fills the packs better and mixes them further. None: as many as fill about
            64 packs, judged by the first rows, so that the last pack of a window, which is half empty on average,
            costs less than 1 % of the budget.
        shuffle_buffer: rows held for shuffling the stream; 0 keeps its order. Packs of a window are always shuffled,
            since packing sorts by length.
        seed, epoch: all randomness comes from these two.
        rank, world_size, accumulation: a step of training is `world_size * accumulation` consecutive batches, of which
            every rank gets `accumulation`, such that all have about the same to do. What is in a step depends on that
            product alone. The last step of an epoch is filled with batches of weight 0.
        start_batch: skip so many batches of this rank at the start: exact resumption. See `set_epoch` for how to skip
            without tokenising.

    Raises:
        ValueError, TypeError: naming the argument that does not fit. While iterating: whatever is wrong with a row.
    """

    def __init__(
        self,
        rows: Iterable[TextRow] | TokenStore,
        tokenizer: StackTokenizer,
        *,
        max_tokens: int = 4096,
        max_rows: int | None = None,
        sides: Sequence[str] = SIDES,
        align: bool = True,
        writing: Writing | None = None,
        lookahead: int | None = None,
        shuffle_buffer: int = 0,
        seed: int = 0,
        epoch: int = 0,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
        start_batch: int = 0,
    ) -> None:
        super().__init__()
        if isinstance(rows, Iterator):
            raise TypeError("rows must be re-iterable (a list, read_rows(...)), got an iterator, good for one epoch")
        self.sides = check_sides(sides, tokenizer)
        for side in self.sides:
            limit, what = tokenizer.mt_limit if side == "mt" else tokenizer.max_llm_tokens, f"max_{side}_tokens"
            if writing is not None:
                limit, what = limit + writing.longest(tokenizer), f"{what} with prompt and target,"
            if side == "mt" and tokenizer.partners:
                limit, what = 2 * limit, f"{what}, for a text and its translation together,"
            if max_tokens < limit:
                raise ValueError(
                    f"max_tokens {max_tokens} is below the tokenizer's {what} {limit}: "
                    "a row of that length would fit in no batch"
                )
        for name, value, least in (
            ("max_rows", max_rows, 1),
            ("lookahead", lookahead, 1),
            ("shuffle_buffer", shuffle_buffer, 0),
            ("seed", seed, 0),
            ("epoch", epoch, 0),
            ("world_size", world_size, 1),
            ("accumulation", accumulation, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, world_size {world_size}), got {rank}")
        if isinstance(rows, TokenStore):
            if writing is not None:
                raise ValueError("rows: a token store holds no targets; give the text")
            rows.check(tokenizer, self.sides)
        self.rows = rows
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.max_rows = max_rows
        self.align = align and writing is None
        self.writing = writing
        self.lookahead = lookahead
        self.shuffle_buffer = shuffle_buffer
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.accumulation = accumulation
        self.counters = StreamCounts()
        self.set_epoch(epoch, start_batch)

    def window_rows(self) -> int:
        """`lookahead`, or what it is by default; the first call may read and tokenise the first rows."""
        if self.lookahead is None:
            first = list(islice(self.rows, _LEAST_ROWS))
            packs = len(self._window(0, first).packs) if first else 0
            self.lookahead = min(max(_LEAST_ROWS, -(-len(first) * _WINDOW_PACKS // max(packs, 1))), _MOST_ROWS)
        return self.lookahead

    @property
    def step_size(self) -> int:
        """Batches of one step over all ranks."""
        return self.world_size * self.accumulation

    def size(self, packs: int) -> int:
        """Batches of each rank in an epoch of so many packs."""
        return -(-packs // self.step_size) * self.accumulation

    def _step_start(self, batch: int) -> int:
        """Packs of the epoch before the step that this rank's `batch` belongs to."""
        return batch // self.accumulation * self.step_size

    def set_epoch(self, epoch: int, start_batch: int = 0, after: dict[str, Any] | None = None) -> None:
        """Choose the epoch of the next pass, and how many of this rank's batches it skips.

        Args:
            after: what `read_before` gave for this epoch and a batch that is not later: the rows before are read, for
                their number and the shuffling, but neither tokenised nor packed. The batches are the same.

        Raises:
            ValueError: a negative number, or `after` lies behind `start_batch`.
        """
        if epoch < 0 or start_batch < 0:
            raise ValueError(f"epoch and start_batch must be at least 0, got {epoch} and {start_batch}")
        before = StreamCounts.from_state(after) if after else StreamCounts()
        if before.packs > self._step_start(start_batch):
            raise ValueError(
                f"after: {before.packs} packs lie behind start_batch {start_batch} of {self.world_size} ranks"
            )
        self.epoch = epoch
        self.start_batch = start_batch
        self.before = before
        self._starts = deque([before.state()], maxlen=256)

    def read_before(self, batch: int) -> dict[str, Any]:
        """Plain data: the counts at the start of the window in which this rank's `batch` of the latest pass begins, or
        of an earlier one. With them a later pass goes on there (see `set_epoch`)."""
        earlier = [state for state in self._starts if state["packs"] <= self._step_start(batch)]
        return earlier[-1] if earlier else StreamCounts().state()

    def __iter__(self) -> Iterator[Batch]:
        if get_worker_info() is not None:
            raise RuntimeError("a PackedDataset inside a DataLoader has no defined order: use PackedLoader")
        return self.batches(self.windows())

    def windows(self, worker: int = 0, workers: int = 1, first: int | None = None) -> Iterator[Window]:
        """Windows `first + worker`, `first + worker + workers`, ... of the epoch, then one that marks the end."""
        stream = _shuffled(self.rows, self.shuffle_buffer, f"{self.seed}/{self.epoch}")
        first = self.before.windows if first is None else first
        index = 0
        try:
            while chunk := list(islice(stream, self.window_rows())):
                if index >= first and (index - first) % workers == worker:
                    yield self._window(index, chunk)
                index += 1
        except (ValueError, TypeError, OSError) as error:
            # raised in a worker it would reach the user as a traceback of another process
            yield Window(index, error=error)
            return
        yield Window(-1, source=getattr(self.rows, "counts", None))

    def _window(self, index: int, chunk: list[Any]) -> Window:
        before = self.tokenizer.fallback_counts.copy()
        rows: TokenizedRows | StoredRows
        bad: list[tuple[str, str]] = []
        if isinstance(self.rows, TokenStore):
            rows = StoredRows(self.rows, np.array(chunk, dtype=np.int64), self.sides)
        else:
            rows, bad = tokenise_readable(chunk, self.tokenizer, self.sides, self.writing)
        costs = rows.costs()
        packs = token_budget_packs(costs, self.max_tokens, self.max_rows)
        order = np.random.default_rng([self.seed, self.epoch, index]).permutation(len(packs))
        return Window(
            index,
            rows,
            tuple(tuple(packs[i]) for i in order),
            tuple(pack_cost(costs, packs[i]) for i in order),
            self.tokenizer.fallback_counts - before,
            getattr(self.rows, "counts", None),
            bad=tuple(bad),
        )

    def batches(self, windows: Iterable[Window]) -> Iterator[Batch]:
        """This rank's batches; only here is the number of earlier packs known, and with it whose turn it is."""
        self.counters = StreamCounts.from_state(self.before.state())
        if isinstance(self.rows, TokenStore) and not self.before.windows:
            self.counters.truncated = Counter({side: self.rows.truncated[side] for side in self.sides})
        self._starts.clear()
        turn, start = self.counters.packs, self._step_start(self.start_batch)
        skip = self.start_batch % self.accumulation
        step: list[_Pack] = []
        for window in windows:
            if window.error is not None:
                raise window.error
            if window.source is not None:
                self.counters.source = window.source
            if window.rows is None:
                continue
            expected = self.counters.windows
            assert window.index == expected, f"window {window.index} arrived in place of {expected}"
            self._starts.append(self.counters.state())
            self._count(window, window.rows)
            for pack, cost in zip(window.packs, window.costs):
                if turn >= start:
                    step.append(_Pack(window.rows, pack, cost))
                if len(step) == self.step_size:
                    yield from self._own(step, skip)
                    step, skip = [], 0
                turn += 1
        if step:
            filler = dataclasses.replace(min(step, key=lambda pack: pack.cost), weight=0.0)
            yield from self._own(step + [filler] * (self.step_size - len(step)), skip)

    def _own(self, step: "list[_Pack]", skip: int) -> Iterator[Batch]:
        """This rank's batches of a step, but for its first `skip`."""
        shares = deal([pack.cost for pack in step], self.world_size)
        for place in shares[self.rank][skip:]:
            pack = step[place]
            batch = pack.rows.batch(pack.index, self.align)
            yield dataclasses.replace(batch, weight=pack.weight, place=place)

    def _count(self, window: Window, rows: TokenizedRows | StoredRows) -> None:
        counts = self.counters
        counts.windows += 1
        counts.rows += len(rows)
        counts.packs += len(window.packs)
        counts.budget += len(window.packs) * self.max_tokens
        counts.fallbacks.update(window.fallbacks)
        for name, reason in window.bad[: max(_SHOWN - counts.unreadable, 0)]:
            logger.warning("row %s is left out: %s", name, reason)
        counts.unreadable += len(window.bad)
        for name, (tokens, truncated) in rows.totals().items():
            counts.tokens[name] += tokens
            counts.truncated[name] += truncated


def _shuffled(rows: Iterable[T], size: int, seed: str) -> Iterator[T]:
    """The stream through a buffer of `size` rows from which a random one leaves whenever one enters."""
    if size == 0:
        yield from rows
        return
    rng = random.Random(seed)
    buffer: list[T] = []
    for row in rows:
        if len(buffer) < size:
            buffer.append(row)
            continue
        slot = rng.randrange(size)
        leaving, buffer[slot] = buffer[slot], row
        yield leaving
    rng.shuffle(buffer)
    yield from buffer
