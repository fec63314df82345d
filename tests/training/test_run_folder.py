"""A run's folder says what made it, and is continued whatever made it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from mtllm_fast.training.provenance import git_state, provenance
from mtllm_fast.training.run_folder import RunFolder


def _git(folder: Path, *arguments: str) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


def test_every_start_is_recorded_and_none_prevents_a_resume(tmp_path, monkeypatch) -> None:
    settings = {"stage": "adapt", "train": {"lr": 1e-3}}
    folder = tmp_path / "run"
    monkeypatch.setattr("sys.argv", ["/usr/bin/mtllm", "adapt", "--text", "my file.txt"])
    RunFolder(str(folder), settings, False).start()
    monkeypatch.setattr("sys.argv", ["/usr/bin/mtllm", "adapt", "--text", "my file.txt", "--resume"])
    monkeypatch.setattr("mtllm_fast.training.provenance.PACKAGES", ("torch",))  # other versions than at the first start
    RunFolder(str(folder), settings, True).start()
    first, second = json.loads((folder / "versions.json").read_text())
    assert first["command"] == "mtllm adapt --text 'my file.txt'"
    assert second["command"].endswith("--resume")
    assert {"python", "torch", "transformers", "accelerate", "numpy"} <= set(first["versions"])
    assert set(second["versions"]) == {"python", "torch"}
    assert first["folder"] == str(Path.cwd())
    assert first["started"] <= second["started"]
    assert first["processes"] == 1
    with pytest.raises(ValueError, match=r"lr=0\.01"):
        RunFolder(str(folder), {"stage": "adapt", "train": {"lr": 1e-2}}, True)


def test_a_damaged_record_does_not_prevent_a_start(tmp_path) -> None:
    run = RunFolder(str(tmp_path / "run"), {"stage": "adapt"}, False)
    run.start()
    (tmp_path / "run/versions.json").write_text("{cut")
    run.start()
    assert len(json.loads((tmp_path / "run/versions.json").read_text())) == 1


def test_other_processes_write_nothing(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "1")
    RunFolder(str(tmp_path / "run"), {"stage": "adapt"}, False).start()
    assert list((tmp_path / "run").iterdir()) == []


def test_state_of_the_checkout(tmp_path, monkeypatch) -> None:
    assert git_state(tmp_path) is None
    _git(tmp_path, "init", "-b", "trunk")
    (tmp_path / "a.txt").write_text("one\n")
    _git(tmp_path, "add", "a.txt")
    _git(tmp_path, "commit", "-m", "first")
    clean = git_state(tmp_path)
    assert clean["branch"] == "trunk"
    assert clean["changed"] == []
    assert len(clean["commit"]) == 40
    (tmp_path / "a.txt").write_text("two\n")
    monkeypatch.chdir(tmp_path)
    assert provenance()["git"] == {**clean, "changed": [" M a.txt"]}
    monkeypatch.setenv("PATH", "")
    assert git_state(tmp_path) is None
