"""The torch.library side of `linear_kl`: one op per form, each with CPU and CUDA kernels, a fake and a derivative.

The ops return gradients next to values: `total` is the only differentiable output, backward multiplies the gradients
that the forward made by the incoming scalar. `run_difference` and `run_moment_step` are how callers call them.
Arguments are validated by `linear_kl.py`, not here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import linear_kl_cpu, moments_cpu
from .autodiff import differentiable, once_only
from .device_checks import on_device_of_arguments
from .gemms import accumulation_dtype, kept_dtype


@torch.library.custom_op("mtllm_fast::linear_kl_difference", mutates_args=(), device_types="cpu")
def difference(
    h_s: Tensor,  # (T_s, D)
    w_s: Tensor,  # (V, D)
    h_t: Tensor,  # (T_t, D_t)
    w_t: Tensor | None,  # (V, D_t)
    bias_s: Tensor | None,  # (V,)
    bias_t: Tensor | None,  # (V,)
    rows_s: Tensor | None,  # (P,)
    rows_t: Tensor | None,  # (P,)
    row_weight: Tensor | None,  # (P,)
    num_valid: int,  # pairs of weight != 0, -1 where the host does not know
    temperature: float,
    scale: float,  # τ² or 1, multiplies the values
    softcap: float,  # 0: none
    divergence: str,
    beta: float,
    need_dh: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """total (), values (P,), dh (T_s, D), dw (V, D), db (V,); a gradient that is not needed has no rows.

    dh and dw are in `kept_dtype` of the states and the head, db in the accumulation dtype.
    """
    # An enclosing autocast region would round the fp32 GEMMs in here to bf16.
    with torch.autocast("cpu", enabled=False):
        return linear_kl_cpu.difference_cpu(
            *(h_s, w_s, h_t, w_t, bias_s, bias_t, rows_s, rows_t, row_weight),
            *(temperature, scale, softcap, divergence, beta, need_dh, need_dw, need_db),
        )


@difference.register_kernel("cuda")
@on_device_of_arguments
def _(
    h_s, w_s, h_t, w_t, bias_s, bias_t, rows_s, rows_t, row_weight, num_valid, temperature, scale, softcap, divergence,
    beta, need_dh, need_dw, need_db,
):  # fmt: skip
    from .linear_kl_launch import difference_triton

    with torch.autocast("cuda", enabled=False):
        return difference_triton(
            *(h_s, w_s, h_t, w_t, bias_s, bias_t, rows_s, rows_t, row_weight, num_valid),
            *(temperature, scale, softcap, divergence, beta, need_dh, need_dw, need_db),
        )


@difference.register_fake
def _(
    h_s, w_s, h_t, w_t, bias_s, bias_t, rows_s, rows_t, row_weight, num_valid, temperature, scale, softcap, divergence,
    beta, need_dh, need_dw, need_db,
):  # fmt: skip
    dtype = accumulation_dtype(h_s.dtype)
    vocab, width = w_s.shape
    return (
        h_s.new_empty((), dtype=dtype),
        h_s.new_empty(h_s.shape[0] if rows_s is None else rows_s.shape[0], dtype=dtype),
        h_s.new_empty((h_s.shape[0] if need_dh else 0, width), dtype=kept_dtype(h_s.dtype)),
        w_s.new_empty((vocab if need_dw else 0, width), dtype=kept_dtype(w_s.dtype)),
        h_s.new_empty(vocab if need_db else 0, dtype=dtype),
    )


@torch.library.custom_op("mtllm_fast::linear_kl_moments", mutates_args=(), device_types="cpu")
def moment_step(
    h_s: Tensor,  # (T_s, D)
    w_s: Tensor,  # (V, D)
    bias_s: Tensor | None,  # (V,)
    m: Tensor,  # (N, D)
    entropy: Tensor,  # (N,)
    bias_mean: Tensor,  # (N,)
    rows_s: Tensor | None,  # (P,)
    rows_t: Tensor | None,  # (P,)
    row_weight: Tensor | None,  # (P,)
    num_valid: int,
    temperature: float,
    scale: float,
    need_dh: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """total (), values (P,), dh (T_s, D)."""
    with torch.autocast("cpu", enabled=False):
        return moments_cpu.moment_step_cpu(
            *(h_s, w_s, bias_s, m, entropy, bias_mean, rows_s, rows_t, row_weight, temperature, scale, need_dh)
        )


@moment_step.register_kernel("cuda")
@on_device_of_arguments
def _(
    h_s, w_s, bias_s, m, entropy, bias_mean, rows_s, rows_t, row_weight, num_valid, temperature, scale, need_dh
):  # fmt: skip
    from .linear_kl_launch import moment_step_triton

    with torch.autocast("cuda", enabled=False):
        return moment_step_triton(
            *(h_s, w_s, bias_s, m, entropy, bias_mean, rows_s, rows_t, row_weight, num_valid),
            *(temperature, scale, need_dh),
        )


@moment_step.register_fake
def _(
    h_s, w_s, bias_s, m, entropy, bias_mean, rows_s, rows_t, row_weight, num_valid, temperature, scale, need_dh
):  # fmt: skip
    dtype = accumulation_dtype(h_s.dtype)
    return (
        h_s.new_empty((), dtype=dtype),
        h_s.new_empty(h_s.shape[0] if rows_s is None else rows_s.shape[0], dtype=dtype),
        h_s.new_empty((h_s.shape[0] if need_dh else 0, h_s.shape[1]), dtype=kept_dtype(h_s.dtype)),
    )


@torch.library.custom_op("mtllm_fast::teacher_moments", mutates_args=(), device_types="cpu")
def moments_of(
    h_t: Tensor,  # (T_t, D_t)
    w_t: Tensor,  # (V, D_t)
    w_s: Tensor | None,  # (V, D)
    bias_t: Tensor | None,  # (V,)
    bias_s: Tensor | None,  # (V,)
    rows: Tensor | None,  # (N,)
    temperature: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """m (N, D), entropy (N,), bias_mean (N,), all in the accumulation dtype. Has no derivative."""
    with torch.autocast("cpu", enabled=False):
        return moments_cpu.teacher_moments_cpu(h_t, w_t, w_s, bias_t, bias_s, rows, temperature, softcap)


@moments_of.register_kernel("cuda")
@on_device_of_arguments
def _(h_t, w_t, w_s, bias_t, bias_s, rows, temperature, softcap):
    from .linear_kl_launch import teacher_moments_triton

    with torch.autocast("cuda", enabled=False):
        return teacher_moments_triton(h_t, w_t, w_s, bias_t, bias_s, rows, temperature, softcap)


@moments_of.register_fake
def _(h_t, w_t, w_s, bias_t, bias_s, rows, temperature, softcap):
    dtype = accumulation_dtype(h_t.dtype)
    count = h_t.shape[0] if rows is None else rows.shape[0]
    width = (w_t if w_s is None else w_s).shape[1]
    return (
        h_t.new_empty((count, width), dtype=dtype),
        h_t.new_empty(count, dtype=dtype),
        h_t.new_empty(count, dtype=dtype),
    )


@torch.library.custom_op("mtllm_fast::scale_gradient", mutates_args=())
def scale_gradient(gradient: Tensor, by: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * by in `dtype`, as an op so that a second derivative raises instead of lying."""
    return (gradient * by).to(dtype)


@scale_gradient.register_fake
def _(gradient, by, dtype):
    return torch.empty_like(gradient, dtype=dtype)


scaled_gradient = once_only(scale_gradient, "linear_kl, distillation_loss or pooled_mse")


def _save_difference(ctx, inputs, output):
    _, _, dh, dw, db = output
    ctx.need_dh, ctx.need_dw, ctx.need_db = inputs[-3:]
    ctx.dtypes = [None if x is None else x.dtype for x in (inputs[0], inputs[1], inputs[4])]
    ctx.set_materialize_grads(False)  # or backward would allocate zeros for dh and dw, which have no derivative
    ctx.save_for_backward(dh, dw, db)


def _difference_backward(ctx, grad_total, *_unused):
    dh, dw, db = ctx.saved_tensors
    gradients: list[Tensor | None] = [None] * 18
    if grad_total is None:
        return tuple(gradients)
    if ctx.need_dh:
        gradients[0] = scaled_gradient(dh, grad_total, ctx.dtypes[0])
    if ctx.need_dw:
        gradients[1] = scaled_gradient(dw, grad_total, ctx.dtypes[1])
    if ctx.need_db:
        gradients[4] = scaled_gradient(db, grad_total, ctx.dtypes[2])
    return tuple(gradients)


def _save_moment_step(ctx, inputs, output):
    ctx.need_dh, ctx.dtype = inputs[-1], inputs[0].dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[2])


def _moment_step_backward(ctx, grad_total, *_unused):
    (dh,) = ctx.saved_tensors
    wanted = ctx.need_dh and grad_total is not None
    return (scaled_gradient(dh, grad_total, ctx.dtype) if wanted else None, *([None] * 12))


run_difference = differentiable(difference, _save_difference, _difference_backward, "linear_kl")
run_moment_step = differentiable(moment_step, _save_moment_step, _moment_step_backward, "linear_kl")
