"""KL of the task head's distributions (stage 3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from .term import Given, LossTerm, Term, required


@dataclass(frozen=True)
class TaskHeadKL(Term):
    """`kl` of the head on pooled states, over texts; the head is the task teacher's."""

    temperature: float = 1.0

    name = "head_kl"
    needs = frozenset({"teacher", "task_head"})

    def forward(self, given: Given) -> LossTerm:
        head = required(given.task_head)
        return kl(head(given.student.pooled()), head(required(given.teacher).pooled()), self.temperature)


def kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> LossTerm:
    """`tau^2 * sum_i KL(softmax(t_i / tau) || softmax(s_i / tau))`, count = rows.

    Args:
        student_logits, teacher_logits: (N, C), used in float32.
        temperature: tau > 0; the factor tau^2 keeps the gradient's scale (Hinton et al., arXiv 1503.02531).
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student_logits {tuple(student_logits.shape)} and teacher_logits {tuple(teacher_logits.shape)} differ"
        )
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be > 0")
    log_p = F.log_softmax(teacher_logits.float() / temperature, -1)
    log_q = F.log_softmax(student_logits.float() / temperature, -1)
    total = F.kl_div(log_q, log_p, reduction="sum", log_target=True) * temperature**2
    return LossTerm(total, total.new_tensor(student_logits.shape[0]))
