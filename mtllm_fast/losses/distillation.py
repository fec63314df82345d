"""The distillation loss: weighted terms over packed student and teacher states, each as `(sum, count)`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from ..kernels import linear_kl
from ..models.heads import TaskHead, segment_mean, span_mean
from .reference import kl, mse

if TYPE_CHECKING:
    from ..data.collate import Batch
    from ..models.llm import LMHead


class LossTerm(NamedTuple):
    """One term over one pack: `weight * sum / (global count)` is its part of the loss."""

    sum: Tensor
    count: Tensor  # type: ignore[assignment]  # named as everywhere else, though tuples have a method `count`


@dataclass(frozen=True)
class DistillationWeights:
    """Weight of every term; 0 leaves the term out.

    pooled_mse: MSE of mean-pooled last hidden states (the paper's loss).
    paired_mse: MSE of last hidden states at rows that end at the same character.
    kl: KL of the LM head's distributions at those rows, times temperature^2.
    head_kl: KL of the task head's distributions, times temperature^2 (stage 3).
    """

    pooled_mse: float = 1.0
    paired_mse: float = 0.0
    kl: float = 0.0
    head_kl: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name in ("pooled_mse", "paired_mse", "kl", "head_kl"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)}: a loss weight must be >= 0")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature}: must be > 0")
        if not any((self.pooled_mse, self.paired_mse, self.kl, self.head_kl)):
            raise ValueError("pooled_mse, paired_mse, kl, head_kl: at least one weight must be > 0")

    @property
    def needs_pairs(self) -> bool:
        return self.paired_mse > 0 or self.kl > 0

    def counts(self, batch: Batch) -> dict[str, float]:
        """What each active term of `batch` is divided by once summed over the whole step; known before the forward."""
        texts, pairs = batch.num_rows * batch.weight, batch.num_pairs * batch.weight
        sizes = {"pooled_mse": texts, "paired_mse": pairs, "kl": pairs, "head_kl": texts}
        return {name: size for name, size in sizes.items() if getattr(self, name) > 0}


class DistillationLoss(nn.Module):
    """Distils a teacher's states into a student's over one pack.

    Source: arXiv 2406.12739 (pooled MSE), extended by token-aligned MSE and temperature-scaled KL.
    """

    def __init__(self, weights: DistillationWeights | None = None) -> None:
        super().__init__()
        self.weights = weights or DistillationWeights()

    def forward(
        self,
        student: Tensor,  # (T_mt, D)
        teacher: Tensor,  # (T_llm, D)
        batch: Batch,
        *,
        lm_head: LMHead | None = None,
        task_head: TaskHead | None = None,
    ) -> dict[str, LossTerm]:
        """The active terms of `batch`, unweighted sums with their counts.

        Args:
            student: states of the packed rows `batch.mt`; teacher: of `batch.llm`.
            lm_head: needed by `kl`; task_head: needed by `head_kl`.

        Raises:
            ValueError: states and batch do not fit, or an active term lacks what it needs.
        """
        weights = self.weights
        assert batch.mt is not None and batch.llm is not None
        for name, states, side in (("student", student, batch.mt), ("teacher", teacher, batch.llm)):
            if states.shape[0] != side.num_tokens:
                raise ValueError(f"{name} has {states.shape[0]} rows, its packed batch has {side.num_tokens} tokens")
        if student.shape[1] != teacher.shape[1]:
            raise ValueError(f"student states are {student.shape[1]} wide, teacher states {teacher.shape[1]}")
        terms: dict[str, LossTerm] = {}
        if weights.pooled_mse or weights.head_kl:
            if batch.mt_spans is not None:
                assert batch.llm_spans is not None
                pooled_s, pooled_t = span_mean(student, batch.mt_spans), span_mean(teacher, batch.llm_spans)
            else:
                pooled_s, pooled_t = segment_mean(student, batch.mt), segment_mean(teacher, batch.llm)
            if weights.pooled_mse:
                total, count = mse(pooled_s.flatten(0, -2), pooled_t.flatten(0, -2))
                choices = pooled_s.shape[1] if pooled_s.dim() == 3 else 1
                terms["pooled_mse"] = LossTerm(total / choices, count / choices)
            if weights.head_kl:
                if task_head is None:
                    raise ValueError("head_kl > 0 needs task_head, the frozen head of the task teacher")
                terms["head_kl"] = LossTerm(*kl(task_head(pooled_s), task_head(pooled_t), weights.temperature))
        if weights.needs_pairs:
            if batch.mt_rows is None or batch.llm_rows is None:
                raise ValueError("paired_mse and kl need aligned rows: collate the batch with align=True")
            if weights.paired_mse:
                rows = student.index_select(0, batch.mt_rows), teacher.index_select(0, batch.llm_rows)
                terms["paired_mse"] = LossTerm(*mse(*rows))
            if weights.kl:
                if lm_head is None:
                    raise ValueError("kl > 0 needs lm_head, the LLM's output head")
                total, count = linear_kl(
                    student,
                    lm_head.weight.detach(),
                    teacher,
                    bias_s=None if lm_head.bias is None else lm_head.bias.detach(),
                    rows_s=batch.mt_rows,
                    rows_t=batch.llm_rows,
                    temperature=weights.temperature,
                    softcap=lm_head.softcap,
                )
                terms["kl"] = LossTerm(total, count)
        return terms

    def total(self, terms: dict[str, LossTerm], counts: dict[str, float]) -> Tensor:
        """`sum_k weight_k * sum_k / count_k` with the counts of the whole step."""
        parts = [getattr(self.weights, name) * term.sum / max(counts[name], 1e-9) for name, term in terms.items()]
        return torch.stack(parts).sum()
