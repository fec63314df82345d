"""CPU kernel of `linear_ce`: `linear_kl_cpu`'s chunks and blocks with one row of logits in place of two."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import tiles
from .linear_kl_cpu import Chunks, Five, Head, block_softmax, whole_softmax
from .linear_kl_cpu import check_rows as check_targets

if TYPE_CHECKING:
    from .linear_ce import CrossEntropy


def cross_entropy_cpu(a: CrossEntropy) -> Five:
    """(Σ weight · value, values (N,), dh (T, D), dw (V, D), db (V,)); gradients not asked for are empty tensors."""
    vocab, eps = a.w_s.shape[0], a.smoothing
    check_targets(a.rows_t, vocab, "targets")
    chunks = Chunks(a, Head(a.w_s, a.bias_s, tiles.LINEAR_KL_CPU.block_v, 1.0, a.softcap), sides=1, name="rows")
    head, dtype, targets = chunks.head, chunks.dtype, chunks.pairs.rows_t
    assert targets is not None
    # Of a block its softmax, which needs but a factor later; with soft-capping, whose slope they give, the logits.
    kept = torch.empty(chunks.rows * (vocab if a.any_gradient else head.width), dtype=dtype)
    scratch = torch.empty(chunks.rows * head.width if a.softcap else 0, dtype=dtype)

    def rows(x: Tensor, start: int, stop: int) -> tuple[Tensor, Iterator[Tensor]]:
        y, states, n = targets[start:stop].long(), head.states(x), stop - start
        statistics, at_target, mean = [], x.new_zeros(n), x.new_zeros(n)

        def block(v0: int, v1: int) -> Tensor:
            offset = n * v0 if a.any_gradient else 0
            return kept[offset : offset + n * (v1 - v0)].view(n, v1 - v0)

        def of_targets(v0: int, v1: int) -> tuple[Tensor, Tensor]:
            """Rows whose target is in the block, and its column."""
            inside = ((y >= v0) & (y < v1)).nonzero().squeeze(1)
            return inside, y[inside] - v0

        for v0, v1 in head.ranges:
            z, own = head.logits(states, v0, v1), block(v0, v1)
            inside, column = of_targets(v0, v1)
            at_target[inside] = z[inside, column]
            if eps:
                mean += z.sum(1) / vocab
            softmax = scratch[: z.numel()].view_as(z) if a.softcap else own
            statistics.append(block_softmax(z, softmax, head.bias is not None))
            if a.softcap:
                own.copy_(z)
        top, total, scale = whole_softmax(*(torch.stack(part) for part in zip(*statistics)))  # (n, 1); blocks first
        values = (1.0 - eps) * (top[:, 0] - at_target) + total[:, 0].log()
        if eps:
            values += eps * (top[:, 0] - mean)

        def gradients() -> Iterator[Tensor]:
            for k, (v0, v1) in enumerate(head.ranges):
                own = block(v0, v1)
                if a.softcap:
                    grad = torch.sub(own, top, out=scratch[: own.numel()].view_as(own)).exp_().div_(total)
                else:
                    grad = own.mul_(scale[k])
                if eps:
                    grad.sub_(eps / vocab)
                inside, column = of_targets(v0, v1)
                grad[inside, column] -= 1.0 - eps
                if a.softcap:
                    grad.mul_(own.mul_(1.0 / a.softcap).square_().neg_().add_(1.0))
                yield grad

        return values, gradients()

    return chunks.run(rows, 1.0, 1.0)
