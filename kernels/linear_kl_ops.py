"""The ops of `linear_kl`, one per form, with their fakes and derivatives.

They return gradients next to values: `total` is the only differentiable output, backward multiplies the gradients that
the forward made by the incoming scalar. Arguments are validated by `linear_kl.py`, not here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import linear_kl_cpu, moments_cpu
from .gemms import accumulation_dtype, kept_dtype
from .op import Kept, Op, Registered

Three = tuple[Tensor, Tensor, Tensor]
Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class ScaleGradient(Op[Tensor]):
    """gradient * by in `dtype`, as an op so that a second derivative raises instead of lying."""

    gradient: Tensor
    by: Tensor
    dtype: torch.dtype

    def cpu(self) -> Tensor:
        return (self.gradient * self.by).to(self.dtype)

    def fake(self) -> Tensor:
        return torch.empty_like(self.gradient, dtype=self.dtype)


scale_gradient = Registered(
    ScaleGradient, "scale_gradient", gradient_of="linear_kl, linear_ce, distillation_loss or pooled_mse"
)


def dtype_if(needed: bool, x: Tensor | None) -> torch.dtype | None:
    return x.dtype if needed and x is not None else None


def scaled_gradients(by: Tensor | None, kept: Kept) -> dict[str, Tensor | None]:
    """Gradients for an incoming scalar `by` of the arguments that kept["dtypes"] names with their dtypes (None: not
    needed); in `kept` are those for 1."""
    return {
        name: None if by is None or dtype is None else scale_gradient(gradient=kept[name], by=by, dtype=dtype)
        for name, dtype in kept["dtypes"].items()
    }


def scalars(temperature: float, scale_by_t2: bool, num_valid: int | None) -> dict[str, float]:
    """Arguments of the ops over pairs, of those of the public functions."""
    tau = float(temperature)
    scale = tau**2 if scale_by_t2 else 1.0
    return {"num_valid": -1 if num_valid is None else num_valid, "temperature": tau, "scale": scale}


class OverPairs:
    """An op over a head and row pairs, the second of a pair a teacher's row or a target."""

    h_s: Tensor
    w_s: Tensor
    rows_s: Tensor | None
    rows_t: Tensor | None
    row_weight: Tensor | None
    num_valid: int
    need_dh: bool
    need_dw: bool = False
    need_db: bool = False

    @property
    def any_gradient(self) -> bool:
        return self.need_dh or self.need_dw or self.need_db

    @property
    def pairs(self) -> int:
        return (self.h_s if self.rows_s is None else self.rows_s).shape[0]


class OverHead(Op[Five], OverPairs):
    """An op over row pairs that trains states, head and bias.

    It gives total (), values (P,), dh (T_s, D), dw (V, D), db (V,); a gradient that is not needed has no rows. dh and
    dw are in `kept_dtype` of the states and the head, everything else in the accumulation dtype.
    """

    bias_s: Tensor | None

    def fake(self) -> Five:
        h_s, w_s = self.h_s, self.w_s
        dtype = accumulation_dtype(h_s.dtype)
        vocab, width = w_s.shape
        return (
            h_s.new_empty((), dtype=dtype),
            h_s.new_empty(self.pairs, dtype=dtype),
            h_s.new_empty((h_s.shape[0] if self.need_dh else 0, width), dtype=kept_dtype(h_s.dtype)),
            w_s.new_empty((vocab if self.need_dw else 0, width), dtype=kept_dtype(w_s.dtype)),
            h_s.new_empty(vocab if self.need_db else 0, dtype=dtype),
        )

    def keep(self, output: Five) -> Kept:
        dtypes = {
            "h_s": dtype_if(self.need_dh, self.h_s),
            "w_s": dtype_if(self.need_dw, self.w_s),
            "bias_s": dtype_if(self.need_db, self.bias_s),
        }
        return {"dtypes": dtypes, **dict(zip(dtypes, output[2:]))}

    @staticmethod
    def backward(kept: Kept, total: Tensor | None, *_: Tensor | None) -> dict[str, Tensor | None]:
        return scaled_gradients(total, kept)


@dataclass(frozen=True, kw_only=True, eq=False)
class Difference(OverHead):
    """The divergence of two heads' distributions at row pairs."""

    h_s: Tensor  # (T_s, D)
    w_s: Tensor  # (V, D)
    h_t: Tensor  # (T_t, D_t)
    w_t: Tensor | None = None  # (V, D_t); None: w_s and bias_s
    bias_s: Tensor | None = None  # (V,)
    bias_t: Tensor | None = None  # (V,)
    rows_s: Tensor | None = None  # (P,)
    rows_t: Tensor | None = None  # (P,)
    row_weight: Tensor | None = None  # (P,)
    num_valid: int = -1  # pairs of weight != 0, -1 where the host does not know
    temperature: float = 1.0
    scale: float = 1.0  # τ² or 1, multiplies the values
    softcap: float = 0.0  # 0: none
    divergence: str = linear_kl_cpu.FORWARD
    beta: float = 0.5
    need_dh: bool = False
    need_dw: bool = False
    need_db: bool = False

    def cpu(self) -> Five:
        return linear_kl_cpu.difference_cpu(self)

    def cuda(self) -> Five:
        from .linear_kl_launch import difference_triton

        return difference_triton(self)


@dataclass(frozen=True, kw_only=True, eq=False)
class MomentStep(Op[Three], OverPairs):
    """total (), values (P,), dh (T_s, D) of the forward KL against cached teacher rows."""

    h_s: Tensor  # (T_s, D)
    w_s: Tensor  # (V, D)
    bias_s: Tensor | None = None  # (V,)
    m: Tensor  # (N, D)
    entropy: Tensor  # (N,)
    bias_mean: Tensor  # (N,)
    rows_s: Tensor | None = None  # (P,)
    rows_t: Tensor | None = None  # (P,)
    row_weight: Tensor | None = None  # (P,)
    num_valid: int = -1
    temperature: float = 1.0
    scale: float = 1.0
    need_dh: bool = False

    def cpu(self) -> Three:
        return moments_cpu.moment_step_cpu(self)

    def cuda(self) -> Three:
        from .linear_kl_launch import moment_step_triton

        return moment_step_triton(self)

    def fake(self) -> Three:
        h_s, dtype = self.h_s, accumulation_dtype(self.h_s.dtype)
        return (
            h_s.new_empty((), dtype=dtype),
            h_s.new_empty(self.pairs, dtype=dtype),
            h_s.new_empty((h_s.shape[0] if self.need_dh else 0, h_s.shape[1]), dtype=kept_dtype(h_s.dtype)),
        )

    def keep(self, output: Three) -> Kept:
        return {"dtypes": {"h_s": dtype_if(self.need_dh, self.h_s)}, "h_s": output[2]}

    @staticmethod
    def backward(kept: Kept, total: Tensor | None, *_: Tensor | None) -> dict[str, Tensor | None]:
        return scaled_gradients(total, kept)


@dataclass(frozen=True, kw_only=True, eq=False)
class MomentsOf(Op[Three]):
    """m (N, D), entropy (N,), bias_mean (N,), all in the accumulation dtype. Has no derivative."""

    h_t: Tensor  # (T_t, D_t)
    w_t: Tensor  # (V, D_t)
    w_s: Tensor | None = None  # (V, D)
    bias_t: Tensor | None = None  # (V,)
    bias_s: Tensor | None = None  # (V,)
    rows: Tensor | None = None  # (N,)
    temperature: float = 1.0
    softcap: float = 0.0

    @property
    def count(self) -> int:
        return (self.h_t if self.rows is None else self.rows).shape[0]

    def cpu(self) -> Three:
        return moments_cpu.teacher_moments_cpu(self)

    def cuda(self) -> Three:
        from .linear_kl_launch import teacher_moments_triton

        return teacher_moments_triton(self)

    def fake(self) -> Three:
        dtype = accumulation_dtype(self.h_t.dtype)
        width = (self.w_t if self.w_s is None else self.w_s).shape[1]
        shapes = (self.count, width), (self.count,), (self.count,)
        m, entropy, bias_mean = (self.h_t.new_empty(shape, dtype=dtype) for shape in shapes)
        return m, entropy, bias_mean


difference = Registered(Difference, "linear_kl_difference", errors="linear_kl")
moment_step = Registered(MomentStep, "linear_kl_moments", errors="linear_kl")
moments_of = Registered(MomentsOf, "teacher_moments")
