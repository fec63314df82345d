"""Attention over packed sequences for unmodified Hugging Face models.

Every Hugging Face model that calls its attention through `ALL_ATTENTION_FUNCTIONS` runs on a packed batch as it is:
`NAME` is registered once, the model is called with batch size 1 and the keyword `plan=AttentionPlan(...)`, which
reaches `packed_attention` through the layers' keyword arguments. No attention mask is ever built.

    out[i] = softmax(scale * q[i] @ k[S(i)].T) @ v[S(i)]      S(i): rows of i's own sequence (causal: up to i)
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from ..data.pack import PackedBatch

NAME = "mtllm_packed"
BACKENDS = ("varlen", "sdpa")

# A bucket may hold sequences down to this share of its longest one (less padding against fewer kernel calls).
_BUCKET_SHARE = 0.75
_BUCKET_SLACK = 8


@dataclass(frozen=True)
class _Bucket:
    """Sequences of similar length that one padded SDPA call serves."""

    gather: Tensor  # (b, L) packed row of each slot; padding slots repeat the sequence's first row
    valid: Tensor | None  # (b, L) bool, None where every sequence has length L
    scatter: Tensor  # flat slots of the valid rows


@dataclass
class AttentionPlan:
    """What every layer needs to know about a packed batch, computed once per model call.

    Args:
        batch: the packed batch.
        causal: rows see only themselves and earlier rows of their sequence.
        backend: "varlen" (FlashAttention-2 inside torch, CUDA, fp16/bf16), "sdpa", or None to choose.
    """

    batch: PackedBatch
    causal: bool
    backend: str | None = None
    _buckets: list[_Bucket] | None = field(default=None, repr=False)
    _order: Tensor | None = field(default=None, repr=False)
    _masks: dict[tuple[int, int | None], Tensor | None] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.backend is not None and self.backend not in BACKENDS:
            raise ValueError(f"backend={self.backend!r}: expected one of {', '.join(BACKENDS)} or None")

    def buckets(self) -> tuple[list[_Bucket], Tensor]:
        """The SDPA buckets and the permutation that brings their concatenated rows back into packed order."""
        if self._buckets is None:
            self._buckets, self._order = _make_buckets(self.batch)
        assert self._order is not None
        return self._buckets, self._order

    def mask(self, index: int, window: int | None) -> Tensor | None:
        """(b, 1, L, L) bool mask of bucket `index`, or None where plain (causal) attention is exact."""
        key = (index, window)
        if key not in self._masks:
            self._masks[key] = _bucket_mask(self.buckets()[0][index], self.causal, window)
        return self._masks[key]


def _make_buckets(batch: PackedBatch) -> tuple[list[_Bucket], Tensor]:
    lengths = torch.tensor(batch.lengths, dtype=torch.int64)
    starts = torch.cumsum(lengths, 0) - lengths
    order = torch.argsort(lengths, descending=True, stable=True)
    order = order[lengths[order] > 0]
    buckets, rows, first = [], [], 0
    sorted_lengths = lengths[order].tolist()
    while first < len(sorted_lengths):
        longest = sorted_lengths[first]
        floor = min(longest * _BUCKET_SHARE, longest - _BUCKET_SLACK)
        last = first
        while last < len(sorted_lengths) and sorted_lengths[last] >= floor:
            last += 1
        members = order[first:last]
        steps = torch.arange(longest)
        valid = steps < lengths[members, None]
        gather = starts[members, None] + torch.where(valid, steps, 0)
        rows.append(gather[valid])
        buckets.append(
            _Bucket(
                gather.to(batch.device),
                None if bool(valid.all()) else valid.to(batch.device),
                valid.flatten().nonzero().squeeze(1).to(batch.device),
            )
        )
        first = last
    permutation = torch.argsort(torch.cat(rows)) if rows else torch.zeros(0, dtype=torch.int64)
    return buckets, permutation.to(batch.device)


def _bucket_mask(bucket: _Bucket, causal: bool, window: int | None) -> Tensor | None:
    length = bucket.gather.shape[1]
    if window is not None and window >= length:
        window = None
    if window is None and (bucket.valid is None or causal):
        return None  # right padding is invisible to causal rows
    steps = torch.arange(length, device=bucket.gather.device)
    distance = steps[:, None] - steps[None, :]
    allowed = torch.ones(length, length, dtype=torch.bool, device=bucket.gather.device)
    if causal:
        allowed &= distance >= 0
    if window is not None:
        # Hugging Face's convention: exclusive looking back only, inclusive looking both ways.
        allowed &= (distance < window) if causal else (distance.abs() <= window)
    mask = allowed[None, None]
    if bucket.valid is not None:
        # a padding slot stands for its sequence's first row, and must see something: itself
        mask = (mask & bucket.valid[:, None, None, :]) | torch.eye(length, dtype=torch.bool, device=mask.device)
    return mask


def _scores_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, softcap: float, dropout: float
) -> Tensor:
    """Attention with logit soft-capping, which SDPA lacks. q, k, v: (b, H, L, d)."""
    scores = softcap * torch.tanh((q @ k.transpose(-1, -2)) * (scale / softcap))
    if mask is None and causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = F.dropout(torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype), dropout, dropout > 0)
    return weights @ v


def sdpa_attention(
    q: Tensor,  # (T, H, d)
    k: Tensor,  # (T, H_kv, d)
    v: Tensor,  # (T, H_kv, d)
    plan: AttentionPlan,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:  # (T, H, d)
    """Packed attention by `F.scaled_dot_product_attention` on buckets of similar length; any device and dtype."""
    groups = q.shape[1] // k.shape[1]
    buckets, order = plan.buckets()
    pieces = []
    for index, bucket in enumerate(buckets):
        shape = bucket.gather.shape
        rows = bucket.gather.flatten()
        qb, kb, vb = (x.index_select(0, rows).unflatten(0, shape).transpose(1, 2) for x in (q, k, v))
        if groups > 1:
            kb, vb = kb.repeat_interleave(groups, 1), vb.repeat_interleave(groups, 1)
        mask = plan.mask(index, window)
        if softcap is not None:
            out = _scores_attention(qb, kb, vb, mask, plan.causal, scale, softcap, dropout)
        else:
            is_causal = plan.causal and mask is None
            out = F.scaled_dot_product_attention(qb, kb, vb, mask, dropout, is_causal=is_causal, scale=scale)
        out = out.transpose(1, 2).flatten(0, 1)
        pieces.append(out if bucket.valid is None else out.index_select(0, bucket.scatter))
    if not pieces:
        return q * 1.0
    return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).index_select(0, order)


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, *, scale: float, window: int | None = None
) -> Tensor:
    """Packed attention by torch's built-in FlashAttention-2 (CUDA, fp16 or bf16). Shapes as in `sdpa_attention`."""
    from torch.nn.attention.varlen import varlen_attn

    if plan.causal:
        sides = (-1 if window is None else window - 1, 0)
    else:
        sides = (-1, -1) if window is None else (window, window)
    cu_seqlens, longest = plan.batch.cu_seqlens, plan.batch.max_seqlen
    return varlen_attn(  # type: ignore[return-value]  # a pair only with return_aux
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        longest,
        longest,
        scale=scale,
        window_size=sides,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def choose_backend(device: torch.device, dtype: torch.dtype, head_dim: int, *, softcap: bool, dropout: bool) -> str:
    """The fastest backend that serves a call exactly: "varlen" or "sdpa"."""
    if device.type == "cuda" and dtype in (torch.float16, torch.bfloat16) and head_dim <= 256 and head_dim % 8 == 0:
        return "sdpa" if softcap or dropout else "varlen"
    return "sdpa"


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,  # (1, H, T, d)
    key: Tensor,  # (1, H_kv, T, d)
    value: Tensor,  # (1, H_kv, T, d)
    attention_mask: Tensor | None,
    *,
    plan: AttentionPlan | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:  # (1, T, H, d)
    """The function behind the attention name "mtllm_packed".

    Raises:
        ValueError: the model was called without `plan`, or the plan's backend cannot serve the call.
    """
    if plan is None:
        raise ValueError(
            f"attention {NAME!r} needs plan=AttentionPlan(...): call the model through PackedLLM/PackedEncoder"
        )
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    chosen = plan.backend or choose_backend(
        q.device, q.dtype, q.shape[-1], softcap=softcap is not None, dropout=dropout > 0
    )
    if chosen == "varlen":
        if softcap is not None or dropout > 0:
            raise ValueError("backend='varlen' has neither soft-capping nor dropout: use backend='sdpa'")
        out = varlen_attention(q, k, v, plan, scale=scale, window=sliding_window)
    else:
        out = sdpa_attention(q, k, v, plan, scale=scale, window=sliding_window, softcap=softcap, dropout=dropout)
    return out[None], None


def _no_mask(*args: object, **kwargs: object) -> None:
    return None


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, _no_mask)
