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
    return Step("a step", {"log": (sys.executable, "-c", code)}, 1.0)


def run(code: str, folder, limit: float = 60.0):
    (outcome,) = run_step(step(code), folder, limit, dict(os.environ))
    return outcome


def test_a_step_is_ok_fails_or_runs_out_of_time(tmp_path):
    ok = run("print('first'); print('last')", tmp_path)
    assert (ok.status, ok.last_line) == ("ok", "last")
    assert run("raise SystemExit(3)", tmp_path).status == "failed (3)"
    late = run("import time; print('began', flush=True); time.sleep(60)", tmp_path, 2)
    assert (late.status, late.last_line) == ("out of time", "began")
    assert late.seconds < 10


def test_limits_stay_within_the_budget(tmp_path):
    found = gpu_suite.steps(tmp_path)
    assert sum(s.share for s in found) <= 1.0
    assert all(str(tmp_path) in " ".join(command) for s in found for command in s.commands.values())
    assert {"test_hidden_gpu", "test_linear_kl_gpu"} <= set(gpu_suite.test_commands(tmp_path))


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
