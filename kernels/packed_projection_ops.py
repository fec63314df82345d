"""The ops of `packed_projection`: one linear layer with everything around it, and its derivative.

Arguments are validated by `packed_projection.py`; values of row numbers and bounds in the kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import packed_projection_cpu as shared
from .gemms import accumulation_dtype
from .op import Kept, Op, Registered

Two = tuple[Tensor, Tensor]
Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _length(embeddings: Tensor | None) -> int:
    return 0 if embeddings is None else embeddings.shape[-2]


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedLinear(Op[Two]):
    """scale · act(norm(x[rows]) wᵀ + bias) between the boundary rows (T_out, D), and act's argument (T or 0, D)."""

    x: Tensor  # (N, E)
    rows: Tensor | None = None  # (T,)
    w: Tensor  # (D, E)
    bias: Tensor | None = None  # (D,)
    norm: str = "none"
    norm_weight: Tensor | None = None  # (E,)
    norm_bias: Tensor | None = None  # (E,)
    eps: float = 0.0
    scale: float = 1.0
    activation: str = "none"
    cu_seqlens: Tensor | None = None  # (B + 1,)
    prefix: Tensor | None = None  # (n, D) or (B, n, D)
    suffix: Tensor | None = None
    dtype: torch.dtype
    need_pre: bool = False

    @property
    def tokens(self) -> int:
        return (self.x if self.rows is None else self.rows).shape[0]

    @property
    def boundaries(self) -> tuple[int, int]:
        """Rows before and after each sequence."""
        return _length(self.prefix), _length(self.suffix)

    @property
    def total(self) -> int:
        """Rows of the result."""
        extra = sum(self.boundaries)
        return self.tokens + ((self.cu_seqlens.shape[0] - 1) * extra if self.cu_seqlens is not None else 0)

    def cpu(self) -> Two:
        return shared.packed_linear_cpu(self)

    def cuda(self) -> Two:
        from .packed_projection_launch import packed_linear_triton

        return packed_linear_triton(self)

    def fake(self) -> Two:
        w, out = self.w, self.w.shape[0]
        return w.new_empty((self.total, out), dtype=self.dtype), w.new_empty((self.tokens if self.need_pre else 0, out))

    def keep(self, output: Two) -> Kept:
        names = ("x", "rows", "w", "norm", "norm_weight", "norm_bias", "eps", "scale", "activation", "cu_seqlens")
        linear = {name: getattr(self, name) for name in names}
        linear["before"], linear["after"] = self.boundaries
        linear["per_sequence"] = [e is not None and e.dim() == 3 for e in (self.prefix, self.suffix)]
        summed = ("bias", "norm_weight", "norm_bias", "prefix", "suffix")
        dtypes = {name: x.dtype for name in summed if (x := getattr(self, name)) is not None}
        return {**linear, "pre": output[1], "dtypes": dtypes}

    @staticmethod
    def backward(kept: Kept, dy: Tensor | None, _: Tensor | None) -> dict[str, Tensor | None]:
        if dy is None:
            return {}
        asked, dtypes = kept.pop("needs"), kept.pop("dtypes")
        need = {"need_dx": asked["x"], "need_dw": asked["w"], "need_db": asked["bias"]}
        need["need_norm"] = asked["norm_weight"] or asked["norm_bias"]
        dx, dw, db, d_norm, d_prefix, d_suffix = packed_linear_backward(dy=dy.contiguous(), **kept, **need)
        gradients = {"x": dx, "w": dw, "bias": db, "prefix": d_prefix, "suffix": d_suffix}
        gradients |= {"norm_weight": d_norm[0], "norm_bias": d_norm[1]}
        return {name: g.to(dtypes.get(name, g.dtype)) for name, g in gradients.items()}


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedLinearBackward(Op[Six]):
    """dx, dw, db, d_norm (2, E), d_prefix, d_suffix; one that is not needed has no elements."""

    dy: Tensor  # (T_out, D)
    x: Tensor  # (N, E)
    rows: Tensor | None = None  # (T,)
    w: Tensor  # (D, E)
    norm: str = "none"
    norm_weight: Tensor | None = None  # (E,)
    norm_bias: Tensor | None = None  # (E,)
    eps: float = 0.0
    scale: float = 1.0
    activation: str = "none"
    pre: Tensor  # (T, D)
    cu_seqlens: Tensor | None = None
    before: int = 0
    after: int = 0
    per_sequence: list[bool]
    need_dx: bool = False
    need_dw: bool = False
    need_db: bool = False
    need_norm: bool = False

    def cpu(self) -> Six:
        return shared.packed_linear_backward(self)

    def fake(self) -> Six:
        dtype = accumulation_dtype(self.w.dtype)
        width_out, width = self.w.shape

        def boundary(length: int, own: bool) -> Tensor:
            shape: tuple[int, ...] = (0, width_out)
            if self.before + self.after:
                assert self.cu_seqlens is not None
                shape = (self.cu_seqlens.shape[0] - 1, length, width_out) if own else (length, width_out)
            return self.dy.new_empty(shape, dtype=dtype)

        return (
            self.x.new_empty((self.x.shape[0] if self.need_dx else 0, width)),
            self.w.new_empty((width_out if self.need_dw else 0, width)),
            self.w.new_empty(width_out if self.need_db else 0, dtype=dtype),
            self.w.new_empty((2, width if self.need_norm else 0), dtype=dtype),
            boundary(self.before, self.per_sequence[0]),
            boundary(self.after, self.per_sequence[1]),
        )


packed_linear = Registered(PackedLinear, "packed_linear", errors="packed_projection")
packed_linear_backward = Registered(PackedLinearBackward, "packed_linear_backward", gradient_of="packed_projection")
