"""linear_ce: cross-entropy of target tokens under an LM head, without keeping `(T, V)` logits.

    z      = cap(h[rows] @ w.T + bias)
    values = torch.nn.functional.cross_entropy(z, targets, reduction="none", label_smoothing=eps)
    loss   = (row_weight * values).sum()

With q = (1 - eps) onehot(y) + eps / V: values = lse(z) - <q, z>, and d values / d z = softmax(z) - q. Per chunk of
rows: fp32 logits, one row kernel that turns them into that gradient in place, one GEMM with the head (one more where
the head trains): 2 GEMMs of 2·T·D·V FLOPs, memory O(chunk · V). It shares everything but the row kernel with
`linear_kl`, whose docstring says why logits are fp32 and where the gradient waits.

Chunked fused heads are public since Liger-Kernel's (arXiv 2410.10989); cut-cross-entropy (arXiv 2411.09009) recomputes
logits instead and drops small gradients, which this does not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .gemms import accumulation_dtype
from .linear_kl_checks import autocast, check_matrix, check_side, check_vector, common_vocabulary, gathered
from .linear_kl_ops import Five, OverHead
from .op import Registered, needs_gradient

IGNORED = -100  # as torch.nn.functional.cross_entropy


def reference(
    h: Tensor,  # (T, D)
    w: Tensor,  # (V, D)
    targets: Tensor,  # (N,)
    *,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    row_weight: Tensor | None = None,
    ignore_index: int = IGNORED,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same maths with materialised logits in the inputs' own precision: (sum, count, values (N,))."""
    z = F.linear(h if rows is None else h[rows], w[:vocab_size], None if bias is None else bias[:vocab_size])
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    values = F.cross_entropy(
        z, targets.long(), ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing
    )
    weight = (targets != ignore_index).to(values.dtype)
    weight = weight if row_weight is None else weight * row_weight.to(values.dtype)
    values = torch.where(weight != 0, values, torch.zeros_like(values))
    return (values * weight).sum(), weight.sum(), values


@dataclass(frozen=True, kw_only=True, eq=False)
class CrossEntropy(OverHead):
    """The cross-entropy of a head's distributions with target tokens."""

    h_s: Tensor  # (T, D)
    w_s: Tensor  # (V, D)
    rows_t: Tensor  # (N,) targets
    bias_s: Tensor | None = None  # (V,)
    rows_s: Tensor | None = None  # (N,)
    row_weight: Tensor | None = None  # (N,)
    num_valid: int = -1
    softcap: float = 0.0  # 0: none
    smoothing: float = 0.0
    need_dh: bool = False
    need_dw: bool = False
    need_db: bool = False

    def cpu(self) -> Five:
        from .linear_ce_cpu import cross_entropy_cpu

        return cross_entropy_cpu(self)

    def cuda(self) -> Five:
        from .linear_ce_triton import cross_entropy_triton

        return cross_entropy_triton(self)


cross_entropy = Registered(CrossEntropy, "linear_ce", errors="linear_ce")


def linear_ce(
    h: Tensor,  # (T, D)
    w: Tensor,  # (V, D)
    targets: Tensor,  # (N,)
    *,
    bias: Tensor | None = None,  # (V,)
    rows: Tensor | None = None,  # (N,)
    row_weight: Tensor | None = None,  # (N,)
    num_valid: int | None = None,
    ignore_index: int = IGNORED,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    per_row: bool = False,
) -> tuple[Tensor, ...]:
    """Σ_i row_weight[i] · CE(softmax(w h[rows[i]]), targets[i]), and the weights' sum.

    Args:
        h: (T, D) states, fp32, bf16, fp16 (or fp64 on the CPU). Gets a gradient.
        w: (V, D) head in the same dtype. Gets a gradient if it requires one.
        targets: (N,) int64 or int32, one per row; `ignore_index` leaves the row out.
        bias: (V,) of the head; -inf removes an entry (not together with softcap or label_smoothing).
        rows: (N,) rows of h, such as the row before each target token; None takes row i for target i. May repeat.
        row_weight: (N,) weight (or bool mask) per target, constant. A target of weight 0 is left out altogether.
        num_valid: number of targets that are not left out, if the host knows it; as in `linear_kl`, for CUDA only.
        label_smoothing: ε in [0, 1): the target distribution is (1 - ε) onehot + ε / V.
        softcap: c > 0 replaces a logit z by c · tanh(z / c), as Gemma 2 does.
        vocab_size: number of real entries when a head is padded.
        per_row: also return the values.

    Returns:
        (sum, count) as 0-d tensors in fp32 (fp64 for fp64 inputs); count is the sum of the weights of what is not left
        out. With per_row, (sum, count, values) with values (N,) detached, unweighted, 0 where left out.

    Raises:
        TypeError: a tensor of a wrong kind of dtype.
        ValueError: shapes, devices, dtypes or options that do not fit together; a sharded parameter that is trained.
        IndexError: a row or target out of range (on CUDA a device-side assertion, unless MTLLM_DEBUG=1).
    """
    check_matrix("h", h)
    device = h.device
    h, w, bias = autocast(h), autocast(gathered("w", w)), gathered("bias", bias)
    check_side("h", h, "w", w, device)
    count = h.shape[0] if rows is None else rows.shape[0]
    check_vector("rows", rows, count, "one per target", device, "rows")
    check_vector("targets", targets, count, f"one per row, of which there are {count}", device, "rows")
    check_vector("row_weight", row_weight, count, "one per target", device, "weight")
    check_vector("bias", bias, w.shape[0], "the vocabulary", device, "bias")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing is {label_smoothing}, but must be at least 0 and below 1")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}, but must be above 0, or None for no soft-capping")
    if num_valid is not None and not 0 <= num_valid <= count:
        raise ValueError(f"num_valid is {num_valid}, but must be between 0 and {count}, the number of targets")
    vocab = common_vocabulary(w.shape[0], w.shape[0], vocab_size, "w")
    if vocab < w.shape[0]:
        w, bias = w[:vocab], None if bias is None else bias[:vocab]
    dtype, ignored = accumulation_dtype(h.dtype), targets == ignore_index
    weight = (~ignored).to(dtype) if row_weight is None else row_weight.detach().to(dtype).masked_fill(ignored, 0.0)
    total, values, *_ = cross_entropy(
        h_s=h,
        w_s=w,
        rows_t=targets.masked_fill(ignored, 0),
        bias_s=bias,
        rows_s=rows,
        row_weight=weight,
        num_valid=-1 if num_valid is None else num_valid,
        softcap=float(softcap or 0.0),
        smoothing=float(label_smoothing),
        need_dh=needs_gradient(h),
        need_dw=needs_gradient(w),
        need_db=needs_gradient(bias),
    )
    return (total, weight.sum(), values.detach()) if per_row else (total, weight.sum())
