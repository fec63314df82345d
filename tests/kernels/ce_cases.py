"""Problems of linear_ce, for its tests on the CPU, in the interpreter and on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from mtllm_fast.kernels.linear_ce import reference
from torch import Tensor


def make(dtype: torch.dtype = torch.float32, *, count: int = 23, width: int = 16, vocab: int = 301, **on: Any) -> dict:
    """Arguments of `linear_ce`; `on`: bias, rows, weights, ignored (flags), and options as they are."""
    g = torch.Generator().manual_seed(0)
    flags = {name: on.pop(name, False) for name in ("bias", "rows", "weights", "ignored")}
    made = {
        "h": torch.randn(count + 4 if flags["rows"] else count, width, generator=g).to(dtype),
        "w": (torch.randn(vocab, width, generator=g) * 2 / width**0.5).to(dtype),
        "targets": torch.randint(0, vocab, (count,), generator=g),
    }
    made["targets"][:3] = torch.tensor([0, vocab - 1, vocab // 2])  # the edges
    if flags["bias"]:
        made["bias"] = torch.randn(vocab, generator=g).to(dtype)
    if flags["rows"]:
        made["rows"] = torch.randint(0, count + 4, (count,), generator=g)
    if flags["weights"]:
        made["row_weight"] = torch.rand(count, generator=g)
        made["row_weight"][::4] = 0.0
    if flags["ignored"]:
        made["targets"][1::3] = -100
    return made | on


def run(function: Any, case: dict, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Sum, count, values and the gradients of half the sum by states, head and bias."""
    given = {
        name: x.detach().to(dtype or x.dtype).requires_grad_() if name in ("h", "w", "bias") else x
        for name, x in case.items()
    }
    total, count, values = function(**given, **({} if function is reference else {"per_row": True}))
    (total * 0.5).backward()
    found = {"total": total, "count": count, "values": values, "dh": given["h"].grad, "dw": given["w"].grad}
    if "bias" in given:
        found["db"] = given["bias"].grad
    return {name: x.detach() for name, x in found.items()}


def exact(case: dict) -> dict[str, Tensor]:
    """The reference in fp64 on the same numbers."""
    return run(reference, case, torch.float64)
