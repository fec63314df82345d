"""Hidden-state losses over packed rows of different tokenizations: segment_mean, pooled_mse, paired_mse.

    mean_b      = x[cu_seqlens[b] : cu_seqlens[b + 1]].mean(0)
    pooled_mse  = (weight * (mean_b(student) - mean_b(teacher)).square().mean(-1)).sum()
    paired_mse  = (weight * (student[rows_s] - teacher[rows_t]).square().mean(-1)).sum()

Gradient of a state in segment b of n_b rows: u = 2 weight_b (mean_s - mean_t) / (D n_b), which the forward keeps.
Bytes at T x D states of s bytes: pooled forward 2 T D s, backward T D s; paired forward 2 P D s, backward
(2 P + T) D s. FLOPs are negligible.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import hidden_mse_ops as ops
from .gemms import accumulation_dtype
from .linear_kl_checks import check_local
from .op import needs_gradient
from .segments import POOLINGS, SPANS, check_bounds, segment_ranges


def reference_mean(
    x: Tensor,  # (T, D)
    bounds: Tensor,  # (B + 1,) or (S, 2)
    pooling: str = "mean",
) -> Tensor:
    """`segment_mean` by torch, a loop over segments, in x's own precision."""
    starts, ends = segment_ranges(bounds, pooling)
    means = [x[a:b].mean(0) if b > a else x.new_zeros(x.shape[1]) for a, b in zip(starts.tolist(), ends.tolist())]
    return torch.stack(means)


def reference_pooled(
    student: Tensor,
    teacher: Tensor,
    bounds_s: Tensor,
    bounds_t: Tensor,
    weight: Tensor | None = None,
    pooling: str = "mean",
) -> Tensor:
    """Sum of `pooled_mse` by torch, differentiable, in the states' own precision."""
    mean_s, mean_t = reference_mean(student, bounds_s, pooling), reference_mean(teacher.detach(), bounds_t, pooling)
    lengths = [torch.sub(*reversed(segment_ranges(b, pooling))) for b in (bounds_s, bounds_t)]
    values = torch.where((lengths[0] > 0) & (lengths[1] > 0), (mean_s - mean_t).square().mean(-1), 0.0)
    return (values if weight is None else values * weight).sum()


def reference_paired(
    student: Tensor,
    teacher: Tensor,
    rows_s: Tensor,
    rows_t: Tensor,
    weight: Tensor | None = None,
) -> Tensor:
    """Sum of `paired_mse` by torch, differentiable, in the states' own precision."""
    values = (student[rows_s] - teacher[rows_t].detach()).square().mean(-1)
    return (values if weight is None else values * weight).sum()


def check_states(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    check_local(name, x)
    if not x.dtype.is_floating_point:
        raise TypeError(f"{name} must be floating point, got {x.dtype}")
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(f"{name} must have shape (rows, width) with width >= 1, got {tuple(x.shape)}")


def check_two_sides(student: Tensor, teacher: Tensor) -> None:
    check_states("student", student)
    check_states("teacher", teacher)
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(f"student is {student.shape[1]} wide but teacher is {teacher.shape[1]} wide")
    if student.dtype != teacher.dtype:
        raise ValueError(f"student is {student.dtype} but teacher is {teacher.dtype}; cast one of them")
    if student.device != teacher.device:
        raise ValueError(f"teacher is on {teacher.device}, but student is on {student.device}; move it there")


def check_vector(name: str, x: Tensor | None, shape: tuple[int, ...], device: torch.device, rows: bool) -> None:
    if x is None:
        return
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}, but the states are on {device}; move it there")
    if rows and x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must hold int32 or int64 row numbers, got {x.dtype}")
    if not rows and not (x.dtype.is_floating_point or x.dtype == torch.bool):
        raise TypeError(f"{name} must be floating point or bool, got {x.dtype}")


def check_pairs(student: Tensor, rows_s: Tensor, rows_t: Tensor, weight: Tensor | None) -> None:
    for name, rows in (("rows_s", rows_s), ("rows_t", rows_t)):
        if not isinstance(rows, Tensor) or rows.dim() != 1:
            raise ValueError(f"{name} must be a tensor of shape (P,), one row number per pair")
        check_vector(name, rows, (rows_s.shape[0],), student.device, rows=True)
    check_vector("weight", weight, (rows_s.shape[0],), student.device, rows=False)


def both_bounds(
    student: Tensor,
    teacher: Tensor,
    cu_seqlens_s: Tensor | None,
    cu_seqlens_t: Tensor | None,
    spans_s: Tensor | None,
    spans_t: Tensor | None,
    pooling: str,
    weight: Tensor | None,
) -> tuple[Tensor, Tensor, str, Tensor | None]:
    """(bounds of the student, of the teacher, pooling of the ops, weight (S,))."""
    if spans_s is not None or spans_t is not None:
        if spans_s is None or spans_t is None:
            raise ValueError("spans_s and spans_t belong together; one of them is None")
        pooling, bounds_s, bounds_t, name = SPANS, spans_s, spans_t, "spans"
    else:
        if cu_seqlens_s is None or cu_seqlens_t is None:
            raise ValueError("cu_seqlens_s and cu_seqlens_t are needed where there are no spans")
        if pooling not in POOLINGS:
            raise ValueError(f"pooling is {pooling!r}, but must be one of {', '.join(POOLINGS)}")
        bounds_s, bounds_t, name = cu_seqlens_s, cu_seqlens_t, "cu_seqlens"
    check_bounds(f"{name}_s", bounds_s, student.device, "student")
    check_bounds(f"{name}_t", bounds_t, teacher.device, "teacher")
    if bounds_s.shape != bounds_t.shape:
        raise ValueError(f"{name}_s is {tuple(bounds_s.shape)} but {name}_t is {tuple(bounds_t.shape)}")
    shape = tuple(bounds_s.shape[:-1]) if name == "spans" else (bounds_s.shape[0] - 1,)
    check_vector("weight", weight, shape, student.device, rows=False)
    if name == "spans":
        bounds_s, bounds_t = bounds_s.reshape(-1, 2), bounds_t.reshape(-1, 2)
    return bounds_s, bounds_t, pooling, None if weight is None else weight.detach().flatten()


def pooled_count(bounds_s: Tensor, bounds_t: Tensor, weight: Tensor | None, dtype: torch.dtype, spans: bool) -> Tensor:
    """Sum of the weights of segments that are empty on neither side."""
    if spans:
        valid = (bounds_s[:, 1] > bounds_s[:, 0]) & (bounds_t[:, 1] > bounds_t[:, 0])
    else:
        valid = (bounds_s.diff() > 0) & (bounds_t.diff() > 0)
    return valid.to(dtype).sum() if weight is None else torch.where(valid, weight.to(dtype), 0.0).sum()


def segment_mean(
    x: Tensor,  # (T, D)
    cu_seqlens: Tensor | None = None,  # (B + 1,)
    *,
    spans: Tensor | None = None,  # (S, 2) or (B, C, 2)
    pooling: str = "mean",
) -> Tensor:  # (B, D), (S, D) or (B, C, D)
    """Mean of the rows of each segment.

    Args:
        x: (T, D) states, fp32, bf16, fp16 (or fp64 on the CPU). Gets a gradient.
        cu_seqlens: (B + 1,) int32 or int64, from 0, not descending, at most T. Rows after its end belong to nobody.
        spans: start and end row of each segment, in place of cu_seqlens; in any order, without overlap.
        pooling: with cu_seqlens "mean", or the "first" or "last" row of each sequence.

    Returns:
        Means in fp32 (fp64 for fp64 states). A segment without rows gives zeros.

    Raises:
        TypeError, ValueError: arguments that do not fit together; on CUDA bad values of cu_seqlens or spans are a
            device-side assertion instead, which does not stop the host.
    """
    check_states("x", x)
    bounds = cu_seqlens if spans is None else spans
    if bounds is None or (spans is not None and cu_seqlens is not None):
        raise ValueError("pass either cu_seqlens or spans")
    if spans is not None:
        pooling = SPANS
    elif pooling not in POOLINGS:
        raise ValueError(f"pooling is {pooling!r}, but must be one of {', '.join(POOLINGS)}")
    check_bounds("cu_seqlens" if spans is None else "spans", bounds, x.device, "x")
    shape = bounds.shape[:-1] if spans is not None else (bounds.shape[0] - 1,)
    bounds = bounds.reshape(-1, 2) if spans is not None else bounds
    mean = ops.segment_mean(x=x, bounds=bounds, pooling=pooling)
    return mean.reshape(*shape, x.shape[1])


def pooled_mse(
    student: Tensor,  # (T_s, D)
    teacher: Tensor,  # (T_t, D)
    cu_seqlens_s: Tensor | None = None,  # (B + 1,)
    cu_seqlens_t: Tensor | None = None,  # (B + 1,)
    *,
    spans_s: Tensor | None = None,  # (S, 2) or (B, C, 2)
    spans_t: Tensor | None = None,
    pooling: str = "mean",
    weight: Tensor | None = None,  # (B,), (S,) or (B, C)
) -> tuple[Tensor, Tensor]:
    """Σ_b weight_b · mean_d (pooled_s[b, d] - pooled_t[b, d])², and the sum of the weights (arXiv 2406.12739).

    Args:
        student: (T_s, D) states, fp32, bf16, fp16 (or fp64 on the CPU). Gets a gradient.
        teacher: (T_t, D) states in the same dtype. Always a constant.
        cu_seqlens_s, cu_seqlens_t, spans_s, spans_t, pooling: the pooled rows of each side, as in `segment_mean`.
        weight: weight (or bool mask) per segment, constant.

    Returns:
        (sum, count), 0-d, fp32 (fp64 for fp64 states). A segment that is empty on either side has weight 0.

    Raises:
        TypeError, ValueError: as `segment_mean`.
    """
    check_two_sides(student, teacher)
    bounds_s, bounds_t, pooling, flat = both_bounds(
        student, teacher, cu_seqlens_s, cu_seqlens_t, spans_s, spans_t, pooling, weight
    )
    pooled = {"bounds_s": bounds_s, "bounds_t": bounds_t, "pooling": pooling, "segment_weight": flat}
    need_dx = needs_gradient(student)
    total, *_ = ops.hidden_loss(student=student, teacher=teacher.detach(), **pooled, need_dx=need_dx)
    return total, pooled_count(bounds_s, bounds_t, flat, total.dtype, pooling == SPANS)


def paired_mse(
    student: Tensor,  # (T_s, D)
    teacher: Tensor,  # (T_t, D)
    rows_s: Tensor,  # (P,)
    rows_t: Tensor,  # (P,)
    *,
    weight: Tensor | None = None,  # (P,)
    rows_sorted: bool = False,
) -> tuple[Tensor, Tensor]:
    """Σ_p weight_p · mean_d (student[rows_s[p], d] - teacher[rows_t[p], d])², and the sum of the weights.

    Args:
        student: (T_s, D) states, fp32, bf16, fp16 (or fp64 on the CPU). Gets a gradient.
        teacher: (T_t, D) states in the same dtype. Always a constant.
        rows_s, rows_t: (P,) int32 or int64, rows may repeat.
        weight: (P,) weight (or bool mask) per pair, constant. A pair of weight 0 is left out altogether.
        rows_sorted: promise that rows_s ascends (as aligned rows do), which saves a sort in backward.

    Returns:
        (sum, count), 0-d, fp32 (fp64 for fp64 states).

    Raises:
        TypeError, ValueError: arguments that do not fit together.
        IndexError: a row number out of range (on CUDA a device-side assertion, unless MTLLM_DEBUG=1).
    """
    check_two_sides(student, teacher)
    check_pairs(student, rows_s, rows_t, weight)
    dtype = accumulation_dtype(student.dtype)
    flat = None if weight is None else weight.detach().to(dtype)
    pairs = {"rows_s": rows_s, "rows_t": rows_t, "pair_weight": flat, "rows_sorted": rows_sorted}
    states = {"student": student, "teacher": teacher.detach(), "need_dx": needs_gradient(student)}
    _, total, *_ = ops.hidden_loss(**states, **pairs)
    return total, torch.full_like(total, rows_s.shape[0]) if flat is None else flat.sum()
