"""CPU products: right for every number of rows, and the library behind them sees few different shapes."""

from __future__ import annotations

import pytest
import torch
from mtllm_fast.kernels import gemms

from tests.conftest import assert_matches


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 31, 32, 33, 500, 1025])
def test_products_of_any_number_of_rows(rows: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    a, w, bias, other = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((rows, 48), (80, 48), (80,), (rows, 80))
    )
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    got = gemms.cpu_nt(a.to(dtype), w.to(dtype), bias.to(dtype))
    assert_matches(got, a @ w.t() + bias, tolerance)
    assert_matches(gemms.cpu_nt(a.to(dtype), w.to(dtype)), a @ w.t(), tolerance)
    assert_matches(gemms.cpu_tn(a.to(dtype), other.to(dtype)), a.t() @ other, tolerance)
    # a view of every second row and a transposed one: what callers pass
    assert_matches(gemms.cpu_nt(a.to(dtype)[::2], w.to(dtype)), a[::2] @ w.t(), tolerance)
    assert_matches(gemms.cpu_tn(a.to(dtype), a.to(dtype)[:, 8:24]), a.t() @ a[:, 8:24], tolerance)


def test_few_shapes() -> None:
    """Every number of rows up to 8,192 becomes one of at most 100, and none grows by more than 1/16 (or 31 rows)."""
    sizes = {rows: gemms._padded(torch.empty(rows, 1)).shape[0] for rows in range(1, 8193)}
    assert len(set(sizes.values())) <= 100
    assert all(rows <= size <= max(rows * 17 / 16, rows + 31) for rows, size in sizes.items())
