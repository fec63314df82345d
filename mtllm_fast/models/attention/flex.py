"""Packed attention by FlexAttention: a document mask over the packed rows, soft-cap as a score modification.

On CUDA it is compiled, which takes tens of seconds the first time; on the CPU it runs unfused, for checks: there it
holds all T x T scores and has no backward pass. So it is used only where it is named.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .contract import AttentionPlan, Backend, Call, DistanceBias, visible

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128


@lru_cache(maxsize=2)
def _flex_attention(compiled: bool) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    function: Any = flex_attention
    # fullgraph: after too many recompilations an error, not a silent return to the unfused form
    return torch.compile(function, dynamic=True, fullgraph=True) if compiled else function


def block_table(lengths: tuple[int, ...], causal: bool, window: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Which blocks of rows (n, n) must be computed: those with a masked pair in them, and those without one.

    Worked out from the lengths on the host. A block that turns out to hold no visible pair is only slow, not wrong.
    """
    total = sum(lengths)
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    starts = np.arange(0, total, BLOCK)
    ends = np.minimum(starts + BLOCK, total)
    first, last = sequence[starts], sequence[ends - 1]
    index = np.arange(len(starts))
    apart = np.abs(index[:, None] - index)
    some = (first[:, None] <= last) & (first <= last[:, None])
    whole = ends - starts == BLOCK
    one = (first == last) & whole
    every = one[:, None] & one & (first[:, None] == first)
    if causal:
        some &= index[:, None] >= index
        every &= index[:, None] > index
    if window is not None:
        reach = window - 1 if causal else window
        some &= np.maximum((apart - 1) * BLOCK + 1, 0) <= reach
        every &= (apart + 1) * BLOCK - 1 <= reach
    return some & ~every, every


def make_block_mask(plan: AttentionPlan, window: int | None) -> BlockMask:
    """The document mask of a plan."""
    from torch.nn.attention.flex_attention import BlockMask

    device, causal, sequence = plan.batch.device, plan.causal, plan.batch.sequence_ids
    # a tensor: a captured Python number would become a symbol, which the compiler does not take here
    limit = None if window is None else torch.tensor(window, device=device)

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (sequence[i] == sequence[j]) & visible(i - j, causal, limit)

    def ordered(table: np.ndarray) -> tuple[Tensor, Tensor]:
        counts = torch.from_numpy(table.sum(1, dtype=np.int32))
        columns = torch.from_numpy(np.argsort(~table, axis=1, kind="stable").astype(np.int32))
        return counts[None, None].to(device), columns[None, None].to(device)

    partial, full = block_table(plan.lengths, causal, window)
    total = plan.batch.num_tokens
    return BlockMask.from_kv_blocks(
        *ordered(partial), *ordered(full), BLOCK_SIZE=BLOCK, mask_mod=mask_mod, seq_lengths=(total, total)
    )


def make_cap(softcap: Tensor) -> Callable[..., Tensor]:
    """The score modification that bounds scores by `softcap` (a 0-D tensor)."""

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return score_mod


def make_bias(values: Tensor) -> Callable[..., Tensor]:
    """The score modification that adds `values` (H, 2 n - 1) by distance; distances between sequences are masked."""
    middle = torch.tensor(values.shape[1] // 2, device=values.device)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + values[h, (j - i).clamp(-middle, middle) + middle]

    return score_mod


class Flex(Backend):
    name = "flex"
    about = "FlexAttention, compiled on CUDA, unfused on the CPU; only where it is named"
    automatic = False

    def missing(self, device: torch.device) -> str | None:
        if device.type not in ("cuda", "cpu"):
            return "runs on CUDA and on the CPU only"
        if device.type == "cuda" and find_spec("triton") is None:
            return "needs triton"
        return None

    def cannot(self, call: Call) -> str | None:
        if call.dropout:
            return "has no dropout"
        if call.bias and (call.softcap is not None or call.needs_grad):
            return "takes no bias with gradients or a soft-cap"
        if call.device.type == "cpu":
            return "has no backward pass on the CPU" if call.needs_grad else None
        if call.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"takes float32, float16 and bfloat16, not {str(call.dtype).removeprefix('torch.')}"
        return f"takes heads of at least 16, not {min(call.head_dim, call.value_dim)}" if call.head_dim < 16 else None

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, call: Call, bias: DistanceBias | None = None
    ) -> Tensor:
        mask = plan.cached(("flex", call.window), lambda: make_block_mask(plan, call.window))
        cap = None
        if call.softcap is not None:
            bound = torch.tensor(call.softcap, device=q.device)
            cap = plan.cached(("flex cap", call.softcap), lambda: make_cap(bound))
        if bias is not None:
            cap = make_bias(bias.values.detach().to(q.dtype))
        if not call.needs_grad:
            q, k, v = q.detach(), k.detach(), v.detach()
        out = _flex_attention(q.device.type == "cuda")(
            *(x.transpose(0, 1)[None] for x in (q, k, v)),
            score_mod=cap,
            block_mask=mask,
            scale=call.scale,
            enable_gqa=call.groups > 1,
        )
        return out[0].transpose(0, 1)
