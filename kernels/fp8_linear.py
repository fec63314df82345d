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

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .device_checks import on_device_of_arguments

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


@torch.library.custom_op("mtllm_fast::quantise_rows", mutates_args=(), device_types="cpu")
def quantise_rows(
    x: Tensor,  # (T, K)
) -> tuple[Tensor, Tensor]:
    """(bytes (T, K) of q, scales (T,) fp32), see `reference_rows`; torch's checks of ops have no e4m3."""
    q, scale = reference_rows(x)
    return q.view(torch.uint8), scale


@quantise_rows.register_kernel("cuda")
@on_device_of_arguments
def _(x):
    from .fp8_linear_triton import quantise_rows_triton

    return quantise_rows_triton(x)


@quantise_rows.register_fake
def _(x):
    return x.new_empty(x.shape, dtype=torch.uint8), x.new_empty(x.shape[0], dtype=torch.float32)


@torch.library.custom_op("mtllm_fast::fp8_product", mutates_args=(), device_types="cpu")
def fp8_product(
    q: Tensor,  # (T, K) uint8, the bytes of e4m3
    scale: Tensor,  # (T,) fp32
    w: Tensor,  # (N, K) uint8
    w_scale: Tensor,  # (N,) fp32
    fast: bool,
) -> Tensor:
    """y (T, N) bf16. fast: sums in the tensor cores' own registers, of about 14 bits; without effect on the CPU.

    On the CPU the operands are widened to bf16, which has all of e4m3's numbers: bf16 products with sums in fp32, which
    scales that are powers of two leave as they are.
    """
    with torch.autocast("cpu", enabled=False):
        y = F.linear(_widened(q), _widened(w))
    return y.mul_(scale[:, None]).mul_(w_scale)


@fp8_product.register_kernel("cuda")
@on_device_of_arguments
def _(q, scale, w, w_scale, fast):
    if not q.shape[0]:
        return q.new_empty(0, w.shape[0], dtype=torch.bfloat16)
    # only bf16 results are to be had on every GPU with fp8
    q, w = q.view(FP8), w.view(FP8)
    return torch._scaled_mm(q, w.t(), scale[:, None], w_scale[None], out_dtype=torch.bfloat16, use_fast_accum=fast)


@fp8_product.register_fake
def _(q, scale, w, w_scale, fast):
    return q.new_empty(q.shape[0], w.shape[0], dtype=torch.bfloat16)


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
    return fp8_product(q, scale, w, w_scale, fast).to(x.dtype)
