"""The ops of `hidden_mse` and `distillation_loss`, with their fakes and derivatives.

`segment_mean` pools, `hidden_loss` computes the pooled and the paired loss of one student and teacher, and
`state_gradient` is the backward of all of them: one op, so that a state's gradient is written once however many terms
it comes from. Arguments are validated by the public functions; values of row numbers and bounds in the kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import hidden_mse_cpu
from .gemms import accumulation_dtype
from .op import Kept, Op, Registered
from .segments import SPANS

Three = tuple[Tensor, Tensor, Tensor]


def segments_of(bounds: Tensor, pooling: str) -> int:
    return bounds.shape[0] - int(pooling != SPANS)


@dataclass(frozen=True, kw_only=True, eq=False)
class SegmentMean(Op[Tensor]):
    """Means (S, D) of the rows of segments."""

    x: Tensor  # (T, D)
    bounds: Tensor  # (B + 1,) or (S, 2)
    pooling: str = "mean"

    def cpu(self) -> Tensor:
        return hidden_mse_cpu.segment_mean_cpu(self)

    def cuda(self) -> Tensor:
        from .hidden_mse_launch import segment_mean_triton

        return segment_mean_triton(self)

    def fake(self) -> Tensor:
        shape = (segments_of(self.bounds, self.pooling), self.x.shape[1])
        return self.x.new_empty(shape, dtype=accumulation_dtype(self.x.dtype))

    def keep(self, output: Tensor) -> Kept:
        return {"student": shape_of(self.x), "bounds": self.bounds, "pooling": self.pooling}

    @staticmethod
    def backward(kept: Kept, grad_mean: Tensor | None) -> dict[str, Tensor | None]:
        if grad_mean is None:
            return {}
        bounds = kept["bounds"]
        if kept["pooling"] == SPANS:
            lengths = bounds[:, 1] - bounds[:, 0]
        else:
            lengths = bounds.diff() if kept["pooling"] == "mean" else bounds.diff().clamp(max=1)
        u = (grad_mean / lengths.clamp(min=1).unsqueeze(1)).contiguous()
        return {"x": gradient_of_states({**kept, "u": u}, u.new_ones(()))}


@dataclass(frozen=True, kw_only=True, eq=False)
class HiddenLoss(Op[Three]):
    """pooled (), paired (), u (S, D)."""

    student: Tensor  # (T_s, D)
    teacher: Tensor  # (T_t, D)
    bounds_s: Tensor | None = None  # (B + 1,) or (S, 2); None: no pooled term
    bounds_t: Tensor | None = None
    pooling: str = "mean"
    segment_weight: Tensor | None = None  # (S,)
    rows_s: Tensor | None = None  # (P,); None: no paired term
    rows_t: Tensor | None = None  # (P,)
    pair_weight: Tensor | None = None  # (P,)
    rows_sorted: bool = False
    need_dx: bool = False

    def cpu(self) -> Three:
        return self._terms(hidden_mse_cpu.pooled_cpu, hidden_mse_cpu.pairs_cpu)

    def cuda(self) -> Three:
        from .hidden_mse_launch import pairs_triton, pooled_triton

        return self._terms(pooled_triton, pairs_triton)

    def _terms(
        self, pooled: Callable[[HiddenLoss], tuple[Tensor, Tensor]], paired: Callable[[HiddenLoss], Tensor]
    ) -> Three:
        values = pair_values = self.student.new_zeros(0, dtype=accumulation_dtype(self.student.dtype))
        u = values.new_empty(0, 0)
        if self.bounds_s is not None:
            values, u = pooled(self)
        if self.rows_s is not None:
            pair_values = paired(self)
        total = _weighted_sum(values, self.segment_weight if self.bounds_s is not None else None)
        pair_total = _weighted_sum(pair_values, self.pair_weight if self.rows_s is not None else None)
        return total, pair_total, u

    def fake(self) -> Three:
        dtype = accumulation_dtype(self.student.dtype)
        shape = (0, 0)
        if self.bounds_s is not None:
            shape = (segments_of(self.bounds_s, self.pooling) if self.need_dx else 0, self.student.shape[1])
        pooled, paired, u = (self.student.new_empty(of, dtype=dtype) for of in ((), (), shape))
        return pooled, paired, u

    def keep(self, output: Three) -> Kept:
        names = ("pooling", "rows_s", "rows_t", "pair_weight", "rows_sorted", "need_dx")
        given = {"bounds": self.bounds_s, **{name: getattr(self, name) for name in names}}
        paired = self.rows_s is not None  # only row pairs need the states again
        states = {
            "student": self.student if paired else shape_of(self.student),
            "teacher": self.teacher if paired else None,
        }
        return {**given, **states, "u": output[2] if self.bounds_s is not None else None}

    @staticmethod
    def backward(
        kept: Kept, grad_pooled: Tensor | None, grad_paired: Tensor | None, *_: Tensor | None
    ) -> dict[str, Tensor | None]:
        return {"student": gradient_of_states(kept, grad_pooled, grad_paired) if kept["need_dx"] else None}


def _weighted_sum(values: Tensor, weight: Tensor | None) -> Tensor:
    return values.sum() if weight is None else (values * weight.to(values.dtype)).sum()


@dataclass(frozen=True, kw_only=True, eq=False)
class StateGradient(Op[Tensor]):
    """Gradient (T, D) of the states from the pooled term, the row pairs and `more`, each times its scale."""

    scales: Tensor  # (3,)
    student: Tensor  # (T, D)
    teacher: Tensor | None = None  # (T_t, D)
    u: Tensor | None = None  # (S, D)
    bounds: Tensor | None = None
    pooling: str = "mean"
    rows_s: Tensor | None = None  # (P,)
    rows_t: Tensor | None = None  # (P,)
    pair_weight: Tensor | None = None  # (P,)
    rows_sorted: bool = False
    more: Tensor | None = None  # (T, D)

    def cpu(self) -> Tensor:
        return hidden_mse_cpu.state_gradient_cpu(self)

    def cuda(self) -> Tensor:
        from .hidden_mse_launch import state_gradient_triton

        return state_gradient_triton(self)

    def fake(self) -> Tensor:
        return self.student.new_empty(self.student.shape)


def gradient_of_states(
    kept: Kept, pooled: Tensor | None, paired: Tensor | None = None, more: Tensor | None = None
) -> Tensor | None:
    """`state_gradient` of those of its arguments that `kept` has, times incoming scalars of the pooled term, the pairs
    and `more`; without a scalar (None) a part is left out."""
    given = {name: kept[name] for name in state_gradient.names if name in kept}
    parts = {"u": pooled, "rows_s": paired, "more": more}
    given |= {name: given.get(name) if scalar is not None else None for name, scalar in parts.items()}
    if all(given[name] is None for name in parts):
        return None
    dtype = accumulation_dtype(given["student"].dtype)
    zero = given["student"].new_zeros((), dtype=dtype)
    return state_gradient(scales=torch.stack([zero if s is None else s.to(dtype) for s in parts.values()]), **given)


def shape_of(x: Tensor) -> Tensor:
    """What stands for `x` (T, D) in backward where only its shape and dtype are read: one row of memory."""
    return x.new_empty(1, x.shape[1]).expand(x.shape)


segment_mean = Registered(SegmentMean, "segment_mean", errors="segment_mean")
hidden_loss = Registered(HiddenLoss, "hidden_loss", errors="pooled_mse or paired_mse")
state_gradient = Registered(
    StateGradient, "state_gradient", gradient_of="segment_mean, pooled_mse, paired_mse or distillation_loss"
)
