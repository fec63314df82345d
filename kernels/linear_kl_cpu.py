"""CPU kernels of `linear_kl`: the chunked algorithm of `linear_kl.py`, blocked over the vocabulary so that every
elementwise pass works on a block that is still in cache.

Per chunk of C row pairs, for each vocabulary block: one GEMM makes the logits of both rows, and (forward KL) the
block's own softmax is stored with its maximum and sum. When all blocks are done those of the row are known, and a
second sweep rescales each stored block into the gradient and multiplies it with the head.
Memory: two buffers `(C, V)`, whatever T is; only one block when no gradient is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import tiles
from .gemms import accumulation_dtype, cpu_nt, cpu_tn, has_fast_bf16, kept_dtype

if TYPE_CHECKING:
    from .linear_kl_ops import Difference, OverPairs

FORWARD, REVERSE, JSD = "forward", "reverse", "jsd"
Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def check_rows(rows: Tensor | None, limit: int, name: str) -> None:
    """Raise IndexError when an entry of `rows` is outside [0, limit)."""
    if rows is None or rows.numel() == 0:
        return
    low, high = (int(v) for v in torch.aminmax(rows))
    if low < 0 or high >= limit:
        raise IndexError(f"{name} holds {low if low < 0 else high}, but there are {limit} of them (0 to {limit - 1})")


class Pairs:
    """The row pairs of weight != 0, as index tensors on either side; None stands for "all, in order"."""

    def __init__(self, a: OverPairs):
        rows_s, rows_t, row_weight = a.rows_s, a.rows_t, a.row_weight
        self.total = self.count = a.pairs
        self.rows_s, self.rows_t, self.weight = rows_s, rows_t, row_weight
        self.kept: Tensor | None = None
        if row_weight is not None:
            kept = torch.nonzero(row_weight).squeeze(1)
            self.count = kept.shape[0]
            if self.count < self.total:
                self.kept, self.weight = kept, row_weight[kept]
                self.rows_s = kept if rows_s is None else rows_s[kept]
                self.rows_t = kept if rows_t is None else rows_t[kept]

    def gradient(self, h: Tensor, needed: bool) -> Tensor:
        """Where the gradient (T_s, D) is written; added, in the accumulation dtype, where a row may be named twice."""
        shape = (h.shape[0] if needed else 0, h.shape[1])
        if self.rows_s is None:
            return torch.empty(shape, dtype=kept_dtype(h.dtype))
        return torch.zeros(shape, dtype=accumulation_dtype(h.dtype))

    def add(self, dh: Tensor, dx: Tensor, start: int, stop: int) -> None:
        """Add the gradient rows (C, D) of pairs [start, stop)."""
        if self.rows_s is None:
            dh[start:stop] = dx
        else:
            dh.index_add_(0, self.rows_s[start:stop], dx)

    def reduce(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """(weighted sum, values of all pairs with 0 where left out)."""
        total = (values if self.weight is None else values * self.weight).sum()
        if self.kept is not None:
            values = values.new_zeros(self.total).index_copy_(0, self.kept, values)
        return total, values


def take(x: Tensor, rows: Tensor | None, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Rows [start, stop) of the selected rows of x, in `dtype`."""
    chunk = x[start:stop] if rows is None else x.index_select(0, rows[start:stop])
    return chunk.to(dtype)


class Head:
    """A head in vocabulary blocks, cast to the accumulation dtype one block at a time."""

    def __init__(self, weight: Tensor, bias: Tensor | None, block_v: int, temperature: float, softcap: float):
        vocab, width = weight.shape
        self.dtype = accumulation_dtype(weight.dtype)
        self.weight = weight
        self.temperature, self.softcap = temperature, softcap
        # Without soft-capping 1/τ goes into the states and the bias, which are small.
        self.input_scale = 1.0 if softcap else 1.0 / temperature
        self.bias = None if bias is None else bias.to(self.dtype) * self.input_scale
        self.ranges = [(v, min(v + block_v, vocab)) for v in range(0, vocab, block_v)]
        self.width = min(block_v, vocab)  # of the widest block
        cast = weight.dtype != self.dtype
        self._scratch = weight.new_empty((self.width, width), dtype=self.dtype) if cast else None

    def block(self, start: int, stop: int) -> Tensor:
        """Head rows [start, stop); valid until the next call."""
        block = self.weight[start:stop]
        return block if self._scratch is None else self._scratch[: stop - start].copy_(block)

    def states(self, x: Tensor) -> Tensor:
        """x ready for `logits`."""
        return x if self.input_scale == 1.0 else x * self.input_scale

    def logits(self, x: Tensor, start: int, stop: int) -> Tensor:
        """softcap(x @ headᵀ + bias) / temperature of one block, (C, v)."""
        z = cpu_nt(x, self.block(start, stop), None if self.bias is None else self.bias[start:stop])
        if self.softcap:
            z.mul_(1.0 / self.softcap).tanh_().mul_(self.softcap / self.temperature)
        return z


def block_softmax(z: Tensor, out: Tensor, masked: bool) -> tuple[Tensor, Tensor]:
    """Softmax of a block into `out` (C, v); returns the block's maximum and Σ exp(z - maximum), (C, 1). `out` may be z.

    Bias entries of -inf can make a block all -inf: it then holds zeros, its maximum is -inf, its sum 0. NaN stays NaN.
    """
    maximum = z.amax(1, keepdim=True)
    if masked:
        empty = maximum == -torch.inf
        torch.sub(z, maximum.masked_fill(empty, 0.0), out=out).exp_()
        total = out.sum(1, keepdim=True)
        out.div_(total.masked_fill(empty, 1.0))
        return maximum, total
    torch.softmax(z, 1, out=out)
    # The largest probability is 1 / Σ exp(z - max); one reduction over `out` instead of another exp over z.
    return maximum, out.amax(1, keepdim=True).reciprocal()


def whole_softmax(maxima: Tensor, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Maximum and Σ exp(z - maximum) of whole rows (C, 1), and what makes the blocks' softmaxes theirs (blocks, C, 1).

    Maximum and sum stay apart everywhere: their log-sum-exp in one number is rounded at the size of the logits, and
    exp(z - lse) then sums to 1 only up to that (1e-4 at 1,500, 1e-3 at 1e4).
    """
    top = maxima.amax(0)
    shares = sums * (maxima - top).exp()
    total = shares.sum(0)
    return top, total, shares / total


class PairLogits:
    """Logits of one chunk's row pairs, block by block: student rows above teacher rows in one (2C, v) tensor, so that a
    pass over both is one call. Holds a (2C, V) buffer when a gradient follows."""

    def __init__(self, student: Head, teacher: Head | None, rows: int, store: bool):
        self.student, self.shared = student, teacher is None
        self.teacher = student if teacher is None else teacher
        self.masked = student.bias is not None or self.teacher.bias is not None
        self.ranges = student.ranges
        self.store = store
        size = 2 * rows * (student.weight.shape[0] if store else student.width)
        self._buffer = torch.empty(size, dtype=student.dtype)
        self._scratch = torch.empty(2 * rows * student.width, dtype=student.dtype)

    def load(self, x_s: Tensor, x_t: Tensor) -> None:
        """Set the chunk: states (C, D) and (C, D_t)."""
        self.rows = x_s.shape[0]
        self._x_s, self._x_t = self.student.states(x_s), self.teacher.states(x_t)
        self._x_both = torch.cat([self._x_s, self._x_t]) if self.shared else None

    def compute(self, start: int, stop: int) -> Tensor:
        """Logits (2C, v) of one block."""
        if self._x_both is not None:
            return self.student.logits(self._x_both, start, stop)
        z_s, z_t = self.student.logits(self._x_s, start, stop), self.teacher.logits(self._x_t, start, stop)
        return torch.cat([z_s, z_t])

    def buffer(self, start: int, stop: int) -> Tensor:
        """The buffer of one block, contiguous (2C, v)."""
        offset = 2 * self.rows * start if self.store else 0
        return self._buffer[offset : offset + 2 * self.rows * (stop - start)].view(2 * self.rows, stop - start)

    def scratch(self, like: Tensor) -> Tensor:
        """A scratch block shaped like `like`."""
        return self._scratch[: like.numel()].view_as(like)

    def halves(self, both: Tensor) -> tuple[Tensor, Tensor]:
        """(student, teacher) rows."""
        return both[: self.rows], both[self.rows :]


def _forward_kl(pair: PairLogits) -> tuple[Tensor, Iterator[Tensor]]:
    """Row values of KL(p_t || p_s) and an iterator over the gradient blocks p_s - p_t."""
    statistics, dots = [], []
    for start, stop in pair.ranges:
        z, p = pair.compute(start, stop), pair.buffer(start, stop)
        statistics.append(block_softmax(z, p, pair.masked))
        (z_s, z_t), (_, p_t) = pair.halves(z), pair.halves(p)
        diff = torch.sub(z_t, z_s, out=pair.scratch(z_s))
        if pair.masked:
            diff.masked_fill_(p_t == 0, 0.0)
        dots.append(diff.mul_(p_t).sum(1, keepdim=True))
    top, total, scale = whole_softmax(*(torch.stack(part) for part in zip(*statistics)))
    (top_s, top_t), (log_s, log_t) = pair.halves(top), pair.halves(total.log())
    rows = (torch.stack(dots) * scale[:, pair.rows :]).sum(0) + (top_s - top_t) + (log_s - log_t)

    def gradients() -> Iterator[Tensor]:
        for k, (start, stop) in enumerate(pair.ranges):
            p_s, p_t = pair.halves(pair.buffer(start, stop).mul_(scale[k]))
            yield p_s.sub_(p_t)

    return rows.squeeze(1), gradients()


def _any_divergence(pair: PairLogits, divergence: str, beta: float) -> tuple[Tensor, Iterator[Tensor]]:
    """Row values of any divergence, with soft-capping, and an iterator over its gradient blocks.

    With r = log p_s - log p_t, u = log p_s - log m, v = log p_t - log m, m = β p_t + (1-β) p_s:
    forward Σ -p_t r, gradient p_s - p_t; reverse Σ p_s r =: K, gradient p_s (r - K);
    JSD β Σ p_t v + (1-β) U with U = Σ p_s u, gradient (1-β) p_s (u - U).
    """
    statistics = []
    for start, stop in pair.ranges:
        z = pair.compute(start, stop)
        statistics.append(block_softmax(z, pair.scratch(z), pair.masked))
        if pair.store:
            pair.buffer(start, stop).copy_(z)
    top, total, _ = whole_softmax(*(torch.stack(part) for part in zip(*statistics)))  # (2C, 1)
    norm_s, norm_t = pair.halves(total.reciprocal())
    offset = torch.sub(*pair.halves(total.log()))

    def block(start: int, stop: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """z_s, p_s and p_t times the rows' sums, and the log ratio r of one block."""
        z = pair.buffer(start, stop) if pair.store else pair.compute(start, stop)
        below = z - top
        ratio = torch.sub(*pair.halves(below)).sub_(offset)
        e_s, e_t = pair.halves(below.exp_())
        return pair.halves(z)[0], e_s, e_t, ratio

    def over_mixture(ratio: Tensor, other: float) -> Tensor:
        """log p - log((1 - other) p + other q), given ratio = log p - log q; exact near 0 and for any ratio."""
        share = torch.where(ratio < 0, 1.0 - other, other)
        return ratio.clamp(max=0.0).sub_(ratio.abs().neg_().expm1_().mul_(share).log1p_())

    def expectation(e: Tensor, value: Tensor, norm: Tensor) -> Tensor:
        product = e * value
        if pair.masked:
            product.masked_fill_(e == 0, 0.0)
        return product.sum(1, keepdim=True).mul_(norm)

    values = top.new_zeros(pair.rows, 1)
    mean = torch.zeros_like(values)
    for start, stop in pair.ranges:
        _, e_s, e_t, ratio = block(start, stop)
        if divergence == FORWARD:
            values -= expectation(e_t, ratio, norm_t)
        elif divergence == REVERSE:
            values += expectation(e_s, ratio, norm_s)
        else:
            mean += expectation(e_s, over_mixture(ratio, beta), norm_s)
            values += beta * expectation(e_t, over_mixture(-ratio, 1.0 - beta), norm_t)
    if divergence == REVERSE:
        mean = values
    elif divergence == JSD:
        values = values + (1.0 - beta) * mean

    def gradients() -> Iterator[Tensor]:
        for start, stop in pair.ranges:
            z_s, e_s, e_t, ratio = block(start, stop)
            if divergence == FORWARD:
                grad = e_s.mul_(norm_s).sub_(e_t.mul_(norm_t))
            else:
                if divergence == JSD:
                    ratio = over_mixture(ratio, beta)
                grad = (ratio - mean).mul_(e_s)
                if pair.masked:
                    grad.masked_fill_(e_s == 0, 0.0)
                grad.mul_(norm_s if divergence == REVERSE else (1.0 - beta) * norm_s)
            if pair.student.softcap:
                # z_s holds softcap(logit) / temperature, so this factor is 1 - tanh².
                grad.mul_(z_s.mul_(pair.student.temperature / pair.student.softcap).square_().neg_().add_(1.0))
            yield grad

    return values.squeeze(1), gradients()


def difference_cpu(a: Difference) -> Five:
    """(Σ weight · value, values (P,), dh (T_s, D), dw (V, D), db (V,)); gradients not asked for are empty tensors."""
    check_rows(a.rows_t, a.h_t.shape[0], "rows_t")
    chunks = Chunks(a, Head(a.w_s, a.bias_s, tiles.LINEAR_KL_CPU.block_v, a.temperature, a.softcap))
    student, dtype = chunks.head, chunks.dtype
    teacher = None if a.w_t is None else Head(a.w_t, a.bias_t, tiles.LINEAR_KL_CPU.block_v, a.temperature, a.softcap)
    pair = PairLogits(student, teacher, chunks.rows, a.any_gradient)
    plain = a.divergence == FORWARD and not a.softcap

    def rows(x_s: Tensor, start: int, stop: int) -> tuple[Tensor, Iterator[Tensor]]:
        pair.load(x_s, take(a.h_t, chunks.pairs.rows_t, start, stop, dtype))
        return _forward_kl(pair) if plain else _any_divergence(pair, a.divergence, a.beta)

    return chunks.run(rows, a.scale, a.scale / a.temperature)


class Chunks:
    """The rows of an op over a head, some at a time: their values, and the products of their logits' gradients.

    `sides`: logits of so many states a row are held. `name`: what `rows_s` is called by who calls the op."""

    def __init__(self, a: OverPairs, head: Head, sides: int = 2, name: str = "rows_s") -> None:
        self.a, self.head = a, head
        self.dtype = accumulation_dtype(a.h_s.dtype)
        check_rows(a.rows_s, a.h_s.shape[0], name)
        self.pairs = Pairs(a)
        sizes = tiles.LINEAR_KL_CPU
        self.rows = sizes.rows_for(self.pairs.count, a.w_s.shape[0], self.dtype.itemsize, sides)

    def run(
        self, rows: Callable[[Tensor, int, int], tuple[Tensor, Iterator[Tensor]]], scale: float, factor: float
    ) -> Five:
        """`rows(x (C, D), start, stop)` gives values (C,), times `scale` those of the op, and blocks (C, v) of the
        gradient by the logits, times `factor` those of the values."""
        a, pairs, dtype, head, chunk = self.a, self.pairs, self.dtype, self.head, self.rows
        h_s, w_s = a.h_s, a.w_s
        vocab, width = w_s.shape
        values = torch.empty(pairs.count, dtype=dtype)
        dh = pairs.gradient(h_s, a.need_dh)
        dw = torch.zeros((vocab if a.need_dw else 0, width), dtype=dtype)
        db = torch.zeros(vocab if a.need_db else 0, dtype=dtype)
        # The result is bf16 anyway, so p_s - p_t may be too: 0.24 % gradient error instead of 0.17 %, at any KL. The
        # logits must not: bf16 GEMMs of the CPU round what they return.
        in_bf16 = a.need_dh and h_s.dtype == torch.bfloat16 and has_fast_bf16()
        grad_bf16 = torch.empty((min(chunk, pairs.count), vocab) if in_bf16 else (0, 0), dtype=torch.bfloat16)
        for start in range(0, pairs.count, chunk):
            stop = min(start + chunk, pairs.count)
            x_s = take(h_s, pairs.rows_s, start, stop, dtype)
            chunk_values, gradients = rows(x_s, start, stop)
            values[start:stop] = chunk_values * scale
            if not a.any_gradient:
                continue
            # Everything that is one number per row goes onto the (C, D) side, never onto (C, V).
            row_scale = torch.full((stop - start, 1), factor, dtype=dtype)
            if pairs.weight is not None:
                row_scale = row_scale * pairs.weight[start:stop, None]
            x_scaled = x_s * row_scale if a.need_dw else x_s
            dx = torch.zeros_like(x_s)
            for (v0, v1), grad in zip(head.ranges, gradients, strict=True):
                if in_bf16:
                    grad_bf16[: stop - start, v0:v1] = grad
                elif a.need_dh:
                    dx += cpu_nt(grad, head.block(v0, v1).t())
                if a.need_dw:
                    dw[v0:v1] += cpu_tn(grad, x_scaled)
                if a.need_db:
                    db[v0:v1].addmv_(grad.t(), row_scale[:, 0])
            if a.need_dh:
                if in_bf16:
                    dx = torch.mm(grad_bf16[: stop - start], w_s).to(dtype)
                dx.mul_(row_scale)
                pairs.add(dh, dx, start, stop)
        return *pairs.reduce(values), dh.to(kept_dtype(h_s.dtype)), dw.to(kept_dtype(w_s.dtype)), db
