"""MSE of mean-pooled last hidden states, the paper's loss (arXiv 2406.12739)."""

from __future__ import annotations

from torch import Tensor

from .fused import Arguments, FusedTerm
from .term import Given, LossTerm, Side, required


class PooledMSE(FusedTerm):
    """`sum_b mean_d (mean_t s_td - mean_t' t_t'd)^2` over texts, a text of choices being the mean over its choices."""

    name = "pooled_mse"
    needs = frozenset({"teacher"})

    def arguments(self, given: Given) -> Arguments:
        student, teacher = given.student, required(given.teacher)
        if student.spans is not None:
            return {"pooled": True, "spans_s": student.spans, "spans_t": teacher.spans}
        bounds = {"cu_seqlens_s": student.packed.cu_seqlens, "cu_seqlens_t": teacher.packed.cu_seqlens}
        return {"pooled": True, **bounds}

    def per_text(self, term: LossTerm, given: Given) -> LossTerm:
        if given.student.spans is None:
            return term
        per_text = given.student.spans.shape[1]
        return LossTerm(term.sum / per_text, term.count / per_text)

    def compared(self, teacher: Side) -> Tensor:
        return teacher.pooled().flatten(0, -2)
