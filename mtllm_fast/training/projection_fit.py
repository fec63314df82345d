"""A start for the projection: projected encoder states pick out the LLM's own embedding of the same characters."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.collate import collate
from ..data.read import TextRow
from ..models import MTLLM

CHUNK = 256


def fit_projection(
    student: MTLLM,
    rows: Iterable[TextRow],
    count: int,
    *,
    steps: int = 150,
    max_pairs: int = 20_000,
    penalty: float = 1e-4,
) -> float:
    """Set a linear projection by a softmax regression from encoder states to the LLM's tokens.

    With x (E,) an encoder state and t the LLM token that ends at the same character, it minimises the cross-entropy of
    `softmax((W x + b) . e_v)` at t over the tokens v that occur, every token type weighing the same, plus
    `penalty / 2 * |W|^2`; e_v are the LLM's centred embeddings at length 1. The result is scaled to the embeddings'
    length. A least-squares fit explains more of the English embeddings, but by directions that are English only.

    Args:
        student: a stack with a linear projection and a tokenizer.
        rows: texts; the first `count` are read, and at most `max_pairs` aligned tokens of them used.

    Returns:
        The share of these tokens that the projected states pick out, 0 to 1.

    Raises:
        ValueError: the projection is not linear, or no tokens of the two sides end at the same character.
    """
    projection = student.projection.layers if student.projection is not None else None
    if not isinstance(projection, nn.Linear):
        raise ValueError(
            "init_rows: only a linear projection can be fitted; use projection.kind='linear' or init_rows=0"
        )
    assert student.llm is not None
    states, tokens = _pairs(student, islice(rows, count), max_pairs)
    if len(tokens) == 0:
        raise ValueError(
            f"init_rows={count}: no tokens of the two sides end at the same character; give more rows or 0"
        )
    types, target, frequency = tokens.unique(return_inverse=True, return_counts=True)
    table = student.llm.model.get_input_embeddings().weight.detach()[types].float()
    centre = table.mean(0)
    directions = F.normalize(table - centre, dim=-1)  # (V', D)
    share = 1 / frequency.float()[target]
    share = share / share.sum()
    weight = torch.zeros(projection.weight.shape, device=states.device, requires_grad=True)
    bias = torch.zeros(projection.weight.shape[0], device=states.device, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=0.02)
    with torch.enable_grad():
        for _ in range(steps):
            logits = (states @ weight.T + bias) @ directions.T
            loss = (
                share * F.cross_entropy(logits, target, reduction="none")
            ).sum() + penalty / 2 * weight.square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        projected = states @ weight.T + bias
        found = (projected @ directions.T).argmax(-1) == target
        scale = (table - centre).norm(dim=-1).mean() / projected.norm(dim=-1).mean()
        projection.weight.copy_(scale * weight)
        if projection.bias is not None:
            projection.bias.copy_(scale * bias + centre)
    return float(found.float().mean())


@torch.no_grad()
def _pairs(student: MTLLM, rows: Iterable[TextRow], limit: int) -> tuple[Tensor, Tensor]:
    """Encoder states (P, E) float32 and the LLM tokens (P,) that end at the same characters."""
    assert student.encoder is not None and student.projection is not None and student.tokenizer is not None
    device = next(student.projection.parameters()).device
    states, tokens, stream, total = [], [], iter(rows), 0
    student.encoder.eval()
    while total < limit and (chunk := list(islice(stream, CHUNK))):
        batch = collate(chunk, student.tokenizer, sides=("mt", "llm"), align=True).to(device)
        assert (
            batch.mt is not None and batch.llm is not None and batch.mt_rows is not None and batch.llm_rows is not None
        )
        states.append(student.encoder(batch.mt)[batch.mt_rows].float())
        tokens.append(batch.llm.input_ids[batch.llm_rows])
        total += len(tokens[-1])
    student.train()
    if not total:
        return torch.zeros(0, 1), torch.zeros(0, dtype=torch.long)
    return torch.cat(states)[:limit], torch.cat(tokens)[:limit]
