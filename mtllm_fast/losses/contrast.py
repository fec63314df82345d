"""Contrast of pooled states: a text is to be nearer to the teacher's state of it than to those of other texts."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .term import Given, LossTerm, Side, Term, required


@dataclass(frozen=True)
class Contrast(Term):
    """`-sum_b log(exp(cos(s_b, t_b) / tau) / sum_c exp(cos(s_b, t_c) / tau))`, c over b and the texts that are not b's.

    One-way InfoNCE on mean-pooled states, a text of choices being its choices' states end to end; the teacher's have no
    gradient. A text that stands twice in a pack, for the student or for the teacher, is not its own negative.
    contrast_layer: of the states after that layer of the LLM, from 1; None: of the last hidden states.
    Source: arXiv 2502.14830 (cosine, one way, temperature 0.1, there between translations at an inner layer).
    """

    contrast_temperature: float = 0.1
    contrast_layer: int | None = None

    name = "contrast"
    needs = frozenset({"teacher"})
    compares_texts = True

    def __post_init__(self) -> None:
        if self.contrast_layer is not None:
            object.__setattr__(self, "needs", self.needs | {"inner"})

    def forward(self, given: Given) -> LossTerm:
        student, teacher = given.student, required(given.teacher)
        if self.contrast_layer is not None:
            student, teacher = required(given.inner)
        total = info_nce(
            student.pooled().flatten(1),
            teacher.pooled().flatten(1),
            self.contrast_temperature,
            _same(student) | _same(teacher),
        )
        if self.contrast_layer is not None:  # DDP waits for a gradient of every weight, of the layers above, too
            total = total + 0 * given.student.states.sum()
        return LossTerm(total, total.new_tensor(given.batch.num_rows))


def _same(side: Side) -> Tensor:
    """(B, B) bool, which texts a reader reads as the same tokens."""
    digests = side.packed.digests
    return digests[:, None] == digests


def info_nce(
    student: Tensor,  # (B, D)
    teacher: Tensor,  # (B, D)
    temperature: float,
    same: Tensor | None = None,  # (B, B) bool
) -> Tensor:
    """`sum_b lse_c(x_bc) - x_bb` with `x_bc = cos(s_b, t_c) / tau`; the gradient of the student's states alone.

    Args:
        student, teacher: used as they are, float32 or float64, under autocast too.
        same: pairs that are no negatives of each other; the diagonal is not read.
    """
    kind = student.device.type  # a cosine in bf16 would be off by a hundredth of what the temperature divides
    with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
        cosines = F.normalize(student, dim=-1) @ F.normalize(teacher.detach(), dim=-1).T
    scores = cosines / temperature
    rows = torch.arange(len(scores), device=scores.device)
    if same is not None:
        scores = scores.masked_fill(same & (rows[:, None] != rows), -torch.inf)
    return F.cross_entropy(scores, rows, reduction="sum")


def reference(student: Tensor, teacher: Tensor, temperature: float, same: Tensor | None = None) -> Tensor:
    """`info_nce` by its definition, pair by pair in float64."""
    total = student.new_zeros((), dtype=torch.float64)
    for b, s in enumerate(student.double()):
        powers = {
            c: (torch.dot(s, t) / (s.norm() * t.norm()) / temperature).exp()
            for c, t in enumerate(teacher.detach().double())
            if c == b or same is None or not bool(same[b, c])
        }
        total = total - (powers[b] / torch.stack(list(powers.values())).sum()).log()
    return total
