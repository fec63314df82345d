"""The comparison that carries its own negative controls, and what else the tests of all ops share; problems of linear_kl."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from mtllm_fast.kernels.linear_kl import reference
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

# Relative L2 error against fp64, by input dtype. bf16 and fp16 results are themselves rounded (0.17 %, 0.02 %).
LIMITS = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}


def error(actual: Tensor, exact: Tensor) -> float:
    """||actual - exact|| / ||exact|| in fp64."""
    return float((actual.detach().double().cpu() - exact).norm() / exact.norm())


def check(actual: Tensor, exact: Tensor, limit: float) -> None:
    """`actual` is within `limit` of fp64 `exact`; zeros and `exact` with one block scaled by 1.05 are not."""
    assert actual.shape == exact.shape
    exact = exact.detach().double().cpu()
    assert exact.norm() > 0, "nothing to compare"
    assert error(torch.zeros_like(exact), exact) > limit
    wrong = exact.clone().flatten()
    peak, width = int(wrong.abs().argmax()), max(1, wrong.numel() // 8)
    start = max(0, min(peak - width // 2, wrong.numel() - width))
    wrong[start : start + width] *= 1.05
    assert error(wrong.view_as(exact), exact) > limit
    assert error(actual, exact) <= limit
    rms = float(actual.detach().double().cpu().norm() / exact.norm())
    assert abs(rms - 1) <= limit


def largest_error(actual: Tensor, exact: Tensor, floor: float = 1e-3) -> float:
    """Largest difference over the largest element, at least `floor`; 0 where there is nothing."""
    if not exact.numel():
        return 0.0
    return float((actual.detach().cpu() - exact).abs().max() / exact.abs().max().clamp(min=floor))


@contextmanager
def nan_in_empty() -> Iterator[None]:
    """Inside the block torch.empty is filled with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def same_bits(make: Callable[[], dict[str, Tensor]]) -> None:
    """What `make` gives is finite and the same bit for bit, whatever torch.empty holds."""
    first = make()
    with nan_in_empty():
        second = make()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        assert value.isfinite().all(), name


def same_as_fake(op: Any, arguments: tuple[Any, ...], kernel: str = "") -> None:
    """Shapes and dtypes of the results, or of those of the kernel of that device type, are those of the op's fake."""
    got = (op._backend_fns[kernel] if kernel else op)(*arguments)
    with FakeTensorMode() as mode:
        said = op(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments))
    got, said = ((x,) if isinstance(x, Tensor) else x for x in (got, said))
    assert [(x.shape, x.dtype) for x in got] == [(x.shape, x.dtype) for x in said]


@pytest.fixture
def exact_fp32_gemms() -> Iterator[None]:
    """No TF32 on a GPU."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@dataclass
class Case:
    """Inputs of one call; `options` are keyword arguments of `linear_kl` and `reference` alike."""

    h_s: Tensor
    w_s: Tensor
    h_t: Tensor
    w_t: Tensor | None
    options: dict[str, Any] = field(default_factory=dict)

    def arguments(self, dtype: torch.dtype | None = None, device: str = "cpu") -> tuple[list[Any], dict[str, Any]]:
        """Fresh leaves; student states, head and bias require gradients."""

        def moved(x: Any, grad: bool) -> Any:
            if not isinstance(x, Tensor):
                return x
            y = x.detach().clone().to(device)
            if y.dtype.is_floating_point:
                y = (y if dtype is None else y.to(dtype)).requires_grad_(grad)
            return y

        tensors = [moved(self.h_s, True), moved(self.w_s, True), moved(self.h_t, False), moved(self.w_t, False)]
        return tensors, {key: moved(value, key == "bias_s") for key, value in self.options.items()}

    def run(
        self, function: Any, dtype: torch.dtype | None = None, device: str = "cpu", **extra: Any
    ) -> dict[str, Tensor]:
        """Value and gradients of 0.5 * sum."""
        tensors, options = self.arguments(dtype, device)
        total, count, *rest = function(*tensors, **options, **extra)
        (total * 0.5).backward()
        out = {"total": total, "count": count, "dh": tensors[0].grad, "dw": tensors[1].grad}
        if rest:
            out["values"] = rest[0]
        if "bias_s" in options:
            out["db"] = options["bias_s"].grad
        return {key: value.detach() for key, value in out.items()}

    def exact(self) -> dict[str, Tensor]:
        """The fp64 reference on the same numbers."""
        return self.run(reference, torch.float64)


def make_case(
    dtype: torch.dtype = torch.float32,
    *,
    pairs: int = 21,
    width: int = 24,
    vocab: int = 333,
    separate: bool = False,
    bias: bool = False,
    rows: bool = False,
    weights: bool = False,
    noise: float = 0.7,
    seed: int = 0,
    **options: Any,
) -> Case:
    """A student `noise` away from its teacher. `separate` heads have different widths; `rows` index larger batches."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    teacher_width = width // 2 + 3 if separate else width
    student_rows, teacher_rows = (pairs + 6, pairs + 3) if rows else (pairs, pairs)
    h_t = normal(teacher_rows, teacher_width)
    if separate or rows:
        h_s = normal(student_rows, width)
    else:
        h_s = h_t + noise * normal(student_rows, width)
    w_s = normal(vocab, width) * 2 / width**0.5
    w_t = normal(vocab, teacher_width) * 2 / teacher_width**0.5 if separate else None
    if bias:
        options["bias_s"] = normal(vocab).to(dtype)
        if separate:
            options["bias_t"] = normal(vocab).to(dtype)
    if rows:
        options["rows_s"] = torch.randint(0, student_rows, (pairs,), generator=g)
        options["rows_t"] = torch.randint(0, teacher_rows, (pairs,), generator=g)
    if weights:
        weight = torch.rand(pairs, generator=g)
        weight[::3] = 0.0
        options["row_weight"] = weight
    tensors = [x if x is None else x.to(dtype) for x in (h_s, w_s, h_t, w_t)]
    return Case(*tensors, options)


def with_gone(gone: Tensor, **options: Any) -> tuple[Case, Case]:
    """A problem whose bias is -inf at the entries `gone` (V,), and the same over the others alone."""
    case, kept = (make_case(vocab=len(gone), bias=True, **options) for _ in range(2))
    case.options["bias_s"][gone] = -torch.inf
    kept.w_s, kept.options["bias_s"] = kept.w_s[~gone], kept.options["bias_s"][~gone]
    return case, kept


def large_case(
    kind: str, dtype: torch.dtype = torch.float32, *, pairs: int = 40, vocab: int = 64, **options: Any
) -> Case:
    """Logits in the hundreds and thousands that are exact in fp32: the head is the identity.

    "ties" N(0, 300) with a dozen entries around 1,500 that decide; "signs" ±1e4; "below" all around -1e4; "low" a
    temperature of 1/50 and logits of about 30; "near" as "ties" with a teacher that is almost the student.
    """
    g = torch.Generator().manual_seed(4)
    z_s, z_t = (300.0 * torch.randn(pairs, vocab, generator=g) for _ in range(2))
    if kind == "signs":
        z_s, z_t = z_s.sign() * 1e4, z_t.sign() * 1e4
    elif kind == "below":
        z_s, z_t = -1e4 + z_s / 300, -1e4 + z_t / 300
    else:
        for z in (z_s, z_t):
            z[:, 20:32] = 1500.0 + torch.randn(pairs, 12, generator=g)
    if kind == "low":
        z_s, z_t, options = z_s / 50, z_t / 50, {"temperature": 0.02, **options}
    if kind == "near":
        z_t = z_s + 0.05 * torch.randn(pairs, vocab, generator=g)
    return Case(z_s.to(dtype), torch.eye(vocab).to(dtype), z_t.to(dtype), None, options)
