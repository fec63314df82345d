"""What the LLM of a stack reads: its own tokens around the projected encoder states of a text, packed.

    [before | text | boundary | after]      before and after in the LLM's tokens, text in the encoder's

`boundary` is a trained embedding, where the projection has one. MindMerger (arXiv 2405.17386) and LangBridge (arXiv
2401.10695) feed their LLMs this way, in training and generation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data.pack import PackedBatch
from ..data.prompt import NO_TOKEN, target_rows
from .llm import PackedLLM
from .readers import StackReader

if TYPE_CHECKING:
    from ..data.batch import Batch
    from .mtllm import MTLLM


@dataclass(frozen=True, eq=False)
class LLMInputs:
    """B sequences of T rows in all.

    Fields:
        batch: the packing; its ids are the LLM's own, 0 in rows of the text, the boundary and what is no token.
        embeds: (T, D) input embeddings.
        before_rows, text_rows, after_rows: int64 rows of `embeds`, in packed order. The state of row r - 1 predicts the
            token of row r, so `states[after_rows - 1]` are those of a loss on the tokens after the text.
    """

    batch: PackedBatch
    embeds: Tensor
    before_rows: Tensor
    text_rows: Tensor
    after_rows: Tensor


def compose(
    reader: StackReader, text: PackedBatch, before: PackedBatch | None = None, after: PackedBatch | None = None
) -> LLMInputs:
    """Put `before` and `after` around every text. Gradients reach whatever of the stack is trained.

    Args:
        text: B texts in the encoder's tokens.
        before, after: LLM tokens, B sequences or one for all texts; None for no tokens. `NO_TOKEN` may be among them.

    Raises:
        ValueError: another number of sequences.
    """
    count = text.num_sequences
    boundary = reader.projection.boundary
    ends = [boundary is not None] * count
    parts = (_lengths("before", before, count), text.lengths, ends, _lengths("after", after, count))
    lengths = np.stack(parts, 1).astype(np.int64)  # (B, 4)
    closing = _embedded(reader.llm, after)
    if boundary is not None:
        closing = _behind(boundary.to(reader.llm.model.dtype), closing)
    embeds = reader.projected(text, _embedded(reader.llm, before), closing)
    # the op puts as many rows around every text: of the rows that fill up a shorter `before` or `after` none is kept
    widths = lengths.copy()
    widths[:, [0, 3]] = lengths[:, [0, 3]].max(0)
    counts = widths.ravel()
    offset = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
    kept = offset < np.repeat(lengths.ravel(), counts)
    if not kept.all():
        embeds = embeds.index_select(0, torch.from_numpy(np.flatnonzero(kept)).to(embeds.device))
    part = np.repeat(np.tile(np.arange(4), count), counts)[kept]
    before_rows, text_rows, after_rows = (
        torch.from_numpy(np.flatnonzero(part == k)).to(text.device) for k in (0, 1, 3)
    )
    ids = torch.zeros(len(embeds), dtype=torch.int64, device=text.device)
    for tokens, rows in ((before, before_rows), (after, after_rows)):
        if tokens is not None:
            own = tokens.input_ids.masked_fill(tokens.input_ids == NO_TOKEN, 0)
            ids[rows] = own.repeat(count // tokens.num_sequences)
    return LLMInputs(PackedBatch.from_flat(ids, lengths.sum(1).tolist()), embeds, before_rows, text_rows, after_rows)


class Read(NamedTuple):
    """What the LLM read of texts and their targets.

    Fields:
        packed: the packing; states: (T, D) of its rows.
        rows: (N,) int64 packed rows whose states predict the target tokens, in the order of `batch.targets`.
    """

    packed: PackedBatch
    states: Tensor
    rows: Tensor


def read_with_targets(model: MTLLM, batch: Batch) -> Read:
    """The states of a stack, or of an LLM alone, on texts with a prompt around them and their targets after them.

    Args:
        batch: collated with a prompt.

    Raises:
        ValueError: a batch without targets, or a model without an LLM.
    """
    if batch.targets is None:
        raise ValueError("batch has no targets; collate it with prompt=Prompt(...)")
    if model.config.reader == "llm":
        packed = batch.side("llm")
        if batch.llm_rows is None:
            raise ValueError("batch has no 'llm' side with targets; collate it with sides=('llm',)")
        return Read(packed, model.states(packed), batch.llm_rows)
    stack = model.require_stack()
    inputs = compose(stack, batch.side("mt"), batch.before, batch.after)
    rows = torch.from_numpy(target_rows(inputs.batch.lengths, batch.targets.lengths)).to(inputs.embeds.device)
    return Read(inputs.batch, stack.llm(inputs.batch, embeds=inputs.embeds), rows)


def _behind(boundary: Tensor, after: Tensor | None) -> Tensor:
    """(1 + n, D), or (B, 1 + n, D): the boundary (D,) before what follows it."""
    if after is None:
        return boundary[None]
    return torch.cat([boundary.expand(*after.shape[:-2], 1, -1), after], -2)


def _lengths(name: str, tokens: PackedBatch | None, count: int) -> tuple[int, ...]:
    if tokens is None:
        return (0,) * count
    if tokens.num_sequences not in (1, count):
        raise ValueError(
            f"{name}: {tokens.num_sequences} sequences for {count} texts; give one for all, or one per text"
        )
    return tokens.lengths * (count // tokens.num_sequences)


def _embedded(llm: PackedLLM, tokens: PackedBatch | None) -> Tensor | None:
    """(n, D) of one sequence, (B, n, D) of several; zeros for `NO_TOKEN`."""
    if tokens is None or not tokens.num_tokens:
        return None
    none = tokens.input_ids == NO_TOKEN
    embeds = llm.model.get_input_embeddings()(tokens.input_ids.masked_fill(none, 0)).to(llm.model.dtype)
    embeds = embeds.masked_fill(none[:, None], 0.0)
    return embeds if tokens.num_sequences == 1 else tokens.pad_states(embeds)
