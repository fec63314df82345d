"""Packed attention by FlashAttention-2 inside torch: `torch.nn.attention.varlen`, CUDA, float16 and bfloat16."""

from __future__ import annotations

import logging
from functools import lru_cache
from importlib.util import find_spec
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from .contract import AttentionPlan, Backend, Call, DistanceBias, cuda_missing, half_cannot

log = logging.getLogger(__name__)


@lru_cache(maxsize=1)
def options() -> frozenset[str]:
    """Parameters of this torch's `varlen_attn`: it is young and grows."""
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(signature(varlen_attn).parameters)


@lru_cache(maxsize=8)
def takes_groups(device: torch.device) -> bool:
    """Whether this torch's `varlen_attn` reads key heads that several query heads share, without a copy for each.

    Releases with `enable_gqa` do. Before (2.11) it hands the heads to FlashAttention, which knows groups, but says
    nothing about them: one small call, output and gradients, is compared with that of copied heads.
    """
    if "enable_gqa" in options():
        return True
    from torch.nn.attention.varlen import varlen_attn

    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        generator = torch.Generator().manual_seed(0)
        q, k, v, direction = (
            torch.randn(8, heads, 16, generator=generator).to(device, torch.float16).requires_grad_()
            for heads in (4, 2, 2, 4)
        )
        ends = torch.tensor([0, 3, 8], dtype=torch.int32, device=device)
        found = []
        for copies in (1, 2):
            keys, values = (x.repeat_interleave(copies, dim=1) for x in (k, v))
            try:
                out = varlen_attn(q, keys, values, ends, ends, 5, 5, scale=0.25)
                gradients = torch.autograd.grad(out, (q, k, v), direction)  # type: ignore[arg-type]
            except (RuntimeError, ValueError, TypeError) as error:
                if copies > 1:
                    raise
                log.info(
                    "varlen_attn of torch %s takes no grouped heads (%s); they are copied", torch.__version__, error
                )
                return False
            found.append((out, *gradients))
    same = all(torch.allclose(a.float(), b.float(), atol=1e-2, rtol=1e-2) for a, b in zip(*found))  # type: ignore[union-attr]
    if not same:
        log.info("varlen_attn of torch %s takes grouped heads for others; they are copied", torch.__version__)
    return same


class Varlen(Backend):
    name = "varlen"
    about = "FlashAttention-2 inside torch; float16 and bfloat16 on CUDA"

    def missing(self, device: torch.device) -> str | None:
        reason = cuda_missing(device, (8, 0))
        if reason is None and find_spec("torch.nn.attention.varlen") is None:
            reason = "this torch has no torch.nn.attention.varlen"
        if reason is None and not options() >= {"scale", "window_size"}:
            reason = "this torch's varlen_attn has no scale and window_size"
        return reason

    def cannot(self, call: Call) -> str | None:
        if call.head_dim % 8:
            return f"takes head sizes that are multiples of 8, not {call.head_dim}"
        if call.softcap is not None:
            return "has no soft-cap"
        if call.dropout:
            return "has no dropout"
        return half_cannot(call, 256)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, call: Call, bias: DistanceBias | None = None
    ) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        grouped: dict[str, Any] = {}
        if call.groups > 1 and "enable_gqa" in options():
            grouped["enable_gqa"] = True
        elif call.groups > 1 and (torch.compiler.is_compiling() or not takes_groups(q.device)):
            k, v = (x.repeat_interleave(call.groups, dim=1) for x in (k, v))
        left, right = call.sides
        cu_seqlens, longest = plan.cu_seqlens, plan.batch.max_seqlen
        return varlen_attn(  # type: ignore[return-value]  # a pair only with return_aux
            q,
            k,
            v,
            cu_seqlens,
            cu_seqlens,
            longest,
            longest,
            scale=call.scale,
            window_size=(-1 if left is None else left, -1 if right is None else right),
            **grouped,
        )
