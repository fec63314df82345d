"""Rows to fp8 on a GPU: one program a row, read once where it fits into registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device_checks import require_triton_dtype
from .hidden_mse_launch import MAX_WIDTH, power_of_two


@triton.jit
def _largest(x):
    """Of NaN nothing is said; the number itself stays NaN."""
    return tl.max(tl.abs(x), 0)


@triton.jit
def fp8_rows(
    x_ptr,  # (T, K)
    q_ptr,  # (T, K) e4m3
    scale_ptr,  # (T,) fp32
    stride_x,
    width,
    WHOLE: tl.constexpr,  # a block holds a row
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_x
    q_ptr += row * width
    offs_k = tl.arange(0, BLOCK_K)
    x = tl.load(x_ptr + offs_k, mask=offs_k < width, other=0.0).to(tl.float32)
    most = _largest(x)
    if not WHOLE:
        for start in range(BLOCK_K, width, BLOCK_K):
            offs = start + offs_k
            part = tl.load(x_ptr + offs, mask=offs < width, other=0.0).to(tl.float32)
            most = tl.maximum(most, _largest(part))
    # see fp8_linear.row_scales
    up = ((most * (1 / 448.0)).to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
    scale = tl.maximum(up, 0x800000).to(tl.float32, bitcast=True)
    tl.store(scale_ptr + row, scale)
    inverse = tl.div_rn(1.0, scale)
    tl.store(q_ptr + offs_k, (x * inverse).to(q_ptr.dtype.element_ty), mask=offs_k < width)
    if not WHOLE:
        for start in range(BLOCK_K, width, BLOCK_K):
            offs = start + offs_k
            part = tl.load(x_ptr + offs, mask=offs < width, other=0.0).to(tl.float32)
            tl.store(q_ptr + offs, (part * inverse).to(q_ptr.dtype.element_ty), mask=offs < width)


def warps(block: int) -> int:
    """8 numbers a thread and load, up to 8 loads."""
    return min(16, max(1, block // 1024))


def quantise_rows_triton(x: Tensor, block: int | None = None) -> tuple[Tensor, Tensor]:
    """As `fp8_linear.quantise_rows`. Tests run it on CPU tensors in the Triton interpreter.

    Raises:
        TypeError: x is of a dtype that the kernel does not read.
    """
    require_triton_dtype("x", x)
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, width = x.shape
    q = x.new_empty(rows, width, dtype=torch.float8_e4m3fn)
    scale = x.new_empty(rows, dtype=torch.float32)
    block = block or min(power_of_two(width), MAX_WIDTH)
    if rows:
        fp8_rows[(rows,)](x, q, scale, x.stride(0), width, WHOLE=width <= block, BLOCK_K=block, num_warps=warps(block))
    return q.view(torch.uint8), scale
