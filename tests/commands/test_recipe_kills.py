"""A recipe that is killed with -9, within its steps and between them, ends in the bytes of one that is not."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.commands.recipe_steps import QUICK, models, record, write_data

FORK = """
import os
from mtllm_fast import cli
from mtllm_fast.commands import recipe_run
from tests.commands import recipe_steps
os.setpgid(0, 0)
recipe_run.run_measured = recipe_steps.forked
cli.main(["train", *sys.argv[1:]])
"""


@pytest.fixture(scope="module")
def arguments(tmp_path_factory, encoder_folder, llm_folder):
    """Those of a run of MT-LLM into a folder."""
    data = [f"{role}={value}" for role, value in write_data(tmp_path_factory.mktemp("recipes")).items()]
    models = ["--encoder", encoder_folder, "--llm", llm_folder]

    def of(output: Path, seed: int = 3) -> list[object]:
        return ["--recipe", "mt_llm", *models, "--output", output, "--seed", seed, "--data", *data, "--set", *QUICK]

    return of


def test_killed_within_and_between_steps_it_ends_in_the_same_bytes(arguments, forked, tmp_path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    out = forked.run(*arguments(whole), code=FORK)
    assert out.count("mtllm ") == 3 and f"-> {whole / 'student'}" in out
    expected = models(whole)
    assert set(expected) == {f"{step}/model.safetensors" for step in ("adapt", "teacher", "student")}
    assert len({*expected.values()}) == 3

    def finished(step: str) -> bool:
        return (killed / "recipe.json").exists() and record(killed)["steps"][step]["finished"]

    moments = {
        "while the first step trains": lambda: list((killed / "adapt").glob("checkpoint-*")),
        "between two steps": lambda: finished("adapt"),
        "while the last step trains": lambda: list((killed / "student").glob("checkpoint-*")),
    }
    for number, (name, is_there) in enumerate(moments.items()):
        pid, deadline = forked.start(*arguments(killed), code=FORK), time.monotonic() + 240
        while not is_there():
            assert time.monotonic() < deadline, name
            time.sleep(0.001)
        os.killpg(pid, signal.SIGKILL)
        code, out = forked.wait()
        assert code == -signal.SIGKILL, out
        if number == 0:
            assert not finished("adapt"), "it was killed too late"
    assert not record(killed)["finished"] and not finished("student")
    assert record(killed)["steps"]["adapt"]["starts"] == 2
    out = forked.run(*arguments(killed), code=FORK)
    assert out.count("is there") == 2  # adapt and teacher
    assert models(killed) == expected
    after = record(killed)
    assert after["finished"] and [one["finished"] for one in after["steps"].values()] == [True] * 3
    assert after["steps"]["adapt"]["starts"] == 2 and len(after["starts"]) == 4
    # each start counts, also those that were killed: 0.1 s there by the report of the runner above
    assert after["steps"]["adapt"]["seconds"] == pytest.approx(0.1 + 0.2)
    assert after["steps"]["student"]["cpu_seconds"] > 0.1
    # another seed gives other bytes: the comparison can fail
    other = tmp_path / "other"
    forked.run(*arguments(other, seed=4), code=FORK)
    assert models(other)["adapt/model.safetensors"] != expected["adapt/model.safetensors"]
    assert models(other)["student/model.safetensors"] != expected["student/model.safetensors"]
