"""The trace of a layer's memory traffic: its counting by hand, and the committed table against the code of today."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.lora import pefts_layers
from benchmarks.traffic import Traffic, traced
from tests.conftest import REPO


def test_counts_by_hand() -> None:
    x, w = torch.zeros(8, 4), torch.zeros(6, 4)
    with Traffic() as seen:
        y = (x + x).view(4, 8)  # reads 256 bytes, writes 128; a view moves nothing
        y.mul_(2)  # reads and writes y, which is named twice
        torch.empty(1000)
        x @ w.t()
    assert dict(seen.elementwise) == {"add": 3 * 128, "mul_": 2 * 128}
    assert dict(seen.products) == {"mm": 128 + 96 + 192}


@pytest.mark.parametrize("dropout", [0.05, 0.0])
def test_the_committed_table_is_of_this_code(dropout: float) -> None:
    table = json.loads((REPO / "benchmarks/results/cpu/traffic.json").read_text(encoding="utf-8"))
    ours = traced(dropout)
    with pefts_layers():
        theirs = traced(dropout)
    for name, found in ((f"LoRA as one op, dropout {dropout}", ours), (f"peft's layers, dropout {dropout}", theirs)):
        for part in ("forward", "backward"):  # torch's own decompositions may change a little between versions
            for kind in ("elementwise", "products"):
                assert found[part][kind] == pytest.approx(table[name][part][kind], rel=0.05)
    assert ours["forward"]["elementwise"] < 0.55 * theirs["forward"]["elementwise"]
    assert ours["backward"]["elementwise"] < 0.8 * theirs["backward"]["elementwise"]
