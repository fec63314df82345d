"""MSE of last hidden states at rows that end at the same character."""

from __future__ import annotations

from torch import Tensor

from .fused import Arguments, FusedTerm, pair_arguments
from .term import Given, Side, required


class PairedMSE(FusedTerm):
    """`sum_p mean_d (s_pd - t_pd)^2` over aligned pairs."""

    name = "paired_mse"
    needs = frozenset({"teacher", "pairs"})
    unit = "pairs"

    def arguments(self, given: Given) -> Arguments:
        return {"paired": True, **pair_arguments(given)}

    def compared(self, teacher: Side) -> Tensor:
        return teacher.states[required(teacher.pair_rows)]
