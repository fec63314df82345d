"""One frozen linear layer with LoRA, forward + backward: peft's layer against the models' one op (`models.lora`).

python -m benchmarks.cases.lora
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtllm_fast.models.lora import LoraLinear, fuse_lora

from ..registry import Case, Variant, Work, register
from ..run import main
from .packed_path import fresh_compile

SCALE = 2.0


class SharedLora(torch.autograd.Function):
    """y = x wᵀ, plus scale · (x aᵀ) bᵀ on the first `split` rows, which alone are differentiated.

    The base product and the adapter's share one output, so that y is written once and added to in place; nothing but
    x and x aᵀ is kept for backward.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, a: Tensor, b: Tensor, scale: float, split: int) -> Tensor:
        flat = x.view(-1, x.shape[-1])
        y = flat @ w.t()
        low = flat[:split] @ a.t()
        y[:split].addmm_(low, b.t(), alpha=scale)
        ctx.save_for_backward(flat[:split], low, w, a, b)
        ctx.scale, ctx.shape = scale, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, low, w, a, b = ctx.saved_tensors
        dy = dy.reshape(-1, dy.shape[-1])[: x.shape[0]]
        d_low = ctx.scale * (dy @ b)
        dx = x.new_zeros(ctx.shape)
        rows = dx.view(-1, x.shape[1])[: x.shape[0]]
        torch.mm(dy, w, out=rows)
        rows.addmm_(d_low, a)
        return dx, None, d_low.t() @ x, ctx.scale * (dy.t() @ low), None, None


@dataclass
class Problem:
    """Rows, a frozen weight, an adapter of rank r, the gradient that comes in."""

    x: Tensor  # (T, K)
    w: Tensor  # (N, K)
    a: Tensor  # (r, K)
    b: Tensor  # (N, r)
    direction: Tensor  # (T, N)
    layer: Any  # peft's, over the same base weight; its adapter is in fp32, as training has it
    backward: bool = True


def make(
    rows: int = 2048, width: int = 512, out: int = 512, rank: int = 16, *, dtype: torch.dtype, device: str
) -> Problem:
    """Random operands; the layer is peft's own, without dropout."""
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    torch.manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, device=device) * scale).to(dtype)

    p = Problem(
        normal(rows, width),
        normal(out, width, scale=width**-0.5),
        normal(rank, width, scale=width**-0.5),
        normal(out, rank, scale=0.1),
        normal(rows, out),
        None,
    )
    base = nn.Linear(width, out, bias=False, device=device, dtype=dtype).requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=int(SCALE * rank), lora_dropout=0.0)
    layer = Linear(base, "student", config=config, r=rank, lora_alpha=int(SCALE * rank)).to(device)
    with torch.no_grad():
        base.weight.copy_(p.w)
        layer.lora_A["student"].weight.copy_(p.a)
        layer.lora_B["student"].weight.copy_(p.b)
    fuse_lora([layer])
    p.layer = layer
    return p


@contextmanager
def pefts_layers() -> Iterator[None]:
    """Inside the block every LoRA layer of a model runs peft's own forward."""
    with patch.object(LoraLinear, "_plain_adapter", lambda *_: None):
        yield


def by_peft(p: Problem) -> dict[str, Any]:
    with pefts_layers():
        return by_layer(p)


def by_layer(p: Problem) -> dict[str, Any]:
    x = p.x.detach().requires_grad_()
    a, b = (part["student"].weight for part in (p.layer.lora_A, p.layer.lora_B))
    a.grad = b.grad = None
    with torch.autocast(x.device.type, x.dtype, enabled=x.dtype in (torch.bfloat16, torch.float16)):
        y = p.layer(x)
    if p.backward:
        y.backward(p.direction)
    return {"y": y.detach(), "x": x.grad, "a": a.grad, "b": b.grad}


def _formula(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, w) + SCALE * F.linear(F.linear(x, a), b)


def _plain(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, w)


def by(formula: Any, p: Problem) -> dict[str, Any]:
    x, a, b = (t.detach().requires_grad_() for t in (p.x, p.a, p.b))
    y = formula(x, p.w, a, b)
    if p.backward:
        y.backward(p.direction)
    return {"y": y.detach(), "x": x.grad, "a": a.grad, "b": b.grad}


def exact(p: Problem) -> dict[str, Tensor]:
    return by(_formula, Problem(*(t.double() for t in (p.x, p.w, p.a, p.b, p.direction)), None))


def work(p: Problem) -> Work:
    """Base product forward and for dx, the adapter's three pairs of thin products; x, y, dy, dx and w once."""
    (rows, width), out, rank = p.x.shape, p.w.shape[0], p.a.shape[0]
    flops = 2.0 * rows * (2 * width * out + 3 * rank * (width + out))
    return Work((2 * p.x.numel() + 2 * p.direction.numel() + 2 * p.w.numel()) * p.x.element_size(), flops)


register(
    Case(
        name="lora",
        about="one frozen linear layer with LoRA r=16, forward + backward",
        make=make,
        sizes={
            "quick": ({"label": "512x256x256", "rows": 512, "width": 256, "out": 256},),
            "cpu": (
                {"label": "2048x512x512", "rows": 2048, "width": 512, "out": 512},
                {"label": "2048x512x1376", "rows": 2048, "width": 512, "out": 1376},
            ),
            "cuda": (
                {"label": "8192x4096x4096", "rows": 8192, "width": 4096, "out": 4096},
                {"label": "8192x4096x14336", "rows": 8192, "width": 4096, "out": 14336},
            ),
        },
        variants={
            "peft": Variant(by_peft),
            "one op": Variant(by_layer, ours=True),
            "compile": Variant(
                partial(by, torch.compile(_formula, dynamic=False)),
                needs=("compiler",),
                prepare=fresh_compile,
                quick=False,
            ),
            "without adapter": Variant(partial(by, _plain), gated=False),
        },
        reference=exact,
        tolerance={"fp32": 1e-5, "bf16": 2e-2, "fp16": 5e-3},
        shape=lambda p: {"T": p.x.shape[0], "K": p.w.shape[1], "N": p.w.shape[0], "r": p.a.shape[0]},
        warm={"rows": 4, "width": 8, "out": 8, "rank": 2},
        work=work,
        sources=("benchmarks/cases/lora.py",),
    )
)


if __name__ == "__main__":
    sys.exit(main(cases=("lora",), prog="benchmarks.cases.lora"))
