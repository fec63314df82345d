"""CPU kernels of `linear_kl`: the chunked algorithm of `linear_kl.py`, blocked over the vocabulary so that every
elementwise pass works on a block that is still in cache.

Per chunk of C row pairs, for each vocabulary block: one GEMM writes the logits of both rows, the statistics of the block
are taken, and (forward KL) the logits are replaced in place by `exp(z - blockmax)`. When all blocks are done the row's
log-sum-exp is known, and a second sweep turns each stored block into the gradient and multiplies it with the head.
Memory: two fp32 buffers `(C, V)`, whatever T is; none that large when no gradient is wanted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .tiles import LINEAR_KL_CPU, CpuChunks

FORWARD, REVERSE, JSD = "forward", "reverse", "jsd"


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Logits and statistics are fp32, or fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_rows(rows: Tensor, limit: int, name: str) -> None:
    """Raise IndexError when an entry of `rows` is outside [0, limit)."""
    if rows.numel() == 0:
        return
    low, high = (int(v) for v in torch.aminmax(rows))
    if low < 0 or high >= limit:
        raise IndexError(
            f"{name} holds {low if low < 0 else high}, but its states have {limit} rows (0 to {limit - 1})"
        )


def select_pairs(
    rows_s: Tensor | None, rows_t: Tensor | None, row_weight: Tensor | None, pairs: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Pairs of weight != 0 as (kept, rows_s, rows_t); None stands for "all, in order"."""
    if row_weight is None:
        return None, rows_s, rows_t
    kept = torch.nonzero(row_weight).squeeze(1)
    if kept.numel() == pairs:
        return None, rows_s, rows_t
    return kept, kept if rows_s is None else rows_s[kept], kept if rows_t is None else rows_t[kept]


def take(x: Tensor, rows: Tensor | None, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Rows [start, stop) of the selected rows of x, in `dtype`."""
    chunk = x[start:stop] if rows is None else x.index_select(0, rows[start:stop])
    return chunk.to(dtype)


class Blocks:
    """Vocabulary blocks of one head: `(start, stop)` ranges and the head's block in the accumulation dtype."""

    def __init__(self, weight: Tensor, block_v: int, dtype: torch.dtype):
        self.weight = weight
        self.dtype = dtype
        self.ranges = [(v, min(v + block_v, weight.shape[0])) for v in range(0, weight.shape[0], block_v)]
        cast = weight.dtype != dtype
        self._scratch = (
            weight.new_empty((min(block_v, weight.shape[0]), weight.shape[1]), dtype=dtype) if cast else None
        )

    def head(self, start: int, stop: int) -> Tensor:
        """Head rows [start, stop) in the accumulation dtype; valid until the next call."""
        block = self.weight[start:stop]
        return block if self._scratch is None else self._scratch[: stop - start].copy_(block)


def logits_into(out: Tensor, x: Tensor, head: Tensor, bias: Tensor | None, temperature: float, softcap: float) -> None:
    """out (C, v) = softcap(x @ headᵀ + bias) / temperature, in place."""
    alpha = 1.0 if softcap else 1.0 / temperature
    if bias is None:
        torch.addmm(out, x, head.t(), beta=0.0, alpha=alpha, out=out)
    else:
        torch.addmm(bias, x, head.t(), beta=alpha, alpha=alpha, out=out)
    if softcap:
        out.mul_(1.0 / softcap).tanh_().mul_(softcap / temperature)


def _finite(maximum: Tensor) -> Tensor:
    """A block whose logits are all -inf (masked by the bias) must not turn into inf - inf; NaN stays NaN."""
    return maximum.clamp_(min=torch.finfo(maximum.dtype).min)


class _Work:
    """Everything about one call that does not change from chunk to chunk."""

    def __init__(
        self,
        h_s: Tensor,
        w_s: Tensor,
        h_t: Tensor,
        w_t: Tensor | None,
        bias_s: Tensor | None,
        bias_t: Tensor | None,
        temperature: float,
        softcap: float,
        divergence: str,
        beta: float,
        store: bool,
        chunk: int,
        sizes: CpuChunks,
    ):
        self.dtype = accumulation_dtype(h_s.dtype)
        self.shared = w_t is None
        self.blocks_s = Blocks(w_s, sizes.block_v, self.dtype)
        self.blocks_t = self.blocks_s if w_t is None else Blocks(w_t, sizes.block_v, self.dtype)
        self.bias_s = None if bias_s is None else bias_s.to(self.dtype)
        self.bias_t = self.bias_s if w_t is None else None if bias_t is None else bias_t.to(self.dtype)
        self.masked = bias_s is not None or bias_t is not None
        self.temperature, self.softcap, self.divergence, self.beta = temperature, softcap, divergence, beta
        vocab = w_s.shape[0]
        self.ranges = self.blocks_s.ranges
        width = max((stop - start for start, stop in self.ranges), default=0)
        self.store = store
        self.logits = h_s.new_empty(2 * chunk * (vocab if store else width), dtype=self.dtype)
        self.scratch = h_s.new_empty(chunk * width, dtype=self.dtype)

    def views(self, start: int, stop: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """(both (2C, v), student (C, v), teacher (C, v)) of one block; contiguous."""
        width = stop - start
        offset = 2 * rows * start if self.store else 0
        both = self.logits[offset : offset + 2 * rows * width].view(2 * rows, width)
        return both, both[:rows], both[rows:]

    def compute(self, x_both: Tensor | None, x_s: Tensor, x_t: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Logits of one block for both rows."""
        rows = x_s.shape[0]
        both, z_s, z_t = self.views(start, stop, rows)
        cap = (self.temperature, self.softcap)
        bias_s = None if self.bias_s is None else self.bias_s[start:stop]
        if x_both is not None:
            logits_into(both, x_both, self.blocks_s.head(start, stop), bias_s, *cap)
        else:
            bias_t = None if self.bias_t is None else self.bias_t[start:stop]
            logits_into(z_s, x_s, self.blocks_s.head(start, stop), bias_s, *cap)
            logits_into(z_t, x_t, self.blocks_t.head(start, stop), bias_t, *cap)
        return z_s, z_t

    def temp(self, like: Tensor) -> Tensor:
        """A scratch block shaped like `like`."""
        return self.scratch[: like.numel()].view_as(like)


def _forward_kl(work: _Work, x_both: Tensor | None, x_s: Tensor, x_t: Tensor) -> tuple[Tensor, Iterator[Tensor]]:
    """Row values of KL(p_t || p_s) and an iterator over the gradient blocks p_s - p_t."""
    stats = []
    for start, stop in work.ranges:
        z_s, z_t = work.compute(x_both, x_s, x_t, start, stop)
        diff = torch.sub(z_t, z_s, out=work.temp(z_s))
        max_s, max_t = _finite(z_s.amax(1, keepdim=True)), _finite(z_t.amax(1, keepdim=True))
        e_s, e_t = z_s.sub_(max_s).exp_(), z_t.sub_(max_t).exp_()
        if work.masked:
            diff.masked_fill_(e_t == 0, 0.0)
        dot = torch.bmm(e_t.unsqueeze(1), diff.unsqueeze(2)).squeeze(2)
        stats.append(torch.cat([max_s, max_t, e_s.sum(1, keepdim=True), e_t.sum(1, keepdim=True), dot], 1))
    max_s, max_t, sum_s, sum_t, dot = torch.stack(stats).unbind(2)  # (blocks, C) each
    lse_s = torch.logsumexp(max_s + sum_s.log(), 0)
    lse_t = torch.logsumexp(max_t + sum_t.log(), 0)
    scale_s, scale_t = (max_s - lse_s).exp_(), (max_t - lse_t).exp_()
    rows = (dot * scale_t).sum(0) - lse_t + lse_s

    def gradients() -> Iterator[Tensor]:
        for k, (start, stop) in enumerate(work.ranges):
            _, e_s, e_t = work.views(start, stop, x_s.shape[0])
            yield e_s.mul_(scale_s[k].unsqueeze(1)).addcmul_(e_t, scale_t[k].unsqueeze(1), value=-1.0)

    return rows, gradients()


def _any_divergence(work: _Work, x_both: Tensor | None, x_s: Tensor, x_t: Tensor) -> tuple[Tensor, Iterator[Tensor]]:
    """Row values of any divergence, with soft-capping, and an iterator over its gradient blocks.

    With r = log p_s - log p_t, u = log p_s - log m, v = log p_t - log m, m = β p_t + (1-β) p_s:
    forward Σ -p_t r, gradient p_s - p_t; reverse Σ p_s r =: K, gradient p_s (r - K);
    JSD β Σ p_t v + (1-β) U with U = Σ p_s u, gradient (1-β) p_s (u - U).
    """
    stats = []
    for start, stop in work.ranges:
        z_s, z_t = work.compute(x_both, x_s, x_t, start, stop)
        for z in (z_s, z_t):
            maximum = _finite(z.amax(1, keepdim=True))
            stats.append(maximum + torch.sub(z, maximum, out=work.temp(z)).exp_().sum(1, keepdim=True).log())
    per_block = torch.stack(stats)
    lse_s = torch.logsumexp(per_block[0::2], 0)  # (C, 1)
    lse_t = torch.logsumexp(per_block[1::2], 0)
    log_b, log_a = _log(work.beta), _log(1.0 - work.beta)

    def log_probs(start: int, stop: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """z_s, p_s, p_t, log p_s and the log ratio r of one block."""
        if work.store:
            _, z_s, z_t = work.views(start, stop, x_s.shape[0])
        else:
            z_s, z_t = work.compute(x_both, x_s, x_t, start, stop)
        logp_s, logp_t = z_s - lse_s, z_t - lse_t
        return z_s, logp_s.exp(), logp_t.exp(), logp_s, logp_s - logp_t

    def expectation(p: Tensor, value: Tensor) -> Tensor:
        product = p * value
        if work.masked:
            product.masked_fill_(p == 0, 0.0)
        return product.sum(1, keepdim=True)

    rows = torch.zeros_like(lse_s)
    student_mean = torch.zeros_like(lse_s)
    for start, stop in work.ranges:
        _, p_s, p_t, _, ratio = log_probs(start, stop)
        if work.divergence == FORWARD:
            rows -= expectation(p_t, ratio)
        elif work.divergence == REVERSE:
            rows += expectation(p_s, ratio)
        else:
            student_mean += expectation(p_s, -torch.logaddexp(ratio.new_tensor(log_a), log_b - ratio))
            rows += work.beta * expectation(p_t, -torch.logaddexp(ratio.new_tensor(log_b), log_a + ratio))
    if work.divergence == REVERSE:
        student_mean = rows
    elif work.divergence == JSD:
        rows = rows + (1.0 - work.beta) * student_mean

    def gradients() -> Iterator[Tensor]:
        for start, stop in work.ranges:
            z_s, p_s, p_t, _, ratio = log_probs(start, stop)
            if work.divergence == FORWARD:
                grad = p_s.sub_(p_t)
            else:
                if work.divergence == JSD:
                    ratio = torch.logaddexp(ratio.new_tensor(log_a), log_b - ratio).neg_()
                grad = p_s * (ratio - student_mean)
                if work.masked:
                    grad.masked_fill_(p_s == 0, 0.0)
                if work.divergence == JSD:
                    grad.mul_(1.0 - work.beta)
            if work.softcap:
                # z_s holds softcap(logit) / temperature, so this is 1 - tanh².
                capped = z_s.mul_(work.temperature / work.softcap)
                grad.mul_(capped.square_().neg_().add_(1.0))
            yield grad

    return rows.squeeze(1), gradients()


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf


def difference_cpu(
    h_s: Tensor,  # (T_s, D)
    w_s: Tensor,  # (V, D)
    h_t: Tensor,  # (T_t, D_t)
    w_t: Tensor | None,  # (V, D_t)
    bias_s: Tensor | None,  # (V,)
    bias_t: Tensor | None,  # (V,)
    rows_s: Tensor | None,  # (P,)
    rows_t: Tensor | None,  # (P,)
    row_weight: Tensor | None,  # (P,)
    temperature: float,
    scale: float,
    softcap: float,
    divergence: str,
    beta: float,
    need_dh: bool,
    need_dw: bool,
    need_db: bool,
    sizes: CpuChunks = LINEAR_KL_CPU,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(Σ weight · value, values (P,), dh (T_s, D), dw (V, D), db (V,)); gradients not asked for are empty tensors."""
    dtype = accumulation_dtype(h_s.dtype)
    for rows, states, name in ((rows_s, h_s, "rows_s"), (rows_t, h_t, "rows_t")):
        if rows is not None:
            check_rows(rows, states.shape[0], name)
    pairs = h_s.shape[0] if rows_s is None else rows_s.shape[0]
    kept, rows_s, rows_t = select_pairs(rows_s, rows_t, row_weight, pairs)
    weight = None if row_weight is None else (row_weight if kept is None else row_weight[kept]).to(dtype)
    count = pairs if kept is None else kept.shape[0]

    vocab, width = w_s.shape
    store = need_dh or need_dw or need_db
    values = torch.empty(count, dtype=dtype)
    # A row index may name a row twice (two teacher rows for one student row), so gradients are added, not written.
    dh = (torch.empty if rows_s is None else torch.zeros)((h_s.shape[0] if need_dh else 0, width), dtype=h_s.dtype)
    dw = torch.zeros((vocab if need_dw else 0, width), dtype=dtype)
    db = torch.zeros(vocab if need_db else 0, dtype=dtype)
    chunk = sizes.rows_for(count, vocab, dtype.itemsize)
    work = _Work(
        h_s, w_s, h_t, w_t, bias_s, bias_t, temperature, softcap, divergence, beta, store, min(chunk, count), sizes
    )
    rows_kernel = _forward_kl if divergence == FORWARD and not softcap else _any_divergence

    for start in range(0, count, chunk):
        stop = min(start + chunk, count)
        x_s = take(h_s, rows_s, start, stop, dtype)
        x_t = take(h_t, rows_t, start, stop, dtype)
        x_both = torch.cat([x_s, x_t]) if work.shared else None
        chunk_values, gradients = rows_kernel(work, x_both, x_s, x_t)
        values[start:stop] = chunk_values * scale
        if not store:
            continue
        # d value / d logit of the raw logit; the weights go onto the (C, D) side, never onto (C, V).
        row_scale = torch.full((stop - start, 1), scale / temperature, dtype=dtype)
        if weight is not None:
            row_scale = row_scale * weight[start:stop, None]
        x_scaled = x_s * row_scale if need_dw else x_s
        dx = torch.zeros_like(x_s)
        for (v0, v1), grad in zip(work.ranges, gradients, strict=True):
            if need_dh:
                dx.addmm_(grad, work.blocks_s.head(v0, v1))
            if need_dw:
                dw[v0:v1].addmm_(grad.t(), x_scaled)
            if need_db:
                db[v0:v1].addmv_(grad.t(), row_scale[:, 0])
        if need_dh:
            dx = dx.mul_(row_scale).to(h_s.dtype)
            if rows_s is None:
                dh[start:stop] = dx
            else:
                dh.index_add_(0, rows_s[start:stop], dx)

    total = values.sum() if weight is None else torch.dot(values, weight)
    if kept is not None:
        values = torch.zeros(pairs, dtype=dtype).index_copy_(0, kept, values)
    return total, values, dh, dw.to(w_s.dtype), db
