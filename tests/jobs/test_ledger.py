"""What differs between two keys."""

from __future__ import annotations

from mtllm_fast.jobs.ledger import differing


def test_names_that_differ() -> None:
    before, now = {"a": 1, "b": 2, "lost": 3}, {"new": 0, "b": 4, "a": 1, "none": None}
    assert differing(before, now) == ["new", "b", "lost"]
    assert differing(now, now) == []
