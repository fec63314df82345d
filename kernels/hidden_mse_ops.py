"""The torch.library side of `hidden_mse` and `distillation_loss`: CPU and CUDA kernels, fakes and derivatives.

`segment_mean` pools, `hidden_loss` computes the pooled and the paired loss of one student and teacher, and
`state_gradient` is the backward of all of them: one op, so that a state's gradient is written once however many terms
it comes from. Arguments are validated by the public functions; values of row numbers and bounds in the kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import hidden_mse_cpu
from .autodiff import differentiable, once_only
from .device_checks import on_device_of_arguments
from .gemms import accumulation_dtype
from .linear_kl_ops import scaled_gradient


def _segments(bounds: Tensor, pooling: str) -> int:
    return bounds.shape[0] if pooling == "spans" else bounds.shape[0] - 1


_STATS = {"none": 0, "rms": 1, "layer": 2}


@torch.library.custom_op("mtllm_fast::segment_mean", mutates_args=(), device_types="cpu")
def segment_mean(
    x: Tensor,  # (T, D)
    bounds: Tensor,  # (B + 1,) or (S, 2)
    pooling: str,
    norm: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Means (S, D) of normalised rows, and row statistics (n, T)."""
    return hidden_mse_cpu.segment_mean_cpu(x, bounds, pooling, norm, eps)


@segment_mean.register_kernel("cuda")
@on_device_of_arguments
def _(x, bounds, pooling, norm, eps):
    from . import hidden_mse_launch

    return hidden_mse_launch.segment_mean_triton(x, bounds, pooling, norm, eps)


@segment_mean.register_fake
def _(x, bounds, pooling, norm, eps):
    dtype = accumulation_dtype(x.dtype)
    return (
        x.new_empty((_segments(bounds, pooling), x.shape[1]), dtype=dtype),
        x.new_empty((_STATS[norm], x.shape[0]), dtype=dtype),
    )


@torch.library.custom_op("mtllm_fast::hidden_loss", mutates_args=(), device_types="cpu")
def hidden_loss(
    student: Tensor,  # (T_s, D)
    teacher: Tensor,  # (T_t, D)
    bounds_s: Tensor | None,  # (B + 1,) or (S, 2); None: no pooled term
    bounds_t: Tensor | None,
    pooling: str,
    segment_weight: Tensor | None,  # (S,)
    norm: str,
    norm_weight: Tensor | None,  # (D,)
    eps: float,
    rows_s: Tensor | None,  # (P,); None: no paired term
    rows_t: Tensor | None,  # (P,)
    pair_weight: Tensor | None,  # (P,)
    kind: str,
    rows_sorted: bool,
    need_dx: bool,
    need_norm: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """pooled (), paired (), values (S,) and (P,), u (S, D), stats (n, T_s), pair_stats (2, P), d norm_weight (1, D)."""
    return _hidden_loss(
        hidden_mse_cpu, "cpu", student, teacher, bounds_s, bounds_t, pooling, segment_weight, norm, norm_weight, eps,
        rows_s, rows_t, pair_weight, kind, need_dx, need_norm,
    )  # fmt: skip


@hidden_loss.register_kernel("cuda")
@on_device_of_arguments
def _(
    student, teacher, bounds_s, bounds_t, pooling, segment_weight, norm, norm_weight, eps, rows_s, rows_t, pair_weight,
    kind, rows_sorted, need_dx, need_norm,
):  # fmt: skip
    from . import hidden_mse_launch

    return _hidden_loss(
        hidden_mse_launch, "triton", student, teacher, bounds_s, bounds_t, pooling, segment_weight, norm, norm_weight,
        eps, rows_s, rows_t, pair_weight, kind, need_dx, need_norm,
    )  # fmt: skip


def _weighted_sum(values: Tensor, weight: Tensor | None) -> Tensor:
    return values.sum() if weight is None else (values * weight.to(values.dtype)).sum()


def _hidden_loss(
    kernels, path, student, teacher, bounds_s, bounds_t, pooling, segment_weight, norm, norm_weight, eps, rows_s,
    rows_t, pair_weight, kind, need_dx, need_norm,
):  # fmt: skip
    dtype = accumulation_dtype(student.dtype)
    nothing = student.new_zeros(0, dtype=dtype)
    values, u, d_norm = nothing.clone(), nothing.view(0, 1)[:, :0].clone(), nothing.view(0, 1).clone()
    stats, pair_values, pair_stats = nothing.view(0, 1).clone(), nothing.clone(), nothing.view(0, 1).clone()
    if bounds_s is not None:
        values, u, stats, d_norm = getattr(kernels, f"pooled_{path}")(
            student, teacher, bounds_s, bounds_t, pooling, segment_weight, norm, norm_weight, eps, need_dx, need_norm
        )
    if rows_s is not None:
        pair_values, pair_stats = getattr(kernels, f"pairs_{path}")(student, teacher, rows_s, rows_t, pair_weight, kind)
    pooled = _weighted_sum(values, segment_weight if bounds_s is not None else None)
    paired = _weighted_sum(pair_values, pair_weight if rows_s is not None else None)
    return pooled, paired, values, pair_values, u, stats, pair_stats, d_norm


@hidden_loss.register_fake
def _(
    student, teacher, bounds_s, bounds_t, pooling, segment_weight, norm, norm_weight, eps, rows_s, rows_t, pair_weight,
    kind, rows_sorted, need_dx, need_norm,
):  # fmt: skip
    dtype = accumulation_dtype(student.dtype)
    pooled = bounds_s is not None
    segments = _segments(bounds_s, pooling) if pooled else 0
    pairs = 0 if rows_s is None else rows_s.shape[0]
    width = student.shape[1]

    def empty(*shape: int) -> Tensor:
        return student.new_empty(shape, dtype=dtype)

    return (
        empty(),
        empty(),
        empty(segments),
        empty(pairs),
        empty(segments if need_dx else 0, width) if pooled else empty(0, 0),
        empty(_STATS[norm], student.shape[0] if need_dx else 0) if pooled else empty(0, 1),
        empty(2, pairs if kind == "cosine" else 0) if rows_s is not None else empty(0, 1),
        empty(1, width) if pooled else empty(0, 1),
    )


@torch.library.custom_op("mtllm_fast::state_gradient", mutates_args=(), device_types="cpu")
def state_gradient(
    scales: Tensor,  # (3,)
    student: Tensor,  # (T, D)
    teacher: Tensor | None,  # (T_t, D)
    u: Tensor | None,  # (S, D)
    bounds: Tensor | None,
    pooling: str,
    norm: str,
    stats: Tensor,  # (n, T)
    rows_s: Tensor | None,  # (P,)
    rows_t: Tensor | None,  # (P,)
    pair_weight: Tensor | None,  # (P,)
    pair_stats: Tensor,  # (2, P)
    kind: str,
    rows_sorted: bool,
    more: Tensor | None,  # (T, D)
) -> Tensor:
    """Gradient (T, D) of the states from the pooled term, the row pairs and `more`, each times its scale."""
    return hidden_mse_cpu.state_gradient_cpu(
        scales, student, teacher, u, bounds, pooling, norm, stats, rows_s, rows_t, pair_weight, pair_stats, kind,
        rows_sorted, more,
    )  # fmt: skip


@state_gradient.register_kernel("cuda")
@on_device_of_arguments
def _(
    scales, student, teacher, u, bounds, pooling, norm, stats, rows_s, rows_t, pair_weight, pair_stats, kind,
    rows_sorted, more,
):  # fmt: skip
    from . import hidden_mse_launch

    return hidden_mse_launch.state_gradient_triton(
        scales, student, teacher, u, bounds, pooling, norm, stats, rows_s, rows_t, pair_weight, pair_stats, kind,
        rows_sorted, more,
    )  # fmt: skip


@state_gradient.register_fake
def _(
    scales, student, teacher, u, bounds, pooling, norm, stats, rows_s, rows_t, pair_weight, pair_stats, kind,
    rows_sorted, more,
):  # fmt: skip
    return student.new_empty(student.shape)


gradient_of_states = once_only(state_gradient, "segment_mean, pooled_mse, paired_mse or distillation_loss")


def scales_of(like: Tensor, *gradients: Tensor | None) -> Tensor:
    """The incoming scalars as one (3,) tensor; a term without a gradient counts 0."""
    dtype = accumulation_dtype(like.dtype)
    zero = like.new_zeros((), dtype=dtype)
    padded = (*gradients, *[None] * (3 - len(gradients)))
    return torch.stack([zero if g is None else g.to(dtype) for g in padded])


def shape_of(x: Tensor) -> Tensor:
    """What stands for `x` (T, D) in backward where only its shape and dtype are read: one row of memory."""
    return x.new_empty(1, x.shape[1]).expand(x.shape)


def _save_segment_mean(ctx, inputs, output):
    x, bounds, ctx.pooling, ctx.norm, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(shape_of(x) if ctx.norm == "none" else x, bounds, output[1])


def _segment_mean_backward(ctx, grad_mean, _):
    x, bounds, stats = ctx.saved_tensors
    if grad_mean is None:
        return None, None, None, None, None
    if ctx.pooling == "spans":
        lengths = bounds[:, 1] - bounds[:, 0]
    else:
        lengths = bounds.diff() if ctx.pooling == "mean" else bounds.diff().clamp(max=1)
    u = (grad_mean / lengths.clamp(min=1).unsqueeze(1)).contiguous()
    dx = gradient_of_states(
        u.new_ones(3), x, None, u, bounds, ctx.pooling, ctx.norm, stats, None, None, None, stats[:0], "mse", False,
        None,
    )  # fmt: skip
    return dx, None, None, None, None


def _save_hidden_loss(ctx, inputs, output):
    (student, teacher, bounds_s, _, ctx.pooling, _, ctx.norm, norm_weight, _, rows_s, rows_t, pair_weight, ctx.kind,
     ctx.rows_sorted, ctx.need_dx, ctx.need_norm) = inputs  # fmt: skip
    _, _, _, _, u, stats, pair_stats, d_norm = output
    ctx.norm_dtype = None if norm_weight is None else norm_weight.dtype
    ctx.set_materialize_grads(False)
    # Only row pairs need the states again, and a norm those of the student.
    student = student if rows_s is not None or ctx.norm != "none" else shape_of(student)
    teacher = teacher if rows_s is not None else None
    ctx.save_for_backward(student, teacher, bounds_s, rows_s, rows_t, pair_weight, u, stats, pair_stats, d_norm)


def _hidden_loss_backward(ctx, grad_pooled, grad_paired, *_unused):
    student, teacher, bounds_s, rows_s, rows_t, pair_weight, u, stats, pair_stats, d_norm = ctx.saved_tensors
    gradients: list[Tensor | None] = [None] * 16
    if ctx.need_dx and (grad_pooled is not None or grad_paired is not None):
        pooled, paired = bounds_s is not None and grad_pooled is not None, grad_paired is not None
        gradients[0] = gradient_of_states(
            scales_of(student, grad_pooled, grad_paired), student, teacher, u if pooled else None, bounds_s,
            ctx.pooling, ctx.norm, stats, rows_s if paired else None, rows_t, pair_weight, pair_stats, ctx.kind,
            ctx.rows_sorted, None,
        )  # fmt: skip
    if ctx.need_norm and grad_pooled is not None:
        gradients[7] = scaled_gradient(d_norm[0], grad_pooled, ctx.norm_dtype)
    return tuple(gradients)


run_segment_mean = differentiable(segment_mean, _save_segment_mean, _segment_mean_backward, "segment_mean")
run_hidden_loss = differentiable(hidden_loss, _save_hidden_loss, _hidden_loss_backward, "pooled_mse or paired_mse")
