"""linear_kl: divergence between two LM-head distributions over aligned rows, without keeping `(T, V)` logits.

    z_s, z_t = (cap(h[rows] @ w.T + bias).div(temperature).log_softmax(-1) for h, rows, w, bias in (student, teacher))
    values   = temperature**2 * (z_t.exp() * (z_t - z_s)).sum(-1)                                          # forward KL
    loss     = (row_weight * values).sum()

Gradient of the forward KL: `d values / d h_s = temperature * (p_s - p_t) @ w_s`; the teacher is a constant.

Two forms. The *difference form* takes any divergence and any heads: per chunk of rows, fp32 logits of both rows, one
row kernel that turns them into `p_s - p_t` in place, one GEMM: 3 GEMMs of 2·T·D·V FLOPs, memory O(chunk · V). A head
that trains costs one GEMM more, and on CUDA 2 V min(T, max(2 D, 4096)) bytes in which `p_s - p_t` waits for it. The
*moment form* (forward KL, frozen student head, no soft-capping) rewrites the value as

    KL = lse(w_s x_s / τ) - <m_t, x_s> / τ - <p_t, bias_s> / τ - H_t,      m_t = p_t @ w_s,  H_t = entropy of p_t
    d KL / d x_s = (m_s - m_t) / τ

so the teacher enters through D + 2 numbers per row (`TeacherMoments`) that can be cached: 2 GEMMs, one logits buffer;
public as the "KL cache trick" (jonathanc.net/blog/kl-cache-trick, 2026-05), which is where credit for it goes.
Its gradient is as exact as the other's; its value is a difference of two numbers as large as the logits, so a small KL
under logits in the thousands has few digits.

bf16 logits put 8 to 78 % error into the gradient near convergence, so logits are fp32 whatever the inputs are.
The gradient is produced in the forward pass; backward only multiplies it by the incoming scalar. For fp16 inputs it
waits in fp32, where loss scaling still reaches it; rows named twice are added in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import linear_kl_ops as ops
from .gemms import accumulation_dtype
from .linear_kl_checks import (
    autocast,
    check_head,
    check_matrix,
    check_moments,
    check_options,
    check_side,
    check_vector,
    common_vocabulary,
    gathered,
    plain_divergence,
)
from .linear_kl_cpu import FORWARD, JSD, REVERSE
from .moments import TeacherMoments
from .op import needs_gradient


def reference(
    h_s: Tensor,  # (T_s, D)
    w_s: Tensor,  # (V, D)
    h_t: Tensor,  # (T_t, D_t)
    w_t: Tensor | None = None,  # (V, D_t)
    *,
    bias_s: Tensor | None = None,
    bias_t: Tensor | None = None,
    rows_s: Tensor | None = None,
    rows_t: Tensor | None = None,
    row_weight: Tensor | None = None,
    temperature: float = 1.0,
    scale_by_t2: bool = True,
    softcap: float | None = None,
    divergence: str = FORWARD,
    beta: float = 0.5,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same maths with materialised logits in the inputs' own precision: (sum, count, values (P,)).

    Differentiable by autograd; the teacher is detached. Tests call it in fp64, benchmarks in the working precision.
    """
    if w_t is None:
        w_t, bias_t = w_s, bias_s

    def log_probs(h: Tensor, rows: Tensor | None, w: Tensor, bias: Tensor | None) -> Tensor:
        h = h if rows is None else h[rows]
        z = h @ w[:vocab_size].t()
        if bias is not None:
            z = z + bias[:vocab_size]
        if softcap:
            z = softcap * torch.tanh(z / softcap)
        return (z / temperature).log_softmax(-1)

    student = log_probs(h_s, rows_s, w_s, bias_s)
    with torch.no_grad():
        teacher = log_probs(h_t, rows_t, w_t, bias_t)

    def kl(p: Tensor, q: Tensor) -> Tensor:
        terms = p.exp() * (p - q)
        return torch.where(p == -torch.inf, torch.zeros_like(terms), terms).sum(-1)

    if divergence == FORWARD or (divergence == JSD and beta == 0):
        values = kl(teacher, student)
    elif divergence == REVERSE or (divergence == JSD and beta == 1):
        values = kl(student, teacher)
    else:
        mean = torch.logaddexp(teacher + teacher.new_tensor(beta).log(), student + teacher.new_tensor(1 - beta).log())
        values = beta * kl(teacher, mean) + (1 - beta) * kl(student, mean)
    values = values * (temperature**2 if scale_by_t2 else 1.0)
    if row_weight is None:
        return values.sum(), values.new_tensor(float(values.shape[0])), values
    weight = row_weight.to(values.dtype)
    values = torch.where(weight != 0, values, torch.zeros_like(values))
    return (values * weight).sum(), weight.sum(), values


def teacher_moments(
    h_t: Tensor,  # (T_t, D_t)
    w_t: Tensor,  # (V, D_t)
    temperature: float = 1.0,
    *,
    w_s: Tensor | None = None,  # (V, D)
    bias_t: Tensor | None = None,  # (V,)
    bias_s: Tensor | None = None,  # (V,)
    rows: Tensor | None = None,  # (N,)
    softcap: float | None = None,
    vocab_size: int | None = None,
    dtype: torch.dtype | None = None,
) -> TeacherMoments:
    """Teacher rows for `linear_kl(..., teacher=moments)`: two GEMMs per row, once instead of in every step.

    Args:
        h_t: (T_t, D_t) teacher states.
        w_t: (V, D_t) teacher head.
        temperature: τ > 0; the student's step must use the same.
        w_s: (V, D) the student's frozen head if it is not w_t; its dtype must be h_t's.
        bias_t: (V,) bias of the teacher head.
        bias_s: (V,) bias of the student head; with w_s=None both share a head and this defaults to bias_t.
        rows: (N,) rows of h_t to take; None takes all.
        softcap: soft-capping of the teacher's logits. (The student's cannot be soft-capped in the moment form.)
        vocab_size: number of real entries when a head is padded.
        dtype: of m; None keeps fp32 (fp64 for fp64 inputs). bf16 adds 0.7 % gradient error at KL 0.1.

    Raises:
        TypeError, ValueError, IndexError: as `linear_kl`.
    """
    check_matrix("h_t", h_t)
    h_t, w_t = autocast(h_t), autocast(gathered("w_t", w_t, constant=True))
    w_s = autocast(gathered("w_s", w_s, constant=True))
    bias_t, bias_s = gathered("bias_t", bias_t, constant=True), gathered("bias_s", bias_s, constant=True)
    if w_s is None and bias_s is None:
        bias_s = bias_t
    device = h_t.device
    check_side("h_t", h_t, "w_t", w_t, device)
    check_options(temperature, softcap, FORWARD, 0.0, "moments")
    if w_s is not None:
        check_head("w_s", w_s, device)
        if w_s.dtype != w_t.dtype:
            raise ValueError(f"w_s is {w_s.dtype} but w_t is {w_t.dtype}; cast one of them")
    v_s = w_t.shape[0] if w_s is None else w_s.shape[0]
    vocab = common_vocabulary(v_s, w_t.shape[0], vocab_size, "w_t")
    check_vector("bias_t", bias_t, w_t.shape[0], "the teacher vocabulary", device, "bias")
    check_vector("bias_s", bias_s, v_s, "the student vocabulary", device, "bias")
    check_vector("rows", rows, 0 if rows is None else rows.numel(), "row numbers", device, "rows")
    heads = (None if x is None else x.detach()[:vocab] for x in (w_t, w_s, bias_t, bias_s))
    sides = dict(zip(("w_t", "w_s", "bias_t", "bias_s"), heads))
    options = {"temperature": float(temperature), "softcap": float(softcap or 0.0)}
    m, entropy, bias_mean = ops.moments_of(h_t=h_t.detach(), **sides, rows=rows, **options)
    return TeacherMoments(m if dtype is None else m.to(dtype), entropy, bias_mean, float(temperature), vocab)


def linear_kl(
    h_s: Tensor,  # (T_s, D)
    w_s: Tensor,  # (V, D)
    h_t: Tensor | None = None,  # (T_t, D_t)
    w_t: Tensor | None = None,  # (V, D_t)
    *,
    bias_s: Tensor | None = None,  # (V,)
    bias_t: Tensor | None = None,  # (V,)
    rows_s: Tensor | None = None,  # (P,)
    rows_t: Tensor | None = None,  # (P,)
    row_weight: Tensor | None = None,  # (P,)
    num_valid: int | None = None,
    temperature: float = 1.0,
    scale_by_t2: bool = True,
    softcap: float | None = None,
    divergence: str = FORWARD,
    beta: float = 0.5,
    vocab_size: int | None = None,
    teacher: TeacherMoments | None = None,
    form: str = "auto",
    per_row: bool = False,
) -> tuple[Tensor, ...]:
    """Σ_i row_weight[i] · D(softmax(w_t h_t[rows_t[i]] / τ), softmax(w_s h_s[rows_s[i]] / τ)), and the weights' sum.

    Args:
        h_s: (T_s, D) student states, fp32, bf16, fp16 (or fp64 on the CPU). Gets a gradient. GEMM results are fp32 for
            16-bit inputs; for fp32 inputs on CUDA they are what `torch.set_float32_matmul_precision` says.
        w_s: (V, D) student head in the same dtype. Gets a gradient (of the student's side only) if it requires one.
        h_t: (T_t, D_t) teacher states. Always a constant.
        w_t: (V, D_t) teacher head; None shares the student's head and bias. Always a constant.
        bias_s: (V,) bias of the student head; -inf removes an entry (not together with softcap, which caps it).
        bias_t: (V,) bias of the teacher head; with w_t=None the student's is shared and this must be None.
        rows_s: (P,) rows of h_s, one per pair; None takes row i for pair i. Rows may repeat.
        rows_t: (P,) rows of h_t, or of `teacher`.
        row_weight: (P,) weight (or bool mask) per pair, constant. A pair of weight 0 is left out altogether.
        num_valid: number of pairs of weight != 0, if the host knows it. CUDA only: without it the GEMMs run over all
            pairs, since finding out would stop the host; a number that is too small is caught on the device.
        temperature: τ > 0, divides the logits (after soft-capping).
        scale_by_t2: multiply the values by τ², which keeps the gradient's size independent of τ (Hinton et al. 2015).
        softcap: c > 0 replaces a logit z by c · tanh(z / c) on both sides, as Gemma 2 does.
        divergence: "forward" KL(teacher‖student), "reverse" KL(student‖teacher) or "jsd", the generalised
            Jensen-Shannon divergence β·KL(p_t‖m) + (1-β)·KL(p_s‖m) with m = β·p_t + (1-β)·p_s (Agarwal et al. 2024).
        beta: β of "jsd" in [0, 1]; by that paper's convention 0 is the forward and 1 the reverse KL.
        vocab_size: number of real entries when a head is padded; rows beyond it count as -inf logits.
        teacher: cached `teacher_moments` in place of h_t, w_t and bias_t.
        form: "difference", "moments" (forward KL, frozen student head, no soft-capping), or "auto": moments when
            `teacher` is given, otherwise difference, which needs one GEMM less than uncached moments.
        per_row: also return the values.

    Returns:
        (sum, count) as 0-d tensors in fp32 (fp64 for fp64 inputs); count is the sum of the weights, P without weights.
        With per_row, (sum, count, values) with values (P,) detached, unweighted, 0 where the weight is 0.
        NaN or Inf in a selected row makes sum NaN; no valid pairs give sum 0, count 0 and a zero gradient.

    Raises:
        TypeError: a tensor of a wrong kind of dtype.
        ValueError: shapes, devices, dtypes, vocabularies or options that do not fit together; a sharded parameter
            (DTensor) that requires a gradient.
        IndexError: a row number out of range (on CUDA a device-side assertion, unless MTLLM_DEBUG=1).
    """
    check_matrix("h_s", h_s)
    device = h_s.device
    h_s, h_t = autocast(h_s), autocast(h_t)
    w_s, bias_s = autocast(gathered("w_s", w_s)), gathered("bias_s", bias_s)
    w_t, bias_t = autocast(gathered("w_t", w_t, constant=True)), gathered("bias_t", bias_t, constant=True)
    check_side("h_s", h_s, "w_s", w_s, device)
    check_options(temperature, softcap, divergence, beta, form)
    pairs = h_s.shape[0] if rows_s is None else rows_s.shape[0]
    check_vector("rows_s", rows_s, pairs, "one per pair", device, "rows")
    check_vector("rows_t", rows_t, pairs, f"one per pair, as rows_s or h_s has {pairs}", device, "rows")
    check_vector("row_weight", row_weight, pairs, "one per pair", device, "weight")
    check_vector("bias_s", bias_s, w_s.shape[0], "the student vocabulary", device, "bias")
    if num_valid is not None and not 0 <= num_valid <= pairs:
        raise ValueError(f"num_valid is {num_valid}, but must be between 0 and {pairs}, the number of pairs")
    divergence = plain_divergence(divergence, beta)
    if teacher is not None:
        if h_t is not None or w_t is not None or bias_t is not None:
            raise ValueError("teacher replaces h_t, w_t and bias_t; leave them None")
        if form == "difference":
            raise ValueError("form is 'difference', but the difference form needs h_t, not teacher moments")
        form = "moments"
    elif h_t is None:
        raise ValueError("h_t is None and so is teacher; pass the teacher's states or its moments")
    else:
        check_side("h_t", h_t, "w_s" if w_t is None else "w_t", w_s if w_t is None else w_t, device)
        if bias_t is not None and w_t is None:
            raise ValueError("bias_t is given but w_t is not: a shared head shares its bias; pass w_t=w_s to separate")
        if w_t is not None:
            check_vector("bias_t", bias_t, w_t.shape[0], "the teacher vocabulary", device, "bias")

    def narrowed(x: Tensor | None) -> Tensor | None:
        return x if x is None or x.shape[0] == vocab else x[:vocab]

    weight = None if row_weight is None else row_weight.detach().to(accumulation_dtype(h_s.dtype))
    shared: dict[str, object] = {"h_s": h_s, "rows_s": rows_s, "rows_t": rows_t, "row_weight": weight}
    shared |= {"need_dh": needs_gradient(h_s), **ops.scalars(temperature, scale_by_t2, num_valid)}
    if form == "moments":
        vocab = common_vocabulary(w_s.shape[0], teacher.vocab_size if teacher else w_s.shape[0], vocab_size, "teacher")
        if divergence != FORWARD:
            raise ValueError(f"divergence is {divergence!r}, but the moment form computes only 'forward'")
        if softcap is not None:
            raise ValueError(f"softcap is {softcap}, but the moment form needs logits that are linear in the states")
        if needs_gradient(w_s) or needs_gradient(bias_s):
            raise ValueError("w_s or bias_s requires a gradient, but the moment form needs a frozen student head")
        if teacher is None:
            assert h_t is not None
            own_head = (w_s, bias_s) if w_t is None else (w_t, bias_t)
            teacher = teacher_moments(
                h_t,
                own_head[0],
                temperature,
                w_s=None if w_t is None else w_s,
                bias_t=own_head[1],
                bias_s=bias_s,
                vocab_size=vocab_size,
            )
            vocab = teacher.vocab_size
        check_moments(teacher, w_s, vocab, float(temperature), pairs, rows_t, device)
        total, values, _ = ops.moment_step(**shared, w_s=narrowed(w_s), bias_s=narrowed(bias_s), **teacher.tensors())
    else:
        assert h_t is not None
        if rows_t is None and h_t.shape[0] != pairs:
            raise ValueError(f"h_t has {h_t.shape[0]} rows for {pairs} pairs; pass rows_t to say which belong together")
        vocab = common_vocabulary(w_s.shape[0], (w_s if w_t is None else w_t).shape[0], vocab_size, "w_t")
        w_t, bias_t = (narrowed(None if x is None else x.detach()) for x in (w_t, bias_t))
        shared |= {"h_t": h_t.detach(), "w_s": narrowed(w_s), "w_t": w_t, "bias_s": narrowed(bias_s), "bias_t": bias_t}
        shared |= {"need_dw": needs_gradient(w_s), "need_db": needs_gradient(bias_s), "softcap": float(softcap or 0.0)}
        total, values, *_ = ops.difference(**shared, divergence=divergence, beta=float(beta))
    count = torch.full_like(total, pairs) if weight is None else weight.sum()
    return (total, count.detach(), values.detach()) if per_row else (total, count.detach())


class LinearKL(nn.Module):
    """`linear_kl` with its options fixed: `LinearKL(temperature=2.0)(h_s, w_s, h_t, rows_s=..., rows_t=...)`."""

    def __init__(
        self,
        temperature: float = 1.0,
        scale_by_t2: bool = True,
        softcap: float | None = None,
        divergence: str = FORWARD,
        beta: float = 0.5,
        vocab_size: int | None = None,
    ):
        super().__init__()
        check_options(temperature, softcap, divergence, beta, "auto")
        self.options: dict[str, Any] = {
            "temperature": temperature,
            "scale_by_t2": scale_by_t2,
            "softcap": softcap,
            "divergence": divergence,
            "beta": beta,
            "vocab_size": vocab_size,
        }

    def forward(
        self, h_s: Tensor, w_s: Tensor, h_t: Tensor | None = None, w_t: Tensor | None = None, **inputs: Any
    ) -> tuple[Tensor, ...]:
        """See `linear_kl`; `inputs` are its other arguments."""
        return linear_kl(h_s, w_s, h_t, w_t, **inputs, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
