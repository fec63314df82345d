"""The kernel that rounds rows to fp8, on CPU tensors in the interpreter.

`test_triton_interpreter.py` runs this file in a process of its own. The interpreter's conversion to e4m3 loses the carry
of a mantissa that rounds up, and NaN: only numbers that e4m3 has are compared bit for bit. That the compiled kernel
rounds to nearest and saturates is in `test_aot_hidden.py`.
"""

from __future__ import annotations

import pytest
import torch
from mtllm_fast.kernels.fp8_linear import (
    _quantise_rows,
    dequantised_rows,
    fp8_product,
    quantise_rows,
    reference_rows,
    row_scales,
)
from mtllm_fast.kernels.fp8_linear_triton import quantise_rows_triton

from tests.kernels.linear_kl_cases import same_as_fake

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def rows(dtype):
    x = torch.randn(12, 80, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 3, 12)[:, None]
    x[3], x[4, 7] = 0.0, 5e4
    return x.to(dtype)


@pytest.mark.parametrize("block", [None, 16, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows(block, dtype) -> None:
    x = dequantised_rows(*reference_rows(rows(dtype))).to(dtype)  # a second rounding changes nothing
    q, scale = quantise_rows_triton(x, block)
    right, own = quantise_rows(x)
    assert torch.equal(scale, own)
    assert torch.equal(q, right)
    assert not torch.equal(quantise_rows_triton(2 * x, block)[1], own)  # control
    for strided in (x.t().contiguous().t(), torch.cat([x, x], 1)[:, :80]):
        got = quantise_rows_triton(strided, block)
        assert torch.equal(got[0], right) and torch.equal(got[1], own)


@pytest.mark.parametrize("block", [None, 32])
def test_scales_of_any_numbers(block) -> None:
    x = rows(torch.float32)
    x[5] *= 1e-38
    x[6] = 3e38
    x[7, 79] = torch.inf
    _, scale = quantise_rows_triton(x, block)
    assert torch.equal(scale, row_scales(x))
    assert scale[7].isinf() and scale[5] == 2.0**-126


def test_no_rows_and_other_dtypes() -> None:
    assert quantise_rows_triton(torch.randn(0, 32))[0].shape == (0, 32)
    with pytest.raises(TypeError, match=r"x is torch\.float64"):
        quantise_rows_triton(torch.randn(2, 32).double())


def test_cuda_kernels_return_what_their_fakes_say(monkeypatch) -> None:
    from contextlib import nullcontext

    monkeypatch.setattr(torch.cuda, "device", nullcontext)  # the interpreter has none to go to
    x, (w, scale) = rows(torch.bfloat16), quantise_rows(torch.randn(16, 80))
    same_as_fake(_quantise_rows.op, (x,), "cuda")
    arguments = (*quantise_rows(x), w, scale, True)
    try:
        got = fp8_product.op._backend_fns["cuda"](*arguments).float()
    except RuntimeError as error:
        pytest.skip(f"torch {torch.__version__} has no product of rows in fp8 on the CPU: {error}")
    same_as_fake(fp8_product.op, arguments, "cuda")
    own = fp8_product.op(*arguments).float()
    assert float((got - own).norm() / own.norm()) < 2.0**-8
