"""Launches the Triton path of `linear_kl`: chunked GEMMs with fp32 results around `linear_kl_triton`'s row kernels.

Nothing here reads a device value on the host. Row indices are checked by a device-side assertion. Pairs of weight 0 are
sorted behind the others; the row kernels skip them, and with `num_valid` the GEMMs end before them too.
Tests run these functions on CPU tensors in the Triton interpreter, where the GEMMs are computed in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .device_checks import require, require_rows, require_triton_dtype
from .gemms import kept_dtype, mm_f32, mm_f32_add
from .linear_kl_triton import exp_rows, finish_moments, kl_rows
from .tiles import LINEAR_KL, LinearKLTiles, padded_vocabulary, row_of

if TYPE_CHECKING:
    from .linear_kl_ops import Difference, MomentsOf, MomentStep, OverPairs

Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

# fp16 cannot hold probabilities below 6e-8, so they are stored times 2^10, which leaves room for the p (r - K) of the
# reverse KL; bf16 and fp32 have the range.
FP16_SCALE = 1024.0


class Pairs:
    """Row pairs in the order they are computed: weight 0 last, and cut off there where `num_valid` says so."""

    def __init__(self, a: OverPairs):
        self.total = self.count = a.pairs
        rows_s, rows_t, weight, num_valid = a.rows_s, a.rows_t, a.row_weight, a.num_valid
        self.rows_s, self.rows_t, self.weight = rows_s, rows_t, weight
        self.order: Tensor | None = None
        self.relative, self.peak = weight, torch.ones(())
        if weight is None:
            return
        if num_valid >= 0:
            require((weight != 0).sum() <= num_valid, f"more than num_valid={num_valid} pairs have a weight")
            self.count = num_valid
        order = torch.argsort((weight == 0).to(torch.int8), stable=True)[: self.count]
        self.order, self.weight = order, weight[order].float()
        self.relative = self.weight
        self.rows_s = order if rows_s is None else rows_s[order]
        self.rows_t = order if rows_t is None else rows_t[order]
        if a.h_s.dtype != torch.float16:
            return
        # The largest weight, 1 where there is none: what is left of a weight must fit into 16 bits next to a state.
        peak = torch.nn.functional.pad(self.weight.abs(), (0, 1)).amax()
        self.peak = torch.where(peak == 0, 1.0, peak)
        self.relative = self.weight / self.peak

    def take(self, x: Tensor, rows: Tensor | None, start: int, stop: int) -> Tensor:
        """Rows of x for pairs [start, stop), contiguous; zeros where the weight is 0, so no NaN gets out of there."""
        if rows is None:
            return x[start:stop].contiguous()
        taken = x.index_select(0, rows[start:stop])
        if self.weight is None:
            return taken
        return taken.masked_fill_((self.weight[start:stop] == 0).unsqueeze(1), 0.0)

    def weights(self, start: int, stop: int) -> Tensor | None:
        return None if self.weight is None else self.weight[start:stop]

    def reduce(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """(weighted sum, values of all pairs)."""
        if self.weight is None or self.order is None:
            return values.sum(), values
        # where, not a product: a sum over no weights must be 0 whatever the values are.
        total = torch.where(self.weight == 0, 0.0, values * self.weight).sum()
        return total, values.new_zeros(self.total).index_copy_(0, self.order, values)

    def gradient(self, h: Tensor, needed: bool) -> Tensor:
        """Where the gradient (T_s, D) is written; added, in fp32 and a fixed order, where a row may be named twice."""
        shape = (h.shape[0] if needed else 0, h.shape[1])
        if self.rows_s is None:
            return h.new_empty(shape, dtype=kept_dtype(h.dtype))
        return h.new_zeros(shape, dtype=torch.float32)


def _add(dh: Tensor, rows: Tensor, dx: Tensor) -> None:
    """Add the gradient rows (C, D) to these rows of dh."""
    dh.index_put_((rows.long(),), dx, accumulate=True)


def _half_view(buffer: Tensor, vocab: int, dtype: torch.dtype) -> tuple[Tensor, float]:
    """The rows of an fp32 buffer seen as (C, V) of `dtype` in the same memory, and the factor on what is stored."""
    if dtype == torch.float32:
        return buffer[:, :vocab], 1.0
    return buffer.view(dtype)[:, :vocab], FP16_SCALE if dtype == torch.float16 else 1.0


def padded_bias(bias: Tensor | None, like: Tensor) -> Tensor:
    """A bias as the kernels read it, fp32 and padded; any tensor will do where there is none."""
    return (
        like
        if bias is None
        else torch.nn.functional.pad(bias.float(), (0, padded_vocabulary(bias.shape[0]) - bias.shape[0]))
    )


@dataclass(frozen=True)
class Rows:
    """What a row kernel works on: the first of a chunk's logits buffers and the gradient over them."""

    first: int  # of the chunk, in the order of the pairs
    logits: Tensor  # (n, padded) fp32
    grad: Tensor  # (n, V)
    values: Tensor  # (n,)
    weights: Tensor | None  # (n,)
    grad_scale: float
    barrier: bool  # the gradient shares the logits' memory


def over_chunks(
    a: OverPairs,
    pairs: Pairs,
    tiles: LinearKLTiles,
    sides: int,
    logits: Callable[[Tensor, int, Tensor], None],
    row_kernel: Callable[[Rows], None],
    scale: float,
) -> Five:
    """Values and gradients of an op over a head, chunk by chunk.

    Args:
        sides: logits buffers of a chunk, one below the other; the student's are the first.
        logits: fills them, given the states (n, D), the chunk's first pair and the buffers (sides · n, padded).
        row_kernel: turns them into values and `grad`.
        scale: of the gradient of the logits.
    """
    h_s, w_s, need_dh, need_dw, need_db = a.h_s, a.w_s, a.need_dh, a.need_dw, a.need_db
    vocab, width = w_s.shape
    values = h_s.new_empty(pairs.count, dtype=torch.float32)
    dh = pairs.gradient(h_s, need_dh)
    db = h_s.new_zeros(vocab if need_db else 0, dtype=torch.float32)
    chunk = max(1, min(tiles.chunk_rows, pairs.count))
    buffer = h_s.new_empty(sides * chunk, padded_vocabulary(vocab), dtype=torch.float32)
    dx = h_s.new_empty(chunk if need_dh else 0, width, dtype=torch.float32)
    kept = tiles.rows_of_dw(pairs.count, width, h_s.dtype) if need_dw else 0
    once = kept >= pairs.count
    dw = h_s.new_empty((vocab if need_dw else 0, width), dtype=kept_dtype(w_s.dtype) if once else torch.float32)
    gradients, x_kept = h_s.new_empty(kept, buffer.shape[1]), h_s.new_empty(kept, width)

    for start in range(0, pairs.count, chunk):
        stop = min(start + chunk, pairs.count)
        n = stop - start
        x_s = pairs.take(h_s, pairs.rows_s, start, stop)
        logits(x_s, start, buffer[: sides * n])
        grad, grad_scale = _half_view(buffer[:n], vocab, h_s.dtype)
        if need_dw:
            first = start % kept
            grad = gradients[first : first + n, :vocab]
        weights, barrier = pairs.weights(start, stop), grad.dtype != torch.float32 and not need_dw
        row_kernel(Rows(start, buffer[:n], grad, values[start:stop], weights, grad_scale, barrier))
        if not a.any_gradient:
            continue
        factor = scale / grad_scale
        if need_dh:
            mm_f32(grad, w_s, out=dx[:n])
            row_factor = factor if weights is None else (weights * factor).unsqueeze(1)
            if pairs.rows_s is None:
                torch.mul(dx[:n], row_factor, out=dh[start:stop])
            else:
                _add(dh, pairs.rows_s[start:stop], dx[:n].mul_(row_factor))
        relative = None if pairs.relative is None else pairs.relative[start:stop]
        if need_dw:
            x_kept[first : first + n] = x_s if relative is None else x_s * relative.unsqueeze(1)
            if first + n == kept or stop == pairs.count:
                rows = slice(0, first + n)
                mm_f32_add(dw, gradients[rows, :vocab].t(), x_kept[rows], alpha=factor, add=start >= kept)
        if need_db:
            row = x_s.new_ones(1, n) if relative is None else relative.to(x_s.dtype).unsqueeze(0)
            mm_f32_add(db.unsqueeze(0), row, grad, alpha=factor)

    if need_dw and not pairs.count:
        dw.zero_()
    if pairs.relative is not None and h_s.dtype == torch.float16:
        dw, db = dw.mul_(pairs.peak), db.mul_(pairs.peak)
    return *pairs.reduce(values), dh.to(kept_dtype(h_s.dtype)), dw.to(kept_dtype(w_s.dtype)), db


def difference_triton(a: Difference, tiles: LinearKLTiles | None = None) -> Five:
    """As `linear_kl_cpu.difference_cpu`, 3 GEMMs and one row kernel per chunk.

    For a head that trains, the gradients of the logits are kept over many chunks (`tiles.rows_of_dw`) for one GEMM,
    which writes dW in its own dtype where it is the only one.
    """
    w_s, h_t, w_t = a.w_s, a.h_t, a.w_t
    require_triton_dtype("h_s", a.h_s)
    tiles = tiles or row_of(LINEAR_KL, a.h_s.device)
    require_rows(a.rows_s, a.h_s.shape[0], "rows_s")
    require_rows(a.rows_t, h_t.shape[0], "rows_t")
    pairs = Pairs(a)
    vocab, tile = w_s.shape[0], tiles.kl_rows
    bias_t = a.bias_s if w_t is None else a.bias_t
    unused = a.h_s.new_empty(1, dtype=torch.float32)
    bias_s_ptr, bias_t_ptr = padded_bias(a.bias_s, unused), padded_bias(bias_t, unused)

    def logits(x_s: Tensor, start: int, buffer: Tensor) -> None:
        n = x_s.shape[0]
        x_t = pairs.take(h_t, pairs.rows_t, start, start + n)
        if w_t is None:
            mm_f32(torch.cat([x_s, x_t]), w_s.t(), out=buffer[:, :vocab])
        else:
            mm_f32(x_s, w_s.t(), out=buffer[:n, :vocab])
            mm_f32(x_t, w_t.t(), out=buffer[n:, :vocab])

    def row_kernel(r: Rows) -> None:
        n, padded = r.logits.shape
        z_t = r.logits.as_strided((n, padded), r.logits.stride(), r.logits.storage_offset() + n * padded)
        kl_rows[(n,)](
            r.logits, z_t, r.grad, bias_s_ptr, bias_t_ptr, r.values if r.weights is None else r.weights, r.values,
            padded, padded, r.grad.stride(0), vocab, padded,
            1.0 / a.temperature, a.softcap, a.scale, a.beta, r.grad_scale,
            DIVERGENCE=a.divergence, HAS_BIAS_S=a.bias_s is not None, HAS_BIAS_T=bias_t is not None,
            HAS_WEIGHT=r.weights is not None, HAS_SOFTCAP=a.softcap > 0, NEED_GRAD=a.any_gradient,
            BARRIER=r.barrier, BLOCK_V=tile.block, **tile.launch,
        )  # fmt: skip

    return over_chunks(a, pairs, tiles, 2, logits, row_kernel, a.scale / a.temperature)


def teacher_moments_triton(a: MomentsOf, tiles: LinearKLTiles | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """As `moments_cpu.teacher_moments_cpu`, 2 GEMMs and one row kernel per chunk."""
    h_t, w_t, rows, count = a.h_t, a.w_t, a.rows, a.count
    require_triton_dtype("h_t", h_t)
    tiles = tiles or row_of(LINEAR_KL, h_t.device)
    require_rows(rows, h_t.shape[0], "rows")
    values = w_t if a.w_s is None else a.w_s
    vocab = w_t.shape[0]
    m = h_t.new_empty(count, values.shape[1], dtype=torch.float32)
    lse, entropy, inv_sum = (h_t.new_empty(count, dtype=torch.float32) for _ in range(3))
    bias_mean = h_t.new_zeros(count, dtype=torch.float32)
    chunk = max(1, min(tiles.chunk_rows, count))
    buffer = h_t.new_empty(chunk, padded_vocabulary(vocab), dtype=torch.float32)
    bias_ptr, value_bias_ptr = padded_bias(a.bias_t, lse), padded_bias(a.bias_s, lse)
    for start in range(0, count, chunk):
        part = slice(start, min(start + chunk, count))
        x = h_t[part] if rows is None else h_t.index_select(0, rows[part])
        z = buffer[: x.shape[0]]
        mm_f32(x.contiguous(), w_t.t(), out=z[:, :vocab])
        e, e_scale = _half_view(z, vocab, h_t.dtype)
        exp_rows[(x.shape[0],)](
            z, e, bias_ptr, value_bias_ptr, lse[part], inv_sum[part], entropy[part], bias_mean[part],
            z.stride(0), e.stride(0), vocab, buffer.shape[1], 1.0 / a.temperature, a.softcap, e_scale,
            HAS_BIAS=a.bias_t is not None, HAS_VALUE_BIAS=a.bias_s is not None, HAS_SOFTCAP=a.softcap > 0,
            WANT_ENTROPY=True, BARRIER=e.dtype != torch.float32, BLOCK_V=tiles.exp_rows.block, **tiles.exp_rows.launch,
        )  # fmt: skip
        mm_f32(e, values, out=m[part])
    return m.mul_(inv_sum.unsqueeze(1)), entropy, bias_mean


def moment_step_triton(a: MomentStep, tiles: LinearKLTiles | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """As `moments_cpu.moment_step_cpu`, 2 GEMMs and two row kernels per chunk."""
    h_s, w_s, need_dh, m = a.h_s, a.w_s, a.need_dh, a.m.contiguous()
    require_triton_dtype("h_s", h_s)
    tiles = tiles or row_of(LINEAR_KL, h_s.device)
    require_rows(a.rows_s, h_s.shape[0], "rows_s")
    require_rows(a.rows_t, m.shape[0], "rows_t")
    pairs = Pairs(a)
    vocab, width = w_s.shape
    values, lse, inv_sum = (h_s.new_empty(pairs.count, dtype=torch.float32) for _ in range(3))
    dh = pairs.gradient(h_s, need_dh)
    chunk = max(1, min(tiles.chunk_rows, pairs.count))
    buffer = h_s.new_empty(chunk, padded_vocabulary(vocab), dtype=torch.float32)
    added = h_s.new_empty(chunk if need_dh and pairs.rows_s is not None else 0, width, dtype=torch.float32)
    ew = h_s.new_empty(chunk if need_dh else 0, width, dtype=torch.float32)
    bias_ptr = padded_bias(a.bias_s, lse)
    for start in range(0, pairs.count, chunk):
        stop = min(start + chunk, pairs.count)
        n = stop - start
        x = pairs.take(h_s, pairs.rows_s, start, stop)
        z = buffer[:n]
        mm_f32(x, w_s.t(), out=z[:, :vocab])
        e, e_scale = _half_view(z, vocab, h_s.dtype)
        exp_rows[(n,)](
            z, e, bias_ptr, bias_ptr, lse[start:stop], inv_sum[start:stop], lse, lse,
            z.stride(0), e.stride(0), vocab, buffer.shape[1], 1.0 / a.temperature, 0.0, e_scale,
            HAS_BIAS=a.bias_s is not None, HAS_VALUE_BIAS=False, HAS_SOFTCAP=False, WANT_ENTROPY=False,
            BARRIER=e.dtype != torch.float32, BLOCK_V=tiles.exp_rows.block, **tiles.exp_rows.launch,
        )  # fmt: skip
        if need_dh:
            mm_f32(e, w_s, out=ew[:n])
        weights = pairs.weights(start, stop)
        rows = None if pairs.rows_t is None else pairs.rows_t[start:stop].contiguous()
        dx = dh[start:stop] if pairs.rows_s is None else added[:n]
        finish_moments[(n,)](
            ew, inv_sum[start:stop], lse[start:stop], x, m, a.entropy, a.bias_mean, lse if rows is None else rows,
            lse if weights is None else weights, values[start:stop], dx, start,
            width, x.stride(0), m.stride(0), width, width, 1.0 / a.temperature, a.scale,
            HAS_ROWS=rows is not None, HAS_WEIGHT=weights is not None, NEED_GRAD=need_dh,
            BLOCK_D=tiles.finish_moments.block, **tiles.finish_moments.launch,
        )  # fmt: skip
        if need_dh and pairs.rows_s is not None:
            _add(dh, pairs.rows_s[start:stop], dx)
    return *pairs.reduce(values), dh.to(kept_dtype(h_s.dtype))
