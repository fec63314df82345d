"""distillation_loss: pooled MSE, paired MSE and LM-head KL of a student and a teacher, in one autograd node.

    pooled_mse = pooled_mse(student, teacher, cu_seqlens_s, cu_seqlens_t)
    paired_mse = paired_mse(student, teacher, rows_s, rows_t)
    kl         = linear_kl(student, head, teacher, rows_s=rows_s, rows_t=rows_t)

The gradient is that of the three ops by themselves, but `d student (T, D)` is written once: backward takes the incoming
scalars of all three sums and makes one pass that adds the pooled part, the row pairs and the KL's rows. By themselves
the three write three tensors and autograd adds them, 9 T D against (3 + pairs) T D values moved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import hidden_mse_ops, linear_kl_ops
from .gemms import accumulation_dtype, kept_dtype
from .hidden_mse import both_bounds, check_pairs, check_two_sides, pooled_count
from .linear_kl_checks import check_moments, check_options, check_side, common_vocabulary, gathered, plain_divergence
from .linear_kl_cpu import FORWARD
from .linear_kl_ops import dtype_if, scaled_gradients
from .moments import TeacherMoments
from .op import Kept, Op, Registered, needs_gradient
from .segments import SPANS


class DistillationTerms(NamedTuple):
    """(sum, count) of each term, 0-d; None for a term that was not asked for. Every sum is differentiable."""

    pooled_mse: tuple[Tensor, Tensor] | None
    paired_mse: tuple[Tensor, Tensor] | None
    kl: tuple[Tensor, Tensor] | None


Seven = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Distillation(Op[Seven]):
    """pooled (), paired (), kl (), u (S, D), dh (T_s, D), dw (V, D), db (V,)."""

    student: Tensor  # (T_s, D)
    teacher: Tensor  # (T_t, D)
    bounds_s: Tensor | None = None
    bounds_t: Tensor | None = None
    pooling: str = "mean"
    segment_weight: Tensor | None = None  # (S,)
    rows_s: Tensor | None = None  # (P,)
    rows_t: Tensor | None = None  # (P,)
    pair_weight: Tensor | None = None  # (P,)
    paired: bool = False
    rows_sorted: bool = False
    head: Tensor | None = None  # (V, D); None: no KL
    bias: Tensor | None = None  # (V,)
    m: Tensor | None = None  # (N, D) teacher moments; None: difference form
    entropy: Tensor | None = None  # (N,)
    bias_mean: Tensor | None = None  # (N,)
    num_valid: int = -1
    temperature: float = 1.0
    scale: float = 1.0
    softcap: float = 0.0
    divergence: str = FORWARD
    beta: float = 0.5
    need_dx: bool = False
    need_dw: bool = False
    need_db: bool = False

    def hidden(self) -> dict[str, Any]:
        """Arguments of `hidden_loss`."""
        names = ("student", "teacher", "bounds_s", "bounds_t", "pooling", "segment_weight", "need_dx")
        pairs = ("rows_s", "rows_t", "pair_weight", "rows_sorted") if self.paired else ()
        return {name: getattr(self, name) for name in (*names, *pairs)}

    def step(self) -> dict[str, object]:
        """Arguments that both forms of the KL share."""
        names = ("rows_s", "rows_t", "num_valid", "temperature", "scale")
        shared = {"h_s": self.student, "w_s": self.head, "bias_s": self.bias, "row_weight": self.pair_weight}
        return {**shared, "need_dh": self.need_dx, **{name: getattr(self, name) for name in names}}

    def cpu(self) -> Seven:
        pooled, paired, u = hidden_mse_ops.hidden_loss.raw(**self.hidden())
        kl = pooled.new_zeros(())
        dh, dw = (self._kept(0) for _ in range(2))
        db = pooled.new_empty(0)
        if self.head is not None and self.m is not None:
            teacher = {"m": self.m, "entropy": self.entropy, "bias_mean": self.bias_mean}
            kl, _, dh = linear_kl_ops.moment_step.raw(**self.step(), **teacher)
        elif self.head is not None:
            names = ("softcap", "divergence", "beta", "need_dw", "need_db")
            options = {name: getattr(self, name) for name in names}
            kl, _, dh, dw, db = linear_kl_ops.difference.raw(**self.step(), h_t=self.teacher, **options)
        return pooled, paired, kl, u, dh, dw, db

    def _kept(self, rows: int) -> Tensor:
        return self.student.new_empty((rows, self.student.shape[1]), dtype=kept_dtype(self.student.dtype))

    def fake(self) -> Seven:
        pooled, paired, u = hidden_mse_ops.HiddenLoss(**self.hidden()).fake()
        vocab = 0 if self.head is None or self.m is not None else self.head.shape[0]
        dh = self._kept(self.student.shape[0] if self.head is not None and self.need_dx else 0)
        db = pooled.new_empty(vocab if self.need_db else 0)
        return pooled, paired, pooled.new_empty(()), u, dh, self._kept(vocab if self.need_dw else 0), db

    def keep(self, output: Seven) -> Kept:
        _, _, _, u, dh, dw, db = output
        made = {"u": u if self.bounds_s is not None else None, "head": dw, "bias": db}
        made["more"] = dh if self.head is not None else None
        dtypes = {"head": dtype_if(self.need_dw, self.head), "bias": dtype_if(self.need_db, self.bias)}
        given = {"bounds": self.bounds_s, "pooling": self.pooling, "need_dx": self.need_dx}
        if self.paired:  # only row pairs need the states again
            names = ("student", "teacher", "rows_s", "rows_t", "pair_weight", "rows_sorted")
            given |= {name: getattr(self, name) for name in names}
        return {"student": hidden_mse_ops.shape_of(self.student), "dtypes": dtypes, **made, **given}

    @staticmethod
    def backward(
        kept: Kept, grad_pooled: Tensor | None, grad_paired: Tensor | None, grad_kl: Tensor | None, *_: Tensor | None
    ) -> dict[str, Tensor | None]:
        gradients = scaled_gradients(grad_kl, kept)
        if kept["need_dx"]:
            gradients["student"] = hidden_mse_ops.gradient_of_states(kept, grad_pooled, grad_paired, grad_kl)
        return gradients


_distillation = Registered(Distillation, "distillation_loss", errors="distillation_loss")


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
    paired: bool = False,
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
    divergence: str = FORWARD,
    beta: float = 0.5,
) -> DistillationTerms:
    """The active terms over the same packed states, each as (sum, count).

    Args:
        student, teacher: (T_s, D) and (T_t, D) states in one dtype, fp32, bf16, fp16 (or fp64 on the CPU). The student
            gets a gradient, the teacher is a constant.
        pooled: whether to compute the pooled MSE, over cu_seqlens or spans, pooling and segment_weight as `pooled_mse`.
        paired: whether to compute the paired MSE, over rows_s, rows_t, pair_weight as `paired_mse`.
        rows_s, rows_t, pair_weight, rows_sorted: the row pairs of the paired term and of the KL.
        head, head_bias: LM head shared by both sides, in the states' dtype (autocast casts it to that); None: no KL.
            Get gradients of the student's side if they require them.
        moments: cached `teacher_moments` of the pairs' teacher rows: rows_t then holds rows of `moments`, so `paired`
            must be False. Needs a frozen head, the forward KL and no soft-capping.
        num_valid, temperature, scale_by_t2, softcap, divergence, beta: as `linear_kl`.

    Raises:
        TypeError, ValueError, IndexError: as the three ops; or no term at all.
    """
    check_two_sides(student, teacher)
    head, head_bias = gathered("head", head), gathered("head_bias", head_bias)
    if isinstance(head, Tensor) and not student.is_meta and torch.is_autocast_enabled(student.device.type):
        head = head.to(student.dtype)
    if not isinstance(paired, bool):
        raise TypeError(f"paired is {paired!r}, but must be True or False: the paired term is the MSE")
    if not pooled and not paired and head is None:
        raise ValueError("pooled and paired are False and head is None: there is no term to compute")
    bounds_s = bounds_t = flat = pairs = None
    if pooled:
        bounds_s, bounds_t, pooling, flat = both_bounds(
            student, teacher, cu_seqlens_s, cu_seqlens_t, spans_s, spans_t, pooling, segment_weight
        )
    dtype = accumulation_dtype(student.dtype)
    if paired or head is not None:
        if rows_s is None or rows_t is None:
            raise ValueError("rows_s and rows_t are needed by the paired term and the KL")
        check_pairs(student, rows_s, rows_t, pair_weight)
        pairs = None if pair_weight is None else pair_weight.detach().to(dtype)
    if head is not None:
        check_options(temperature, softcap, divergence, beta, "auto")
        divergence = plain_divergence(divergence, beta)
        check_side("student", student, "head", head, student.device)
        if head_bias is not None and (head_bias.shape != head.shape[:1] or head_bias.device != student.device):
            raise ValueError(f"head_bias must have shape ({head.shape[0]},) on {student.device}")
        if moments is not None:
            if paired:
                raise ValueError("paired is True, but with moments rows_t holds rows of the moments")
            if softcap is not None:
                raise ValueError(
                    f"softcap is {softcap}, but the moment form needs logits that are linear in the states"
                )
            if divergence != FORWARD:
                raise ValueError(f"divergence is {divergence!r}, but the moment form computes only 'forward'")
            if needs_gradient(head) or needs_gradient(head_bias):
                raise ValueError("head or head_bias requires a gradient, but the moment form needs a frozen head")
            vocab = common_vocabulary(head.shape[0], moments.vocab_size, None, "moments")
            assert rows_s is not None
            check_moments(moments, head, vocab, float(temperature), rows_s.shape[0], rows_t, student.device)
    elif moments is not None:
        raise ValueError("moments is given, but head is None")
    need = {"need_dx": needs_gradient(student), "need_dw": needs_gradient(head), "need_db": needs_gradient(head_bias)}
    sums = _distillation(
        student=student,
        teacher=teacher.detach(),
        bounds_s=bounds_s,
        bounds_t=bounds_t,
        pooling=pooling,
        segment_weight=flat,
        rows_s=rows_s,
        rows_t=rows_t,
        pair_weight=pairs,
        paired=paired,
        rows_sorted=rows_sorted,
        head=head,
        bias=head_bias,
        **({} if moments is None else moments.tensors()),
        **linear_kl_ops.scalars(temperature, scale_by_t2, num_valid),
        softcap=float(softcap or 0.0),
        divergence=divergence,
        beta=float(beta),
        **need,
    )
    terms: list[tuple[Tensor, Tensor] | None] = [None, None, None]
    if bounds_s is not None and bounds_t is not None:
        terms[0] = (sums[0], pooled_count(bounds_s, bounds_t, flat, dtype, pooling == SPANS))
    if rows_s is not None and (paired or head is not None):
        count = sums[1].detach().new_full((), rows_s.shape[0]) if pairs is None else pairs.sum()
        terms[1] = (sums[1], count) if paired else None
        terms[2] = None if head is None else (sums[2], count)
    return DistillationTerms(*terms)
