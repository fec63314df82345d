"""Runs that are killed and signalled at random moments, in processes of their own (the long version is
benchmarks/studies/survive.py)."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from benchmarks.studies.survive import differences, entries, make_inputs, spoil, unreadable
from mtllm_fast.jobs.checkpoint import damage
from mtllm_fast.training.signals import StopRequest

STEPS = 25


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    inputs = make_inputs(tmp_path_factory.mktemp("inputs"), lines=300)

    def arguments(output: Path, *more: str) -> list[object]:
        return [
            "adapt", "--encoder", inputs / "encoder", "--llm", inputs / "llm", "--text", inputs / "text.txt", "--output", output,
            "--max-steps", STEPS, "--save-steps", 5, "--tokens", 96, "--max-length", 48, "--gradient-accumulation", 2,
            "--loss.paired-mse", 1, "--report-to", "none", "--device", "cpu", "--no-progress", *more,
        ]  # fmt: skip

    return arguments


@pytest.fixture(scope="module")
def whole(forked, command, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "run"
    forked.run(*command(output))
    return output


def _until_new(output: Path, prefix: str) -> None:
    before, deadline = entries(output), time.monotonic() + 60
    while not any(name.startswith(prefix) for name in entries(output) - before):
        assert time.monotonic() < deadline, f"no new {prefix} in {output}"
        time.sleep(0.0005)


def _logged_steps(output: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (output / "log.jsonl").read_text().splitlines()]


def test_killed_runs_resume_bitwise(forked, command, whole, tmp_path) -> None:
    """kill -9 while a checkpoint is written, and in training, once with the newest checkpoint damaged afterwards."""
    output, rng, name = tmp_path / "run", random.Random(), "none"
    for number, what in enumerate((".checkpoint-", "checkpoint-", ".checkpoint-")):
        pid = forked.start(*command(output, *(["--resume"] if number else []), *(["--no-async-save"] * (number == 1))))
        _until_new(output, what)
        time.sleep(rng.uniform(0, 0.01 if number != 1 else 0.1))
        os.kill(pid, signal.SIGKILL)
        code, out = forked.wait()
        assert code == -signal.SIGKILL, out
        assert [what for what in unreadable(output) if not what.startswith(f"{name}:")] == []
        if number == 1:
            name = spoil(output, "byte", rng)
    assert not (output / "model.safetensors").exists(), "the run ended before it was killed"
    out = forked.run(*command(output, "--resume"))
    assert differences(whole, output, STEPS) == []
    assert _logged_steps(output) == _logged_steps(whole)
    assert not [entry for entry in entries(output) if entry.startswith(".")], "what the kills left is still there"
    # the comparison can fail
    data = bytearray((output / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (output / "model.safetensors").write_bytes(data)
    assert differences(whole, output, STEPS) == ["model.safetensors"]


@pytest.mark.parametrize(("number", "ends_with"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_stops_after_a_saved_step(number, ends_with, forked, command, whole, tmp_path) -> None:
    """With Ctrl-C, `adapt && distill` must not go on."""
    output = tmp_path / "run"
    pid = forked.start(*command(output))
    _until_new(output, "checkpoint-")
    time.sleep(random.uniform(0, 0.1))
    os.kill(pid, number)
    code, out = forked.wait()
    assert code == ends_with, out
    assert f"{signal.Signals(number).name}: stopped after step" in out
    said = out.rsplit(" is complete: continue from it with the same command and --resume", 1)[0].rsplit("/", 1)[1]
    assert damage(output / said) is None
    assert f"after step {said.rsplit('-', 1)[1]} of {STEPS}" in out
    assert not (output / "model.safetensors").exists()
    forked.run(*command(output, "--resume"))
    assert differences(whole, output, STEPS) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(number) -> None:
    pid = os.fork()
    if not pid:
        with StopRequest() as stop:
            os.kill(os.getpid(), number)
            if stop.received is number:
                os.kill(os.getpid(), number)
        os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -number
