"""The torch.library side of `packed_projection`: one linear layer with everything around it, and its derivative.

Arguments are validated by `packed_projection.py`; values of row numbers and bounds in the kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import packed_projection_cpu as shared
from .autodiff import differentiable, once_only
from .device_checks import on_device_of_arguments
from .gemms import accumulation_dtype


@torch.library.custom_op("mtllm_fast::packed_linear", mutates_args=(), device_types="cpu")
def packed_linear(
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
) -> tuple[Tensor, Tensor]:
    """scale · act(norm(x[rows]) wᵀ + bias) between the boundary rows (T_out, D), and act's argument (T or 0, D)."""
    with torch.autocast("cpu", enabled=False):
        return shared.packed_linear_cpu(
            x, rows, w, bias, norm, norm_weight, norm_bias, eps, scale, activation, cu_seqlens, prefix, suffix, dtype,
            need_pre,
        )  # fmt: skip


@packed_linear.register_kernel("cuda")
@on_device_of_arguments
def _(
    x, rows, w, bias, norm, norm_weight, norm_bias, eps, scale, activation, cu_seqlens, prefix, suffix, dtype, need_pre
):  # fmt: skip
    from . import packed_projection_launch

    with torch.autocast("cuda", enabled=False):
        return packed_projection_launch.packed_linear_triton(
            x, rows, w, bias, norm, norm_weight, norm_bias, eps, scale, activation, cu_seqlens, prefix, suffix, dtype,
            need_pre,
        )  # fmt: skip


def _length(embeddings: Tensor | None) -> int:
    return 0 if embeddings is None else embeddings.shape[-2]


@packed_linear.register_fake
def _(
    x, rows, w, bias, norm, norm_weight, norm_bias, eps, scale, activation, cu_seqlens, prefix, suffix, dtype, need_pre
):  # fmt: skip
    tokens = x.shape[0] if rows is None else rows.shape[0]
    extra = _length(prefix) + _length(suffix)
    total = tokens + (cu_seqlens.shape[0] - 1) * extra if extra else tokens
    return w.new_empty((total, w.shape[0]), dtype=dtype), w.new_empty((tokens if need_pre else 0, w.shape[0]))


@torch.library.custom_op("mtllm_fast::packed_linear_backward", mutates_args=())
def packed_linear_backward(
    dy: Tensor,
    x: Tensor,
    rows: Tensor | None,
    w: Tensor,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    scale: float,
    activation: str,
    pre: Tensor,
    cu_seqlens: Tensor | None,
    before: int,
    after: int,
    per_sequence: list[bool],
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
    need_norm: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dw, db, d_norm (2, E), d_prefix, d_suffix; one that is not needed has no elements."""
    with torch.autocast(dy.device.type, enabled=False):
        return shared.packed_linear_backward(
            dy, x, rows, w, norm, norm_weight, norm_bias, eps, scale, activation, pre, cu_seqlens, before, after,
            per_sequence, need_dx, need_dw, need_db, need_norm,
        )  # fmt: skip


@packed_linear_backward.register_fake
def _(
    dy, x, rows, w, norm, norm_weight, norm_bias, eps, scale, activation, pre, cu_seqlens, before, after, per_sequence,
    need_dx, need_dw, need_db, need_norm,
):  # fmt: skip
    dtype = accumulation_dtype(w.dtype)
    width_out, width = w.shape

    def boundary(length: int, own: bool) -> Tensor:
        shape: tuple[int, ...] = (0, width_out)
        if before + after:
            shape = (cu_seqlens.shape[0] - 1, length, width_out) if own else (length, width_out)
        return dy.new_empty(shape, dtype=dtype)

    return (
        x.new_empty((x.shape[0] if need_dx else 0, width)),
        w.new_empty((width_out if need_dw else 0, width)),
        w.new_empty(width_out if need_db else 0, dtype=dtype),
        w.new_empty((2, width if need_norm else 0), dtype=dtype),
        boundary(before, per_sequence[0]),
        boundary(after, per_sequence[1]),
    )


run_backward = once_only(packed_linear_backward, "packed_projection")


def _save(ctx, inputs, output):
    x, rows, w, bias, ctx.norm, norm_weight, norm_bias, ctx.eps, ctx.scale, ctx.activation, cu_seqlens, *rest = inputs
    prefix, suffix, _, _ = rest
    ctx.lengths = (_length(prefix), _length(suffix))
    ctx.per_sequence = [e is not None and e.dim() == 3 for e in (prefix, suffix)]
    ctx.dtypes = [None if v is None else v.dtype for v in (bias, norm_weight, norm_bias, prefix, suffix)]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, rows, w, norm_weight, norm_bias, cu_seqlens, output[1])


def _backward(ctx, dy, _):
    gradients: list[Tensor | None] = [None] * 15
    if dy is None:
        return tuple(gradients)
    x, rows, w, norm_weight, norm_bias, cu_seqlens, pre = ctx.saved_tensors
    need = ctx.needs_input_grad
    dx, dw, db, d_norm, d_prefix, d_suffix = run_backward(
        dy.contiguous(), x, rows, w, ctx.norm, norm_weight, norm_bias, ctx.eps, ctx.scale, ctx.activation, pre,
        cu_seqlens, *ctx.lengths, ctx.per_sequence, need[0], need[2], need[3], need[5] or need[6],
    )  # fmt: skip
    found = {0: dx, 2: dw, 3: db, 5: d_norm[0], 6: d_norm[1], 11: d_prefix, 12: d_suffix}
    dtypes = dict(zip((3, 5, 6, 11, 12), ctx.dtypes))
    for index, gradient in found.items():
        if need[index]:
            gradients[index] = gradient.to(dtypes.get(index) or gradient.dtype)
    return tuple(gradients)


run_packed_linear = differentiable(packed_linear, _save, _backward, "packed_projection")
