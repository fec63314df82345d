"""Triton kernels of `hidden_mse`. Every one keeps a whole row in registers and reads or writes each row once.

`check_bounds`    whether the segments of student and teacher are what the others rely on: one launch for all of it.
`pool_rows`       Σ of rows over one piece of a segment, into the piece's slot.
`pool_finish`     the slots of a segment, added in order, to its mean.
`pool_compare`    the same for student and teacher at once: value of the segment and its gradient row u.
`pair_values`     value of one row pair.
`state_gradient`  all parts of the gradient of a state, written once: u, row pairs, one more tensor.

Slots and intervals: see `segments.py`. Sums are fp32; no atomics. Sizes that change from pack to pack are not
specialised on: every pack runs the same compiled code. A program reads one row after another, so loops over rows keep
STAGES - 1 more of them in flight to shared memory.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _interval_of(slot, edges_ptr, intervals, PIECE: tl.constexpr):
    """The last g with g + edges[g] // PIECE <= slot, by bisection: these keys ascend strictly."""
    low = slot * 0
    high = low + intervals
    while low + 1 < high:
        middle = (low + high) // 2
        here = middle + tl.load(edges_ptr + middle).to(tl.int64) // PIECE <= slot
        low = tl.where(here, middle, low)
        high = tl.where(here, high, middle)
    return low


@triton.jit
def _edge(edges_ptr, interval, intervals, rows):
    """First row of an interval, kept within the rows whatever the edges say."""
    edge = tl.load(edges_ptr + interval, mask=interval < intervals, other=rows).to(tl.int64)
    return tl.minimum(tl.maximum(edge, 0), rows)


@triton.jit
def _owner(order_ptr, interval, segments, IS_CU: tl.constexpr):
    """The segment that owns an interval, or -1."""
    if IS_CU:
        owner = tl.where(interval < segments, interval, -1)
    else:
        odd = interval % 2 == 1
        owner = tl.where(odd, tl.load(order_ptr + interval // 2, mask=odd, other=0), -1)
    return owner.to(tl.int64)


@triton.jit
def _wrong(bounds_ptr, count, rows, SPANS: tl.constexpr, BLOCK: tl.constexpr):
    """How many of `count` bounds are wrong: as `segments.assert_values` says."""
    wrong = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        bound = tl.load(bounds_ptr + index, mask=index < count, other=0)
        after = tl.load(bounds_ptr + index + 1, mask=index + 1 < count, other=rows)
        if SPANS:
            # An end needs no look of its own: it lies between its start and the rows.
            bad = (index % 2 == 0) & ((bound < 0) | (after < bound) | (after > rows))
        else:
            bad = (after < bound) | ((index == 0) & (bound != 0))
        wrong += tl.where((index < count) & bad, 1, 0)
    return tl.sum(wrong, 0)


@triton.jit(do_not_specialize=["count_s", "count_t", "rows_s", "rows_t"])
def check_bounds(
    bounds_s_ptr,  # (B + 1,) or (2 S,)
    bounds_t_ptr,
    good_ptr,  # () bool
    count_s,
    count_t,  # 0 where there is no teacher
    rows_s,
    rows_t,
    SPANS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    wrong = _wrong(bounds_s_ptr, count_s, rows_s, SPANS, BLOCK) + _wrong(bounds_t_ptr, count_t, rows_t, SPANS, BLOCK)
    tl.store(good_ptr, wrong == 0)


@triton.jit(do_not_specialize=["rows", "intervals", "segments"])
def pool_rows(
    x_ptr,  # (T, D)
    edges_ptr,  # (G,)
    order_ptr,  # (S,) or unused
    partial_ptr,  # (slots, D) fp32
    stride_x,
    width,
    rows,
    intervals,
    segments,
    IS_CU: tl.constexpr,
    PIECE: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64)
    interval = _interval_of(slot, edges_ptr, intervals, PIECE)
    start = _edge(edges_ptr, interval, intervals, rows)
    end = _edge(edges_ptr, interval + 1, intervals, rows)
    owner = _owner(order_ptr, interval, segments, IS_CU)
    start += tl.maximum(slot - interval - start // PIECE, 0) * PIECE
    end = tl.where(owner < 0, start, tl.minimum(start + PIECE, end))
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < width
    total = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for first in tl.range(start, end, ROWS, num_stages=STAGES):
        offs_t = first + tl.arange(0, ROWS)
        mask = (offs_t < end)[:, None] & mask_d[None, :]
        x = tl.load(x_ptr + offs_t[:, None] * stride_x + offs_d[None, :], mask=mask, other=0.0)
        total += x.to(tl.float32)
    if start < end:
        tl.store(partial_ptr + slot * width + offs_d, tl.sum(total, 0), mask=mask_d)


@triton.jit
def _mean_of(
    partial_ptr,
    edges_ptr,
    position_ptr,
    segment,
    intervals,
    rows,
    offs_d,
    mask_d,
    width,
    IS_CU: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(mean of a segment over offs_d, its number of rows)."""
    if IS_CU:
        interval = segment
    else:
        interval = tl.load(position_ptr + segment)
    start = _edge(edges_ptr, interval, intervals, rows)
    length = tl.maximum(_edge(edges_ptr, interval + 1, intervals, rows) - start, 0)
    slot = interval + start // PIECE
    total = tl.zeros((BLOCK_D,), tl.float32)
    for k in tl.range(0, (length + PIECE - 1) // PIECE, num_stages=4):
        total += tl.load(partial_ptr + (slot + k) * width + offs_d, mask=mask_d, other=0.0)
    return total / tl.maximum(length, 1).to(tl.float32), length


@triton.jit(do_not_specialize=["rows", "intervals"])
def pool_finish(
    partial_ptr,  # (slots, D) fp32
    edges_ptr,  # (G,)
    position_ptr,  # (S,) or unused
    mean_ptr,  # (S, D) fp32
    width,
    rows,
    intervals,
    IS_CU: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < width
    mean, _ = _mean_of(
        partial_ptr, edges_ptr, position_ptr, segment, intervals, rows, offs_d, mask_d, width, IS_CU, PIECE, BLOCK_D
    )
    tl.store(mean_ptr + segment * width + offs_d, mean, mask=mask_d)


@triton.jit(do_not_specialize=["rows_s", "rows_t", "intervals_s", "intervals_t"])
def pool_compare(
    partial_s_ptr,  # (slots_s, D) fp32
    partial_t_ptr,  # (slots_t, D) fp32
    edges_s_ptr,  # (G_s,)
    edges_t_ptr,  # (G_t,)
    position_s_ptr,  # (S,) or unused
    position_t_ptr,  # (S,) or unused
    weight_ptr,  # (S,) fp32 or unused
    value_ptr,  # (S,) fp32
    u_ptr,  # (S, D) fp32
    width,
    rows_s,
    rows_t,
    intervals_s,
    intervals_t,
    HAS_WEIGHT: tl.constexpr,
    NEED_U: tl.constexpr,
    IS_CU_S: tl.constexpr,
    IS_CU_T: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    weight = 1.0
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + segment)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, width, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        mask_d = offs_d < width
        mean_s, length_s = _mean_of(
            partial_s_ptr, edges_s_ptr, position_s_ptr, segment, intervals_s, rows_s, offs_d, mask_d, width,
            IS_CU_S, PIECE, BLOCK_D,
        )  # fmt: skip
        mean_t, length_t = _mean_of(
            partial_t_ptr, edges_t_ptr, position_t_ptr, segment, intervals_t, rows_t, offs_d, mask_d, width,
            IS_CU_T, PIECE, BLOCK_D,
        )  # fmt: skip
        counts = (length_s > 0) & (length_t > 0) & (weight != 0.0)
        difference = tl.where(counts, mean_s - mean_t, 0.0)
        total += difference * difference
        if NEED_U:
            u = difference * (2.0 * weight / width) / tl.maximum(length_s, 1).to(tl.float32)
            tl.store(u_ptr + segment * width + offs_d, u, mask=mask_d)
    tl.store(value_ptr + segment, tl.sum(total, 0) / width)


@triton.jit
def pair_values(
    s_ptr,  # (T_s, D)
    t_ptr,  # (T_t, D)
    rows_s_ptr,  # (P,)
    rows_t_ptr,  # (P,)
    weight_ptr,  # (P,) fp32 or unused
    value_ptr,  # (P,) fp32
    stride_s,
    stride_t,
    width,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    stop = width
    if HAS_WEIGHT:
        stop = tl.where(tl.load(weight_ptr + pair) == 0.0, 0, width)
    s_row = s_ptr + tl.load(rows_s_ptr + pair).to(tl.int64) * stride_s
    t_row = t_ptr + tl.load(rows_t_ptr + pair).to(tl.int64) * stride_t
    total = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, stop, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        mask_d = offs_d < width
        s = tl.load(s_row + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        t = tl.load(t_row + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        total += (s - t) * (s - t)
    tl.store(value_ptr + pair, tl.sum(total, 0) / width)


@triton.jit(do_not_specialize=["rows", "intervals", "segments"])
def state_gradient(
    dx_ptr,  # (T, D)
    x_ptr,  # (T, D) student states, or unused
    t_ptr,  # (T_t, D) teacher states, or unused
    u_ptr,  # (S, D) fp32 gradient of one pooled row's summand, or unused
    more_ptr,  # (T, D) a further gradient, or unused
    scales_ptr,  # (3,) fp32: factors on u, on the pairs, on `more`
    edges_ptr,  # (G,)
    order_ptr,  # (S,) or unused
    pair_edges_ptr,  # (T + 1,) first entry of each row in pair_order, or unused
    pair_order_ptr,  # (P,) pairs sorted by row
    rows_t_ptr,  # (P,)
    pair_weight_ptr,  # (P,) fp32 or unused
    stride_x,
    stride_t,
    stride_more,
    width,
    rows,
    intervals,
    segments,
    HAS_POOL: tl.constexpr,
    HAS_PAIRS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_MORE: tl.constexpr,
    IS_CU: tl.constexpr,
    PIECE: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64)
    interval = _interval_of(slot, edges_ptr, intervals, PIECE)
    start = _edge(edges_ptr, interval, intervals, rows)
    end = _edge(edges_ptr, interval + 1, intervals, rows)
    start += tl.maximum(slot - interval - start // PIECE, 0) * PIECE
    end = tl.minimum(start + PIECE, end)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < width
    u = tl.zeros((BLOCK_D,), tl.float32)
    if HAS_POOL:
        owner = _owner(order_ptr, interval, segments, IS_CU)
        mask_u = mask_d & (owner >= 0)
        u = tl.load(u_ptr + owner * width + offs_d, mask=mask_u, other=0.0) * tl.load(scales_ptr)
    if HAS_PAIRS:
        pair_scale = tl.load(scales_ptr + 1)
    if HAS_MORE:
        more_scale = tl.load(scales_ptr + 2)
    for row in tl.range(start, end, num_stages=STAGES):
        gradient = u
        if HAS_PAIRS:
            first = tl.load(pair_edges_ptr + row)
            last = tl.load(pair_edges_ptr + row + 1)
            paired = tl.where(first < last, width, 0)
            s = tl.load(x_ptr + row * stride_x + offs_d, mask=offs_d < paired, other=0.0).to(tl.float32)
            for index in range(first, last):
                pair = tl.load(pair_order_ptr + index)
                factor = pair_scale
                if HAS_WEIGHT:
                    factor *= tl.load(pair_weight_ptr + pair)
                row_t = tl.load(rows_t_ptr + pair).to(tl.int64)
                t = tl.load(t_ptr + row_t * stride_t + offs_d, mask=mask_d, other=0.0).to(tl.float32)
                part = (s - t) * (2.0 / width)
                if HAS_WEIGHT:
                    part = tl.where(tl.load(pair_weight_ptr + pair) == 0.0, 0.0, part)
                gradient += factor * part
        if HAS_MORE:
            more = tl.load(more_ptr + row * stride_more + offs_d, mask=mask_d, other=0.0).to(tl.float32)
            gradient += more_scale * more
        tl.store(dx_ptr + row * width + offs_d, gradient.to(dx_ptr.dtype.element_ty), mask=mask_d)
