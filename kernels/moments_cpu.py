"""CPU kernels of the moment form: one vocabulary block at a time, carrying `p @ W` along with a running maximum
and sum (apart, as in `linear_kl_cpu`), so that no `(C, V)` buffer exists at all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import tiles
from .gemms import accumulation_dtype, cpu_nt, kept_dtype
from .linear_kl_cpu import Head, Pairs, block_softmax, check_rows, take

if TYPE_CHECKING:
    from .linear_kl_ops import MomentsOf, MomentStep


class RunningMoments:
    """Expectations under the softmax of rows whose logits arrive in blocks.

    After `add` of all blocks: `top`, the largest logit, `total` = Σ exp(z - top), (C, 1); `mean` = p @ values (C, D);
    for a teacher `below` = Σ p (z - top) and `bias_mean`, (C, 1).
    """

    def __init__(self, rows: int, width: int, scratch: Tensor, *, teacher: bool):
        dtype = scratch.dtype
        self.teacher, self._scratch = teacher, scratch
        self.top = torch.full((rows, 1), -torch.inf, dtype=dtype)
        self.total = torch.zeros(rows, 1, dtype=dtype)
        self.below = torch.zeros(rows, 1, dtype=dtype)
        self.bias_mean = torch.zeros(rows, 1, dtype=dtype)
        self.mean = torch.zeros(rows, width, dtype=dtype)

    def add(self, z: Tensor, values: Tensor | None, value_bias: Tensor | None, masked: bool) -> None:
        """Logits z (C, v), overwritten; head rows `values` (v, D) or None, their bias (v,) or None."""
        p = self._scratch[: z.numel()].view_as(z)
        block_top, block_total = block_softmax(z, p, masked)
        top = torch.maximum(self.top, block_top)
        fall_old, fall_new = self.top - top, block_top - top
        share_old, share_new = self.total * fall_old.exp(), block_total * fall_new.exp()
        total = share_old + share_new
        old, new = share_old / total, share_new / total
        if masked:
            nothing_yet = top == -torch.inf
            for part in (total, old, new):
                part.masked_fill_(nothing_yet, 0.0)
        if values is not None:
            self.mean.mul_(old).addcmul_(cpu_nt(p, values.t()), new)
        if value_bias is not None:
            # 0 times a bias of -inf, an entry that both sides mask, counts 0.
            product = (p * value_bias).masked_fill_(p == 0, 0.0)
            self.bias_mean.mul_(old).addcmul_(product.sum(1, keepdim=True), new)
        if self.teacher:
            z.sub_(block_top)
            if masked:
                z.masked_fill_(p == 0, 0.0)
            # A part without a share may lie infinitely far below.
            own = z.mul_(p).sum(1, keepdim=True).add_(fall_new)
            self.below = torch.where(old > 0, old * (self.below + fall_old), 0.0) + torch.where(new > 0, new * own, 0.0)
        self.top, self.total = top, total


def teacher_moments_cpu(a: MomentsOf) -> tuple[Tensor, Tensor, Tensor]:
    """m (N, D), entropy (N,), bias_mean (N,)."""
    dtype = accumulation_dtype(a.h_t.dtype)
    sizes = tiles.LINEAR_KL_CPU
    check_rows(a.rows, a.h_t.shape[0], "rows")
    count = a.count
    head = Head(a.w_t, a.bias_t, sizes.block_v, a.temperature, a.softcap)
    values = head if a.w_s is None else Head(a.w_s, None, sizes.block_v, 1.0, 0.0)
    value_bias = None if a.bias_s is None else a.bias_s.to(dtype)
    width = values.weight.shape[1]
    m = torch.empty(count, width, dtype=dtype)
    entropy, bias_mean = torch.empty(count, dtype=dtype), torch.empty(count, dtype=dtype)
    chunk = 2 * sizes.chunk_rows  # one row each, where the difference form has two
    scratch = torch.empty(min(chunk, count) * head.width, dtype=dtype)
    for start in range(0, count, chunk):
        stop = min(start + chunk, count)
        x = head.states(take(a.h_t, a.rows, start, stop, dtype))
        running = RunningMoments(stop - start, width, scratch, teacher=True)
        for v0, v1 in head.ranges:
            block_bias = None if value_bias is None else value_bias[v0:v1]
            running.add(head.logits(x, v0, v1), values.block(v0, v1), block_bias, a.bias_t is not None)
        m[start:stop] = running.mean
        entropy[start:stop] = (running.total.log() - running.below).squeeze(1)
        bias_mean[start:stop] = running.bias_mean.squeeze(1)
    return m, entropy, bias_mean


def moment_step_cpu(a: MomentStep) -> tuple[Tensor, Tensor, Tensor]:
    """(Σ weight · value, values (P,), dh (T_s, D)) of the forward KL against cached teacher rows."""
    h_s, need_dh = a.h_s, a.need_dh
    dtype = accumulation_dtype(h_s.dtype)
    sizes = tiles.LINEAR_KL_CPU
    check_rows(a.rows_s, h_s.shape[0], "rows_s")
    check_rows(a.rows_t, a.m.shape[0], "rows_t")
    pairs = Pairs(a)
    values = torch.empty(pairs.count, dtype=dtype)
    width = h_s.shape[1]
    dh = pairs.gradient(h_s, need_dh)
    head = Head(a.w_s, a.bias_s, sizes.block_v, a.temperature, 0.0)
    chunk = 2 * sizes.chunk_rows
    scratch = torch.empty(min(chunk, pairs.count) * head.width, dtype=dtype)
    for start in range(0, pairs.count, chunk):
        stop = min(start + chunk, pairs.count)
        x = take(h_s, pairs.rows_s, start, stop, dtype)
        m_t, h_t, b_t = (take(part, pairs.rows_t, start, stop, dtype) for part in (a.m, a.entropy, a.bias_mean))
        running = RunningMoments(stop - start, width if need_dh else 0, scratch, teacher=False)
        scaled = head.states(x)
        for v0, v1 in head.ranges:
            z = head.logits(scaled, v0, v1)
            running.add(z, head.block(v0, v1) if need_dh else None, None, a.bias_s is not None)
        dot = (m_t * x).sum(1) + b_t
        # The two large numbers first: their difference is exact.
        far, near = running.top.squeeze(1) - dot / a.temperature, running.total.log().squeeze(1) - h_t
        values[start:stop] = (far + near) * a.scale
        if not need_dh:
            continue
        dx = running.mean.sub_(m_t).mul_(a.scale / a.temperature)
        if pairs.weight is not None:
            dx.mul_(pairs.weight[start:stop, None])
        pairs.add(dh, dx, start, stop)
    return *pairs.reduce(values), dh.to(kept_dtype(h_s.dtype))
