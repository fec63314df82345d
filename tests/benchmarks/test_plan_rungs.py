"""The estimates of a GPU step by rung: of the traced bytes that are committed, in the order that the audit has."""

from __future__ import annotations

import copy
import json

import pytest

from benchmarks.studies.plan_rungs import TRAFFIC, estimates, flops
from tests.conftest import REPO

TABLE = json.loads(TRAFFIC.read_text(encoding="utf-8"))


def test_flops_are_the_designs() -> None:
    """43.1 GFLOP a token pair (design/KERNELS.md §9)."""
    assert sum(flops()) == pytest.approx(43.1e9, rel=0.02)


def test_the_committed_estimates_are_of_the_committed_traffic() -> None:
    committed = json.loads((REPO / "benchmarks/results/predicted/rungs_h200.json").read_text(encoding="utf-8"))
    assert committed == estimates(TABLE)
    assert all(one["share"] < 1 for one in committed if one["share"])  # ceilings
    changed = copy.deepcopy(TABLE)
    changed["LoRA as one op, dropout 0.05"]["backward"]["elementwise"] *= 2
    slower = {one["rung"]: one["documents_per_s"] for one in estimates(changed)}
    before = {one["rung"]: one["documents_per_s"] for one in committed}
    assert [rung for rung in before if slower[rung] < before[rung]] == ["LoRA as one op, dropout .05"]
