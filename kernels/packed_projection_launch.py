"""Launches the CUDA paths of `packed_projection`: the fused Triton GEMM, or `norm_rows` and cuBLAS.

The library's product is the faster of the two, so it is taken wherever it needs no pass over the result behind it: that
is all the fused GEMM saves. Gather, norm and the places of boundary rows are made on the narrow input; bias and scale
are the product's own. An activation or a cast is a pass, and `tiles.PACKED_PROJECTION` says up to which width of the
input it decides. Tests run these functions on CPU tensors in the Triton interpreter.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .device_checks import require_rows, require_triton_dtype
from .hidden_mse_launch import MAX_WIDTH, power_of_two
from .packed_projection_cpu import ACTIVATIONS, gathered_rows, place_boundaries, result_rows
from .packed_projection_triton import fold_norm, norm_rows, projection_gemm
from .tiles import PACKED_PROJECTION, ProjectionTiles, row_of

if TYPE_CHECKING:
    from .packed_projection_ops import PackedLinear


def _norm(
    a: PackedLinear, rows: Tensor | None, tokens: int, dtype: torch.dtype, store: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(normalised rows (T, E) in `dtype` if `store`, 1/std (T,), mean (T,))."""
    x, weight, bias = a.x, a.norm_weight if store else None, a.norm_bias if store else None
    width = x.shape[1]
    out = x.new_empty(tokens if store else 0, width, dtype=dtype)
    rstd, mean = (x.new_empty(tokens, dtype=torch.float32) for _ in range(2))
    block = power_of_two(width)
    if tokens:
        norm_rows[(tokens,)](
            x, x if rows is None else rows, x if weight is None else weight, x if bias is None else bias, out, rstd,
            mean, x.stride(0), width, a.eps,
            NORM=a.norm, HAS_ROWS=rows is not None, HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None,
            STORE_ROWS=store, BLOCK_E=block, num_warps=min(16, max(1, block // 512)),
        )  # fmt: skip
    return out, rstd, mean


def packed_linear_triton(
    a: PackedLinear, fused: bool | None = None, tiles: ProjectionTiles | None = None
) -> tuple[Tensor, Tensor]:
    """As `packed_projection_cpu.packed_linear_cpu`; `fused` overrides the choice of the tile table."""
    tiles = tiles or row_of(PACKED_PROJECTION, a.x.device)
    require_triton_dtype("x", a.x)
    require_triton_dtype("weight", a.w)
    width = a.w.shape[1]
    if width > MAX_WIDTH:
        raise ValueError(f"x is {width} wide, but the kernels take at most {MAX_WIDTH}")
    require_rows(a.rows, a.x.shape[0], "rows")
    x, w = (value if value.stride(1) == 1 else value.contiguous() for value in (a.x, a.w))
    a = replace(a, x=x, w=w)
    placed = result_rows(a)
    if fused is None:
        # fp32 operands would lose their precision (TF32) or the tensor cores (IEEE): left to the library's setting.
        passes = int(a.activation != "none") + int(a.dtype != w.dtype)
        fused = x.dtype == w.dtype != torch.float32 and width <= tiles.fused_up_to * passes
    out_rows = None if placed is None else placed[0]
    if fused or a.tokens == 0:
        y, pre = _fused(a, out_rows, tiles)
    else:
        source = a.rows
        if out_rows is not None:  # boundary rows are projected from row 0 and overwritten: a few more rows, no pass
            own_rows = torch.arange(a.tokens, device=x.device) if a.rows is None else a.rows.long()
            source = own_rows.new_zeros(a.total).index_copy_(0, out_rows, own_rows)
        if a.norm == "none":
            own = gathered_rows(x, source, 0, a.total).to(w.dtype)
        else:
            own, _, _ = _norm(a, source, a.total, w.dtype, store=True)
        y, pre = _library(own, a, out_rows)
    if placed is not None:
        place_boundaries(y, a, *placed[1:])
    return y, pre


def _library(own: Tensor, a: PackedLinear, out_rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """scale · act(own wᵀ + bias) (T_out, D), and the argument of act (T or 0, D)."""
    w, scale, activation, need_pre = a.w, a.scale, a.activation, a.need_pre
    bias = None if a.bias is None else a.bias.to(w.dtype)
    if activation == "none" and scale != 1.0 and not need_pre:
        # alpha scales the fp32 accumulators; a bias with beta = 1 is added by the GEMM itself.
        added = w.new_empty(w.shape[0]) if bias is None else bias * scale
        z = torch.addmm(added, own, w.t(), beta=0 if bias is None else 1, alpha=scale)
        return z.to(a.dtype), z.new_empty(0, w.shape[0])
    z = torch.nn.functional.linear(own, w, bias)
    y = ACTIVATIONS[activation](z)
    y = (y if scale == 1.0 else y * scale).to(a.dtype)
    if not need_pre:
        return y, z.new_empty(0, w.shape[0])
    pre = z if out_rows is None else z[out_rows]
    return y, pre.clone() if pre is y else pre


def _fused(a: PackedLinear, out_rows: Tensor | None, tiles: ProjectionTiles) -> tuple[Tensor, Tensor]:
    w, bias, norm_weight, norm_bias, tokens = a.w, a.bias, a.norm_weight, a.norm_bias, a.tokens
    width_out, width = w.shape
    pre = w.new_empty(tokens if a.need_pre else 0, width_out)
    y = w.new_empty(a.total, width_out, dtype=a.dtype)
    x = a.x.to(w.dtype)
    rstd = mean = sums = x
    folded, folded_bias = w, None if bias is None else bias.float()
    if a.norm != "none":
        _, rstd, mean = _norm(replace(a, x=x), a.rows, tokens, w.dtype, store=False)
        folded = w if norm_weight is None else torch.empty_like(w, memory_format=torch.contiguous_format)
        sums, folded_bias = (w.new_empty(width_out, dtype=torch.float32) for _ in range(2))
        block = power_of_two(width)
        fold_norm[(width_out,)](
            w, w if bias is None else bias, w if norm_weight is None else norm_weight,
            w if norm_bias is None else norm_bias, folded, sums, folded_bias, w.stride(0), width,
            HAS_BIAS=bias is not None, HAS_WEIGHT=norm_weight is not None, HAS_NORM_BIAS=norm_bias is not None,
            BLOCK_E=block, num_warps=min(16, max(1, block // 512)),
        )  # fmt: skip
    tile = tiles.gemm if a.activation == "none" else tiles.activated
    if tokens == 0 or width_out == 0:
        return y, pre
    grid = (-(-tokens // tile.block_t) * -(-width_out // tile.block_d),)
    projection_gemm[grid](
        x, x if a.rows is None else a.rows, folded, sums, folded if folded_bias is None else folded_bias, rstd, mean,
        x if out_rows is None else out_rows, y, pre, x.stride(0), folded.stride(0), tokens, width_out, width, a.scale,
        NORM=a.norm, ACTIVATION=a.activation, HAS_ROWS=a.rows is not None, HAS_OUT_ROWS=out_rows is not None,
        HAS_BIAS=folded_bias is not None, STORE_PRE=pre.shape[0] > 0, UPCAST=x.device.type == "cpu",
        EVEN_E=width % tile.block_e == 0, BLOCK_T=tile.block_t, BLOCK_D=tile.block_d, BLOCK_E=tile.block_e,
        GROUP_T=tile.group_t, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return y, pre
