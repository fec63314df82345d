"""A start for the projection: least squares from encoder states to the LLM's embeddings of the same characters."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import torch
from torch import Tensor, nn

from ..data.collate import collate
from ..data.read import TextRow
from ..models import MTLLM

CHUNK = 256


@torch.no_grad()
def fit_projection(student: MTLLM, rows: Iterable[TextRow], count: int, *, ridge: float = 1e-3) -> float:
    """Set a linear projection so that projected states come near the LLM's own embeddings of the same characters.

    Minimises `mean |W x + b - e|^2 + ridge * |W|^2` over the row pairs that end at the same character, where x (E,) is
    the encoder's state and e (D,) the LLM's input embedding; solved from E x E sums in float64: memory does not grow.

    Args:
        student: a stack with a linear projection and a tokenizer.
        rows: texts; the first `count` are used.

    Returns:
        The share of the embeddings' variance that the projection explains, 0 to 1.

    Raises:
        ValueError: the projection is not linear, or no row pair ends at the same character.
    """
    projection = student.projection.layers if student.projection is not None else None
    if not isinstance(projection, nn.Linear):
        raise ValueError(
            "init_rows: least squares fits a linear projection; use projection.kind='linear' or init_rows=0"
        )
    assert student.encoder is not None and student.llm is not None and student.tokenizer is not None
    embeddings = student.llm.model.get_input_embeddings()
    device = projection.weight.device
    student.eval()
    totals: list[Tensor] = []
    pairs = 0
    stream = iter(islice(rows, count))
    while chunk := list(islice(stream, CHUNK)):
        batch = collate(chunk, student.tokenizer, sides=("mt", "llm"), align=True).to(device)
        assert (
            batch.mt is not None and batch.llm is not None and batch.mt_rows is not None and batch.llm_rows is not None
        )
        x = student.encoder(batch.mt)[batch.mt_rows].double()  # (P, E)
        e = embeddings(batch.llm.input_ids[batch.llm_rows]).double()  # (P, D)
        sums = [x.sum(0), e.sum(0), x.T @ x, x.T @ e, e.square().sum()]
        totals = [total + part for total, part in zip(totals, sums)] if totals else sums
        pairs += len(x)
    student.train()
    if pairs == 0:
        raise ValueError(
            f"init_rows={count}: no tokens of the two sides end at the same character; give more rows or 0"
        )
    mean_x, mean_e, xx, xe, ee = (total / pairs for total in totals)
    covariance = xx - torch.outer(mean_x, mean_x)
    cross = xe - torch.outer(mean_x, mean_e)
    damped = covariance + ridge * torch.eye(len(mean_x), dtype=torch.float64, device=device)
    solution = torch.linalg.solve(damped, cross)  # (E, D)
    projection.weight.copy_(solution.T)
    if projection.bias is not None:
        projection.bias.copy_(mean_e - mean_x @ solution)
    variance = ee - mean_e.square().sum()
    left = variance - 2 * (solution * cross).sum() + (solution * (covariance @ solution)).sum()
    return float(1 - left / variance)
