"""Packed attention by xformers' `memory_efficient_attention` with block-diagonal masks: CUDA, float32 too.

Facts: xformers 0.0.35. It has no soft-cap and no two-sided window on block-diagonal masks; half precision goes through
FlashAttention (Ampere and newer) or CUTLASS, float32 through CUTLASS (up to Hopper).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .contract import AttentionPlan, Backend, Call, DistanceBias, cuda_missing, load

if TYPE_CHECKING:
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

_LAST_CUTLASS = (9, 0)


def make_bias(plan: AttentionPlan, window: int | None) -> BlockDiagonalMask:
    """The mask object of a plan. Its window looks back only and counts the row itself, as the contract's causal one."""
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    blocks = BlockDiagonalMask.from_seqlens(plan.lengths, device=plan.batch.device)
    if not plan.causal:
        assert window is None
        return blocks
    return blocks.make_causal() if window is None else blocks.make_local_attention(window)


class XFormers(Backend):
    name = "xformers"
    about = "xformers' memory_efficient_attention; float32, float16 and bfloat16 on CUDA, dropout"

    def missing(self, device: torch.device) -> str | None:
        pip = "pip install xformers, the extra `xformers`"
        return cuda_missing(device, (6, 0)) or load("xformers.ops", "memory_efficient_attention", pip)[1]

    def cannot(self, call: Call) -> str | None:
        from xformers.ops import fmha

        dtype = str(call.dtype).removeprefix("torch.")
        if call.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"takes float32, float16 and bfloat16, not {dtype}"
        if call.softcap is not None:
            return "has no soft-cap"
        if call.bias:
            return "takes no bias of the scores"
        if call.window is not None and not call.causal:
            return "has no window that looks both ways"
        if call.value_dim != call.head_dim:
            return f"needs values as wide as keys, not {call.value_dim} and {call.head_dim}"
        step = 4 if call.dtype == torch.float32 else 8
        if call.head_dim % step:
            return f"takes head sizes that are multiples of {step} in {dtype}, not {call.head_dim}"
        capability = torch.cuda.get_device_capability(call.device)
        flash = call.dtype != torch.float32 and capability >= (8, 0) and call.head_dim <= 256
        if flash and fmha.flash.FwOp.is_available():
            return None
        if capability > _LAST_CUTLASS or not fmha.cutlass.FwOp.is_available():
            return f"has no kernel for {dtype} with head size {call.head_dim} on this GPU"
        return None

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, call: Call, bias: DistanceBias | None = None
    ) -> Tensor:
        from xformers.ops import memory_efficient_attention

        bias = plan.cached(("xformers", call.window), lambda: make_bias(plan, call.window))
        if call.groups > 1:  # its own grouped heads have no backward pass
            k, v = k.repeat_interleave(call.groups, 1), v.repeat_interleave(call.groups, 1)
        return memory_efficient_attention(q[None], k[None], v[None], bias, call.dropout, call.scale)[0]
