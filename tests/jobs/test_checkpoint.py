"""Checkpoints on disk: complete or refused, the newest and the best kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.studies.survive import entries
from mtllm_fast.jobs.checkpoint import Publisher, damage, last_complete, mark_complete, publish, rotate, staged


@pytest.fixture
def folder(tmp_path) -> Path:
    for step in (10, 20):
        made = staged(tmp_path, step)
        (made / "inner").mkdir(parents=True)
        (made / "model").write_bytes(bytes(range(100)))
        (made / "inner" / "file").write_text(str(step))
        publish(tmp_path, step)
    return tmp_path


def test_damaged_checkpoints_are_refused(folder, caplog) -> None:
    newest = folder / "checkpoint-20"
    assert damage(newest) is None
    assert last_complete(folder) == newest
    data = (newest / "model").read_bytes()
    cases = {
        "the content of model": data[:50] + b"\xff" + data[51:],
        "model has 99 bytes instead of 100": data[:99],
        "model is missing": None,
    }
    for why, content in cases.items():
        if content is None:
            (newest / "model").unlink()
        else:
            (newest / "model").write_bytes(content)
        caplog.clear()
        assert last_complete(folder) == folder / "checkpoint-10"
        assert "checkpoint-20 is not a complete checkpoint" in caplog.text and why in caplog.text
    (newest / "model").write_bytes(data)
    assert damage(newest) is None
    (newest / "complete.json").write_text("{")
    assert "cannot be read" in str(damage(newest))
    (newest / "complete.json").unlink()
    assert "no complete.json" in str(damage(newest))


def test_rotation_keeps_the_newest_and_the_best(folder) -> None:
    for step in (30, 40):
        staged(folder, step).mkdir()
        publish(folder, step)
    damaged = folder / "checkpoint-99"  # a later one that was refused; it is no reason to delete another
    damaged.mkdir()
    rotate(folder, folder / "checkpoint-40", 2, best=str(folder / "checkpoint-10"))
    assert entries(folder) == {"checkpoint-10", "checkpoint-30", "checkpoint-40", "checkpoint-99"}


def test_publishing_replaces_a_damaged_one_and_says_what_fails(folder, monkeypatch) -> None:
    (folder / "checkpoint-20" / "model").write_bytes(b"")
    staged(folder, 20).mkdir()
    publisher = Publisher(folder, keep=2, background=True)
    publisher.publish(20, None)
    assert publisher.settle() is None
    assert damage(folder / "checkpoint-20") is None
    staged(folder, 30).mkdir()

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mtllm_fast.jobs.checkpoint.mark_complete", full)
    publisher.publish(30, None)
    step, error = publisher.settle() or (0, None)
    assert step == 30 and isinstance(error, OSError)
    assert entries(folder) == {"checkpoint-10", "checkpoint-20"}


def test_a_marker_covers_every_file(tmp_path) -> None:
    (tmp_path / "c" / "deep").mkdir(parents=True)
    (tmp_path / "c" / "deep" / "x").write_text("1")
    mark_complete(tmp_path / "c")
    assert set(json.loads((tmp_path / "c" / "complete.json").read_text())) == {"deep/x"}
