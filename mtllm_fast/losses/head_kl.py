"""KL of the task head's distributions (stage 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from .term import Given, LossTerm, Term, required, rows_weighed

if TYPE_CHECKING:
    from ..data.batch import Batch


@dataclass(frozen=True)
class TaskHeadKL(Term):
    """`sum_b w_b kl_b` of the head on pooled states, over texts; the head is the task teacher's.

    w_b is that of `Batch.row_weight`, or 1. With `rank_weights` it is also divided by the rank of the row's label among
    the teacher's logits: a row that the teacher has right counts as before, one that it has wrong less. The sum is then
    still divided by the rows, or by their `row_weight`, since what the teacher says is not known before the forward.
    Source of the ranks: arXiv 2309.17134, which takes one number for a whole batch.
    """

    temperature: float = 1.0
    rank_weights: bool = False

    name = "head_kl"
    needs = frozenset({"teacher", "task_head"})

    def __post_init__(self) -> None:
        if self.rank_weights:
            object.__setattr__(self, "needs", self.needs | {"labels"})

    def count(self, batch: Batch) -> float:
        return rows_weighed(batch)

    def forward(self, given: Given) -> LossTerm:
        head, weights = required(given.task_head), given.batch.row_weight
        student, teacher = head(given.student.pooled()), head(required(given.teacher).pooled())
        if self.rank_weights:
            shares = 1 / label_ranks(teacher, required(given.batch.labels))
            weights = shares if weights is None else weights * shares
        total = kl(student, teacher, self.temperature, weights)
        return LossTerm(total, total.new_tensor(rows_weighed(given.batch)))


def label_ranks(logits: Tensor, labels: Tensor) -> Tensor:
    """(N,) int64, the place from 1 of each row's label among its logits (N, C); equal ones do not stand before it."""
    return 1 + (logits > logits.gather(1, labels[:, None])).sum(1)


def kl(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, weights: Tensor | None = None
) -> Tensor:
    """`tau^2 * sum_i w_i KL(softmax(t_i / tau) || softmax(s_i / tau))`, 0-d.

    Args:
        student_logits, teacher_logits: (N, C), used in float32; log-probabilities are logits, too.
        temperature: tau > 0; the factor tau^2 keeps the gradient's scale (Hinton et al., arXiv 1503.02531).
        weights: (N,), 1 where there are none.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student_logits {tuple(student_logits.shape)} and teacher_logits {tuple(teacher_logits.shape)} differ"
        )
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be > 0")
    log_p = F.log_softmax(teacher_logits.float() / temperature, -1)
    log_q = F.log_softmax(student_logits.float() / temperature, -1)
    if weights is None:
        total = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    else:
        total = (F.kl_div(log_q, log_p, reduction="none", log_target=True) * weights[:, None]).sum()
    return total * temperature**2
