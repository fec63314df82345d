"""What every attention backend is compared on: the length grid, the features, and the comparison itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtllm_fast.data.pack import PackedBatch
from mtllm_fast.models.attention import AttentionPlan, Call, reference
from tests.conftest import assert_matches, relative_error

LENGTHS = {
    "edges": (0, 1, 63, 64, 65, 2, 0),
    "dominant": (1, 5, 300, 0, 3, 7),
    "many tiny": (1, 2, 3, 1, 4, 2, 1, 5, 3, 2, 2, 1, 6, 1, 3) * 4,
    "equal": (16, 16, 16, 16),
}


class Features(NamedTuple):
    causal: bool = False
    window: int | None = None
    softcap: float | None = None
    heads: tuple[int, int] = (4, 4)
    width: int = 16


FEATURES = {
    "plain": Features(),
    "causal": Features(causal=True),
    "window": Features(window=20),
    "causal window": Features(causal=True, window=20),
    "window 1": Features(window=1),
    "causal window 1": Features(causal=True, window=1),
    "soft-cap": Features(softcap=2.0),
    "causal window soft-cap": Features(causal=True, window=30, softcap=2.0, heads=(6, 2)),
    "grouped": Features(heads=(6, 2)),
    "causal grouped": Features(causal=True, heads=(4, 1), width=64),
    "wide": Features(width=128),
    "odd width": Features(width=24),
}


def call(**changes: Any) -> Call:
    """A call on the CPU."""
    plain = {"device": torch.device("cpu"), "dtype": torch.float32, "heads": 4, "kv_heads": 4, "causal": True}
    return Call(**{**plain, "head_dim": 64, "value_dim": 64, "scale": 0.125, **changes})


def packed(lengths: tuple[int, ...], device: str = "cpu") -> PackedBatch:
    return PackedBatch.from_sequences([[1] * n for n in lengths]).to(device)


def inputs(batch: PackedBatch, features: Features, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """float64 q, k, v and a random weight for the outputs; scores large enough for a soft-cap to matter."""
    generator = torch.Generator().manual_seed(seed)
    heads, kv_heads = features.heads
    q, k, v, probe = (
        torch.randn(batch.num_tokens, h, features.width, generator=generator, dtype=torch.float64)
        for h in (heads, kv_heads, kv_heads, heads)
    )
    return [x.to(batch.device) for x in (2 * q, k, v)], probe.to(batch.device)


def outputs(function: Callable[..., Tensor], tensors: list[Tensor], probe: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients of q, k, v of `function(q, k, v)` in `dtype`."""
    leaves = [x.to(dtype).requires_grad_() for x in tensors]
    out = function(*leaves)
    return [out, *torch.autograd.grad((out * probe.to(dtype)).sum(), leaves)]


def check(
    attend: Callable[..., Tensor],
    batch: PackedBatch,
    features: Features,
    dtype: torch.dtype = torch.float32,
    gradients: bool = True,
    slack: float = 1e-6,
) -> None:
    """`attend(q, k, v, plan, **options)` is about as close to the float64 reference as plain torch is in `dtype`."""
    tensors, probe = inputs(batch, features)
    tensors = [x.to(dtype).double() for x in tensors]
    options = {"scale": features.width**-0.5, "window": features.window, "softcap": features.softcap}

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference(q, k, v, batch.lengths, causal=features.causal, **options)

    def mine(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, AttentionPlan(batch, features.causal), **options)

    truth = outputs(plain, tensors, probe, torch.float64)
    eager = outputs(plain, tensors, probe, dtype)
    if gradients:
        actual = outputs(mine, tensors, probe, dtype)
    else:
        with torch.no_grad():
            actual = [mine(*(x.to(dtype) for x in tensors))]
    for name, mine_, plain_, expected in zip(("out", "dq", "dk", "dv"), actual, eager, truth):
        assert mine_.dtype == dtype, name
        expected = expected.detach()
        if float(expected.abs().max()) < 1e-12:  # rows that see only themselves have no gradient of q and k
            # in float64 it is zero; what plain torch leaves in `dtype` is rounding
            scale = float(probe.abs().max() * max(x.abs().max() for x in tensors) ** 2)
            assert float(mine_.detach().abs().max()) <= 8 * torch.finfo(dtype).eps * scale, name
            continue
        allowed = 3 * relative_error(plain_, expected) + slack
        assert_matches(mine_.double(), expected, allowed)
