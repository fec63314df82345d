"""Cross-entropy over the LM head with hard labels: ours against unfused, torch's own, Liger, quack, cut-cross-entropy.

    python -m benchmarks.cases.linear_ce --device cpu

Published figures of fused heads are of this loss, so the others also say whether the numbers of `linear_kl` on the same
machine are to be believed. With a frozen head every variant needs two products (logits and the states' gradient; those
that recompute logits three).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from mtllm_fast.kernels import linear_ce
from mtllm_fast.kernels.tiles import LINEAR_KL_CPU
from torch import Tensor

from ..registry import Case, Variant, Work, register
from ..run import main
from .linear_kl import parse, sized
from .linear_kl_variants import make_problem

ROWS = 512  # of the gate, and of fp64 logits


@dataclass
class Problem:
    """Mean cross entropy of (T,) labels under a head; the head is frozen unless it requires a gradient."""

    h: Tensor  # (T, D)
    w: Tensor  # (V, D)
    labels: Tensor  # (T,)
    backward: bool = True


def make(rows: int, width: int, vocab: int, *, dtype: torch.dtype, device: str, **options: Any) -> Problem:
    """Random states; labels are a teacher's most probable entry, so that the loss is not the logarithm of V."""
    p = make_problem(rows, width, vocab, dtype, device, **options)
    with torch.no_grad():
        labels = torch.cat([(p.h_t[i : i + ROWS] @ p.w.t()).argmax(-1) for i in range(0, rows, ROWS)])
    return Problem(p.h_s, p.w, labels)


def step(loss: Callable[[Tensor, Tensor, Tensor], Tensor], p: Problem) -> dict[str, Tensor]:
    """Loss and gradients of one step, gradients fresh."""
    p.h.grad = p.w.grad = None
    value = loss(p.h, p.w, p.labels)
    if p.backward:
        value.backward()
    found = {"loss": value.detach(), "gradient": p.h.grad, "head_gradient": p.w.grad}
    return {name: x for name, x in found.items() if x is not None}


def ours(h: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    total, count = linear_ce(h, w, labels)
    return total / count


def unfused(h: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    """F.linear, then cross_entropy in fp32."""
    return F.cross_entropy(F.linear(h, w).float(), labels)


def torch_fused(h: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    """torch's own, from 2.13 on."""
    return F.linear_cross_entropy(h, w, labels)


def liger(h: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(w, h, labels)


def quack(h: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(h, w, labels, reduction="mean")


def cut_cross_entropy(h: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    """Apple's, with its default filter of small gradients."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(h, w, labels)


@torch.no_grad()
def gemms(p: Problem) -> None:
    """The two products alone, whole, in the operands' dtype."""
    torch.mm(torch.mm(p.h, p.w.t()), p.w)


def small(p: Problem) -> Problem:
    """Fewer rows, whose logits fp64 can afford on a CPU."""
    rows = p.h.shape[0] if p.w.is_cuda else min(p.h.shape[0], LINEAR_KL_CPU.chunk_rows)
    head = p.w.detach().clone().requires_grad_(p.w.requires_grad)
    return Problem(p.h.detach()[:rows].clone().requires_grad_(), head, p.labels[:rows])


def exact(p: Problem) -> dict[str, Tensor]:
    """Loss and gradients in fp64."""
    w = p.w.detach().double().requires_grad_(p.w.requires_grad)
    h = p.h.detach().double().requires_grad_()
    loss = torch.zeros((), dtype=torch.float64, device=h.device)
    for start in range(0, h.shape[0], ROWS):
        rows = slice(start, start + ROWS)
        part = F.cross_entropy(F.linear(h[rows], w), p.labels[rows], reduction="sum") / h.shape[0]
        part.backward()
        loss += part.detach()
    found = {"loss": loss, "gradient": h.grad, "head_gradient": w.grad}
    return {name: x for name, x in found.items() if x is not None}


def work(p: Problem) -> Work:
    """Two products (three with a trained head); states, head and gradients once."""
    (rows, width), vocab, trained = p.h.shape, p.w.shape[0], p.w.requires_grad
    values = 2 * rows * width + vocab * width * (1 + trained)
    return Work(values * p.w.element_size(), 2.0 * (2 + trained) * rows * width * vocab)


def _variant(loss: Callable[[Tensor, Tensor, Tensor], Tensor], *needs: str, **options: Any) -> Variant:
    return Variant(partial(step, loss), needs=needs, **options)


register(
    Case(
        name="linear_ce",
        about="cross-entropy over the LM head with hard labels, forward + backward",
        make=make,
        sizes={
            "quick": (sized(256, 256, 4000),),
            "cpu": (sized(1024, 512, 32000),),
            "cuda": (
                sized(8192, 4096, 128256),
                sized(4096, 4096, 128256),
                sized(8192, 4096, 151936),
                sized(4096, 4096, 128256, "trained head", train_head=True),
            ),
        },
        variants={
            "ours": _variant(ours, ours=True),
            "unfused": _variant(unfused),
            "torch": _variant(torch_fused, "torch.nn.functional:linear_cross_entropy"),
            "liger": _variant(liger, "liger_kernel", devices=("cuda",)),
            "quack": _variant(quack, "quack.linear_cross_entropy:chunked_linear_cross_entropy", devices=("cuda",)),
            "cut-cross-entropy": _variant(cut_cross_entropy, "cut_cross_entropy", devices=("cuda",)),
            "gemms": Variant(gemms, gated=False),
        },
        reference=exact,
        tolerance={"fp32": 1e-4, "bf16": 5e-2, "fp16": 2e-2},
        shape=lambda p: {"T": p.h.shape[0], "D": p.w.shape[1], "V": p.w.shape[0]},
        warm={"rows": 32, "width": 64, "vocab": 512},
        work=work,
        small=small,
        parse=parse,
        sources=("kernels/*.py",),
    )
)


if __name__ == "__main__":
    sys.exit(main(cases=("linear_ce",), prog="benchmarks.cases.linear_ce"))
