"""The trace of a layer's memory traffic: its counting by hand, and the committed table against the code of today."""

from __future__ import annotations

import json

import pytest
import torch
import triton
import triton.language as tl
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.studies.traffic import LAYERS, traced
from benchmarks.studies.traffic_count import CompiledTraffic, Traffic, accessed, counted_launches
from tests.conftest import REPO

PEFTS, ONE_OP, LIGER, COMPILED = LAYERS
TABLE = json.loads((REPO / "benchmarks/results/cpu/traffic.json").read_text(encoding="utf-8"))


def test_counts_by_hand() -> None:
    x, w = torch.zeros(8, 4), torch.zeros(6, 4)
    with Traffic() as seen:
        y = (x + x).view(4, 8)  # reads 256 bytes, writes 128; a view moves nothing
        y.mul_(2)  # reads and writes y, which is named twice
        torch.empty(1000)
        x @ w.t()
        with Traffic.paused():
            x + x
    assert dict(seen.elementwise) == {"add": 3 * 128, "mul_": 2 * 128}
    assert dict(seen.products) == {"mm": 128 + 96 + 192}


def test_compiled_counts_by_hand() -> None:
    def formula(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return ((x * 2).relu() @ w).exp() + 1

    counting = CompiledTraffic()
    torch.compiler.reset()
    with FakeTensorMode():
        x, w = torch.empty(64, 32), torch.empty(32, 16)
        compiled = torch.compile(formula, backend=counting, dynamic=False)
        with torch.no_grad():
            for _ in range(2):
                compiled(x, w)
        with Traffic() as eager:
            formula(x, w)
    torch.compiler.reset()
    once = (
        2 * x.nbytes + 2 * 64 * 16 * 4
    )  # around the product: x read, one tensor written; one read, the result written
    assert counting.forward.elementwise["fused"] == 2 * once < 2 * sum(eager.elementwise.values())
    assert counting.forward.products["mm"] == 2 * (x.nbytes + w.nbytes + 64 * 16 * 4)


@triton.jit
def _scale_in_place(x_ptr, w_ptr, y_ptr, stride, n: tl.constexpr):
    places = tl.program_id(0) * stride + tl.arange(0, n)
    x_ptr += tl.program_id(0)
    row = y_ptr + places
    value = tl.load(x_ptr + places) * tl.load(w_ptr)
    tl.store(x_ptr + places, value)
    tl.store(row, value)


def test_launches_by_hand() -> None:
    kernel = _scale_in_place.fn
    loads, stores = accessed(kernel)
    assert loads & {"x_ptr", "w_ptr", "y_ptr"} == {"x_ptr", "w_ptr"}
    assert stores & {"x_ptr", "w_ptr", "y_ptr"} == {"x_ptr", "y_ptr"}
    seen = Traffic()
    x, w, y = torch.zeros(8, 4), torch.zeros(1), torch.zeros(8, 4)
    with counted_launches(seen):
        _scale_in_place[(8,)](x, w, y, 4, n=4)
    assert dict(seen.elementwise) == {"_scale_in_place": 2 * x.nbytes + w.nbytes + y.nbytes}


@pytest.mark.parametrize(
    ("layers", "dropout"),
    [(PEFTS, 0.05), (ONE_OP, 0.05), (ONE_OP, 0.0), (LIGER, 0.05), (LIGER, 0.0), (COMPILED, 0.05)],
)
def test_the_committed_table_is_of_this_code(layers: str, dropout: float) -> None:
    if layers == LIGER:
        pytest.importorskip("liger_kernel")
    found, table = traced(dropout, layers), TABLE[f"{layers}, dropout {dropout}"]
    for part in ("forward", "backward"):  # torch's own decompositions may change a little between versions
        for kind in ("elementwise", "products"):
            assert found[part][kind] == pytest.approx(table[part][kind], rel=0.05)


@pytest.mark.parametrize(("dropout", "forward", "backward"), [(0.05, 900, 1200), (0.0, 700, 1000)])
def test_fused_layers_keep_within_their_bounds(dropout: float, forward: int, backward: int) -> None:
    for layers in (LIGER, COMPILED):
        moved = TABLE[f"{layers}, dropout {dropout}"]
        assert moved["forward"]["elementwise"] <= forward
        assert moved["backward"]["elementwise"] <= backward
    unfused = TABLE[f"{ONE_OP}, dropout {dropout}"]  # control: the bounds are not met by themselves
    assert unfused["forward"]["elementwise"] > forward
    assert unfused["backward"]["elementwise"] > backward
