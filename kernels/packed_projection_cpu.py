"""CPU kernels of `packed_projection`, and the backward that every device shares: GEMMs around row blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .device_checks import require
from .gemms import accumulation_dtype, cpu_nt, cpu_tn, mm_f32_add
from .linear_kl_cpu import check_rows
from .segments import assert_values, check_values

if TYPE_CHECKING:
    from .packed_projection_ops import PackedLinear, PackedLinearBackward

BLOCK_ROWS = 512  # rows per GEMM on the CPU: enough to pay for packing the weight, few enough to stay in cache

ACTIVATIONS = {"none": lambda z: z, "relu": F.relu, "gelu": F.gelu, "silu": F.silu}


def normalised(block: Tensor, norm: str, eps: float) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(rows of mean square 1, 1/rms or 1/std (n,), mean (n,)) of a block in the accumulation dtype."""
    if norm == "none":
        return block, None, None
    if norm == "rms":
        rstd = torch.linalg.vector_norm(block, dim=1).square_().div_(block.shape[1]).add_(eps).rsqrt_()
        return block * rstd.unsqueeze(1), rstd, None
    out, mean, rstd = torch.native_layer_norm(block, (block.shape[1],), None, None, eps)
    return out, rstd.view(-1), mean.view(-1)


def boundary_rows(cu_seqlens: Tensor, tokens: int, before: int, after: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of the result that hold tokens (T,), prefixes (B, before) and suffixes (B, after)."""
    device = cu_seqlens.device
    cu = cu_seqlens.long()
    count = cu.shape[0] - 1
    index = torch.arange(tokens, device=device)
    own = torch.searchsorted(cu[1:].contiguous(), index, right=True)
    first = cu[:-1] + torch.arange(count, device=device) * (before + after)
    prefix = first.unsqueeze(1) + torch.arange(before, device=device)
    suffix = (first + cu.diff() + before).unsqueeze(1) + torch.arange(after, device=device)
    return index + own * (before + after) + before, prefix, suffix


def check_boundaries(cu_seqlens: Tensor, tokens: int) -> None:
    """The sequences must hold every token, or the rows of the result would have gaps."""
    if cu_seqlens.is_cuda:
        assert_values(cu_seqlens, "mean", tokens)
        require(cu_seqlens[-1] == tokens, f"cu_seqlens must end at {tokens}, the number of tokens")
        return
    check_values(cu_seqlens, "mean", tokens)
    if int(cu_seqlens[-1]) != tokens:
        raise ValueError(f"cu_seqlens ends at {int(cu_seqlens[-1])}, but there are {tokens} tokens")


def result_rows(a: PackedLinear) -> tuple[Tensor, Tensor, Tensor] | None:
    """`boundary_rows` of a call, checked; None where it has no boundary rows."""
    if not any(a.boundaries):
        return None
    assert a.cu_seqlens is not None
    check_boundaries(a.cu_seqlens, a.tokens)
    return boundary_rows(a.cu_seqlens, a.tokens, *a.boundaries)


def place_boundaries(y: Tensor, a: PackedLinear, prefix_rows: Tensor, suffix_rows: Tensor) -> None:
    """y[rows (B, n)] = embeddings, (n, D) for every sequence or (B, n, D), of prefix and suffix."""
    for embeddings, rows in ((a.prefix, prefix_rows), (a.suffix, suffix_rows)):
        if embeddings is not None:
            values = embeddings.to(y.dtype).expand(*rows.shape, y.shape[1]).reshape(-1, y.shape[1])
            y.index_copy_(0, rows.flatten(), values)


def gathered_rows(x: Tensor, rows: Tensor | None, start: int, stop: int) -> Tensor:
    return x[start:stop] if rows is None else x.index_select(0, rows[start:stop])


def _linear(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    if x.dtype in (torch.float32, torch.float64):
        return cpu_nt(x.contiguous(), w, bias)
    return F.linear(x, w, bias)


def packed_linear_cpu(a: PackedLinear) -> tuple[Tensor, Tensor]:
    """scale · act(norm(x[rows]) wᵀ + bias) between the boundary rows (T_out, D), and the argument of act (T, D)."""
    x, rows, w, scale, activation, tokens, need_pre = a.x, a.rows, a.w, a.scale, a.activation, a.tokens, a.need_pre
    check_rows(rows, x.shape[0], "rows")
    bias = None if a.bias is None else a.bias.to(w.dtype)
    pre = w.new_empty(tokens if need_pre else 0, w.shape[0])
    placed = result_rows(a)
    if placed is None and a.norm == "none" and activation == "none" and a.dtype == w.dtype:
        y = _linear(gathered_rows(x, rows, 0, tokens).to(w.dtype), w, bias)
        return (y if scale == 1.0 else y.mul_(scale)), pre
    y = w.new_empty(a.total, w.shape[0], dtype=a.dtype)
    if placed is not None:
        place_boundaries(y, a, *placed[1:])
    for start in range(0, tokens, BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, tokens)
        block = gathered_rows(x, rows, start, stop)
        if a.norm != "none":
            unit, _, _ = normalised(block.to(accumulation_dtype(x.dtype)), a.norm, a.eps)
            block = weighted(unit, a.norm_weight, a.norm_bias)
        z = _linear(block.to(w.dtype), w, bias)
        if need_pre:
            pre[start:stop] = z
        z = ACTIVATIONS[activation](z)
        z = z if scale == 1.0 else z.mul_(scale) if activation == "none" else z * scale
        if placed is None:
            y[start:stop] = z
        else:
            y.index_copy_(0, placed[0][start:stop], z.to(a.dtype))
    return y, pre


def weighted(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """x · weight + bias, in place where it is the caller's own copy."""
    if weight is not None:
        x = x.mul_(weight.to(x.dtype))
    return x if bias is None else x.add_(bias.to(x.dtype))


def _through_activation(dy: Tensor, z: Tensor, activation: str) -> Tensor:
    """dy · act'(z)."""
    if activation == "relu":
        return torch.ops.aten.threshold_backward(dy, z, 0)
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(dy, z)
    return torch.ops.aten.silu_backward(dy, z)


def packed_linear_backward(a: PackedLinearBackward) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx (N, E), dw (D, E), db (D,), d_norm (2, E) of weight and bias, d_prefix, d_suffix; fp32 sums.

    Normalised rows are computed again, block by block: saving them would cost as much memory as the encoder states.
    """
    dy, x, rows, w, norm, norm_weight, norm_bias = a.dy, a.x, a.rows, a.w, a.norm, a.norm_weight, a.norm_bias
    need_dx, need_dw, need_db, need_norm = a.need_dx, a.need_dw, a.need_db, a.need_norm
    dtype = accumulation_dtype(w.dtype)
    tokens = x.shape[0] if rows is None else rows.shape[0]
    out_rows = None
    boundaries = [dy.new_empty(0, dy.shape[1], dtype=dtype) for _ in range(2)]
    if a.before + a.after:
        assert a.cu_seqlens is not None
        out_rows, *placed = boundary_rows(a.cu_seqlens, tokens, a.before, a.after)
        for index, at in enumerate(placed):
            taken = dy.index_select(0, at.flatten()).view(*at.shape, dy.shape[1]).to(dtype)
            boundaries[index] = taken if a.per_sequence[index] else taken.sum(0)
    width_out, width = w.shape
    dw = w.new_zeros((width_out if need_dw else 0, width), dtype=dtype)
    db = w.new_zeros(width_out if need_db else 0, dtype=dtype)
    d_norm = w.new_zeros((2, width if need_norm else 0), dtype=dtype)
    dx = w.new_zeros((x.shape[0] if need_dx else 0, width), dtype=dtype)
    block = BLOCK_ROWS if x.device.type == "cpu" else max(tokens, 1)
    for start in range(0, tokens, block):
        stop = min(start + block, tokens)
        dz = dy[start:stop] if out_rows is None else dy.index_select(0, out_rows[start:stop])
        dz = dz.to(w.dtype)
        if a.scale != 1.0:
            dz = dz * a.scale if out_rows is None else dz.mul_(a.scale)
        if a.activation != "none":
            dz = _through_activation(dz, a.pre[start:stop], a.activation)
        if need_db:
            db += dz.sum(0, dtype=dtype)
        if not (need_dw or need_dx or need_norm):
            continue
        taken = gathered_rows(x, rows, start, stop)
        unit, rstd, _ = normalised(taken.to(dtype), norm, a.eps) if norm != "none" else (taken, None, None)
        if need_dw:
            changes = norm_weight is not None or norm_bias is not None
            own = unit.clone() if changes and (need_dx or need_norm) else unit
            own = weighted(own, norm_weight, norm_bias).to(w.dtype)
            if x.device.type == "cpu" and w.dtype in (torch.float32, torch.float64):
                for first in range(0, width_out, BLOCK_ROWS):
                    block_d = slice(first, first + BLOCK_ROWS)
                    dw[block_d] += cpu_tn(dz[:, block_d], own)
            elif w.dtype == torch.float64:
                dw.addmm_(dz.t(), own)
            else:
                mm_f32_add(dw, dz.t(), own, 1.0)
        if not (need_dx or need_norm):
            continue
        d_unit = (dz @ w).to(dtype)
        if need_norm:
            d_norm[0] += (d_unit * unit).sum(0)
            d_norm[1] += d_unit.sum(0)
        if not need_dx:
            continue
        if norm_weight is not None:
            d_unit.mul_(norm_weight.to(dtype))
        if rstd is not None:
            along = (d_unit * unit).mean(1, keepdim=True)
            if norm == "layer":
                d_unit.sub_(d_unit.mean(1, keepdim=True))
            d_unit.addcmul_(unit, along, value=-1.0).mul_(rstd.unsqueeze(1))
        if rows is None:
            dx[start:stop] = d_unit
        elif dx.is_cuda:
            dx.index_put_((rows[start:stop].long(),), d_unit, accumulate=True)
        else:
            dx.index_add_(0, rows[start:stop], d_unit)
    d_prefix, d_suffix = boundaries
    return dx.to(x.dtype), dw.to(w.dtype), db, d_norm, d_prefix, d_suffix
