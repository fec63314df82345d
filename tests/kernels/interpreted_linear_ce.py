"""The Triton path of linear_ce against fp64, in the interpreter; see interpreted_linear_kl.py."""

from __future__ import annotations

import pytest
import torch
from mtllm_fast.kernels.linear_ce import CrossEntropy
from mtllm_fast.kernels.linear_ce_triton import cross_entropy_triton
from mtllm_fast.kernels.tiles import LinearKLTiles, RowTile

from tests.kernels.ce_cases import exact, make
from tests.kernels.linear_kl_cases import LIMITS, check

TILES = LinearKLTiles(4, RowTile(64, 1), RowTile(128, 1), RowTile(16, 1))
WIDE = {torch.bfloat16: 1.25}
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def launch(case: dict, need: tuple[bool, bool, bool] = (True, True, True), tiles: LinearKLTiles = TILES) -> dict:
    weight = (case["targets"] != -100).float() * case.get("row_weight", torch.ones(len(case["targets"])))
    targets = case["targets"].masked_fill(case["targets"] == -100, 0)
    given = {"h_s": case["h"], "w_s": case["w"], "bias_s": case.get("bias"), "rows_s": case.get("rows")}
    options = {"softcap": case.get("softcap", 0.0), "smoothing": case.get("label_smoothing", 0.0)}
    need_dh, need_dw, need_db = need
    op = CrossEntropy(
        **given, rows_t=targets, row_weight=weight, **options, need_dh=need_dh, need_dw=need_dw, need_db=need_db
    )
    return dict(zip(("total", "values", "dh", "dw", "db"), cross_entropy_triton(op, tiles)))


def compare(case: dict) -> None:
    got, right = launch(case, (True, True, "bias" in case)), exact(case)
    dtype = case["h"].dtype
    for name, value in right.items():
        if name != "count":
            factor = 0.5 if name in ("dh", "dw", "db") else 1.0
            check(got[name] * factor, value, LIMITS[dtype] * WIDE.get(dtype, 1.0))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": True, "rows": True, "ignored": True},
        {"label_smoothing": 0.2, "weights": True},
        {"softcap": 2.0, "label_smoothing": 0.1, "bias": True},
        {"vocab": 64},
        {"vocab": 65},
        {"vocab": 5, "count": 3},
    ],
    ids=lambda o: " ".join(o) or "plain",
)
def test_matches_fp64(options) -> None:
    compare(make(**{"count": 7, "width": 8, "vocab": 150, **options}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_place(dtype) -> None:
    """Only the states are trained: the 16-bit gradient is written over its own fp32 logits."""
    case = make(dtype, count=6, width=8, vocab=150, bias=True)
    got, right = launch(case, (True, False, False)), exact(case)
    check(got["dh"] * 0.5, right["dh"], LIMITS[dtype] * WIDE.get(dtype, 1.0))
    compare(case)


def test_the_smoothed_gradient_is_scaled_as_a_whole() -> None:
    """fp16 gradients are written times a power of two, in every part of them."""
    compare(make(torch.float16, count=6, width=8, vocab=150, label_smoothing=0.3))


def test_what_is_left_out_is_not_read() -> None:
    case = make(count=7, width=8, vocab=150, ignored=True)
    right, gone = exact(case), case["targets"] == -100
    case["h"][gone] = torch.nan
    got = launch(case)
    for name in ("total", "dh", "dw"):
        check(got[name] * (1.0 if name == "total" else 0.5), right[name], 1e-5)


def test_large_logits() -> None:
    z = torch.zeros(4, 64)
    z[:, 5:9] = torch.tensor([1e4, 9.999e3, -1e4, 1e4])
    case = {"h": z, "w": torch.eye(64), "targets": torch.tensor([5, 6, 7, 8])}
    got, right = launch(case), exact(case)
    check(got["total"], right["total"], 1e-5)
    check(got["dh"] * 0.5, right["dh"], 1e-5)
    assert torch.isfinite(got["values"]).all()


def test_gradients_not_needed_are_not_made() -> None:
    case = make(count=5, width=8, vocab=70)
    got = launch(case, (False, False, False))
    assert [got[name].shape[0] for name in ("dh", "dw", "db")] == [0, 0, 0]
    check(got["total"], exact(case)["total"], 1e-5)
