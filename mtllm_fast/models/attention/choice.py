"""Which backend serves a call: the registry in order of preference, and the choice."""

from __future__ import annotations

import logging
from functools import lru_cache

import torch
from torch import Tensor

from .contract import AttentionPlan, Backend, Call, DistanceBias
from .flash import FlashAttention2, FlashAttention3, FlashAttention4
from .flex import Flex
from .sdpa import SDPA
from .varlen import Varlen
from .xformers import XFormers

logger = logging.getLogger(__name__)

# The first that serves a call is chosen: kernels for the newest GPUs first, what serves everything last.
BACKENDS: dict[str, Backend] = {
    "flash_attn_3": FlashAttention3(),
    "flash_attn_4": FlashAttention4(),
    "varlen": Varlen(),
    "flash_attn_2": FlashAttention2(),
    "xformers": XFormers(),
    "flex": Flex(),
    "sdpa": SDPA(),
}
# A name for several: the first of them that serves a call.
FAMILIES = {"flash_attn": ("flash_attn_3", "flash_attn_4", "flash_attn_2")}


def check_backend(name: str | None) -> str | None:
    """`name` itself, None meaning "choose". Raises ValueError where no backend is called so."""
    if name is not None and name not in BACKENDS and name not in FAMILIES:
        raise ValueError(f"attention={name!r}: expected one of {', '.join((*FAMILIES, *BACKENDS))}, or None to choose")
    return name


@lru_cache(maxsize=1024)
def choose_backend(call: Call, name: str | None = None) -> Backend:
    """The backend for `call`: the one named, or the first of `BACKENDS` that serves it. Logs the choice once.

    Raises:
        ValueError: `name` is no backend, or the named backend cannot serve the call (says why).
    """
    check_backend(name)
    if name is None:
        candidates = tuple(key for key, backend in BACKENDS.items() if backend.automatic)
    else:
        candidates = FAMILIES.get(name, (name,))
    refusals: dict[str, list[str]] = {}  # reason -> backends
    for candidate in candidates:
        reason = BACKENDS[candidate].refusal(call)
        if reason is None:
            why = "named by the caller" if name else "the first that serves it"
            others = f" ({_listed(refusals)})" if refusals else ""
            logger.debug("packed attention: %s for %s, %s%s", candidate, call, why, others)
            return BACKENDS[candidate]
        refusals.setdefault(reason, []).append(candidate)
    raise ValueError(f"attention={name!r} cannot serve this call ({call}): {_listed(refusals)}")


def _listed(refusals: dict[str, list[str]]) -> str:
    return "; ".join(f"{', '.join(names)}{':' * (len(names) > 1)} {reason}" for reason, names in refusals.items())


def attention(
    q: Tensor,  # (T, H, d)
    k: Tensor,  # (T, H_kv, d)
    v: Tensor,  # (T, H_kv, d_v)
    plan: AttentionPlan,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    bias: DistanceBias | None = None,
) -> Tensor:  # (T, H, d_v)
    """Packed attention; the contract is at the head of contract.py.

    Under autocast it runs in autocast's dtype, as torch's own attention does.

    Args:
        scale: of the scores, `d ** -0.5` by default.
        window: how far a row sees; None is its whole sequence.
        softcap: bound of the scores, None for none.
        dropout: share of the attention weights that is dropped.
        bias: what is added to the scores, None for nothing.

    Raises:
        ValueError: shapes that do not fit, or a backend named in the plan that cannot serve the call.
    """
    if q.ndim != 3 or k.ndim != 3 or v.shape[:2] != k.shape[:2] or q.shape[::2] != k.shape[::2]:
        raise ValueError(
            "q, k, v must be (T, H, d), (T, H_kv, d) and (T, H_kv, d_v), "
            f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"q has {q.shape[1]} heads, which is no multiple of the {k.shape[1]} heads of k")
    if q.shape[0] != plan.batch.num_tokens:
        raise ValueError(f"q has {q.shape[0]} rows, the plan's batch has {plan.batch.num_tokens}")
    if bias is not None and bias.values.shape[1] < 2 * plan.batch.max_seqlen - 1:
        raise ValueError(
            f"bias is of {bias.values.shape[1]} distances, the longest sequence, of {plan.batch.max_seqlen} rows, has "
            f"{2 * plan.batch.max_seqlen - 1}"
        )
    if window is not None and window < 1:
        raise ValueError(f"window={window}: must be at least 1, or None for no window")
    if window is not None and plan.exclusive and not plan.causal:
        window -= 1
    if window is not None and window >= plan.batch.max_seqlen:
        window = None  # it hides nothing in this batch
    if not q.is_meta and torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    if q.dtype != k.dtype or q.dtype != v.dtype:
        raise ValueError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    learns = bias is not None and bias.values.requires_grad
    call = Call(
        device=q.device,
        dtype=q.dtype,
        heads=q.shape[1],
        kv_heads=k.shape[1],
        head_dim=q.shape[2],
        value_dim=v.shape[2],
        causal=plan.causal,
        scale=q.shape[2] ** -0.5 if scale is None else scale,
        window=window,
        softcap=softcap,
        dropout=dropout,
        needs_grad=torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad or learns),
        bias=bias is not None,
    )
    backend = choose_backend(call, plan.backend)
    if q.shape[0] == 0:
        return q.new_empty(0, q.shape[1], v.shape[2]) + 0 * (q.sum() + k.sum() + v.sum())
    return backend.attend(q, k, v, plan, call, bias)
