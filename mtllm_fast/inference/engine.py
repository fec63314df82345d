"""Encode and classify texts at the cost of their tokens: length-sorted windows, token-budget packs, order restored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..data.batch import Batch, tokenise_rows
from ..data.read import TextRow
from ..models import MTLLM


class Engine:
    """Packed inference.

    Args:
        model: an MTLLM with its tokenizer; put into eval mode.
        max_tokens: token budget of one forward pass.
        window: rows that are sorted and packed together; memory grows with it and not with the number of texts.
        device: where the model runs; None leaves it where it is.
    """

    def __init__(self, model: MTLLM, *, max_tokens: int = 8192, window: int = 2048, device: str | None = None) -> None:
        if model.tokenizer is None:
            raise ValueError("model: has no tokenizer; load it with MTLLM.from_pretrained or stack it from folders")
        if max_tokens < 1 or window < 1:
            raise ValueError(f"max_tokens={max_tokens}, window={window}: both must be >= 1")
        self.model = model.to(device) if device else model
        self.max_tokens, self.window = max_tokens, window
        self.device = next(model.parameters()).device
        self.truncated = 0

    def encode(
        self,
        texts: Sequence[str],
        languages: str | Sequence[str] = "eng_Latn",
        *,
        pooling: Literal["mean"] = "mean",
        normalize: bool = False,
    ) -> np.ndarray:
        """Embeddings (N, D) float32 of texts, in their order.

        Args:
            texts: N texts; languages: one MT code for all, or one per text.
            normalize: scale every row to length 1.

        Raises:
            ValueError: an empty text, an unknown language code, or lists of different lengths.
        """
        if pooling != "mean":
            raise ValueError(f"pooling={pooling!r}: the stack is trained on and supports 'mean'")
        if isinstance(texts, str):
            raise TypeError("texts: got one str; pass a list of texts")
        codes = [languages] * len(texts) if isinstance(languages, str) else list(languages)
        if len(codes) != len(texts):
            raise ValueError(f"languages: {len(codes)} codes for {len(texts)} texts")
        for index, text in enumerate(texts):
            if not text.strip():
                raise ValueError(f"texts[{index}] is empty")
        rows = [TextRow(text, code) for text, code in zip(texts, codes)]
        out = self._collect(self.encode_rows(rows), len(rows), self.model.hidden_size)
        if normalize:
            out /= np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-12)
        return out

    def encode_rows(self, rows: Iterable[TextRow]) -> Iterator[np.ndarray]:
        """Embeddings of a stream of rows (pairs too), a window (n, D) at a time, in order."""

        def pooled(batch: Batch) -> Tensor:
            packed = batch.mt if self.model.side == "mt" else batch.llm
            assert packed is not None
            return self.model.pool(self.model.states(packed), packed)

        return self._windows(rows, pooled)

    def classify(self, rows: Iterable[TextRow]) -> np.ndarray:
        """Task-head logits (N, C) float32 of rows, in their order. Raises ValueError where the model has no head."""
        head = self.model.head
        if head is None:
            raise ValueError("model: has no task head; train one with `mtllm finetune` or `mtllm distill`")
        windows = list(self._windows(rows, self.model.logits))
        return np.concatenate(windows) if windows else np.zeros((0, head.linear.out_features), np.float32)

    def _collect(self, windows: Iterator[np.ndarray], count: int, width: int) -> np.ndarray:
        out = np.empty((count, width), np.float32)
        start = 0
        for part in windows:
            out[start : start + len(part)] = part
            start += len(part)
        return out

    def _windows(self, rows: Iterable[TextRow], run: Callable[[Batch], Tensor]) -> Iterator[np.ndarray]:
        stream = iter(rows)
        while window := list(islice(stream, self.window)):
            yield self._run_window(window, run)

    @torch.no_grad()
    def _run_window(self, rows: list[TextRow], run: Callable[[Batch], Tensor]) -> np.ndarray:
        self.model.eval()
        tokenizer, name = self.model.tokenizer, self.model.side
        assert tokenizer is not None
        tokenised = tokenise_rows(rows, tokenizer, (name,))
        side = tokenised.sides[name]
        self.truncated += side.truncated
        lengths = [len(ids) for ids in side.ids]
        # rows of similar length share a pack, so that attention pads little where the backend has to pad
        order = sorted(range(len(rows)), key=lambda index: (-lengths[index], index))
        out: np.ndarray | None = None
        start = 0
        while start < len(order):
            stop, total = start, 0
            while stop < len(order) and (total + lengths[order[stop]] <= self.max_tokens or stop == start):
                total += lengths[order[stop]]
                stop += 1
            members = order[start:stop]
            result = run(tokenised.batch(members, align=False).to(self.device)).float().cpu().numpy()
            if out is None:
                out = np.empty((len(rows), *result.shape[1:]), np.float32)
            out[members] = result
            start = stop
        assert out is not None
        return out
