"""Launches the Triton path of `hidden_mse`. Nothing here reads a device value on the host.

Tests run these functions on CPU tensors in the Triton interpreter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .device_checks import debugging, require, require_rows, require_triton_dtype
from .hidden_mse_triton import check_bounds, pair_values, pool_compare, pool_finish, pool_rows, state_gradient
from .segments import SPANS, Partition, assert_values, partition
from .tiles import HIDDEN_MSE, HiddenMSETiles, row_of

if TYPE_CHECKING:
    from .hidden_mse_ops import HiddenLoss, SegmentMean, StateGradient

MAX_WIDTH = 16384  # a row of fp32 in the registers of 16 warps


def power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _checked(x: Tensor, name: str) -> Tensor:
    """x with unit stride along the width."""
    require_triton_dtype(name, x)
    if x.shape[1] > MAX_WIDTH:
        raise ValueError(f"{name} is {x.shape[1]} wide, but the kernels take at most {MAX_WIDTH}")
    return x if x.stride(1) == 1 else x.contiguous()


def _require_bounds(pooling: str, *sides: tuple[Tensor, int]) -> None:
    """`assert_values` of the bounds and rows of one or two sides by one kernel, where torch would launch 6 a side.

    With MTLLM_DEBUG=1 by torch, side by side, so that the error says which is wrong.
    """
    if debugging():
        for bounds, rows in sides:
            assert_values(bounds, pooling, rows)
        return
    flat = [bounds.flatten().contiguous() for bounds, _ in sides]
    good = torch.empty((), dtype=torch.bool, device=flat[0].device)
    check_bounds[(1,)](
        flat[0], flat[-1], good, flat[0].shape[0], flat[1].shape[0] if len(flat) > 1 else 0, sides[0][1], sides[-1][1],
        SPANS=pooling == SPANS, BLOCK=1024, num_warps=4,
    )  # fmt: skip
    within = " and ".join(str(rows) for _, rows in sides)
    ascend = "spans must be ascending" if pooling == SPANS else "cu_seqlens must start at 0, not descend,"
    require(good, f"{ascend} and {'be' if pooling == SPANS else 'end'} within the {within} rows")


def _pool(x: Tensor, parts: Partition, tiles: HiddenMSETiles) -> Tensor:
    """Partial sums (slots, D), fp32."""
    width = x.shape[1]
    partial = x.new_empty(parts.slots(tiles.piece), width, dtype=torch.float32)
    block = power_of_two(width)
    tile = tiles.for_width(block, x.element_size())
    pool_rows[(partial.shape[0],)](
        x, parts.edges, parts.edges if parts.order is None else parts.order, partial,
        x.stride(0), width, parts.rows, parts.intervals, parts.segments, IS_CU=parts.order is None,
        PIECE=tiles.piece, ROWS=tile.rows, STAGES=tile.stages, BLOCK_D=block, num_warps=tile.num_warps,
    )  # fmt: skip
    return partial


def segment_mean_triton(a: SegmentMean, tiles: HiddenMSETiles | None = None) -> Tensor:
    """As `hidden_mse_cpu.segment_mean_cpu`."""
    x, tiles = _checked(a.x, "x"), tiles or row_of(HIDDEN_MSE, a.x.device)
    _require_bounds(a.pooling, (a.bounds, x.shape[0]))
    parts = partition(a.bounds, a.pooling, x.shape[0], x.device)
    partial = _pool(x, parts, tiles)
    mean = x.new_empty(parts.segments, x.shape[1], dtype=torch.float32)
    block = min(power_of_two(x.shape[1]), tiles.finish_block)
    if mean.numel():
        pool_finish[(parts.segments, -(-x.shape[1] // block))](
            partial,
            parts.edges,
            parts.edges if parts.position is None else parts.position,
            mean,
            x.shape[1],
            parts.rows,
            parts.intervals,
            IS_CU=parts.position is None,
            PIECE=tiles.piece,
            BLOCK_D=block,
            num_warps=4,
        )
    return mean


def pooled_triton(a: HiddenLoss, tiles: HiddenMSETiles | None = None) -> tuple[Tensor, Tensor]:
    """As `hidden_mse_cpu.pooled_cpu`: values (S,), u (S, D)."""
    assert a.bounds_s is not None and a.bounds_t is not None
    student, teacher = _checked(a.student, "student"), _checked(a.teacher, "teacher")
    tiles = tiles or row_of(HIDDEN_MSE, student.device)
    weight, width, sides = a.segment_weight, student.shape[1], []
    _require_bounds(a.pooling, (a.bounds_s, student.shape[0]), (a.bounds_t, teacher.shape[0]))
    for x, bounds in ((student, a.bounds_s), (teacher, a.bounds_t)):
        parts = partition(bounds, a.pooling, x.shape[0], x.device)
        sides.append((parts, _pool(x, parts, tiles)))
    (parts_s, partial_s), (parts_t, partial_t) = sides
    count = parts_s.segments
    values = student.new_empty(count, dtype=torch.float32)
    u = student.new_empty(count if a.need_dx else 0, width, dtype=torch.float32)
    if count:
        pool_compare[(count,)](
            partial_s, partial_t, parts_s.edges, parts_t.edges,
            parts_s.edges if parts_s.position is None else parts_s.position,
            parts_t.edges if parts_t.position is None else parts_t.position,
            values if weight is None else weight.float(), values, u,
            width, parts_s.rows, parts_t.rows, parts_s.intervals, parts_t.intervals,
            HAS_WEIGHT=weight is not None, NEED_U=a.need_dx,
            IS_CU_S=parts_s.position is None, IS_CU_T=parts_t.position is None,
            PIECE=tiles.piece, BLOCK_D=min(power_of_two(width), tiles.compare_block), num_warps=8,
        )  # fmt: skip
    return values, u


def pairs_triton(a: HiddenLoss, tiles: HiddenMSETiles | None = None) -> Tensor:
    """As `hidden_mse_cpu.pairs_cpu`: values (P,)."""
    assert a.rows_s is not None and a.rows_t is not None
    student, teacher = _checked(a.student, "student"), _checked(a.teacher, "teacher")
    tiles = tiles or row_of(HIDDEN_MSE, student.device)
    rows_s, rows_t, weight = a.rows_s, a.rows_t, a.pair_weight
    pairs, width = rows_s.shape[0], student.shape[1]
    for name, rows, x in (("rows_s", rows_s, student), ("rows_t", rows_t, teacher)):
        require_rows(rows, x.shape[0], name)
    values = student.new_empty(pairs, dtype=torch.float32)
    if pairs:
        block = min(power_of_two(width), 4096)
        pair_values[(pairs,)](
            student, teacher, rows_s, rows_t, values if weight is None else weight.float(), values,
            student.stride(0), teacher.stride(0), width, HAS_WEIGHT=weight is not None, BLOCK_D=block,
            num_warps=tiles.for_width(block, student.element_size()).num_warps,
        )  # fmt: skip
    return values


def state_gradient_triton(a: StateGradient, tiles: HiddenMSETiles | None = None) -> Tensor:
    """As `hidden_mse_cpu.state_gradient_cpu`, one kernel; rows named twice are added in the order of the pairs."""
    student, tiles = _checked(a.student, "student"), tiles or row_of(HIDDEN_MSE, a.student.device)
    scales, teacher, u, more = a.scales, a.teacher, a.u, None if a.more is None else _checked(a.more, "more")
    rows_s, rows_t, pair_weight = a.rows_s, a.rows_t, a.pair_weight
    rows, width = student.shape
    parts = partition(None if u is None else a.bounds, a.pooling, rows, student.device)
    dx = student.new_empty(rows, width)
    pair_order = pair_edges = parts.edges
    has_pairs = rows_s is not None and rows_s.shape[0] > 0
    if has_pairs:
        assert rows_s is not None and rows_t is not None and teacher is not None
        teacher = _checked(teacher, "teacher")
        if a.rows_sorted:
            require((rows_s[1:] >= rows_s[:-1]).all(), "rows_s must ascend when rows_sorted is True")
            pair_order, ascending = torch.arange(rows_s.shape[0], device=rows_s.device), rows_s
        else:
            ascending, pair_order = torch.sort(rows_s, stable=True)
        pair_edges = torch.searchsorted(ascending, torch.arange(rows + 1, device=rows_s.device, dtype=rows_s.dtype))
    block = power_of_two(width)
    tile = tiles.for_width(block, student.element_size())
    state_gradient[(parts.slots(tiles.gradient_piece),)](
        dx, student, student if teacher is None else teacher, scales if u is None else u,
        student if more is None else more, scales, parts.edges, parts.edges if parts.order is None else parts.order,
        pair_edges, pair_order, parts.edges if rows_t is None else rows_t,
        scales if pair_weight is None else pair_weight.float(),
        student.stride(0), 0 if teacher is None else teacher.stride(0), 0 if more is None else more.stride(0),
        width, rows, parts.intervals, parts.segments, HAS_POOL=u is not None, HAS_PAIRS=has_pairs,
        HAS_WEIGHT=pair_weight is not None, HAS_MORE=more is not None,
        IS_CU=parts.order is None, PIECE=tiles.gradient_piece, STAGES=min(tile.stages, 3), BLOCK_D=block,
        num_warps=tile.num_warps,
    )  # fmt: skip
    return dx
