"""One run, one writer; a folder that is continued, extended or moved; what it reads, known by content."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mtllm_fast import TextRow, read_rows
from mtllm_fast.jobs.durable import FolderLock
from mtllm_fast.jobs.fingerprint import WHOLE_BYTES, of_file
from mtllm_fast.training import OptimSettings
from mtllm_fast.training.run_folder import RESULT, RUN_FILE, RunFolder

HOLD = """
import sys, time
from mtllm_fast.jobs.durable import FolderLock
from pathlib import Path
print(FolderLock(Path(sys.argv[1])).take(), flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Starts a process that holds the lock of a folder, and one of its own children that outlives it."""
    started = []

    def start(folder: Path) -> subprocess.Popen:
        folder.mkdir(parents=True, exist_ok=True)
        process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline().strip() == "True"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def _settings(**train) -> dict:
    return {"stage": "adapt", "train": {"max_steps": 10, "epochs": 1, "lr": 1e-3, **train}}


def test_the_second_of_two_is_refused(tmp_path, holder) -> None:
    output = tmp_path / "run"
    waiting = RunFolder(str(output), _settings(), False)  # both were started before either wrote
    process = holder(output)
    with pytest.raises(ValueError, match=rf"another process \({process.pid} on .*\) is training in it"):
        waiting.start()
    assert not (output / RUN_FILE).exists()
    (output / RUN_FILE).write_text(json.dumps({**_settings(), "processes": 1}))
    for resume in (False, True):
        with pytest.raises(ValueError, match="another process"):
            RunFolder(str(output), _settings(), resume)
    os.kill(process.pid, signal.SIGKILL)  # a stale lock is none
    process.wait()
    assert (output / ".lock").exists()
    RunFolder(str(output), _settings(), True).start()
    with pytest.raises(ValueError, match="holds another run by now"):
        waiting.start()


def test_a_run_lets_go_of_its_folder(tmp_path, holder) -> None:
    run = RunFolder(str(tmp_path / "run"), _settings(), False)
    run.start()
    RunFolder(str(tmp_path / "run"), _settings(), True).start()  # the same process is no other one
    run.release()
    assert not (tmp_path / "run/.lock").exists()
    holder(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")  # and a folder that was deleted is not locked by who wrote into it
    RunFolder(str(tmp_path / "run"), _settings(), False).start()


def test_workers_do_not_keep_the_lock_of_a_killed_run(tmp_path) -> None:
    """A forked child of the holder lives on."""
    (tmp_path / "run").mkdir()
    pid = os.fork()
    if not pid:
        FolderLock(tmp_path / "run").take()
        worker = os.fork()
        if not worker:
            time.sleep(30)
            os._exit(0)
        (tmp_path / "worker").write_text(str(worker))
        os._exit(0)
    os.waitpid(pid, 0)
    try:
        assert FolderLock(tmp_path / "run").take()
    finally:
        os.kill(int((tmp_path / "worker").read_text()), signal.SIGKILL)
        FolderLock(tmp_path / "run").release()


# ---- what may change
def test_a_run_is_extended_and_not_cut(tmp_path) -> None:
    output = tmp_path / "run"
    RunFolder(str(output), _settings(), False).start()
    (output / RESULT).write_text('{"train_loss": 1.0}')
    unmade = RunFolder(str(output), _settings(), True)
    assert unmade.finished() is None  # its model is not there
    unmade.release()
    (output / "model.safetensors").touch()
    assert RunFolder(str(output), _settings(), True).finished() == {"train_loss": 1.0}
    with pytest.raises(ValueError, match=r"max_steps=9, .* started with 10; a run can be extended, not cut"):
        RunFolder(str(output), _settings(max_steps=9), True)
    with pytest.raises(ValueError, match="max_steps=-1"):
        RunFolder(str(output), _settings(max_steps=-1), True)
    longer = RunFolder(str(output), _settings(max_steps=30), True)
    assert longer.finished() is None
    longer.start()
    record = json.loads((output / RUN_FILE).read_text())
    assert record["train"]["max_steps"] == 30
    assert record["extended"] == [{"train.max_steps": [10, 30]}]
    assert not (output / RESULT).exists()
    again = RunFolder(str(output), _settings(max_steps=30), True)
    assert again.extended == {}
    RunFolder(str(output), _settings(max_steps=30, epochs=2), True).start()
    record = json.loads((output / RUN_FILE).read_text())
    assert record["extended"] == [{"train.max_steps": [10, 30]}, {"train.epochs": [1, 2]}]


@pytest.mark.parametrize("text", ['{"stage": "ad', "", "[1]", "\x00\x00"])
def test_a_damaged_record_is_named(text, tmp_path) -> None:
    RunFolder(str(tmp_path / "run"), _settings(), False).start()
    for name in (RUN_FILE, RESULT):
        whole = (tmp_path / "run" / name).read_text() if name == RUN_FILE else ""
        (tmp_path / "run" / name).write_text(text)
        with pytest.raises(ValueError, match=rf"run/{name}: is damaged"):
            RunFolder(str(tmp_path / "run"), _settings(), True).finished()
        (tmp_path / "run" / name).write_text(whole)


def _resumed(output: Path, settings: dict, **inputs) -> RunFolder:
    return RunFolder(str(output), settings, True, inputs)


def test_other_text_under_the_same_name_is_noticed(tmp_path) -> None:
    text, output = tmp_path / "text.txt", tmp_path / "run"
    text.write_text("a river runs\n" * 9)
    settings = {**_settings(), "source": {"text": str(text)}}
    RunFolder(str(output), settings, False, {"rows": read_rows(text)}).start()
    os.utime(text, (1, 1))
    _resumed(output, settings, rows=read_rows(text))  # the same content at another time
    text.write_text("a river rums\n" * 9)
    with pytest.raises(ValueError, match=r"rows has changed .*text\.txt: 117 bytes .* then, 117 bytes"):
        _resumed(output, settings, rows=read_rows(text))
    text.write_text("a river runs\n" * 8)
    with pytest.raises(ValueError, match="104 bytes"):
        _resumed(output, settings, rows=read_rows(text))


def test_a_file_of_a_folder_and_rows_of_a_list(tmp_path) -> None:
    """Siblings of a text file: another file of its folder, task rows, validation rows, a model's weights."""
    texts, model = tmp_path / "texts", tmp_path / "model"
    texts.mkdir()
    model.mkdir()
    (texts / "a.txt").write_text("one\n")
    (model / "model.safetensors").write_bytes(b"weights")
    rows, valid = [TextRow("one", label=0), TextRow("two", label=1)], [TextRow("three", label=0)]

    def run(resume: bool, **other) -> None:
        inputs = {"text": read_rows(texts), "rows": rows, "valid_rows": valid, "model": str(model), **other}
        RunFolder(str(tmp_path / "run"), {**_settings(), "model": str(model)}, resume, inputs).start()

    run(False)
    run(True)
    relabelled = [TextRow("one", label=1), TextRow("two", label=1)]
    for name, changes in {"rows": {"rows": relabelled}, "valid_rows": {"valid_rows": [*valid, *valid]}}.items():
        with pytest.raises(ValueError, match=f"--resume: {name} has changed .* rows"):
            run(True, **changes)
    (texts / "b.txt").write_text("two\n")
    with pytest.raises(ValueError, match=r"text has changed .*b\.txt: not there then, 4 bytes"):
        run(True)
    (texts / "b.txt").unlink()
    (model / "model.safetensors").write_bytes(b"weighty")
    with pytest.raises(ValueError, match=r"model has changed .*model\.safetensors"):
        run(True)
    (model / "model.safetensors").write_bytes(b"weights")
    shutil.move(model, tmp_path / "moved")
    with pytest.raises(ValueError, match="model has changed"):
        run(True)
    model = tmp_path / "moved"
    run(True)  # another path to the same model


def test_large_files_are_read_in_parts_that_cover_both_ends(tmp_path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(WHOLE_BYTES + 10**6)
    digests = {of_file(path)}
    for place in (0, WHOLE_BYTES + 10**6 - 1):
        with path.open("r+b") as file:
            file.seek(place)
            file.write(b"x")
        digests.add(of_file(path))
    assert len(digests) == 3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", -1), ("seed", 2**32), ("workers", -2), ("clip", -1.0), ("clip", float("nan")), ("max_rows", 0),
        ("weight_decay", -0.1), ("shuffle_buffer", -1), ("lr", float("inf")), ("device", "tpu9"), ("report_to", "x"),
        ("lr", 0.0), ("max_steps", -2), ("tokens", 10), ("keep", 1), ("warmup", 1.5),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_named(name, value) -> None:
    with pytest.raises(ValueError, match=rf"^{name}={value!r}: "):
        OptimSettings(**{name: value})


def test_no_step_and_no_pass() -> None:
    with pytest.raises(ValueError, match=r"^max_steps=-1: must be >= 0, or -1 with epochs >= 1"):
        OptimSettings(max_steps=-1, epochs=0)
