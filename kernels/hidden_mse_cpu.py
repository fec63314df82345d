"""CPU kernels of `hidden_mse`.

Segment sums are `embedding_bag`: it reads rows where they lie, at memory bandwidth. Whatever needs a changed copy of
the states (16-bit dtypes, gradients) goes in blocks of rows that stay in cache: fresh pages cost more than the
arithmetic.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .gemms import accumulation_dtype
from .linear_kl_cpu import check_rows
from .segments import check_values, segment_ranges

if TYPE_CHECKING:
    from .hidden_mse_ops import HiddenLoss, SegmentMean, StateGradient

BLOCK_VALUES = 1 << 18  # values per block: 1 MiB of fp32


def block_rows(width: int) -> int:
    return max(16, BLOCK_VALUES // max(width, 1))


def _covered_rows(starts: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """(rows (R,) of all segments one after the other, offsets (S,) of each segment in them)."""
    lengths = ends.long() - starts.long()
    offsets = lengths.cumsum(0) - lengths
    rows = torch.repeat_interleave(starts.long() - offsets, lengths)
    return rows.add_(torch.arange(rows.shape[0])), offsets


def _segment_sums(x: Tensor, bounds: Tensor, pooling: str) -> tuple[Tensor, Tensor]:
    """(sums of rows (S, D), lengths (S,))."""
    check_values(bounds, pooling, x.shape[0])
    dtype = accumulation_dtype(x.dtype)
    starts, ends = segment_ranges(bounds, pooling)
    lengths = (ends - starts).long()
    rows, offsets = _covered_rows(starts, ends)
    count, width = starts.shape[0], x.shape[1]
    sums = x.new_zeros(count, width, dtype=dtype)
    if rows.numel() == 0 or width == 0:
        return sums, lengths
    if x.dtype == torch.float32:
        return F.embedding_bag(rows, x.contiguous(), offsets, mode="sum"), lengths
    edges = torch.cat((offsets, offsets.new_tensor([rows.shape[0]])))
    block = block_rows(width)
    for start in range(0, rows.shape[0], block):
        taken = rows[start : start + block]
        values = x.index_select(0, taken).to(dtype)
        first = int(torch.searchsorted(edges, start, right=True)) - 1
        last = int(torch.searchsorted(edges, start + taken.shape[0]))
        inside = (offsets[first:last] - start).clamp_(0, taken.shape[0])
        sums[first:last] += F.embedding_bag(torch.arange(taken.shape[0]), values, inside, mode="sum")
    return sums, lengths


def segment_mean_cpu(a: SegmentMean) -> Tensor:
    """Mean (S, D) of each segment's rows."""
    sums, lengths = _segment_sums(a.x, a.bounds, a.pooling)
    return sums.div_(lengths.clamp(min=1).unsqueeze(1))


def pooled_cpu(a: HiddenLoss) -> tuple[Tensor, Tensor]:
    """Values (S,), u (S, D) = d Σ weight · value / d (one row's share of the mean)."""
    assert a.bounds_s is not None and a.bounds_t is not None
    student, weight = a.student, a.segment_weight
    dtype = accumulation_dtype(student.dtype)
    width = student.shape[1]
    mean_s, lengths_s = _segment_sums(student, a.bounds_s, a.pooling)
    mean_t, lengths_t = _segment_sums(a.teacher, a.bounds_t, a.pooling)
    share = lengths_s.clamp(min=1).to(dtype).unsqueeze(1)
    mean_s.div_(share)
    difference = mean_t.div_(lengths_t.clamp(min=1).to(dtype).unsqueeze(1)).neg_().add_(mean_s)
    counts = (lengths_s > 0) & (lengths_t > 0)
    if weight is not None:
        counts &= weight != 0
    difference.masked_fill_(~counts.unsqueeze(1), 0.0)
    values = torch.linalg.vector_norm(difference, dim=1).square_().div_(max(width, 1))
    factor = torch.full_like(values, 2.0 / max(width, 1))
    if weight is not None:
        factor *= weight.to(dtype)
    if not a.need_dx:
        return values, difference.new_empty(0, width)
    return values, difference.mul_(factor.unsqueeze(1)).div_(share)


def pairs_cpu(a: HiddenLoss) -> Tensor:
    """Values (P,), 0 where the weight is 0."""
    assert a.rows_s is not None and a.rows_t is not None
    student, teacher, rows_s, rows_t, weight = a.student, a.teacher, a.rows_s, a.rows_t, a.pair_weight
    check_rows(rows_s, student.shape[0], "rows_s")
    check_rows(rows_t, teacher.shape[0], "rows_t")
    dtype = accumulation_dtype(student.dtype)
    pairs, width = rows_s.shape[0], student.shape[1]
    values = student.new_zeros(pairs, dtype=dtype)
    block = block_rows(width)
    for start in range(0, pairs, block):
        stop = min(start + block, pairs)
        s = student.index_select(0, rows_s[start:stop]).to(dtype)
        t = teacher.index_select(0, rows_t[start:stop]).to(dtype)
        values[start:stop] = torch.linalg.vector_norm(s.sub_(t), dim=1).square_().div_(max(width, 1))
    return values if weight is None else values.masked_fill_(weight == 0, 0.0)


def state_gradient_cpu(a: StateGradient) -> Tensor:
    """scales[0] · (pooled part from u) + scales[1] · (row pairs) + scales[2] · more, in the dtype of the states.

    Every block of rows is finished while it is in cache. A pair whose row is named twice adds to the same row.
    """
    scales, student, u, more, rows_s, pair_weight = a.scales, a.student, a.u, a.more, a.rows_s, a.pair_weight
    dtype = accumulation_dtype(student.dtype)
    rows, width = student.shape
    dx = student.new_empty(rows, width)
    block = block_rows(width)
    own = None
    if u is not None:
        assert a.bounds is not None
        starts, ends = segment_ranges(a.bounds, a.pooling)
        covered, _ = _covered_rows(starts, ends)
        # Row S of u holds the zeros of rows that belong to no segment.
        own = torch.full((rows,), u.shape[0], dtype=torch.int64)
        own[covered] = torch.repeat_interleave(torch.arange(u.shape[0]), ends.long() - starts.long())
        u = F.pad(u * scales[0], (0, 0, 0, 1))
        if rows_s is None and more is None and student.dtype == dtype:
            return torch.index_select(u, 0, own, out=dx)
    order = edges = factor = None
    if rows_s is not None and rows_s.shape[0] > 0:
        if a.rows_sorted and bool((rows_s[1:] < rows_s[:-1]).any()):
            raise ValueError("rows_s must ascend when rows_sorted is True")
        order = torch.arange(rows_s.shape[0]) if a.rows_sorted else torch.argsort(rows_s, stable=True)
        factor = scales[1].expand(order.shape[0])
        if pair_weight is not None:
            kept = pair_weight[order] != 0
            order, factor = order[kept], factor[kept] * pair_weight[order[kept]].to(dtype)
        targets = rows_s[order].long()
        edges = torch.searchsorted(targets, torch.arange(0, rows + block, block)).tolist()
    for index, start in enumerate(range(0, rows, block)):
        stop = min(start + block, rows)
        out = dx[start:stop]
        total = out if out.dtype == dtype else out.new_empty(out.shape, dtype=dtype)
        if u is not None and own is not None:
            torch.index_select(u, 0, own[start:stop], out=total)
        else:
            total.zero_()
        if order is not None and edges is not None and factor is not None and edges[index] < edges[index + 1]:
            assert a.teacher is not None and a.rows_t is not None
            part = slice(edges[index], edges[index + 1])
            pair = order[part]
            s = student.index_select(0, targets[part]).to(dtype)
            t = a.teacher.index_select(0, a.rows_t[pair]).to(dtype)
            total.index_add_(0, targets[part] - start, s.sub_(t).mul_(factor[part].unsqueeze(1) * (2.0 / width)))
        if more is not None:
            total.add_(more[start:stop].to(dtype) * scales[2])
        if total is not out:
            out.copy_(total)
    return dx
