"""The unattended GPU suite, without a GPU: steps that fail or hang do not stop it, results become a report."""

from __future__ import annotations

import json
import os
import sys
import tarfile
import time

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
    assert (late.status, late.last_line) == ("out of time", "KeyboardInterrupt")
    assert "began" in (tmp_path / "log.log").read_text()
    assert late.seconds < 10


def test_a_test_step_that_runs_out_of_time_keeps_what_it_found(tmp_path):
    """Its whole group is interrupted first, children too."""
    child = "import time, pathlib; time.sleep(8); pathlib.Path('late').touch()"
    (tmp_path / "test_it.py").write_text(
        f"import subprocess, sys, time\ndef test_fails(): assert 1 == 2\n"
        f"def test_hangs():\n    subprocess.Popen([sys.executable, '-c', {child!r}], cwd={str(tmp_path)!r})\n"
        "    time.sleep(60)\n"
    )
    command = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-c", os.devnull, f"--junitxml={tmp_path}/x.xml",
               str(tmp_path / "test_it.py"))  # fmt: skip
    began = time.monotonic()
    (outcome,) = run_step(Step("tests", {"log": command}, 1.0), tmp_path, 5, dict(os.environ))
    assert outcome.status == "out of time"
    assert "assert 1 == 2" in (tmp_path / "x.xml").read_text()
    time.sleep(max(0.0, 10 - (time.monotonic() - began)))
    assert not (tmp_path / "late").exists()


def test_all_files_in_one(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.json").write_text("[]")
    gpu_suite.pack(tmp_path / "out", None)
    gpu_suite.pack(tmp_path / "out", tmp_path / "all.tar.gz")
    with tarfile.open(tmp_path / "all.tar.gz") as tar:
        assert tar.getnames() == ["out", "out/a.json"]


def test_limits_stay_within_the_budget(tmp_path):
    found = gpu_suite.steps(tmp_path)
    assert sum(s.share for s in found) <= 1.0
    assert all(str(tmp_path) in " ".join(command) for s in found for command in s.commands.values())
    assert {"test_hidden_gpu", "test_linear_kl_gpu"} <= set(gpu_suite.test_commands(tmp_path))


def test_every_benchmark_of_the_suite_can_be_parsed(tmp_path):
    """Cases, sizes and variants that the commands name exist; a typing error would cost a GPU session."""
    from benchmarks import registry

    cases = registry.load()
    owners = {"packed_path": ["packed_projection", "pooled_mse", "paired_mse", "distillation_loss"],
              "linear_kl": ["linear_kl"], "steps": ["adaptation_step", "task_distillation_step"]}  # fmt: skip
    for one in gpu_suite.steps(tmp_path):
        for command in one.commands.values():
            module = command[2].removeprefix("benchmarks.")
            names = owners.get(module, [c for c in command if c in cases])
            flags = {"--sizes": [], "--variants": []}
            current = None
            for word in command:
                current = word if word.startswith("--") else current
                if current in flags and word != current:
                    flags[current].append(word)
            variants = {v for name in names for v in cases[name].variants}
            for name in names:
                for size in flags["--sizes"]:
                    cases[name].size(size, "cuda")
            assert set(flags["--variants"]) <= variants


def test_report(tmp_path):
    assert "hold no records" in gpu_suite.write_report(tmp_path)
    pytest.importorskip("matplotlib")
    record = {
        "case": "c",
        "shape": {"T": 1},
        "dtype": "bf16",
        "device": "d",
        "variant": "ours",
        "gate": "pass",
        "time_ms": 2.0,
    }
    rows = [{**record, "ours": True}, {**record, "variant": "other", "time_ms": 3.0}]
    (tmp_path / "results.json").write_text(json.dumps(rows))
    gpu_suite.write_summary(tmp_path, [])
    assert gpu_suite.write_report(tmp_path) is None
    assert "1.50" in (tmp_path / "report.md").read_text()
    assert "1.50" in (tmp_path / "report.html").read_text()


def test_without_a_gpu_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_suite.main([str(tmp_path / "new")]) == 2
    assert "no GPU" in capsys.readouterr().err
    assert "torch: " in (tmp_path / "new" / "machine.txt").read_text()
