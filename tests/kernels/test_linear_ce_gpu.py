"""linear_ce on a GPU against fp64, and against its own CPU path; a chunk that ends within the rows."""

from __future__ import annotations

import pytest
import torch
from mtllm_fast.kernels import linear_ce

from tests.kernels.ce_cases import exact, make, run
from tests.kernels.linear_kl_cases import LIMITS, check, exact_fp32_gemms  # noqa: F401

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.usefixtures("exact_fp32_gemms"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": True, "rows": True, "ignored": True, "weights": True},
        {"softcap": 3.0, "label_smoothing": 0.1},
        {"count": 1500},
    ],
    ids=lambda o: " ".join(o) or "plain",
)
def test_matches_fp64(dtype, options) -> None:
    case = make(dtype, **{"count": 70, "width": 64, "vocab": 2051, **options})
    there = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in case.items()}
    got = run(linear_ce, there)
    for name, value in exact(case).items():
        check(got[name], value, LIMITS[dtype])


def test_a_target_out_of_range_is_noticed(monkeypatch) -> None:
    monkeypatch.setenv("MTLLM_DEBUG", "1")
    case = {name: x.cuda() for name, x in make(torch.bfloat16).items()}
    case["targets"][3] = 301
    with pytest.raises(IndexError, match="targets holds a row number outside 0 to 300"):
        linear_ce(**case)
