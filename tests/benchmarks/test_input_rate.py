"""The input benchmark in short: every stage has a rate, and what packing counts is what lies in the packs."""

from __future__ import annotations

import pytest

from benchmarks.studies import input_rate
from mtllm_fast.data import PackedDataset, TextRow


def test_every_stage_has_a_rate(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(input_rate, "DATA", tmp_path)
    monkeypatch.setattr(input_rate, "nli_texts", lambda: [("the river", "a bridge")] * 600)
    records = input_rate.measure(160, 1, 300)
    assert {r["text"] for r in records} == {"web text", "NLI"}
    rates = [r for r in records if r["case"] == "input rate"]
    stages = {"read", "mt", "llm", "pack", "collate", "loader from text", "loader from store"}
    assert {r["variant"] for r in rates if r["text"] == "web text"} == stages
    assert {r["workers"] for r in rates if "workers" in r} == {0, 1, 2}
    assert all(r["rows_per_s"] > 0 for r in rates)
    lines = input_rate.verdict(records)
    assert "loader processes per GPU" in lines[0]
    assert lines[1].startswith("packing, default windows: at least")


def test_packing_counts_both_sides() -> None:
    kinds = {"web text": [TextRow("the cat " * (1 + i % 9), id=str(i)) for i in range(3000)]}
    tokenizer = input_rate.make_tokenizer(kinds, 300)
    records = input_rate.packing("web text", kinds["web text"], tokenizer)
    assert [r["shape"]["tokens"] for r in records] == [n for n in input_rate.BUDGETS for _ in range(2)]
    dataset = PackedDataset(kinds["web text"], tokenizer, max_tokens=16384, lookahead=1024, align=False)
    batches = list(dataset)
    short = next(r for r in records if r["shape"]["tokens"] == 16384 and r["variant"] == "1024 rows")
    for side in ("mt", "llm"):
        tokens = sum(getattr(batch, side).num_tokens for batch in batches)
        assert short["share"][side] == pytest.approx(tokens / (16384 * len(batches)), rel=1e-12)
    assert short["fuller"] == max(short["share"].values())
