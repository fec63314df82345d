"""x Wᵀ where both operands are fp8 (e4m3), every row of x and of W with a scale of its own, and W never changes.

    y[t, n] = s[t] c[n] Σ_k q[t, k] w[n, k],    q = e4m3(x / s),  s[t] = 2^⌈log2(max_k |x[t, k]| / 448)⌉

The gradient of x is the same product of another pair, dy (T, N) and Wᵀ (K, N), so that one op serves both. Hopper's fp8
instructions read both operands along the summed dimension: W and Wᵀ are each kept in rows.

Scales are powers of two. Scaling then rounds nothing, W and Wᵀ have the same values (but for those below 2^-13 of the
largest in their row or column), and the backward is that of the weights of the forward. Of e4m3's range, 2^18 from its
least to its largest number, they leave at least 2^17. SmolLM2's weights are rounded by 2.7 % with them and by 2.6 %
with exact scales; its activations by 2.6 and 2.2 %, since an exact scale leaves each row's largest number as it is.

Gradients are e4m3 too and not e5m2: a scale of its own gives every row the range, and there is a third bit of mantissa.
Of an adapter's gradient 2.4 % are lost to the backward in e4m3, 3.6 % in e5m2 (trials/fp8.py and LOG.md of benchmarks).

Bytes: 3 per element of x to quantise it, 1 of q and w, 2 of y. FLOPs: 2 T K N.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .op import Op, Registered

FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
MULTIPLE = 16  # widths that the hardware's product takes


def row_scales(x: Tensor) -> Tensor:
    """Scales (T,) fp32 of the rows of x (T, K): least powers of two that bring them within 448, at least 2^-126."""
    most = x.abs().amax(1).float() * (1 / LARGEST)
    # the exponent, one up where there is a fraction; whole numbers give the kernel on a GPU the same bits
    up = (most.view(torch.int32) + 0x7FFFFF) & 0x7F800000
    return up.clamp(min=0x800000).view(torch.float32)


def reference_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(q (T, K) e4m3, s (T,) fp32) with q s ≈ x (T, K), to 2^-4 of each number and 2^-10 of its row's scale.

    A row with a NaN or an infinite number has a NaN in q, and so all products of it are NaN.
    """
    scale = row_scales(x)
    return (x.float() * scale.reciprocal()[:, None]).to(FP8), scale


def reference(x: Tensor, w: Tensor, w_scale: Tensor) -> Tensor:
    """What `fp8_linear` computes, (T, N) in fp64: x (T, K) rounded to e4m3, times w (N, K), bytes, scales (N,)."""
    return dequantised_rows(*reference_rows(x)) @ dequantised_rows(w.view(FP8), w_scale).t()


def dequantised_rows(q: Tensor, scale: Tensor) -> Tensor:
    """The numbers (T, K), fp64, of e4m3 with a scale for every row."""
    return q.double() * scale[:, None].double()


@cache
def _values() -> Tensor:
    """The 256 numbers of e4m3 by their bytes, in bf16, which has them all. torch's own conversion is 6 times slower."""
    return torch.arange(256, dtype=torch.uint8).view(FP8).to(torch.bfloat16)


def _widened(q: Tensor) -> Tensor:
    return _values().index_select(0, q.int().view(-1)).view(q.shape)


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantiseRows(Op[tuple[Tensor, Tensor]]):
    """(bytes (T, K) of q, scales (T,) fp32), see `reference_rows`; torch's checks of ops have no e4m3."""

    x: Tensor  # (T, K)

    def cpu(self) -> tuple[Tensor, Tensor]:
        q, scale = reference_rows(self.x)
        return q.view(torch.uint8), scale

    def cuda(self) -> tuple[Tensor, Tensor]:
        from .fp8_linear_triton import quantise_rows_triton

        return quantise_rows_triton(self.x)

    def fake(self) -> tuple[Tensor, Tensor]:
        x = self.x
        return x.new_empty(x.shape, dtype=torch.uint8), x.new_empty(x.shape[0], dtype=torch.float32)


@dataclass(frozen=True, kw_only=True, eq=False)
class Fp8Product(Op[Tensor]):
    """y (T, N) bf16. fast: sums in the tensor cores' own registers, of about 14 bits; without effect on the CPU.

    On the CPU the operands are widened to bf16, which has all of e4m3's numbers: bf16 products with sums in fp32, which
    scales that are powers of two leave as they are.
    """

    q: Tensor  # (T, K) uint8, the bytes of e4m3
    scale: Tensor  # (T,) fp32
    w: Tensor  # (N, K) uint8
    w_scale: Tensor  # (N,) fp32
    fast: bool

    def cpu(self) -> Tensor:
        return F.linear(_widened(self.q), _widened(self.w)).mul_(self.scale[:, None]).mul_(self.w_scale)

    def cuda(self) -> Tensor:
        if not self.q.shape[0]:
            return self.fake()
        q, w, scales = self.q.view(FP8), self.w.view(FP8), (self.scale[:, None], self.w_scale[None])
        # only bf16 results are to be had on every GPU with fp8
        return torch._scaled_mm(q, w.t(), *scales, out_dtype=torch.bfloat16, use_fast_accum=self.fast)

    def fake(self) -> Tensor:
        return self.q.new_empty(self.q.shape[0], self.w.shape[0], dtype=torch.bfloat16)


_quantise_rows = Registered(QuantiseRows, "quantise_rows")
fp8_product = Registered(Fp8Product, "fp8_product")


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(bytes (T, K) of x (T, K) in e4m3, scales (T,) fp32), see `reference_rows`."""
    return _quantise_rows(x=x)


def fp8_linear(x: Tensor, w: Tensor, w_scale: Tensor, *, fast: bool) -> Tensor:
    """y (T, N) of x's dtype, rounded to bf16: x (T, K) times w (N, K), bytes of e4m3, and its scales (N,).

    Without a gradient.

    Raises:
        ValueError: K or N is no multiple of 16, or the shapes do not fit.
    """
    (rows, width), (out, depth) = x.shape, w.shape
    if width != depth or w_scale.shape != (out,):
        raise ValueError(f"x is {rows} x {width}, w {out} x {depth}, w_scale {tuple(w_scale.shape)}: they do not fit")
    if width % MULTIPLE or out % MULTIPLE:
        raise ValueError(f"w is {out} x {depth}: fp8 products take multiples of {MULTIPLE}")
    q, scale = quantise_rows(x)
    return fp8_product(q=q, scale=scale, w=w, w_scale=w_scale, fast=fast).to(x.dtype)
