"""linear_kl: divergence between two LM-head distributions over aligned rows, without keeping `(T, V)` logits.

    z_s, z_t = (cap(h[rows] @ w.T + bias).div(temperature).log_softmax(-1) for h, rows, w, bias in (student, teacher))
    values   = temperature**2 * (z_t.exp() * (z_t - z_s)).sum(-1)                                          # forward KL
    loss     = (row_weight * values).sum()

Gradient of the forward KL: `d values / d h_s = temperature * (p_s - p_t) @ w_s`; the teacher is a constant.

Two forms. The *difference form* takes any divergence and any heads: per chunk of rows, fp32 logits of both rows, one row
kernel that turns them into `p_s - p_t` in place, one GEMM: 3 GEMMs of 2·T·D·V FLOPs, memory O(chunk · V). The *moment
form* (forward KL, frozen student head, no soft-capping) rewrites the value as

    KL = lse(w_s x_s / τ) - <m_t, x_s> / τ - <p_t, bias_s> / τ - H_t,      m_t = p_t @ w_s,  H_t = entropy of p_t
    d KL / d x_s = (m_s - m_t) / τ

so the teacher enters through D + 2 numbers per row (`TeacherMoments`) that can be cached: 2 GEMMs, one logits buffer.

bf16 logits put 8 to 78 % error into the gradient near convergence, so logits are fp32 whatever the inputs are.
The gradient is produced in the forward pass; backward only multiplies it by the incoming scalar.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .linear_kl_cpu import FORWARD, JSD, REVERSE, accumulation_dtype, difference_cpu

DIVERGENCES = (FORWARD, REVERSE, JSD)


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


@torch.library.custom_op("mtllm_fast::linear_kl_difference", mutates_args=(), device_types="cpu")
def _difference(
    h_s: Tensor,
    w_s: Tensor,
    h_t: Tensor,
    w_t: Tensor | None,
    bias_s: Tensor | None,
    bias_t: Tensor | None,
    rows_s: Tensor | None,
    rows_t: Tensor | None,
    row_weight: Tensor | None,
    temperature: float,
    scale: float,
    softcap: float,
    divergence: str,
    beta: float,
    need_dh: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    # An enclosing autocast region would round the fp32 GEMMs in here to bf16.
    with torch.autocast("cpu", enabled=False):
        return difference_cpu(
            h_s,
            w_s,
            h_t,
            w_t,
            bias_s,
            bias_t,
            rows_s,
            rows_t,
            row_weight,
            temperature,
            scale,
            softcap,
            divergence,
            beta,
            need_dh,
            need_dw,
            need_db,
        )


@_difference.register_fake
def _(
    h_s,
    w_s,
    h_t,
    w_t,
    bias_s,
    bias_t,
    rows_s,
    rows_t,
    row_weight,
    temperature,
    scale,
    softcap,
    divergence,
    beta,
    need_dh,
    need_dw,
    need_db,
):
    dtype = accumulation_dtype(h_s.dtype)
    vocab, width = w_s.shape
    return (
        h_s.new_empty((), dtype=dtype),
        h_s.new_empty(h_s.shape[0] if rows_s is None else rows_s.shape[0], dtype=dtype),
        h_s.new_empty((h_s.shape[0] if need_dh else 0, width)),
        w_s.new_empty((vocab if need_dw else 0, width)),
        h_s.new_empty(vocab if need_db else 0, dtype=dtype),
    )


@torch.library.custom_op("mtllm_fast::scale_gradient", mutates_args=())
def _scale_gradient(gradient: Tensor, by: Tensor) -> Tensor:
    """gradient * by. An op without an autograd formula of its own, so that a second derivative raises, not lies."""
    return (gradient * by).to(gradient.dtype)


@_scale_gradient.register_fake
def _(gradient, by):
    return torch.empty_like(gradient)


def _save_gradients(ctx, inputs, output):
    _, _, dh, dw, db = output
    ctx.need_dh, ctx.need_dw, ctx.need_db = inputs[-3:]
    ctx.bias_dtype = None if inputs[4] is None else inputs[4].dtype
    ctx.save_for_backward(dh, dw, db)


def _scaled_gradients(ctx, grad_total, *_unused):
    dh, dw, db = ctx.saved_tensors
    gradients: list[Tensor | None] = [None] * 17
    if ctx.need_dh:
        gradients[0] = _scale_gradient(dh, grad_total)
    if ctx.need_dw:
        gradients[1] = _scale_gradient(dw, grad_total)
    if ctx.need_db:
        gradients[4] = _scale_gradient(db, grad_total).to(ctx.bias_dtype)
    return tuple(gradients)


_difference.register_autograd(_scaled_gradients, setup_context=_save_gradients)


def _check_states(name: str, h: Tensor, w_name: str, w: Tensor, device: torch.device) -> None:
    for label, tensor in ((name, h), (w_name, w)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{label} must be a tensor, got {type(tensor).__name__}")
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{label} must be floating point, got {tensor.dtype}")
        if tensor.dim() != 2:
            raise ValueError(f"{label} must have 2 dimensions, got shape {tuple(tensor.shape)}")
        if tensor.device != device:
            raise ValueError(f"{label} is on {tensor.device}, but h_s is on {device}; move it there")
    if h.shape[1] != w.shape[1]:
        raise ValueError(f"{name} is {h.shape[1]} wide but {w_name} is {w.shape[1]} wide; a head is (V, width)")
    if h.dtype != w.dtype:
        raise ValueError(f"{name} is {h.dtype} but {w_name} is {w.dtype}; cast one of them or use autocast")


def _check_vector(name: str, x: Tensor | None, length: int, what: str, device: torch.device, integer: bool) -> None:
    if x is None:
        return
    if x.dim() != 1 or x.shape[0] != length:
        raise ValueError(f"{name} must have shape ({length},) ({what}), got {tuple(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}, but h_s is on {device}; move it there")
    if integer and x.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must hold int64 or int32 row numbers, got {x.dtype}")
    if not integer and not (x.dtype.is_floating_point or (x.dtype == torch.bool and name == "row_weight")):
        raise TypeError(f"{name} must be floating point, got {x.dtype}")


def _gathered(w: Tensor | None) -> Tensor | None:
    """A sharded (DTensor) parameter, gathered; anything else unchanged."""
    full = getattr(w, "full_tensor", None)
    return w if full is None else full()


def _autocast(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """What autocast does to F.linear's operands."""
    kind = h.device.type
    if torch.is_autocast_enabled(kind) and torch.float64 not in (h.dtype, w.dtype):
        dtype = torch.get_autocast_dtype(kind)
        return h.to(dtype), w.to(dtype)
    return h, w


def _vocabulary(v_s: int, v_t: int, vocab_size: int | None) -> int:
    if vocab_size is None:
        if v_s != v_t:
            raise ValueError(
                f"w_s has {v_s} vocabulary rows but w_t has {v_t}; if the longer one is padded, pass "
                f"vocab_size={min(v_s, v_t)} (padding then counts as -inf), otherwise the vocabularies differ"
            )
        vocab_size = v_s
    if not 1 <= vocab_size <= min(v_s, v_t):
        raise ValueError(f"vocab_size is {vocab_size}, but must be between 1 and {min(v_s, v_t)}, the smaller head")
    return vocab_size


def linear_kl(
    h_s: Tensor,  # (T_s, D)
    w_s: Tensor,  # (V, D)
    h_t: Tensor,  # (T_t, D_t)
    w_t: Tensor | None = None,  # (V, D_t)
    *,
    bias_s: Tensor | None = None,  # (V,)
    bias_t: Tensor | None = None,  # (V,)
    rows_s: Tensor | None = None,  # (P,)
    rows_t: Tensor | None = None,  # (P,)
    row_weight: Tensor | None = None,  # (P,)
    temperature: float = 1.0,
    scale_by_t2: bool = True,
    softcap: float | None = None,
    divergence: str = FORWARD,
    beta: float = 0.5,
    vocab_size: int | None = None,
    per_row: bool = False,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """Σ_i row_weight[i] · D(softmax(w_t h_t[rows_t[i]] / τ), softmax(w_s h_s[rows_s[i]] / τ)), and the weights' sum.

    Args:
        h_s: (T_s, D) student states, fp32, bf16, fp16 (or fp64 on CPU). Gets a gradient.
        w_s: (V, D) student head in the same dtype. Gets a gradient (of the student's side only) if it requires one.
        h_t: (T_t, D_t) teacher states. Always a constant.
        w_t: (V, D_t) teacher head; None shares the student's head and bias. Always a constant.
        bias_s: (V,) bias of the student head; -inf removes an entry.
        bias_t: (V,) bias of the teacher head; with w_t=None the student's bias is shared and this must be None.
        rows_s: (P,) int64 rows of h_s, one per pair; None takes row i for pair i. Rows may repeat.
        rows_t: (P,) int64 rows of h_t.
        row_weight: (P,) weight (or bool mask) per pair, constant. A pair of weight 0 is left out altogether.
        temperature: τ > 0, divides the logits (after soft-capping).
        scale_by_t2: multiply the values by τ², which keeps the gradient's size independent of τ (Hinton et al. 2015).
        softcap: c > 0 replaces a logit z by c · tanh(z / c) on both sides, as Gemma 2 does.
        divergence: "forward" KL(teacher‖student), "reverse" KL(student‖teacher) or "jsd", the generalised
            Jensen-Shannon divergence β·KL(p_t‖m) + (1-β)·KL(p_s‖m) with m = β·p_t + (1-β)·p_s (Agarwal et al. 2024).
        beta: β of "jsd" in [0, 1]; by that paper's convention 0 is the forward and 1 the reverse KL.
        vocab_size: number of real entries when a head is padded; rows beyond it count as -inf logits.
        per_row: also return the values.

    Returns:
        (sum, count) as 0-d tensors in fp32 (fp64 for fp64 inputs); count is the sum of the weights, P without weights.
        With per_row, (sum, count, values) with values (P,) detached, unweighted, 0 where the weight is 0.
        NaN or Inf in a selected row makes sum NaN; no valid pairs give sum 0, count 0 and a zero gradient.

    Raises:
        TypeError: a tensor of a wrong kind of dtype.
        ValueError: shapes, devices, dtypes or vocabularies that do not fit, temperature or softcap not above 0.
        IndexError: a row number out of range.
    """
    device = h_s.device
    w_s, w_t = _gathered(w_s), _gathered(w_t)
    bias_s, bias_t = _gathered(bias_s), _gathered(bias_t)
    dtype_in = h_s.dtype
    h_s, w_s = _autocast(h_s, w_s)
    if w_t is None:
        h_t = h_t.to(h_s.dtype) if h_t.dtype == dtype_in else _autocast(h_t, w_s)[0]
    else:
        h_t, w_t = _autocast(h_t, w_t)
    _check_states("h_s", h_s, "w_s", w_s, device)
    _check_states("h_t", h_t, "w_s" if w_t is None else "w_t", w_s if w_t is None else w_t, device)
    vocab = _vocabulary(w_s.shape[0], w_s.shape[0] if w_t is None else w_t.shape[0], vocab_size)
    _check_vector("bias_s", bias_s, w_s.shape[0], "the student vocabulary", device, integer=False)
    if bias_t is not None and w_t is None:
        raise ValueError("bias_t is given but w_t is not: a shared head shares its bias; pass w_t=w_s to separate them")
    if w_t is not None:
        _check_vector("bias_t", bias_t, w_t.shape[0], "the teacher vocabulary", device, integer=False)
    pairs = h_s.shape[0] if rows_s is None else rows_s.shape[0]
    _check_vector("rows_s", rows_s, pairs, "one per pair", device, integer=True)
    _check_vector(
        "rows_t",
        rows_t,
        pairs,
        "one per pair, as many as rows_s" if rows_s is not None else "one per row of h_s",
        device,
        integer=True,
    )
    if rows_t is None and h_t.shape[0] != pairs:
        raise ValueError(
            f"h_t has {h_t.shape[0]} rows for {pairs} pairs; pass rows_t to say which rows belong together"
        )
    _check_vector("row_weight", row_weight, pairs, "one per pair", device, integer=False)
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, but must be above 0")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}, but must be above 0, or None for no soft-capping")
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence is {divergence!r}, but must be one of {', '.join(DIVERGENCES)}")
    if divergence == JSD and not 0 <= beta <= 1:
        raise ValueError(f"beta is {beta}, but must be between 0 and 1")
    if divergence == JSD and beta in (0, 1):
        divergence = FORWARD if beta == 0 else REVERSE

    if w_s.shape[0] != vocab:
        w_s, bias_s = w_s[:vocab], None if bias_s is None else bias_s[:vocab]
    if w_t is not None and w_t.shape[0] != vocab:
        w_t, bias_t = w_t[:vocab], None if bias_t is None else bias_t[:vocab]
    weight = None if row_weight is None else row_weight.detach().to(accumulation_dtype(h_s.dtype))
    graded = torch.is_grad_enabled()
    total, values, *_ = _difference(
        h_s,
        w_s,
        h_t.detach(),
        None if w_t is None else w_t.detach(),
        bias_s,
        None if bias_t is None else bias_t.detach(),
        rows_s,
        rows_t,
        weight,
        float(temperature),
        float(temperature) ** 2 if scale_by_t2 else 1.0,
        0.0 if softcap is None else float(softcap),
        divergence,
        float(beta),
        graded and h_s.requires_grad,
        graded and w_s.requires_grad,
        graded and bias_s is not None and bias_s.requires_grad,
    )
    count = torch.full_like(total, pairs) if weight is None else weight.sum()
    return (total, count.detach(), values.detach()) if per_row else (total, count.detach())


class LinearKL(nn.Module):
    """`linear_kl` with its options fixed; call it with `(h_s, w_s, h_t, w_t=None, **rows and weights)`."""

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
        self.options = {
            "temperature": temperature,
            "scale_by_t2": scale_by_t2,
            "softcap": softcap,
            "divergence": divergence,
            "beta": beta,
            "vocab_size": vocab_size,
        }

    def forward(self, h_s: Tensor, w_s: Tensor, h_t: Tensor, w_t: Tensor | None = None, **inputs):
        """See `linear_kl`."""
        return linear_kl(h_s, w_s, h_t, w_t, **inputs, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
