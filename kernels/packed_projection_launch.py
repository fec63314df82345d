"""Launches the CUDA paths of `packed_projection`: the fused Triton GEMM, or `norm_rows` and cuBLAS.

The library's product is the faster of the two, so it is taken wherever it needs no pass over the result behind it: that
is all the fused GEMM saves. Gather, norm and the places of boundary rows are made on the narrow input; bias and scale
are the product's own. An activation or a cast is a pass, and `tiles.PACKED_PROJECTION` says up to which width of the
input it decides. Tests run these functions on CPU tensors in the Triton interpreter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .device_checks import require_rows
from .hidden_mse_launch import MAX_WIDTH, power_of_two
from .packed_projection_cpu import ACTIVATIONS, boundary_rows, check_boundaries, gathered_rows, place_boundaries
from .packed_projection_triton import fold_norm, norm_rows, projection_gemm
from .tiles import PACKED_PROJECTION, ProjectionTiles, architecture


def _tiles(device: torch.device) -> ProjectionTiles:
    table = PACKED_PROJECTION
    return table.get(architecture(), table["default"]) if device.type == "cuda" else table["default"]


def _norm(
    x: Tensor, rows: Tensor | None, tokens: int, norm: str, weight: Tensor | None, bias: Tensor | None, eps: float,
    dtype: torch.dtype, store: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(normalised rows (T, E) if `store`, 1/std (T,), mean (T,))."""
    width = x.shape[1]
    out = x.new_empty(tokens if store else 0, width, dtype=dtype)
    rstd, mean = (x.new_empty(tokens, dtype=torch.float32) for _ in range(2))
    block = power_of_two(width)
    if tokens:
        norm_rows[(tokens,)](
            x, x if rows is None else rows, x if weight is None else weight, x if bias is None else bias, out, rstd,
            mean, x.stride(0), width, eps,
            NORM=norm, HAS_ROWS=rows is not None, HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None,
            STORE_ROWS=store, BLOCK_E=block, num_warps=min(16, max(1, block // 512)),
        )  # fmt: skip
    return out, rstd, mean


def packed_linear_triton(
    x: Tensor,  # (N, E)
    rows: Tensor | None,  # (T,)
    w: Tensor,  # (D, E)
    bias: Tensor | None,  # (D,)
    norm: str,
    norm_weight: Tensor | None,  # (E,)
    norm_bias: Tensor | None,  # (E,)
    eps: float,
    scale: float,
    activation: str,
    cu_seqlens: Tensor | None,  # (B + 1,)
    prefix: Tensor | None,  # (n, D) or (B, n, D)
    suffix: Tensor | None,
    dtype: torch.dtype,
    need_pre: bool,
    fused: bool | None = None,
    tiles: ProjectionTiles | None = None,
) -> tuple[Tensor, Tensor]:
    """As `packed_projection_cpu.packed_linear_cpu`; `fused` overrides the choice of the tile table."""
    tiles = tiles or _tiles(x.device)
    for name, value in (("x", x), ("weight", w)):
        if value.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(f"{name} is {value.dtype}, but on {value.device.type} the kernels take fp32, bf16 or fp16")
    width_out, width = w.shape
    if width > MAX_WIDTH:
        raise ValueError(f"x is {width} wide, but the kernels take at most {MAX_WIDTH}")
    require_rows(rows, x.shape[0], "rows")
    x, w = (value if value.stride(1) == 1 else value.contiguous() for value in (x, w))
    tokens = x.shape[0] if rows is None else rows.shape[0]
    before, after = (0 if e is None else e.shape[-2] for e in (prefix, suffix))
    out_rows, total = None, tokens
    if before + after:
        assert cu_seqlens is not None
        check_boundaries(cu_seqlens, tokens)
        out_rows, *placed = boundary_rows(cu_seqlens, tokens, before, after)
        total += (cu_seqlens.shape[0] - 1) * (before + after)
    if fused is None:
        # fp32 operands would lose their precision (TF32) or the tensor cores (IEEE): left to the library's setting.
        passes = int(activation != "none") + int(dtype != w.dtype)
        fused = x.dtype == w.dtype != torch.float32 and width <= tiles.fused_up_to * passes
    if fused or tokens == 0:
        pre = w.new_empty(tokens if need_pre else 0, width_out)
        y = w.new_empty(total, width_out, dtype=dtype)
        _fused(x, rows, w, bias, norm, norm_weight, norm_bias, eps, scale, activation, out_rows, y, pre, tokens, tiles)
    else:
        source = rows
        if out_rows is not None:  # boundary rows are projected from row 0 and overwritten: a few more rows, no pass
            own_rows = torch.arange(tokens, device=x.device) if rows is None else rows.long()
            source = own_rows.new_zeros(total).index_copy_(0, out_rows, own_rows)
        if norm == "none":
            own = gathered_rows(x, source, 0, total).to(w.dtype)
        else:
            own, _, _ = _norm(x, source, total, norm, norm_weight, norm_bias, eps, w.dtype, True)
        y, pre = _library(own, w, bias, scale, activation, dtype, out_rows, need_pre)
    if before + after:
        for embeddings, at in zip((prefix, suffix), placed):
            if embeddings is not None:
                place_boundaries(y, at, embeddings)
    return y, pre


def _library(
    own: Tensor, w: Tensor, bias: Tensor | None, scale: float, activation: str, dtype: torch.dtype,
    out_rows: Tensor | None, need_pre: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """scale · act(own wᵀ + bias) (T_out, D) in `dtype`, and the argument of act (T or 0, D)."""
    bias = None if bias is None else bias.to(w.dtype)
    if activation == "none" and scale != 1.0 and not need_pre:
        # alpha scales the fp32 accumulators; a bias with beta = 1 is added by the GEMM itself.
        added = w.new_empty(w.shape[0]) if bias is None else bias * scale
        z = torch.addmm(added, own, w.t(), beta=0 if bias is None else 1, alpha=scale)
        return z.to(dtype), z.new_empty(0, w.shape[0])
    z = torch.nn.functional.linear(own, w, bias)
    y = ACTIVATIONS[activation](z)
    y = (y if scale == 1.0 else y * scale).to(dtype)
    if not need_pre:
        return y, z.new_empty(0, w.shape[0])
    pre = z if out_rows is None else z[out_rows]
    return y, pre.clone() if pre is y else pre


def _fused(
    x: Tensor, rows: Tensor | None, w: Tensor, bias: Tensor | None, norm: str, norm_weight: Tensor | None,
    norm_bias: Tensor | None, eps: float, scale: float, activation: str, out_rows: Tensor | None, y: Tensor,
    pre: Tensor, tokens: int, tiles: ProjectionTiles,
) -> None:  # fmt: skip
    width_out, width = w.shape
    rstd = mean = sums = x
    if x.dtype != w.dtype:
        x = x.to(w.dtype)
    folded, folded_bias = w, None if bias is None else bias.float()
    if norm != "none":
        _, rstd, mean = _norm(x, rows, tokens, norm, None, None, eps, w.dtype, False)
        folded = w if norm_weight is None else torch.empty_like(w, memory_format=torch.contiguous_format)
        sums, folded_bias = (w.new_empty(width_out, dtype=torch.float32) for _ in range(2))
        block = power_of_two(width)
        fold_norm[(width_out,)](
            w, w if bias is None else bias, w if norm_weight is None else norm_weight,
            w if norm_bias is None else norm_bias, folded, sums, folded_bias, w.stride(0), width,
            HAS_BIAS=bias is not None, HAS_WEIGHT=norm_weight is not None, HAS_NORM_BIAS=norm_bias is not None,
            BLOCK_E=block, num_warps=min(16, max(1, block // 512)),
        )  # fmt: skip
    tile = tiles.gemm if activation == "none" else tiles.activated
    if tokens == 0 or width_out == 0:
        return
    grid = (-(-tokens // tile.block_t) * -(-width_out // tile.block_d),)
    projection_gemm[grid](
        x, x if rows is None else rows, folded, sums, folded if folded_bias is None else folded_bias, rstd, mean,
        x if out_rows is None else out_rows, y, pre, x.stride(0), folded.stride(0), tokens, width_out, width, scale,
        NORM=norm, ACTIVATION=activation, HAS_ROWS=rows is not None, HAS_OUT_ROWS=out_rows is not None,
        HAS_BIAS=folded_bias is not None, STORE_PRE=pre.shape[0] > 0, UPCAST=x.device.type == "cpu",
        EVEN_E=width % tile.block_e == 0, BLOCK_T=tile.block_t, BLOCK_D=tile.block_d, BLOCK_E=tile.block_e,
        GROUP_T=tile.group_t, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
