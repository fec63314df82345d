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


def test_a_private_op_that_changed_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """oneDNN's op is asked once for a small product: gone, with other arguments or with other results it is left alone."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    a, w = (torch.randn(40, 48, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))

    class Gone:
        pass

    class Ops:
        def __init__(self, product) -> None:
            self._linear_pointwise = product

    def right(x, w, bias, attribute, scalars, algorithm):
        return torch.nn.functional.linear(x, w, bias)

    def no_bias(x, w, bias, attribute, scalars, algorithm):
        return x @ w.t()

    def half_precision(x, w, bias, attribute, scalars, algorithm):
        return torch.nn.functional.linear(x.half(), w.half(), None if bias is None else bias.half()).float()

    def refuses(*arguments):
        raise RuntimeError("mkldnn::_linear_pointwise() is missing value for argument 'algorithm'")

    for op, usable in (
        (Ops(right), True),
        (Gone(), False),
        (Ops(lambda x, w: x @ w.t()), False),
        (Ops(no_bias), False),
        (Ops(half_precision), False),
        (Ops(refuses), False),
    ):
        monkeypatch.setattr(torch.ops, "mkldnn", op)
        gemms.has_onednn_fp32.cache_clear()
        caplog.clear()
        try:
            assert gemms.has_onednn_fp32() is usable
            assert (torch.__version__ in caplog.text) is not usable
            caplog.clear()
            assert_matches(gemms.cpu_nt(a, w), a.double() @ w.double().t(), 1e-5)
            assert_matches(gemms.cpu_tn(a, a), a.double().t() @ a.double(), 1e-5)
            assert not caplog.records  # asked and said once
        finally:
            gemms.has_onednn_fp32.cache_clear()


def test_the_op_of_this_torch_answers() -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch without oneDNN")
    assert gemms.onednn_agrees()
