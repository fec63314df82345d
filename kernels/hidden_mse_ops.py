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
from .hidden_mse_cpu import STATISTICS
from .linear_kl_ops import dtype_if, scaled_gradients
from .op import Kept, Op, Registered
from .segments import SPANS

Two = tuple[Tensor, Tensor]
Four = tuple[Tensor, Tensor, Tensor, Tensor]
Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def segments_of(bounds: Tensor, pooling: str) -> int:
    return bounds.shape[0] - int(pooling != SPANS)


@dataclass(frozen=True, kw_only=True, eq=False)
class SegmentMean(Op[Two]):
    """Means (S, D) of normalised rows, without the norm's weight and bias; statistics (n, T) of the rows."""

    x: Tensor  # (T, D)
    bounds: Tensor  # (B + 1,) or (S, 2)
    pooling: str = "mean"
    norm: str = "none"
    eps: float = 0.0

    def cpu(self) -> Two:
        return hidden_mse_cpu.segment_mean_cpu(self)

    def cuda(self) -> Two:
        from .hidden_mse_launch import segment_mean_triton

        return segment_mean_triton(self)

    def fake(self) -> Two:
        x, dtype = self.x, accumulation_dtype(self.x.dtype)
        return (
            x.new_empty((segments_of(self.bounds, self.pooling), x.shape[1]), dtype=dtype),
            x.new_empty((STATISTICS[self.norm], x.shape[0]), dtype=dtype),
        )

    def keep(self, output: Two) -> Kept:
        x = shape_of(self.x) if self.norm == "none" else self.x
        return {"student": x, "bounds": self.bounds, "pooling": self.pooling, "norm": self.norm, "stats": output[1]}

    @staticmethod
    def backward(kept: Kept, grad_mean: Tensor | None, _: Tensor | None) -> dict[str, Tensor | None]:
        if grad_mean is None:
            return {}
        bounds = kept["bounds"]
        if kept["pooling"] == SPANS:
            lengths = bounds[:, 1] - bounds[:, 0]
        else:
            lengths = bounds.diff() if kept["pooling"] == "mean" else bounds.diff().clamp(max=1)
        u = (grad_mean / lengths.clamp(min=1).unsqueeze(1)).contiguous()
        return {"x": gradient_of_states({**kept, "u": u, "pair_stats": kept["stats"][:0]}, u.new_ones(()))}


@dataclass(frozen=True, kw_only=True, eq=False)
class HiddenLoss(Op[Six]):
    """pooled (), paired (), u (S, D), stats (n, T_s), pair_stats (2, P), d norm_weight (1, D)."""

    student: Tensor  # (T_s, D)
    teacher: Tensor  # (T_t, D)
    bounds_s: Tensor | None = None  # (B + 1,) or (S, 2); None: no pooled term
    bounds_t: Tensor | None = None
    pooling: str = "mean"
    segment_weight: Tensor | None = None  # (S,)
    norm: str = "none"
    norm_weight: Tensor | None = None  # (D,)
    eps: float = 0.0
    rows_s: Tensor | None = None  # (P,); None: no paired term
    rows_t: Tensor | None = None  # (P,)
    pair_weight: Tensor | None = None  # (P,)
    kind: str = "mse"
    rows_sorted: bool = False
    need_dx: bool = False
    need_norm: bool = False

    def cpu(self) -> Six:
        return self._terms(hidden_mse_cpu.pooled_cpu, hidden_mse_cpu.pairs_cpu)

    def cuda(self) -> Six:
        from .hidden_mse_launch import pairs_triton, pooled_triton

        return self._terms(pooled_triton, pairs_triton)

    def _terms(self, pooled: Callable[[HiddenLoss], Four], paired: Callable[[HiddenLoss], Two]) -> Six:
        nothing = self.student.new_zeros(0, dtype=accumulation_dtype(self.student.dtype))
        values, u, d_norm = nothing, nothing.view(0, 1)[:, :0].clone(), nothing.view(0, 1).clone()
        stats, pair_values, pair_stats = nothing.view(0, 1).clone(), nothing, nothing.view(0, 1).clone()
        if self.bounds_s is not None:
            values, u, stats, d_norm = pooled(self)
        if self.rows_s is not None:
            pair_values, pair_stats = paired(self)
        total = _weighted_sum(values, self.segment_weight if self.bounds_s is not None else None)
        pair_total = _weighted_sum(pair_values, self.pair_weight if self.rows_s is not None else None)
        return total, pair_total, u, stats, pair_stats, d_norm

    def fake(self) -> Six:
        student, width = self.student, self.student.shape[1]
        pairs = 0 if self.rows_s is None else self.rows_s.shape[0]

        def empty(*shape: int) -> Tensor:
            return student.new_empty(shape, dtype=accumulation_dtype(student.dtype))

        u, stats, d_norm = empty(0, 0), empty(0, 1), empty(0, 1)
        if self.bounds_s is not None:
            u = empty(segments_of(self.bounds_s, self.pooling) if self.need_dx else 0, width)
            stats = empty(STATISTICS[self.norm], student.shape[0] if self.need_dx else 0)
            d_norm = empty(1, width)
        pair_stats = empty(2, pairs if self.kind == "cosine" else 0) if self.rows_s is not None else empty(0, 1)
        return empty(), empty(), u, stats, pair_stats, d_norm

    def keep(self, output: Six) -> Kept:
        _, _, u, stats, pair_stats, d_norm = output
        # Only row pairs need the states again, and a norm those of the student.
        student = self.student if self.rows_s is not None or self.norm != "none" else shape_of(self.student)
        teacher = self.teacher if self.rows_s is not None else None
        made = {"student": student, "teacher": teacher, "stats": stats, "pair_stats": pair_stats}
        names = ("pooling", "norm", "rows_s", "rows_t", "pair_weight", "kind", "rows_sorted", "need_dx")
        dtypes = {"norm_weight": dtype_if(self.need_norm, self.norm_weight)}
        given = {"bounds": self.bounds_s, **{name: getattr(self, name) for name in names}}
        pooled = {"u": u if self.bounds_s is not None else None, "norm_weight": d_norm, "dtypes": dtypes}
        return {**made, **given, **pooled}

    @staticmethod
    def backward(
        kept: Kept, grad_pooled: Tensor | None, grad_paired: Tensor | None, *_: Tensor | None
    ) -> dict[str, Tensor | None]:
        gradients = scaled_gradients(grad_pooled, kept)
        if (d_norm := gradients["norm_weight"]) is not None:
            gradients["norm_weight"] = d_norm[0]
        if kept["need_dx"]:
            gradients["student"] = gradient_of_states(kept, grad_pooled, grad_paired)
        return gradients


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
    norm: str = "none"
    stats: Tensor  # (n, T)
    rows_s: Tensor | None = None  # (P,)
    rows_t: Tensor | None = None  # (P,)
    pair_weight: Tensor | None = None  # (P,)
    pair_stats: Tensor  # (2, P)
    kind: str = "mse"
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
