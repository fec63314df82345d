"""Packed attention against padded SDPA with a 4-D mask, forward + backward, every backend that runs here.

python -m benchmarks.cases.attention
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mtllm_fast.data.pack import PackedBatch
from mtllm_fast.models.attention import AttentionPlan, attention

from ..lengths import DISTRIBUTIONS
from ..registry import Case, Variant, Work, register
from ..run import main
from .packed_path import fresh_compile


@dataclass
class Problem:
    """Queries, keys and values of one layer, packed and padded, and the gradient that comes in."""

    batch: PackedBatch
    q: Tensor  # (T, H, d)
    k: Tensor
    v: Tensor
    direction: Tensor  # (T, H, d)
    mask: Tensor  # (B, 1, L, L) additive, as the authors make it
    padded: tuple[Tensor, ...]  # q, k, v and the incoming gradient, (B, L, H, d)
    causal: bool
    backward: bool = True


def make(
    lengths: str = "NLI",
    count: int = 32,
    heads: int = 8,
    head_dim: int = 64,
    causal: bool = False,
    *,
    dtype: torch.dtype,
    device: str,
) -> Problem:
    """Random queries, keys and values over one distribution of lengths."""
    torch.manual_seed(0)
    sizes = DISTRIBUTIONS[lengths](count)
    batch = PackedBatch.from_sequences([[0] * n for n in sizes]).to(device)
    q, k, v, direction = (torch.randn(batch.num_tokens, heads, head_dim, device=device).to(dtype) for _ in range(4))
    states = (q, k, v, direction)
    return Problem(batch, *states, mask_4d(batch, dtype, causal), pad(batch, states), causal)


def pad(batch: PackedBatch, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Packed (T, H, d) as (B, L, H, d)."""
    return tuple(batch.pad_states(x.flatten(1)).unflatten(2, x.shape[1:]).contiguous() for x in states)


def mask_4d(batch: PackedBatch, dtype: torch.dtype, causal: bool) -> Tensor:
    """(B, 1, L, L): 0 where a row sees another, the dtype's minimum elsewhere."""
    longest = batch.max_seqlen
    steps = torch.arange(longest, device=batch.device)
    seen = (steps < batch.cu_seqlens.diff()[:, None])[:, None, None, :].expand(-1, 1, longest, -1)
    if causal:
        seen = seen & (steps[:, None] >= steps)
    return torch.zeros(seen.shape, dtype=dtype, device=batch.device).masked_fill(~seen, torch.finfo(dtype).min)


def leaves(p: Problem) -> tuple[Tensor, ...]:
    return tuple(x.detach().requires_grad_() for x in (p.q, p.k, p.v))


def packed(backend: str | None, p: Problem) -> dict[str, Any]:
    """The library's attention by one backend (None: the one it chooses), its plan included."""
    q, k, v = leaves(p)
    out = attention(q, k, v, AttentionPlan(p.batch, p.causal, backend))
    if p.backward:
        out.backward(p.direction)
    return {"out": out.detach(), "q": q.grad, "k": k.grad, "v": v.grad}


def padded(p: Problem) -> dict[str, Any]:
    """SDPA over (B, H, L, d) with the 4-D mask, on states that are padded already."""
    *states, direction = (x.transpose(1, 2) for x in p.padded)
    heads = [x.detach().requires_grad_() for x in states]
    out = F.scaled_dot_product_attention(*heads, attn_mask=p.mask)
    if p.backward:
        out.backward(direction)
    return {"out": out.detach(), **{n: x.grad for n, x in zip("qkv", heads)}}


def unpadded(p: Problem, out: dict[str, Tensor]) -> dict[str, Tensor]:
    """(B, H, L, d) results in packed order."""
    return {n: p.batch.unpad_states(x.transpose(1, 2)) for n, x in out.items()}


def exact(p: Problem) -> dict[str, Tensor]:
    states = tuple(x.double() for x in (p.q, p.k, p.v, p.direction))
    wide = Problem(p.batch, *states, mask_4d(p.batch, torch.float64, p.causal), pad(p.batch, states), p.causal)
    return unpadded(wide, padded(wide))


def work(p: Problem) -> Work:
    """2 products forward and 5 backward (scores again, 2 for each gradient pair) per visible pair; q, k, v, out and
    their gradients once."""
    pairs = sum(n * n for n in p.batch.lengths) * (0.5 if p.causal else 1.0)
    width = p.q.shape[1] * p.q.shape[2]
    return Work(8.0 * p.q.numel() * p.q.element_size(), 7 * 2.0 * pairs * width)


BACKENDS = ("sdpa", "varlen", "flash_attn", "xformers", "flex")
NEEDS = {"flash_attn": ("flash_attn",), "xformers": ("xformers",), "flex": ("compiler",)}

register(
    Case(
        name="attention",
        about="packed attention of one layer, forward + backward, plan or mask included",
        make=make,
        sizes={
            "quick": ({"label": "NLI", "lengths": "NLI"},),
            "cpu": tuple(
                {"label": name, "lengths": name, "count": count}
                for name, count in (("NLI", 32), ("sentences", 32), ("long tail", 32), ("web text", 8))
            ),
            "cuda": tuple(
                {"label": name, "lengths": name, "count": count, "heads": 32, "head_dim": 128}
                for name, count in (("NLI", 256), ("web text", 32))
            ),
        },
        variants={
            "ours": Variant(partial(packed, None), ours=True),
            "padded, 4-D mask": Variant(padded, unpadded),
            **{
                name: Variant(
                    partial(packed, name),
                    ours=True,
                    devices=("cuda",),
                    needs=NEEDS.get(name, ()),
                    prepare=fresh_compile,
                )
                for name in BACKENDS
            },
        },
        reference=exact,
        tolerance={"fp32": 1e-5, "bf16": 2e-2, "fp16": 5e-3},
        shape=lambda p: {
            "B": p.batch.num_sequences,
            "T": p.batch.num_tokens,
            "L": p.batch.max_seqlen,
            "H": p.q.shape[1],
            "d": p.q.shape[2],
        },
        warm={"lengths": "padding 25%", "count": 2, "heads": 1, "head_dim": 8},
        work=work,
        sources=("mtllm_fast/models/attention/*.py",),
    )
)


if __name__ == "__main__":
    sys.exit(main(cases=("attention",), prog="benchmarks.cases.attention"))
