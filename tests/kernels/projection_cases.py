"""Problems for the tests of packed_projection."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from tests.kernels.hidden_cases import LENGTHS, cu

reference = importlib.import_module("mtllm_fast.kernels.packed_projection").reference
LEAVES = ("x", "weight", "bias", "hidden_weight", "hidden_bias", "norm_weight", "norm_bias", "prefix", "suffix")


def make(
    lengths: str = "edges",
    *,
    dtype: torch.dtype = torch.float32,
    width: int = 24,
    out: int = 40,
    norm: str | None = None,
    hidden: int = 0,
    padded: bool = True,
    boundaries: bool = False,
    mean: float = 0.5,
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """Keyword arguments of one call: padded states with rows, or packed states in order."""
    g = torch.Generator().manual_seed(seed)
    sizes = LENGTHS[lengths][0]

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=g) * scale).to(dtype)

    found: dict[str, Any] = {**options}
    if padded:
        longest = max(sizes)
        found["x"] = (torch.randn(len(sizes), longest, width, generator=g) + mean).to(dtype)
        found["rows"] = torch.cat([torch.arange(n) + b * longest for b, n in enumerate(sizes)])
    else:
        found["x"] = (torch.randn(sum(sizes), width, generator=g) + mean).to(dtype)
    inner = hidden or width
    found |= {"weight": normal(out, inner, scale=inner**-0.5), "bias": normal(out)}
    if hidden:
        found |= {"hidden_weight": normal(hidden, width, scale=width**-0.5), "hidden_bias": normal(hidden)}
    if norm:
        found |= {"norm": norm, "norm_weight": (torch.rand(width, generator=g) + 0.5).to(dtype)}
        if norm == "layer":
            found["norm_bias"] = normal(width)
    if boundaries:
        found |= {"cu_seqlens": cu(sizes), "prefix": normal(2, out), "suffix": normal(len(sizes), 1, out)}
    return found


def leaves(case: dict[str, Any], dtype: torch.dtype | None = None, device: str = "cpu") -> dict[str, Any]:
    """Fresh copies; every floating-point tensor requires a gradient."""
    found = {}
    for name, value in case.items():
        if isinstance(value, Tensor):
            value = value.detach().clone().to(device)
            if name in LEAVES:
                value = (value if dtype is None else value.to(dtype)).requires_grad_()
        found[name] = value
    return found


def run(
    function: Any, case: dict[str, Any], dtype: torch.dtype | None = None, device: str = "cpu"
) -> dict[str, Tensor]:
    """Result, and gradients of its product with fixed numbers."""
    arguments = leaves(case, dtype, device)
    y = function(**arguments)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y)
    (y * direction).sum().backward()
    found = {"y": y.detach()}
    return found | {f"d_{name}": arguments[name].grad for name in LEAVES if name in arguments}


def exact(case: dict[str, Any]) -> dict[str, Tensor]:
    """The same in fp64, without the cast at the end."""
    return run(reference, {k: v for k, v in case.items() if k != "dtype"}, torch.float64)
