"""Triton path of `linear_ce`: its row kernel, and the launch within `linear_kl_launch`'s chunks.

`ce_rows`  value and gradient of one row. Pass 1 keeps of every four neighbours a running maximum and Σ exp (and Σ z for
           label smoothing), pass 2 writes softmax - q over the logits: 10 bytes per entry (8 read, 2 written).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device_checks import require_rows, require_triton_dtype
from .gemms import mm_f32
from .linear_kl_launch import Five, Pairs, Rows, over_chunks, padded_bias
from .linear_kl_triton import LOG2_E, LOWEST, _lanes, _load_logits
from .tiles import LINEAR_KL, LinearKLTiles, row_of

if TYPE_CHECKING:
    from .linear_ce import CrossEntropy


@triton.jit
def ce_rows(
    z_ptr,  # (C, V) fp32 logits
    grad_ptr,  # (C, V) gradient, may share the logits' memory
    bias_ptr,  # (padded,) fp32 or unused
    targets_ptr,  # (C,)
    weight_ptr,  # (C,) fp32: rows of weight 0 get value 0 and gradient 0
    value_ptr,  # (C,) fp32
    stride_z,
    stride_g,
    vocab,
    padded,
    softcap,
    smoothing,
    grad_scale,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    NEED_GRAD: tl.constexpr,
    BARRIER: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_row = z_ptr + row * stride_z
    grad_row = grad_ptr + row * stride_g
    target = tl.load(targets_ptr + row)
    lanes = _lanes(BLOCK_V)
    stop = tl.where(tl.load(weight_ptr + row) == 0.0, 0, vocab)
    at_target = _load_logits(z_row, bias_ptr, target, vocab, padded, softcap, HAS_BIAS, HAS_SOFTCAP)

    running = tl.full((BLOCK_V // 4,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_V // 4,), tl.float32)
    mean = tl.zeros((BLOCK_V // 4,), tl.float32)
    for start in range(0, stop, BLOCK_V):
        offs_v = start + lanes
        z = _load_logits(z_row, bias_ptr, offs_v, vocab, padded, softcap, HAS_BIAS, HAS_SOFTCAP)
        new = tl.maximum(running, tl.max(z, 1))
        total = total * tl.exp2((running - new) * LOG2_E) + tl.sum(tl.exp2((z - new[:, None]) * LOG2_E), 1)
        if HAS_SMOOTHING:
            mean += tl.sum(tl.where(offs_v < vocab, z, 0.0), 1)
        running = new
    top = tl.max(running, 0)
    whole = tl.sum(total * tl.exp2((running - top) * LOG2_E), 0)
    value = (1.0 - smoothing) * (top - at_target) + tl.log(whole)
    if HAS_SMOOTHING:
        value += smoothing * (top - tl.sum(mean, 0) / vocab)
    tl.store(value_ptr + row, tl.where(stop == 0, 0.0, value))

    if NEED_GRAD:
        norm = grad_scale / whole
        at_all = 0.0
        if HAS_SMOOTHING:
            at_all = smoothing / vocab * grad_scale
        flat = tl.arange(0, BLOCK_V)
        for start in range(0, stop, BLOCK_V):
            offs_v = start + flat
            z = _load_logits(z_row, bias_ptr, offs_v, vocab, padded, softcap, HAS_BIAS, HAS_SOFTCAP)
            grad = tl.exp2((z - top) * LOG2_E) * norm - at_all
            grad -= tl.where(offs_v == target, (1.0 - smoothing) * grad_scale, 0.0)
            if HAS_SOFTCAP:
                tanh = tl.where(offs_v < vocab, z * (1.0 / softcap), 0.0)
                grad *= 1.0 - tanh * tanh
            if BARRIER:
                tl.debug_barrier()
            tl.store(grad_row + offs_v, grad.to(grad_ptr.dtype.element_ty), mask=offs_v < padded)
        nothing = tl.zeros((BLOCK_V,), grad_ptr.dtype.element_ty)
        for start in range(0, vocab - stop, BLOCK_V):
            tl.store(grad_row + start + flat, nothing, mask=start + flat < padded)


def cross_entropy_triton(a: CrossEntropy, tiles: LinearKLTiles | None = None) -> Five:
    """As `linear_ce_cpu.cross_entropy_cpu`, 2 GEMMs (3 with a head that trains) and one row kernel per chunk."""
    require_triton_dtype("h", a.h_s)
    tiles = tiles or row_of(LINEAR_KL, a.h_s.device)
    vocab, tile = a.w_s.shape[0], tiles.kl_rows
    require_rows(a.rows_s, a.h_s.shape[0], "rows")
    require_rows(a.rows_t, vocab, "targets")
    pairs = Pairs(a)
    assert pairs.rows_t is not None
    bias_ptr = padded_bias(a.bias_s, a.h_s.new_empty(1, dtype=torch.float32))
    targets = pairs.rows_t.contiguous()

    def logits(x: Tensor, start: int, buffer: Tensor) -> None:
        mm_f32(x, a.w_s.t(), out=buffer[:, :vocab])

    def row_kernel(r: Rows) -> None:
        n, padded = r.logits.shape
        ce_rows[(n,)](
            r.logits, r.grad, bias_ptr, targets[r.first :], r.weights, r.values, padded, r.grad.stride(0), vocab,
            padded, a.softcap, a.smoothing, r.grad_scale,
            HAS_BIAS=a.bias_s is not None, HAS_SOFTCAP=a.softcap > 0, HAS_SMOOTHING=a.smoothing > 0,
            NEED_GRAD=a.any_gradient, BARRIER=r.barrier, BLOCK_V=tile.block, **tile.launch,
        )  # fmt: skip

    return over_chunks(a, pairs, tiles, 1, logits, row_kernel, 1.0)
