"""Packs and problems for the tests of hidden_mse, distillation_loss and packed_projection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from mtllm_fast.kernels.hidden_mse import reference_paired, reference_pooled
from torch import Tensor

from tests.kernels.linear_kl_cases import LIMITS, check

# Empty, single, around a power of two, one dominant, many tiny.
LENGTHS: dict[str, tuple[list[int], list[int]]] = {
    "edges": ([0, 1, 63, 64, 65, 2, 0], [3, 1, 65, 60, 70, 0, 0]),
    "dominant": ([700, 1, 2, 3], [650, 2, 1, 3]),
    "tiny": ([1, 2, 3, 1] * 8, [2, 1, 1, 4] * 8),
    "one": ([5], [9]),
}


def cu(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def states(
    lengths: str | tuple[list[int], list[int]],
    width: int = 24,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    tail: int = 3,
):
    """(student, teacher, cu_s, cu_t): states with a mean, `tail` student rows behind the last sequence."""
    g = torch.Generator().manual_seed(seed)
    own, other = LENGTHS[lengths] if isinstance(lengths, str) else lengths
    student = torch.randn(sum(own) + tail, width, generator=g) + 0.3
    teacher = torch.randn(sum(other), width, generator=g) - 0.2
    return student.to(dtype), teacher.to(dtype), cu(own), cu(other)


def pairs(student: Tensor, teacher: Tensor, count: int, seed: int = 2, zeros: bool = True):
    """(rows_s, rows_t, weight) with rows named twice and weights of 0."""
    g = torch.Generator().manual_seed(seed)
    rows_s = torch.randint(0, student.shape[0], (count,), generator=g)
    rows_t = torch.randint(0, teacher.shape[0], (count,), generator=g)
    rows_s[count // 2 :] = rows_s[: count - count // 2].clone()
    weight = torch.rand(count, generator=g) + 0.1
    weight[::3] = 0.0 if zeros else 1.0
    return rows_s, rows_t, weight


def exact_pooled(student: Tensor, teacher: Tensor, *bounds: Tensor, **options: Any) -> dict[str, Tensor]:
    """Sum and gradient in fp64."""
    x = student.detach().double().requires_grad_()
    wide = {k: v.detach().double() if isinstance(v, Tensor) else v for k, v in options.items()}
    # where every segment is empty the reference has no path to x
    total = reference_pooled(x, teacher.double(), *bounds, **wide) + 0.0 * x.sum()
    total.backward()
    return {"total": total.detach(), "dx": x.grad}


def exact_paired(student: Tensor, teacher: Tensor, rows_s: Tensor, rows_t: Tensor, weight: Tensor | None):
    """Sum and gradient in fp64."""
    x = student.detach().double().requires_grad_()
    total = reference_paired(x, teacher.double(), rows_s, rows_t, None if weight is None else weight.double())
    total.backward()
    return {"total": total.detach(), "dx": x.grad}


def run_loss(
    function: Callable[..., Any], student: Tensor, *arguments: Any, device: str = "cpu", **options: Any
) -> dict[str, Tensor]:
    """Sum, count and gradient of `pooled_mse` or `paired_mse`."""

    def moved(value: Any) -> Any:
        return value.detach().to(device).clone() if isinstance(value, Tensor) else value

    x = moved(student).requires_grad_()
    total, count = function(x, *map(moved, arguments), **{name: moved(value) for name, value in options.items()})
    total.backward()
    return {"total": total.detach(), "dx": x.grad, "count": count}


def check_all(got: dict[str, Tensor], exact: dict[str, Tensor], dtype: torch.dtype, wider: float = 1.0) -> None:
    """Every entry of `exact` against `got`, each by itself, each with its negative controls."""
    for name, value in exact.items():
        check(got[name], value, LIMITS[dtype] * wider)


def random_lengths(seed: int, largest: int = 9, most: int = 6) -> tuple[list[int], list[int]]:
    """Two lists of as many lengths, empty ones too."""
    g = torch.Generator().manual_seed(seed)
    count = int(torch.randint(1, most + 1, (1,), generator=g))
    return tuple(torch.randint(0, largest + 1, (count,), generator=g).tolist() for _ in range(2))  # type: ignore
