"""Encode and classify texts at the cost of their tokens.

Rows are read in windows. A window is tokenised, equal rows in it become one, and what is left is sorted by length and
cut into packs that fit a token budget; a background thread does that for the next window while the model runs this one.
Windows and packs depend on the rows and the options alone, so a run that goes on in the middle gives the same numbers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..data.batch import Batch, TokenizedRows
from ..data.read import TextRow
from ..data.tokenise import TokenizedSide
from ..kernels import hidden_mse
from ..models import MTLLM
from ..models.adapters import AdaptedModel
from ..models.modes import evaluating
from .compile import compile_layers
from .cpu_linear import fast_linear
from .device import check_device
from .progress import progress_bar
from .quantize import Quantization, check_quantization, quantize_layers
from .texts import Classified, OnBadText, text_rows

Pooling = Literal["mean", "first", "last"]
POOLINGS: tuple[Pooling, ...] = ("mean", "first", "last")


@dataclass(frozen=True)
class EncodedWindow:
    """Consecutive rows of a stream, encoded."""

    index: int
    values: NDArray[np.float32]  # (n, D)
    ids: list[str | None]
    languages: list[str]
    truncated: int  # rows that were cut to the tokenizer's limit


@dataclass(frozen=True)
class _Prepared:
    """A window on the host, ready to run."""

    index: int
    ids: list[str | None]
    languages: list[str]
    truncated: int
    batches: list[Batch]
    place: NDArray[np.int64]  # (n,) which row of the batches, one after the other, is each row of the window


class Engine:
    """Packed inference.

    Args:
        model: an MTLLM with its tokenizer, or the folder or hub name of one. It runs in eval mode, and has its own mode
            between the windows and afterwards.
        max_tokens: token budget of one forward pass; None chooses it by device and width.
        window: rows that are sorted and packed together; memory grows with it and not with the number of texts.
        device: where the model runs; None leaves it where it is.
        ahead: windows that a background thread prepares in advance, reading the rows there; 0 prepares each in the
            calling thread when its turn comes.
        merge_adapters: add the active adapters into the base weights, in place, until `unmerge_adapters`.
        quantize: "int8" or "fp8" weights in the layers, by torchao; in place and for good, adapters merged.
        compile: run the layers through torch.compile; the first passes are then slow.

    Attributes:
        truncated: rows cut to the tokenizer's limit so far.

    Raises:
        ValueError: an argument that does not fit, or `quantize` without torchao; the model is then as it was.
    """

    def __init__(
        self,
        model: MTLLM | str | Path,
        *,
        max_tokens: int | None = None,
        window: int = 2048,
        device: str | None = None,
        ahead: int = 1,
        merge_adapters: bool = False,
        quantize: Quantization | None = None,
        compile: bool = False,
    ) -> None:
        for name, value, least in (("max_tokens", max_tokens, 1), ("window", window, 1), ("ahead", ahead, 0)):
            if value is not None and value < least:
                raise ValueError(f"{name}={value}: must be >= {least}")
        check_device(device, "device=")
        if quantize:
            check_quantization(quantize)
        if isinstance(model, str | Path):
            model = MTLLM.from_pretrained(model)
        if model.tokenizer is None:
            raise ValueError("model: has no tokenizer; load it with MTLLM.from_pretrained or stack it from folders")
        self.model = model.to(device) if device else model
        self.device = next(model.parameters()).device
        self.max_tokens = max_tokens or default_budget(model)
        self.window, self.ahead = window, ahead
        self.truncated = 0
        self.compiled = compile
        if merge_adapters or quantize:
            for part in self._parts():
                part.merge_adapter(keep=not quantize)
        if quantize:
            for part in self._parts():
                quantize_layers(part.layers_root, quantize)
        if compile:
            for part in self._parts():
                compile_layers(part.layers_root.layers)

    def _parts(self) -> list[AdaptedModel]:
        return [part for part in (self.model.encoder, self.model.llm) if part is not None]

    def unmerge_adapters(self) -> None:
        """Undo `merge_adapters`: the base weights are bit for bit what they were."""
        for part in self._parts():
            part.unmerge_adapter()

    def encode(
        self,
        texts: Iterable[str],
        languages: str | Iterable[str] = "eng_Latn",
        *,
        pooling: Pooling = "mean",
        normalize: bool = False,
        on_bad_text: OnBadText = "fail",
        progress: bool = False,
    ) -> NDArray[np.float32]:
        """Embeddings (N, D) float32 of texts, in their order.

        Args:
            texts: N texts; a generator will do.
            languages: one MT code for all, or one per text.
            pooling: "mean" of the last hidden states (what the stack is trained on), or its "first" or "last" row.
            normalize: scale every row to length 1.
            on_bad_text: what a text that is empty or no str does: "fail", or a row of "nan".
            progress: show a bar on stderr.

        Raises:
            TypeError: `texts` is one str, or holds something that is none.
            ValueError: an empty text, an unknown language code, lists of different lengths, or a row whose numbers are
                not finite.
        """
        count, rows, good = text_rows(texts, languages, on_bad_text)
        out = np.full((count, self.model.hidden_size), np.nan, np.float32)
        start = 0
        with progress_bar("encode", len(rows), progress) as advance:
            for part in self.encode_rows(rows, pooling=pooling, normalize=normalize):
                out[good[start : start + len(part)]] = part
                start += len(part)
                advance(len(part))
        return out

    def encode_rows(
        self, rows: Iterable[TextRow], *, pooling: Pooling = "mean", normalize: bool = False
    ) -> Iterator[NDArray[np.float32]]:
        """Embeddings of a stream of rows (pairs too), a window (n, D) at a time, in order."""
        return (window.values for window in self.encode_windows(rows, pooling=pooling, normalize=normalize))

    def encode_windows(
        self,
        rows: Iterable[TextRow],
        *,
        pooling: Pooling = "mean",
        normalize: bool = False,
        skip: Callable[[int], bool] | None = None,
    ) -> Iterator[EncodedWindow]:
        """As `encode_rows`, with the rows' names and languages.

        Args:
            skip: `skip(index)` says of window `index` that its rows are only to be read past.

        Raises:
            ValueError: an unknown pooling; while iterating, whatever is wrong with a row.
        """
        if pooling not in POOLINGS:
            raise ValueError(f"pooling={pooling!r}: expected one of {', '.join(POOLINGS)}")

        def pooled(batch: Batch) -> Tensor:
            packed = batch.mt if self.model.side == "mt" else batch.llm
            assert packed is not None
            states = self.model.states(packed)
            vectors = (
                self.model.pool(states, packed)
                if pooling == "mean"
                else hidden_mse.segment_mean(states, packed.cu_seqlens, pooling=pooling)
            )
            return F.normalize(vectors.float(), dim=1) if normalize else vectors

        return self._windows(rows, pooled, skip)

    @overload
    def classify(self, texts: Iterable[TextRow]) -> NDArray[np.float32]: ...

    @overload
    def classify(
        self, texts: Iterable[str], languages: str | Iterable[str], *, on_bad_text: OnBadText = "fail"
    ) -> Classified: ...

    def classify(
        self,
        texts: Iterable[TextRow] | Iterable[str],
        languages: str | Iterable[str] | None = None,
        *,
        on_bad_text: OnBadText = "fail",
    ) -> NDArray[np.float32] | Classified:
        """Classes of texts, in their order: names and probabilities; of rows (no `languages`): logits (N, C) float32.

        Args:
            texts: N texts with their `languages` (one MT code for all, or one per text), or N rows.
            on_bad_text: of an empty text or what is none: "fail", or no label and probabilities of "nan".

        Raises:
            TypeError: `texts` is one str, holds something that is none, or has no languages.
            ValueError: the model has no head, its head scores choices, a bad text, or a row that is not finite.
        """
        if languages is None:
            rest: Iterator[Any] = iter(texts)
            first = list(islice(rest, 1))
            if first and not isinstance(first[0], TextRow):
                raise TypeError("languages is missing: pass one MT code for all texts, or one per text")
            return self._logits(chain(first, rest))
        labels = self.model.config.labels
        if labels is None:
            kind = "no task head" if self.model.head is None else f"a {self.model.head.config.kind!r} head"
            raise ValueError(f"model: has {kind}; texts are classified by a classification head (`mtllm finetune`)")
        plain: Any = texts
        count, rows, good = text_rows(plain, languages, on_bad_text)
        logits = torch.from_numpy(self._logits(rows))
        probabilities = np.full((count, len(labels)), np.nan, np.float32)
        probabilities[good] = torch.softmax(logits, -1).numpy()
        names: list[str | None] = [None] * count
        for index in good:
            names[index] = labels[int(probabilities[index].argmax())]
        return Classified(names, probabilities, tuple(labels))

    def _logits(self, rows: Iterable[TextRow]) -> NDArray[np.float32]:
        head = self.model.head
        if head is None:
            raise ValueError("model: has no task head; train one with `mtllm finetune` or `mtllm distill`")
        parts = [window.values for window in self._windows(rows, self.model.logits)]
        width = max((part.shape[1] for part in parts), default=head.linear.out_features)
        return np.concatenate([np.zeros((0, width), np.float32), *(_widened(part, width) for part in parts)])

    def score_choices(self, rows: Iterable[TextRow]) -> NDArray[np.float32]:
        """Scores (N, C) float32 of multiple-choice rows, in their order; the highest is the model's answer.

        Rows may differ in how many choices they have: C is the largest number, and missing choices score -inf.

        Raises:
            ValueError: the model's head scores no choices, or a row has none.
        """
        head = self.model.head
        if head is None or head.config.kind != "choice":
            kind = "no task head" if head is None else f"a {head.config.kind!r} head"
            raise ValueError(f"model: has {kind}, choices are scored by a 'choice' head")

        def checked() -> Iterator[TextRow]:
            for index, row in enumerate(rows):
                if not row.choices:
                    raise ValueError(f"rows[{index}] has no choices")
                yield row

        return self.classify(checked())

    def _windows(
        self, rows: Iterable[TextRow], run: Callable[[Batch], Tensor], skip: Callable[[int], bool] | None = None
    ) -> Iterator[EncodedWindow]:
        for window in self._prepared(rows, skip):
            with evaluating(self.model):
                values = self._run(window, run)
            self._check_finite(window, values)
            self.truncated += window.truncated
            yield EncodedWindow(window.index, values, window.ids, window.languages, window.truncated)

    def _check_finite(self, window: _Prepared, values: NDArray[np.float32]) -> None:
        # a choice that a row does not have scores -inf
        bad = np.flatnonzero((np.isnan(values) | np.isposinf(values)).any(1) | np.isneginf(values).all(1))
        if self.model.head is None or self.model.head.config.kind != "choice":
            bad = np.flatnonzero(~np.isfinite(values).all(1))
        if len(bad):
            first = int(bad[0])
            name = "" if window.ids[first] is None else f" (id {window.ids[first]!r})"
            raise ValueError(
                f"row {window.index * self.window + first}{name}: the model gives NaN or infinite numbers for it"
                f"{f', and for {len(bad) - 1} more near it' if len(bad) > 1 else ''}; is its dtype wide enough?"
            )

    def _prepared(self, rows: Iterable[TextRow], skip: Callable[[int], bool] | None) -> Iterator[_Prepared]:
        """The windows of a stream, prepared in order by one background thread."""
        stream = iter(rows)
        index = -1

        def following() -> _Prepared | None:
            nonlocal index
            while True:
                index += 1
                chunk = list(islice(stream, self.window))
                if not chunk:
                    return None
                if skip is None or not skip(index):
                    return self._prepare(index, chunk)

        if self.ahead == 0:
            while (prepared := following()) is not None:
                yield prepared
            return
        # one worker: the rows are read and given out in order, whatever the timing
        with ThreadPoolExecutor(1, thread_name_prefix="mtllm-tokenise") as pool:
            waiting: deque[Future[_Prepared | None]] = deque(pool.submit(following) for _ in range(self.ahead))
            while (prepared := waiting.popleft().result()) is not None:
                waiting.append(pool.submit(following))
                yield prepared

    def _prepare(self, index: int, rows: list[TextRow]) -> _Prepared:
        tokenizer, name = self.model.tokenizer, self.model.side
        assert tokenizer is not None
        side = (tokenizer.mt_side if name == "mt" else tokenizer.llm_side)(rows, ends=False)
        first, inverse = _distinct(side)
        lengths = np.array([len(side.ids[i]) for i in first])
        choices = np.array([len(side.spans[i]) if side.spans else 0 for i in first])
        # rows of similar length share a pack, so that attention pads little where the backend has to pad
        order = np.lexsort((-lengths, choices))
        place = np.empty(len(order), np.int64)
        place[order] = np.arange(len(order))
        tokenised = TokenizedRows({name: side}, [None] * len(rows), [None] * len(rows))
        batches = [
            tokenised.batch([first[k] for k in pack], align=False)
            for pack in _packs(order.tolist(), lengths.tolist(), choices.tolist(), self.max_tokens)
        ]
        if self.device.type == "cuda":
            batches = [batch.pin_memory() for batch in batches]
        return _Prepared(
            index, [row.id for row in rows], [row.language for row in rows], side.truncated, batches, place[inverse]
        )

    @torch.no_grad()
    def _run(self, window: _Prepared, run: Callable[[Batch], Tensor]) -> NDArray[np.float32]:
        # one copy to the host per window: until then the device is never waited for
        with nullcontext() if self.compiled else fast_linear(self.device):
            results = [run(batch.to(self.device, non_blocking=True)).float() for batch in window.batches]
        width = max(result.shape[1] for result in results)
        results = [F.pad(r, (0, width - r.shape[1]), value=-torch.inf) if r.shape[1] < width else r for r in results]
        return torch.cat(results).cpu().numpy()[window.place]


def default_budget(model: MTLLM) -> int:
    """Tokens of one forward pass: enough to fill a GPU; on a CPU no more than its caches like (measured)."""
    if next(model.parameters()).device.type != "cpu":
        return 8192
    return min(max(2**19 // model.hidden_size, 512), 8192)


def _distinct(side: TokenizedSide) -> tuple[list[int], list[int]]:
    """(index of the first of each group of equal rows, group of every row)."""
    groups: dict[bytes, int] = {}
    first: list[int] = []
    inverse: list[int] = []
    for index, ids in enumerate(side.ids):
        key = ids.tobytes() if side.spans is None else ids.tobytes() + b"|" + side.spans[index].tobytes()
        group = groups.setdefault(key, len(first))
        if group == len(first):
            first.append(index)
        inverse.append(group)
    return first, inverse


def _packs(order: list[int], lengths: list[int], choices: list[int], max_tokens: int) -> Iterator[list[int]]:
    """Cut `order` into packs of about equal size within the budget, and where the number of choices changes."""
    tokens = sum(lengths)
    share = -(-tokens // -(-tokens // max_tokens))  # no small pack at the end, and few different sizes
    pack: list[int] = []
    total = 0
    for k in order:
        if pack and (total >= share or total + lengths[k] > max_tokens or choices[k] != choices[pack[0]]):
            yield pack
            pack, total = [], 0
        pack.append(k)
        total += lengths[k]
    yield pack


def _widened(part: NDArray[np.float32], width: int) -> NDArray[np.float32]:
    if part.shape[1] == width:
        return part
    return np.pad(part, ((0, 0), (0, width - part.shape[1])), constant_values=-np.inf)
