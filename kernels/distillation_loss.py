"""distillation_loss: pooled MSE, paired MSE and LM-head KL of a student and a teacher, in one autograd node.

    pooled_mse = pooled_mse(student, teacher, cu_seqlens_s, cu_seqlens_t)
    paired_mse = paired_mse(student, teacher, rows_s, rows_t)
    kl         = linear_kl(student, head, teacher, rows_s=rows_s, rows_t=rows_t)

The gradient is that of the three ops by themselves, but `d student (T, D)` is written once: backward takes the incoming
scalars of all three sums and makes one pass that adds the pooled part, the row pairs and the KL's rows. By themselves
the three write three tensors and autograd adds them, 9 T D against (3 + pairs) T D values moved.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import hidden_mse_ops, linear_kl_ops
from .autodiff import differentiable
from .gemms import accumulation_dtype, kept_dtype
from .hidden_mse import KINDS, both_bounds, check_pairs, check_two_sides, pooled_count
from .linear_kl_checks import check_moments, check_options, check_side, common_vocabulary, gathered
from .linear_kl_cpu import FORWARD
from .moments import TeacherMoments
from .segments import SPANS


class DistillationTerms(NamedTuple):
    """(sum, count) of each term, 0-d; None for a term that was not asked for. Every sum is differentiable."""

    pooled_mse: tuple[Tensor, Tensor] | None
    paired_mse: tuple[Tensor, Tensor] | None
    kl: tuple[Tensor, Tensor] | None


@torch.library.custom_op("mtllm_fast::distillation_loss", mutates_args=())
def _distillation(
    student: Tensor,  # (T_s, D)
    teacher: Tensor,  # (T_t, D)
    bounds_s: Tensor | None,
    bounds_t: Tensor | None,
    pooling: str,
    segment_weight: Tensor | None,  # (S,)
    rows_s: Tensor | None,  # (P,)
    rows_t: Tensor | None,  # (P,)
    pair_weight: Tensor | None,  # (P,)
    kind: str,  # "": no paired term
    rows_sorted: bool,
    head: Tensor | None,  # (V, D); None: no KL
    bias: Tensor | None,  # (V,)
    m: Tensor | None,  # (N, D) teacher moments; None: difference form
    entropy: Tensor | None,  # (N,)
    bias_mean: Tensor | None,  # (N,)
    num_valid: int,
    temperature: float,
    scale: float,
    softcap: float,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """pooled (), paired (), kl (), u (S, D), pair_stats (2, P), dh (T_s, D), dw (V, D), db (V,)."""
    pooled, paired, _, _, u, _, pair_stats, _ = hidden_mse_ops.hidden_loss(
        student, teacher, bounds_s, bounds_t, pooling, segment_weight, "none", None, 0.0,
        rows_s if kind else None, rows_t, pair_weight, kind or "mse", rows_sorted, need_dx, False,
    )  # fmt: skip
    kl = pooled.new_zeros(())
    dh, dw = (student.new_empty(0, student.shape[1], dtype=kept_dtype(student.dtype)) for _ in range(2))
    db = pooled.new_empty(0)
    selection = (rows_s, rows_t, pair_weight, num_valid)
    if head is not None and m is not None:
        assert entropy is not None and bias_mean is not None
        kl, _, dh = linear_kl_ops.moment_step(
            student, head, bias, m, entropy, bias_mean, *selection, temperature, scale, need_dx
        )
    elif head is not None:
        kl, _, dh, dw, db = linear_kl_ops.difference(
            student, head, teacher, None, bias, None, *selection, temperature, scale, softcap, FORWARD, 0.5, need_dx,
            need_dw, need_db,
        )  # fmt: skip
    return pooled, paired, kl, u, pair_stats, dh, dw, db


@_distillation.register_fake
def _(
    student, teacher, bounds_s, bounds_t, pooling, segment_weight, rows_s, rows_t, pair_weight, kind, rows_sorted, head,
    bias, m, entropy, bias_mean, num_valid, temperature, scale, softcap, need_dx, need_dw, need_db,
):  # fmt: skip
    dtype = accumulation_dtype(student.dtype)
    width = student.shape[1]
    u_shape: tuple[int, ...] = (0, 0)
    if bounds_s is not None:
        u_shape = (bounds_s.shape[0] - int(pooling != SPANS) if need_dx else 0, width)
    stats_shape: tuple[int, ...] = (0, 1)
    if kind:
        stats_shape = (2, rows_s.shape[0] if kind == "cosine" else 0)
    with_head, vocab = head is not None, 0 if head is None else head.shape[0]
    differs = with_head and m is None
    return (
        student.new_empty((), dtype=dtype),
        student.new_empty((), dtype=dtype),
        student.new_empty((), dtype=dtype),
        student.new_empty(u_shape, dtype=dtype),
        student.new_empty(stats_shape, dtype=dtype),
        student.new_empty((student.shape[0] if with_head and need_dx else 0, width), dtype=kept_dtype(student.dtype)),
        student.new_empty((vocab if differs and need_dw else 0, width), dtype=kept_dtype(student.dtype)),
        student.new_empty(vocab if differs and need_db else 0, dtype=dtype),
    )


def _save(ctx, inputs, output):
    student, teacher, bounds_s, _, ctx.pooling, _, rows_s, rows_t, pair_weight, ctx.kind, ctx.rows_sorted = inputs[:11]
    head, bias = inputs[11:13]
    ctx.has_head, ctx.bias_dtype = head is not None, None if bias is None else bias.dtype
    ctx.need_dx, ctx.need_dw, ctx.need_db = inputs[-3:]
    _, _, _, u, pair_stats, dh, dw, db = output
    ctx.set_materialize_grads(False)
    # Only row pairs need the states again.
    student, teacher = (student, teacher) if ctx.kind else (hidden_mse_ops.shape_of(student), None)
    ctx.save_for_backward(student, teacher, bounds_s, rows_s, rows_t, pair_weight, u, pair_stats, dh, dw, db)


def _backward(ctx, grad_pooled, grad_paired, grad_kl, *_unused):
    student, teacher, bounds_s, rows_s, rows_t, pair_weight, u, pair_stats, dh, dw, db = ctx.saved_tensors
    gradients: list[Tensor | None] = [None] * 23
    pooled = bounds_s is not None and grad_pooled is not None
    paired = bool(ctx.kind) and grad_paired is not None
    kl = ctx.has_head and grad_kl is not None
    if ctx.need_dx and (pooled or paired or kl):
        gradients[0] = hidden_mse_ops.gradient_of_states(
            hidden_mse_ops.scales_of(student, grad_pooled, grad_paired, grad_kl), student, teacher,
            u if pooled else None, bounds_s, ctx.pooling, "none", u.new_empty(0, 1),
            rows_s if paired else None, rows_t, pair_weight, pair_stats, ctx.kind or "mse", ctx.rows_sorted,
            dh if kl else None,
        )  # fmt: skip
    if kl and ctx.need_dw:
        gradients[11] = linear_kl_ops.scaled_gradient(dw, grad_kl, student.dtype)
    if kl and ctx.need_db:
        gradients[12] = linear_kl_ops.scaled_gradient(db, grad_kl, ctx.bias_dtype)
    return tuple(gradients)


_run = differentiable(_distillation, _save, _backward, "distillation_loss")


def distillation_loss(
    student: Tensor,  # (T_s, D)
    teacher: Tensor,  # (T_t, D)
    *,
    pooled: bool = True,
    cu_seqlens_s: Tensor | None = None,  # (B + 1,)
    cu_seqlens_t: Tensor | None = None,  # (B + 1,)
    spans_s: Tensor | None = None,  # (S, 2) or (B, C, 2)
    spans_t: Tensor | None = None,
    pooling: str = "mean",
    segment_weight: Tensor | None = None,  # (B,), (S,) or (B, C)
    paired: str | None = None,
    rows_s: Tensor | None = None,  # (P,)
    rows_t: Tensor | None = None,  # (P,)
    pair_weight: Tensor | None = None,  # (P,)
    rows_sorted: bool = False,
    head: Tensor | None = None,  # (V, D)
    head_bias: Tensor | None = None,  # (V,)
    moments: TeacherMoments | None = None,
    num_valid: int | None = None,
    temperature: float = 1.0,
    scale_by_t2: bool = True,
    softcap: float | None = None,
) -> DistillationTerms:
    """The active terms over the same packed states, each as (sum, count).

    Args:
        student, teacher: (T_s, D) and (T_t, D) states in one dtype, fp32, bf16, fp16 (or fp64 on the CPU). The student
            gets a gradient, the teacher is a constant.
        pooled: whether to compute the pooled MSE, over cu_seqlens or spans, pooling and segment_weight as `pooled_mse`.
        paired: "mse" or "cosine" for the paired term over rows_s, rows_t, pair_weight as `paired_mse`; None: none.
        rows_s, rows_t, pair_weight, rows_sorted: the row pairs of the paired term and of the KL.
        head, head_bias: LM head shared by both sides, in the states' dtype (autocast casts it to that); None: no KL.
            Get gradients of the student's side if they require them.
        moments: cached `teacher_moments` of the pairs' teacher rows: rows_t then holds rows of `moments`, so `paired`
            must be None. Needs a frozen head and no soft-capping.
        num_valid, temperature, scale_by_t2, softcap: as `linear_kl`, forward KL.

    Raises:
        TypeError, ValueError, IndexError: as the three ops; or no term at all.
    """
    check_two_sides(student, teacher)
    head, head_bias = gathered("head", head), gathered("head_bias", head_bias)
    if isinstance(head, Tensor) and not student.is_meta and torch.is_autocast_enabled(student.device.type):
        head = head.to(student.dtype)
    if not pooled and paired is None and head is None:
        raise ValueError("pooled is False, paired is None and head is None: there is no term to compute")
    bounds_s = bounds_t = flat = pairs = None
    if pooled:
        bounds_s, bounds_t, pooling, flat = both_bounds(
            student, teacher, cu_seqlens_s, cu_seqlens_t, spans_s, spans_t, pooling, segment_weight
        )
    dtype = accumulation_dtype(student.dtype)
    if paired is not None or head is not None:
        if rows_s is None or rows_t is None:
            raise ValueError("rows_s and rows_t are needed by the paired term and the KL")
        check_pairs(student, rows_s, rows_t, pair_weight)
        pairs = None if pair_weight is None else pair_weight.detach().to(dtype)
    if paired is not None and paired not in KINDS:
        raise ValueError(f"paired is {paired!r}, but must be None, 'mse' or 'cosine'")
    graded = torch.is_grad_enabled()
    tau = float(temperature)
    if head is not None:
        check_options(temperature, softcap, FORWARD, 0.0, "auto")
        check_side("student", student, "head", head, student.device)
        if head_bias is not None and (head_bias.shape != head.shape[:1] or head_bias.device != student.device):
            raise ValueError(f"head_bias must have shape ({head.shape[0]},) on {student.device}")
        if moments is not None:
            if paired is not None:
                raise ValueError(f"paired is {paired!r}, but with moments rows_t holds rows of the moments")
            if softcap is not None:
                raise ValueError(
                    f"softcap is {softcap}, but the moment form needs logits that are linear in the states"
                )
            if graded and (head.requires_grad or (head_bias is not None and head_bias.requires_grad)):
                raise ValueError("head or head_bias requires a gradient, but the moment form needs a frozen head")
            vocab = common_vocabulary(head.shape[0], moments.vocab_size, None, "moments")
            assert rows_s is not None
            check_moments(moments, head, vocab, tau, rows_s.shape[0], rows_t, student.device)
    elif moments is not None:
        raise ValueError("moments is given, but head is None")
    sums = _run(
        student, teacher.detach(), bounds_s, bounds_t, pooling, flat, rows_s, rows_t, pairs, paired or "", rows_sorted,
        head, head_bias, *((None, None, None) if moments is None else (moments.m, moments.entropy, moments.bias_mean)),
        -1 if num_valid is None else num_valid, tau, tau**2 if scale_by_t2 else 1.0,
        0.0 if softcap is None else float(softcap), graded and student.requires_grad,
        graded and head is not None and head.requires_grad,
        graded and head_bias is not None and head_bias.requires_grad,
    )  # fmt: skip
    terms: list[tuple[Tensor, Tensor] | None] = [None, None, None]
    if bounds_s is not None and bounds_t is not None:
        terms[0] = (sums[0], pooled_count(bounds_s, bounds_t, flat, dtype, pooling == SPANS))
    if rows_s is not None and (paired is not None or head is not None):
        count = sums[1].detach().new_full((), rows_s.shape[0]) if pairs is None else pairs.sum()
        terms[1] = None if paired is None else (sums[1], count)
        terms[2] = None if head is None else (sums[2], count)
    return DistillationTerms(*terms)
