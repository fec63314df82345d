"""A start for the projection, fitted on tokens of the two sides that end at the same character."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.collate import collate
from ..data.read import TextRow
from ..models import MTLLM

InitKind = Literal["none", "ridge", "softmax"]

CHUNK = 256
HELD_OUT = 0.2  # share of the pairs, the last ones, that the ridge penalty is chosen on
# ridge penalties that are tried, over the mean variance of an encoder dimension times the pairs
PENALTIES = tuple(10.0**power for power in torch.arange(-6, 2.01, 0.5).tolist())
LEAST_PAIRS = 10
MOST_PAIRS = {"ridge": 100_000, "softmax": 20_000}


@dataclass(frozen=True)
class ProjectionFit:
    """What a fit found.

    score: softmax: share of the tokens that the projected states pick out; ridge: R² on the held-out pairs, about the
        mean embedding.
    penalty: of the ridge, relative as in `PENALTIES`.
    """

    kind: str
    pairs: int
    score: float
    penalty: float | None = None


def fit_projection(student: MTLLM, rows: Iterable[TextRow], kind: InitKind, count: int) -> ProjectionFit:
    """Fit the linear projection of `student` by "ridge" (`fit_ridge`) or "softmax" (`fit_softmax`), in place.

    Args:
        student: a stack with a linear projection and a tokenizer.
        rows: texts; the first `count` are read, and at most `MOST_PAIRS` aligned tokens of them used.

    Raises:
        ValueError: the projection is not linear, or too few tokens of the two sides end at the same character.
    """
    projection = student.projection.layers if student.projection is not None else None
    if not isinstance(projection, nn.Linear):
        raise ValueError(f"init={kind!r}: only a linear projection can be fitted; use projection.kind='linear'")
    states, tokens = _pairs(student, islice(rows, count), MOST_PAIRS[kind])
    if len(tokens) < LEAST_PAIRS:
        raise ValueError(
            f"init_rows={count}: {len(tokens)} tokens of the two sides end at the same character, a fit needs at least "
            f"{LEAST_PAIRS}; give more rows or init='none'"
        )
    embedding = student.require_llm().model.get_input_embeddings()
    if kind == "softmax":
        return fit_softmax(projection, states, tokens, embedding.weight.detach())
    return fit_ridge(projection, states, tokens, embedding)


@torch.no_grad()
def fit_ridge(projection: nn.Linear, states: Tensor, tokens: Tensor, embedding: nn.Module) -> ProjectionFit:
    """Ridge regression from encoder states to the LLM's input embeddings, in closed form.

    W minimises `|X W^T + b - Y|^2 + penalty * trace(X^T X) / E * |W|^2`, b is free. The penalty is the one of
    `PENALTIES` that explains most of the held-out pairs; W is then fitted on all pairs, and scaled about the mean so
    that the projected states spread as the embeddings do: a regression that explains a share R² of them gives vectors
    that much shorter, and the LLM, whose layers add to what they are given, then hears them too softly.

    Args:
        projection: set in place. states: (P, E) float32. tokens: (P,) int64.
        embedding: gives the input embeddings (P, D) of tokens, as the LLM's layers receive them.
    """
    bias = projection.bias is not None
    held = max(int(HELD_OUT * len(tokens)), 1)
    fit, check = slice(0, len(tokens) - held), slice(len(tokens) - held, None)
    means = _means(states[fit], tokens[fit], embedding, bias)
    values, basis, cross, _ = _eigen(states[fit], tokens[fit], embedding, means)
    gram_h, cross_h, total_h = _products(states[check], tokens[check], embedding, means)
    gram_h, cross_h = basis.T @ gram_h @ basis, basis.T @ cross_h
    unexplained = []
    for penalty in PENALTIES:
        weight = cross / (values + penalty * values.mean())[:, None]
        unexplained.append(float(total_h - 2 * (weight * cross_h).sum() + (weight * (gram_h @ weight)).sum()))
    best = min(range(len(PENALTIES)), key=unexplained.__getitem__)
    means = _means(states, tokens, embedding, bias)
    values, basis, cross, total = _eigen(states, tokens, embedding, means)
    weight = cross / (values + PENALTIES[best] * values.mean())[:, None]
    spread = (values[:, None] * weight.square()).sum()  # |X W^T|^2
    weight = basis @ weight * (total / spread).sqrt() if spread > 0 else basis @ weight  # (E, D)
    projection.weight.copy_(weight.T)
    if bias:
        projection.bias.copy_(means[1] - means[0] @ weight)
    return ProjectionFit("ridge", len(tokens), 1 - unexplained[best] / float(total_h), PENALTIES[best])


def _means(states: Tensor, tokens: Tensor, embedding: nn.Module, bias: bool) -> tuple[Tensor, Tensor]:
    """Means (E,) and (D,), float64, of the two sides; zeros where there is no bias to hold them."""
    x = states.mean(0, dtype=torch.float64)
    y = torch.stack([embedding(part).sum(0, dtype=torch.float64) for part in tokens.split(8192)]).sum(0) / len(tokens)
    return (x, y) if bias else (torch.zeros_like(x), torch.zeros_like(y))


def _products(
    states: Tensor, tokens: Tensor, embedding: nn.Module, means: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """X^T X (E, E), X^T Y (E, D) and |Y|^2, float64, of the pairs less `means`."""
    gram = states.new_zeros(states.shape[1], states.shape[1], dtype=torch.float64)
    cross = states.new_zeros(states.shape[1], len(means[1]), dtype=torch.float64)
    total = states.new_zeros((), dtype=torch.float64)
    for part, ids in zip(states.split(8192), tokens.split(8192)):
        x, y = part.double() - means[0], embedding(ids).double() - means[1]
        gram += x.T @ x
        cross += x.T @ y
        total += y.square().sum()
    return gram, cross, total


def _eigen(
    states: Tensor, tokens: Tensor, embedding: nn.Module, means: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Eigenvalues and eigenvectors of X^T X, X^T Y in their basis, and |Y|^2."""
    gram, cross, total = _products(states, tokens, embedding, means)
    values, basis = torch.linalg.eigh(gram)
    return values.clamp_min(0), basis, basis.T @ cross, total


def fit_softmax(
    projection: nn.Linear,
    states: Tensor,
    tokens: Tensor,
    embeddings: Tensor,
    *,
    steps: int = 150,
    penalty: float = 1e-4,
) -> ProjectionFit:
    """Softmax regression from encoder states to the LLM's tokens.

    With x (E,) an encoder state and t the LLM token that ends at the same character, it minimises the cross-entropy of
    `softmax((W x + b) . e_v)` at t over the tokens v that occur, every token type weighing the same, plus
    `penalty / 2 * |W|^2`; e_v are the LLM's centred embeddings at length 1. The result is scaled to the embeddings'
    length. A least-squares fit explains more of the English embeddings, but by directions that are English only.

    Args:
        projection: set in place. states: (P, E) float32. tokens: (P,) int64. embeddings: (V, D), the LLM's table.
    """
    types, target, frequency = tokens.unique(return_inverse=True, return_counts=True)
    table = embeddings[types].float()
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
    return ProjectionFit("softmax", len(tokens), float(found.float().mean()))


@torch.no_grad()
def _pairs(student: MTLLM, rows: Iterable[TextRow], limit: int) -> tuple[Tensor, Tensor]:
    """Encoder states (P, E) float32 and the LLM tokens (P,) that end at the same characters."""
    stack, tokenizer = student.require_stack(), student.require_tokenizer()
    device = next(stack.projection.parameters()).device
    states, tokens, stream, total = [], [], iter(rows), 0
    stack.encoder.eval()
    while total < limit and (chunk := list(islice(stream, CHUNK))):
        batch = collate(chunk, tokenizer, sides=("mt", "llm"), align=True).to(device)
        assert batch.mt_rows is not None and batch.llm_rows is not None
        read, norm = student.encoder_states(batch.side("mt")), stack.encoder.final_norm
        states.append((read if norm is None else norm(read))[batch.mt_rows].float())
        tokens.append(batch.side("llm").input_ids[batch.llm_rows])
        total += len(tokens[-1])
    student.train()
    if not total:
        return torch.zeros(0, 1), torch.zeros(0, dtype=torch.long)
    return torch.cat(states)[:limit], torch.cat(tokens)[:limit]
