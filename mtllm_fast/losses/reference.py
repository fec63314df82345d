"""Plain-PyTorch definitions of every distillation term. Each returns `(sum, count)`; sums are float32 scalars.

They are the truth that fused paths are tested against, and the path of every device that has no fused one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def mse(student: Tensor, teacher: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Row-wise mean squared error: `sum_i w_i * mean_d (s_id - t_id)^2`, count = sum of weights.

    Args:
        student, teacher: (N, D), compared in float32.
        weight: (N,) row weights, None for ones.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ in shape")
    rows = (student.float() - teacher.float()).square().mean(-1)
    if weight is None:
        return rows.sum(), rows.new_tensor(rows.numel())
    return (rows * weight).sum(), weight.sum().to(rows.dtype)


def kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
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
    return total, total.new_tensor(student_logits.shape[0])


def lm_head_kl(
    student: Tensor,  # (N, D) states at the aligned rows
    teacher: Tensor,  # (N, D)
    weight: Tensor,  # (V, D) LM head
    bias: Tensor | None = None,  # (V,)
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk_rows: int = 1024,
) -> tuple[Tensor, Tensor]:
    """`kl` of the LM head's distributions, in chunks of rows: (N, V) logits are never held, forward or backward."""

    def logits(states: Tensor) -> Tensor:
        z = F.linear(states.float(), weight.float(), None if bias is None else bias.float())
        return z if softcap is None else softcap * torch.tanh(z / softcap)

    def chunk(s: Tensor, t: Tensor) -> Tensor:
        with torch.no_grad():
            target = logits(t)
        return kl(logits(s), target, temperature)[0]

    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be > 0")
    total = student.new_zeros((), dtype=torch.float32) + student.float().sum() * 0.0
    for start in range(0, student.shape[0], chunk_rows):
        rows = slice(start, start + chunk_rows)
        total = total + checkpoint(chunk, student[rows], teacher[rows], use_reentrant=False)
    return total, total.new_tensor(student.shape[0])
