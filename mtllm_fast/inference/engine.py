"""Encode and classify texts at the cost of their tokens.

Rows are read in windows. A window is tokenised, equal rows in it become one, and what is left is sorted by length and
cut into packs that fit a token budget; a background thread does that for the next window while the model runs this one.
Windows and packs depend on the rows and the options alone, so a run that goes on in the middle gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
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

from ..data.batch import Batch
from ..data.language import language_read, reads_language
from ..data.read import TextRow, UnusableRow
from ..models import MTLLM, segment_mean
from ..models.compile import compile_layers
from ..models.modes import evaluating
from ..models.readers import LLMReader
from .cpu_linear import fast_linear
from .device import check_device
from .progress import progress_bar
from .quantize import Quantization, check_quantization, quantize_layers
from .texts import Classified, OnBadText, check_on_bad_text, text_rows
from .windows import Window, WindowReader

Pooling = Literal["mean", "first", "last"]
POOLINGS: tuple[Pooling, ...] = ("mean", "first", "last")


@dataclass(frozen=True)
class EncodedWindow:
    """Consecutive rows of a stream, encoded."""

    index: int
    values: NDArray[np.float32]  # (n, D)
    ids: list[str | None]
    languages: list[str | None]
    truncated: int  # rows that were cut to the tokenizer's limit


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
        self.tokenizer = model.require_tokenizer()
        self.model = model.to(device) if device else model
        self.device = next(model.parameters()).device
        self.max_tokens = max_tokens or default_budget(model)
        self.window, self.ahead = window, ahead
        self.truncated = 0
        self.compiled = compile
        if merge_adapters or quantize:
            for part in model.bases.values():
                part.merge_adapter(keep=not quantize)
        if quantize:
            for part in model.bases.values():
                quantize_layers(part.layers_root, quantize)
        if compile:
            for part in model.bases.values():
                compile_layers(part.layers)

    def encoder_mean(self, rows: Iterable[TextRow]) -> Tensor:
        """Mean (E,), float32, over texts of their mean encoder states, without `model.shift`.

        The mean of English texts less that of a language's own is the `model.shift` that takes out what all texts of
        the language share; no text needs a label or a translation (per-language centring, arXiv 2004.05160).

        Raises:
            ValueError: the model reads through no encoder, or there are no texts.
        """
        reader = self.model.reader
        if isinstance(reader, LLMReader):
            raise ValueError("encoder_mean: reader='llm' reads through no encoder")

        def run(batch: Batch) -> Tensor:
            packed = batch.side("mt")
            return self.model.pool(self.model.encoder_states(packed), packed)

        before, self.model.shift = (self.model.shift, self.truncated), None
        try:
            parts = [window.values for window in self._windows(rows, run, reader.encoder.hidden_size, "fail")]
        finally:
            self.model.shift, self.truncated = before
        if not parts:
            raise ValueError("rows: no texts")
        return torch.from_numpy(np.concatenate(parts).mean(0, dtype=np.float64)).float().to(self.device)

    def unmerge_adapters(self) -> None:
        """Undo `merge_adapters`: the base weights are bit for bit what they were."""
        for part in self.model.bases.values():
            part.unmerge_adapter()

    def encode(
        self,
        texts: Iterable[str],
        languages: str | Iterable[str] | None = None,
        *,
        pooling: Pooling = "mean",
        normalize: bool = False,
        on_bad_text: OnBadText = "fail",
        progress: bool = False,
    ) -> NDArray[np.float32]:
        """Embeddings (N, D) float32 of texts, in their order.

        Args:
            texts: N texts; a generator will do.
            languages: one MT code for all, or one per text. Encoders with languages need them (for this release, None
                means English, with a FutureWarning); others ignore them, as a log line says once.
            pooling: "mean" of the last hidden states (what the stack is trained on), or its "first" or "last" row.
            normalize: scale every row to length 1.
            on_bad_text: what a text that is empty, has no token, is no str or cannot be read does: "fail", or a row of
                "nan".
            progress: show a bar on stderr.

        Raises:
            TypeError: `texts` is one str, or holds something that is none.
            ValueError: an empty text, an unknown language code, lists of different lengths, or a row whose numbers are
                not finite.
        """
        count, rows, good = text_rows(texts, self._languages(languages), on_bad_text)
        out = np.full((count, self.model.hidden_size), np.nan, np.float32)
        start = 0
        with progress_bar("encode", len(rows), progress) as advance:
            for part in self.encode_rows(rows, pooling=pooling, normalize=normalize, on_bad_text=on_bad_text):
                out[good[start : start + len(part)]] = part
                start += len(part)
                advance(len(part))
        return out

    def encode_rows(
        self,
        rows: Iterable[TextRow | UnusableRow],
        *,
        pooling: Pooling = "mean",
        normalize: bool = False,
        on_bad_text: OnBadText = "fail",
    ) -> Iterator[NDArray[np.float32]]:
        """Embeddings of a stream of rows (pairs too), a window (n, D) at a time, in order.

        An UnusableRow gives NaN. `on_bad_text` is for rows without a token: an empty text has none where the reader
        adds no special tokens.
        """
        windows = self.encode_windows(rows, pooling=pooling, normalize=normalize, on_bad_text=on_bad_text)
        return (window.values for window in windows)

    def encode_windows(
        self,
        rows: Iterable[TextRow | UnusableRow],
        *,
        pooling: Pooling = "mean",
        normalize: bool = False,
        on_bad_text: OnBadText = "fail",
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
        check_on_bad_text(on_bad_text)

        def pooled(batch: Batch) -> Tensor:
            packed = batch.side(self.model.side)
            states = self.model.states(packed)
            vectors = segment_mean(states, packed, pooling)
            return F.normalize(vectors.float(), dim=1) if normalize else vectors

        return self._windows(rows, pooled, self.model.hidden_size, on_bad_text, skip)

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
            texts: N texts with their `languages` (one MT code for all, or one per text; None for an encoder without
                languages), or N rows.
            on_bad_text: of an empty text, one without a token or what is none: "fail", or no label and probabilities of
                "nan".

        Raises:
            TypeError: `texts` is one str, holds something that is none, or has no languages.
            ValueError: the model has no head, its head scores choices, a bad text, or a row that is not finite.
        """
        plain: Any = texts
        if languages is None and not isinstance(texts, str):
            rest: Iterator[Any] = iter(texts)
            first = list(islice(rest, 1))
            plain = chain(first, rest)
            if not first or isinstance(first[0], TextRow):
                return self._logits(plain)
            if reads_language(self.tokenizer, self.model.side):
                raise TypeError("languages is missing: pass one MT code for all texts, or one per text")
        labels = self.model.config.labels
        if labels is None:
            kind = "no task head" if self.model.head is None else f"a {self.model.head.config.kind!r} head"
            raise ValueError(f"model: has {kind}; texts are classified by a classification head (`mtllm finetune`)")
        count, rows, good = text_rows(plain, self._languages(languages), on_bad_text)
        logits = torch.from_numpy(self._logits(rows, on_bad_text))
        probabilities = np.full((count, len(labels)), np.nan, np.float32)
        probabilities[good] = torch.softmax(logits, -1).numpy()
        names: list[str | None] = [None] * count
        for index in good:
            if not np.isnan(probabilities[index, 0]):
                names[index] = labels[int(probabilities[index].argmax())]
        return Classified(names, probabilities, tuple(labels))

    def _languages(self, given: str | Iterable[str] | None) -> str | Iterable[str] | None:
        return language_read(self.tokenizer, self.model.side, given, "languages")

    def _logits(self, rows: Iterable[TextRow], on_bad_text: OnBadText = "fail") -> NDArray[np.float32]:
        head = self.model.head
        if head is None:
            raise ValueError("model: has no task head; train one with `mtllm finetune` or `mtllm distill`")
        width = head.linear.out_features
        parts = [window.values for window in self._windows(rows, self.model.logits, width, on_bad_text)]
        width = max((part.shape[1] for part in parts), default=width)
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
        self,
        rows: Iterable[TextRow | UnusableRow],
        run: Callable[[Batch], Tensor],
        width: int,
        on_bad_text: OnBadText,
        skip: Callable[[int], bool] | None = None,
    ) -> Iterator[EncodedWindow]:
        pin = self.device.type == "cuda"
        reader = WindowReader(self.tokenizer, self.model.side, self.window, self.max_tokens, self.ahead, pin)
        for window in reader.read(rows, on_bad_text, skip):
            with evaluating(self.model):
                values = self._run(window, run, width)
            self._check_finite(window, values)
            self.truncated += window.truncated
            yield EncodedWindow(window.index, values, window.ids, window.languages, window.truncated)

    def _check_finite(self, window: Window, values: NDArray[np.float32]) -> None:
        # a choice that a row does not have scores -inf
        bad = np.flatnonzero((np.isnan(values) | np.isposinf(values)).any(1) | np.isneginf(values).all(1))
        if self.model.head is None or self.model.head.config.kind != "choice":
            bad = np.flatnonzero(~np.isfinite(values).all(1))
        bad = bad[window.place[bad] >= 0]
        if len(bad):
            raise ValueError(
                f"{window.named(int(bad[0]))}: the model gives NaN or infinite numbers for it"
                f"{f', and for {len(bad) - 1} more near it' if len(bad) > 1 else ''}; is its dtype wide enough?"
            )

    @torch.no_grad()
    def _run(self, window: Window, run: Callable[[Batch], Tensor], width: int) -> NDArray[np.float32]:
        # one copy to the host per window: until then the device is never waited for
        with nullcontext() if self.compiled else fast_linear(self.device):
            results = [run(batch.to(self.device, non_blocking=True)).float() for batch in window.batches]
        width = max((result.shape[1] for result in results), default=width)
        results = [F.pad(r, (0, width - r.shape[1]), value=-torch.inf) if r.shape[1] < width else r for r in results]
        if (window.place < 0).any():
            results.append(torch.full((1, width), torch.nan, device=self.device))  # what -1 means
        return torch.cat(results).cpu().numpy()[window.place]


def default_budget(model: MTLLM) -> int:
    """Tokens of one forward pass: enough to fill a GPU; on a CPU no more than its caches like (measured)."""
    if next(model.parameters()).device.type != "cpu":
        return 8192
    return min(max(2**19 // model.hidden_size, 512), 8192)


def _widened(part: NDArray[np.float32], width: int) -> NDArray[np.float32]:
    if part.shape[1] == width:
        return part
    return np.pad(part, ((0, 0), (0, width - part.shape[1])), constant_values=-np.inf)
