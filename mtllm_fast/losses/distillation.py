"""The distillation loss: weighted terms over packed student and teacher states, each as `(sum, count)`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from ..kernels import distillation_loss
from ..models.heads import TaskHead, segment_mean, span_mean
from .reference import kl

if TYPE_CHECKING:
    from ..data.collate import Batch
    from ..models.llm import LMHead


class LossTerm(NamedTuple):
    """One term over one pack: `weight * sum / (global count)` is its part of the loss."""

    sum: Tensor
    count: Tensor  # type: ignore[assignment]  # named as everywhere else, though tuples have a method `count`


@dataclass(frozen=True)
class DistillationWeights:
    """Weight of every term; 0 leaves the term out."""

    pooled_mse: float = 1.0
    """MSE of mean-pooled last hidden states (the paper's loss)."""
    paired_mse: float = 0.0
    """MSE of last hidden states at rows that end at the same character."""
    kl: float = 0.0
    """KL of the LM head's distributions at those rows, times temperature^2."""
    head_kl: float = 0.0
    """KL of the task head's distributions, times temperature^2 (stage 3)."""
    temperature: float = 1.0
    """Of both KL terms; above 1 it makes the distributions flatter."""

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

    Attributes:
        variance: what the sum of an MSE term is divided by, by the term's name; of terms that are not named, nothing.
    """

    def __init__(self, weights: DistillationWeights | None = None) -> None:
        super().__init__()
        self.weights = weights or DistillationWeights()
        self.variance: dict[str, float] = {}

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
        choices = batch.mt_spans is not None
        if weights.needs_pairs and (batch.mt_rows is None or batch.llm_rows is None):
            raise ValueError("paired_mse and kl need aligned rows: collate the batch with align=True")
        if weights.kl and lm_head is None:
            raise ValueError("kl > 0 needs lm_head, the LLM's output head")
        if weights.head_kl and task_head is None:
            raise ValueError("head_kl > 0 needs task_head, the frozen head of the task teacher")
        terms: dict[str, LossTerm] = {}
        if weights.pooled_mse or weights.needs_pairs:
            fused = distillation_loss(
                student,
                teacher.to(student.dtype),
                pooled=weights.pooled_mse > 0,
                cu_seqlens_s=None if choices else batch.mt.cu_seqlens,
                cu_seqlens_t=None if choices else batch.llm.cu_seqlens,
                spans_s=batch.mt_spans,
                spans_t=batch.llm_spans,
                paired="mse" if weights.paired_mse else None,
                rows_s=batch.mt_rows if weights.needs_pairs else None,
                rows_t=batch.llm_rows if weights.needs_pairs else None,
                rows_sorted=True,
                head=lm_head.weight.detach() if weights.kl and lm_head else None,
                head_bias=lm_head.bias.detach() if weights.kl and lm_head and lm_head.bias is not None else None,
                temperature=weights.temperature,
                softcap=lm_head.softcap if weights.kl and lm_head else None,
            )
            terms = {name: LossTerm(*term) for name, term in fused._asdict().items() if term is not None}
            if choices and "pooled_mse" in terms:  # counted in texts, as everything else
                per_text = batch.mt_spans.shape[1]  # type: ignore[union-attr]
                terms["pooled_mse"] = LossTerm(*(value / per_text for value in terms["pooled_mse"]))
            for name in terms.keys() & self.variance.keys():
                terms[name] = LossTerm(terms[name].sum / self.variance[name], terms[name].count)
        if weights.head_kl:
            assert task_head is not None
            if batch.mt_spans is not None and batch.llm_spans is not None:
                pooled = span_mean(student, batch.mt_spans), span_mean(teacher, batch.llm_spans)
            else:
                pooled = segment_mean(student, batch.mt), segment_mean(teacher, batch.llm)
            terms["head_kl"] = LossTerm(*kl(task_head(pooled[0]), task_head(pooled[1]), weights.temperature))
        return terms

    def total(self, terms: dict[str, LossTerm], counts: dict[str, float]) -> Tensor:
        """`sum_k weight_k * sum_k / count_k` with the counts of the whole step."""
        parts = [getattr(self.weights, name) * term.sum / max(counts[name], 1e-9) for name, term in terms.items()]
        return torch.stack(parts).sum()
