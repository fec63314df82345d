"""The unattended GPU suite, without a GPU: steps that fail or hang do not stop it, results become a figure."""

from __future__ import annotations

import json
import os
import sys

import pytest
import torch

from benchmarks import gpu_suite
from benchmarks.gpu_suite import Step, run_step


def step(code: str) -> Step:
    return Step("a step", (sys.executable, "-c", code), 1.0)


def test_a_step_is_ok_fails_or_runs_out_of_time(tmp_path):
    ok = run_step(step("print('first'); print('last')"), tmp_path, 60, dict(os.environ))
    assert (ok.status, ok.last_line) == ("ok", "last")
    assert run_step(step("raise SystemExit(3)"), tmp_path, 60, dict(os.environ)).status == "failed (3)"
    late = run_step(step("import time; print('began', flush=True); time.sleep(60)"), tmp_path, 2, dict(os.environ))
    assert (late.status, late.last_line) == ("out of time", "began")
    assert late.seconds < 10


def test_limits_stay_within_the_budget(tmp_path):
    found = gpu_suite.steps(tmp_path)
    assert sum(s.share for s in found) <= 1.0
    assert all(str(tmp_path) in " ".join(s.command) for s in found)


def test_figure(tmp_path):
    assert gpu_suite.time_figure(tmp_path) == "no timed results"
    pytest.importorskip("matplotlib")
    record = {"case": "c", "shape": {"T": 1}, "variant": "ours", "time_ms": 2.0}
    (tmp_path / "results.json").write_text(json.dumps([record, {**record, "variant": "other", "time_ms": 3.0}]))
    assert gpu_suite.time_figure(tmp_path) is None
    assert (tmp_path / "times.png").stat().st_size > 1000


def test_without_a_gpu_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_suite.main([str(tmp_path / "new")]) == 2
    assert "no GPU" in capsys.readouterr().err
    assert "torch: " in (tmp_path / "new" / "machine.txt").read_text()
