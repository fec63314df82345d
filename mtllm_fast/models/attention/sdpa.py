"""Packed attention by `F.scaled_dot_product_attention`: any device, any dtype.

Many short sequences are laid out in padded buckets of similar length, which costs copies of q, k, v and the output.
On the CPU, where a call costs little, sequences that are worth a call of their own are served where they lie; and short
ones in half precision have a backward of their own (`ShortHalf`), because torch's is slower than plain products there.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .contract import AttentionPlan, Backend, Call, DistanceBias, visible

# A bucket may hold sequences down to this share of its longest one (less padding against fewer kernel calls).
_BUCKET_SHARE = 0.85
_BUCKET_SLACK = 4
# Bytes of q rows whose copies into a bucket and back cost about as much as one more call on the CPU.
_CALL_BYTES = 32768
_SHORT = 128  # longest sequences of `ShortHalf`; at 200 the fused backward is the faster one (benchmarks/LOG.md)
_CPU = ("cpu", "meta")  # meta tensors stand for a CPU step that is only planned


class Buckets(NamedTuple):
    """Sequences sorted by length and laid out as padded blocks, each of which one SDPA call serves."""

    shapes: list[tuple[int, int]]  # (b, L) of every block
    valid: list[Tensor | None]  # (b, L) bool of every block, None where all its sequences have length L
    rows: Tensor | None  # (sum b * L,) packed row of each slot; padding repeats its sequence's first row
    slots: Tensor | None  # (T,) slot of each packed row; both None where the packed rows lie like this already


def make_runs(lengths: tuple[int, ...]) -> Buckets:
    """Blocks of neighbouring sequences of one length, in packed order: nothing is copied or padded."""
    shapes = [(len(list(run)), length) for length, run in groupby(lengths)]
    return Buckets(shapes, [None] * len(shapes), None, None)


def make_buckets(lengths: tuple[int, ...], device: torch.device) -> Buckets:
    """Blocks over non-empty sequences, longest first."""
    all_lengths = torch.tensor(lengths, dtype=torch.int64)
    starts = torch.cumsum(all_lengths, 0) - all_lengths
    order = torch.argsort(all_lengths, descending=True, stable=True)
    sorted_lengths = all_lengths[order].tolist()
    shapes, valid, rows, is_row = [], [], [], []
    first = 0
    while first < len(sorted_lengths):
        longest = sorted_lengths[first]
        floor = min(longest * _BUCKET_SHARE, longest - _BUCKET_SLACK)
        last = first
        while last < len(sorted_lengths) and sorted_lengths[last] >= floor:
            last += 1
        members = order[first:last]
        steps = torch.arange(longest)
        inside = steps < all_lengths[members, None]
        shapes.append((last - first, longest))
        valid.append(None if bool(inside.all()) else inside.to(device))
        rows.append((starts[members, None] + torch.where(inside, steps, 0)).flatten())
        is_row.append(inside.flatten())
        first = last
    row_of_slot, real = torch.cat(rows), torch.cat(is_row)
    if bool(real.all()) and bool((row_of_slot.diff() == 1).all()):
        return Buckets(shapes, valid, None, None)
    slots = torch.empty(int(all_lengths.sum()), dtype=torch.int64)
    slots[row_of_slot[real]] = real.nonzero().squeeze(1)
    return Buckets(shapes, valid, row_of_slot.to(device), slots.to(device))


def block_mask(length: int, valid: Tensor | None, call: Call) -> Tensor | None:
    """Bool mask that broadcasts to (b, H, L, L), or None where plain (causal) attention is exact."""
    window = call.window if call.window is not None and call.window < length else None
    if window is None:
        if valid is None or call.causal:
            return None  # padding stands on the right, where causal rows do not look
        return valid[:, None, None, :]
    steps = torch.arange(length, device=call.device)
    mask = visible(steps[:, None] - steps, call.causal, window)
    if valid is None:
        return mask
    # a padding slot far from its sequence would see nothing, and nothing has no softmax
    return (mask & valid[:, None, None, :]) | torch.eye(length, dtype=torch.bool, device=mask.device)


def biased(bias: DistanceBias, length: int, mask: Tensor | None, call: Call) -> Tensor:
    """The bias of a block (H, L, L) in the dtype of the call, with the block's mask in it."""
    square = bias.square(length).to(call.dtype)
    if mask is None and call.causal:
        mask = torch.ones(length, length, dtype=torch.bool, device=square.device).tril()
    return square if mask is None else square.masked_fill(~mask, -torch.inf)


def _block(q: Tensor, k: Tensor, v: Tensor, shape: tuple[int, int], mask: Tensor | None, call: Call) -> Tensor:
    """(b * L, H, d_v) from the (b * L, ...) rows of a block of `shape` (b, L)."""
    q, k, v = (x.unflatten(0, shape).transpose(1, 2) for x in (q, k, v))
    # on CUDA only the flash kernel takes grouped heads, and it takes no mask: the fallback would hold all scores
    grouped = call.groups > 1 and call.softcap is None and q.device.type in _CPU
    if call.groups > 1 and not grouped:
        k, v = k.repeat_interleave(call.groups, 1), v.repeat_interleave(call.groups, 1)
    if call.softcap is not None:
        out = _capped(q, k, v, mask, call, call.softcap)
    else:
        is_causal = call.causal and mask is None
        if _short_half(q, mask, call):
            out = ShortHalf.apply(q, k, v, mask, is_causal, call.scale)
            return out.transpose(1, 2).flatten(0, 1)  # type: ignore[no-any-return]
        out = F.scaled_dot_product_attention(
            q, k, v, mask, call.dropout, is_causal=is_causal, scale=call.scale, enable_gqa=grouped
        )
    return out.transpose(1, 2).flatten(0, 1)


def _short_half(q: Tensor, mask: Tensor | None, call: Call) -> bool:
    """Whether `ShortHalf` is the faster one: short sequences that are differentiated in half precision on the CPU."""
    half = q.device.type in _CPU and q.dtype in (torch.bfloat16, torch.float16)
    fixed = call.dropout == 0 and (mask is None or not mask.requires_grad)
    return half and fixed and q.shape[2] <= _SHORT and torch.is_grad_enabled() and q.requires_grad


class ShortHalf(torch.autograd.Function):
    """Attention whose backward is plain products in float32 over a block's weights, which are computed again.

    q (b, H, L, d), k and v (b, H / g, L, d) of one dtype, mask bool or added, broadcasting to (b, H, L, L) or None ->
    (b, H, L, d). Keeps q, k and v; `_scaled_dot_product_flash_attention_for_cpu` keeps its output, too.
    """

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal=is_causal, scale=scale, enable_gqa=grouped)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        q, k, v, mask, ctx.is_causal, ctx.scale = inputs
        ctx.save_for_backward(q, k, v, mask)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, mask = ctx.saved_tensors
        batch, heads, length, _ = q.shape
        wide = torch.promote_types(q.dtype, torch.float32)

        def rows(x: Tensor) -> Tensor:
            """(b * H / g, g * L, d): the query heads of one key head as more rows of it."""
            return x.to(wide).reshape(batch * k.shape[1], -1, x.shape[-1])

        rows_q, rows_k, rows_v, rows_d = rows(q), rows(k), rows(v), rows(d_out)
        scores = ((ctx.scale * rows_q) @ rows_k.transpose(1, 2)).view(batch, heads, length, length)
        if ctx.is_causal:
            mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        weights = torch.softmax(scores, -1).view(rows_q.shape[0], -1, length)
        d_weights = rows_d @ rows_v.transpose(1, 2)
        d_scores = ctx.scale * weights * (d_weights - (weights * d_weights).sum(-1, keepdim=True))
        dq, dk = d_scores @ rows_k, d_scores.transpose(1, 2) @ rows_q
        dv = weights.transpose(1, 2) @ rows_d
        return *(d.view(x.shape).to(x.dtype) for d, x in ((dq, q), (dk, k), (dv, v))), None, None, None


def _capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, call: Call, softcap: float) -> Tensor:
    """Attention with soft-capped scores, which SDPA lacks. q, k, v: (b, H, L, d)."""
    scores = softcap * torch.tanh((q @ k.transpose(-1, -2)) * (call.scale / softcap))
    if mask is None and call.causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = F.dropout(torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype), call.dropout, call.dropout > 0)
    return weights @ v


class SDPA(Backend):
    name = "sdpa"
    about = "torch's scaled_dot_product_attention, in place or on buckets of similar length; any device and dtype"

    def missing(self, device: torch.device) -> str | None:
        return None

    def cannot(self, call: Call) -> str | None:
        return "takes no bias with a soft-cap" if call.bias and call.softcap is not None else None

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, call: Call, bias: DistanceBias | None = None
    ) -> Tensor:
        in_place = False
        if q.device.type in _CPU:
            runs = plan.cached("sdpa runs", lambda: make_runs(plan.lengths))
            in_place = len(runs.shapes) * _CALL_BYTES <= q.numel() * q.element_size()
        buckets = runs if in_place else plan.cached("sdpa", lambda: make_buckets(plan.lengths, q.device))
        masks = plan.cached(
            ("sdpa masks", in_place, call.window),
            lambda: [block_mask(shape[1], valid, call) for shape, valid in zip(buckets.shapes, buckets.valid)],
        )
        if bias is not None:
            masks = [biased(bias, shape[1], mask, call) for shape, mask in zip(buckets.shapes, masks)]
        if buckets.rows is not None:
            q, k, v = (x.index_select(0, buckets.rows) for x in (q, k, v))
        sizes = [b * length for b, length in buckets.shapes]
        blocks = zip(q.split(sizes), k.split(sizes), v.split(sizes), buckets.shapes, masks)
        pieces = [_block(q_b, k_b, v_b, shape, mask, call) for q_b, k_b, v_b, shape, mask in blocks]
        out = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return out if buckets.slots is None else out.index_select(0, buckets.slots)
