"""Without an optional package its door says which extra brings it, and everything else works."""

from __future__ import annotations

import importlib
import sys

import pytest


@pytest.mark.parametrize(
    ("package", "door"), [("sentence_transformers", "sentence_transformer"), ("mteb.models", "mteb")]
)
def test_missing_package(package: str, door: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"mtllm_fast.inference.{door}"
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ImportError, match=r"or newer is needed.*mtllm-fast\[doors\]"):
        importlib.import_module(name)
    assert importlib.import_module("mtllm_fast.inference").Engine
