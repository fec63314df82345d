"""A step's gradient depends on its texts, not on how they are packed, accumulated or distributed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import LINES

TOLERANCE = 1e-6


ALONE, TOGETHER = ("1000-1", "28-4", "42-3-per-pack"), ("56-1", "28-2", "42-2")


STEP_GRADIENT = "import runpy; runpy.run_module('tests.training.step_gradient', run_name='__main__')"


@pytest.fixture(scope="module")
def gradients(forked, tmp_path_factory, encoder_folder: str, llm_folder: str) -> dict[str, dict[str, torch.Tensor]]:
    """(processes, tokens, packs per process) as "1: 28-4" -> gradient: one launch of one process and one of two."""
    found = {}
    for processes, launch, names in ((1, forked.run, ALONE), (2, forked.group, TOGETHER)):
        folder = tmp_path_factory.mktemp(f"gradients{processes}")
        launch(encoder_folder, llm_folder, folder, *names, code=STEP_GRADIENT)
        found |= {f"{processes}: {name}": load_file(folder / f"{name}.safetensors") for name in names}
    return found


def _distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Relative L2 distance of two gradients, each taken as one vector over all tensors."""
    difference = sum(float((a[name].double() - b[name].double()).square().sum()) for name in b)
    return (difference / sum(float(g.double().square().sum()) for g in b.values())) ** 0.5


# the last case has 3 packs for 4 places: one process gets a filler that counts nothing
@pytest.mark.parametrize("name", ["1: 28-4", "2: 56-1", "2: 28-2", "2: 42-2"])
def test_same_gradient(gradients, name: str) -> None:
    other, one_pack = gradients[name], gradients["1: 1000-1"]
    assert other.keys() == one_pack.keys()
    assert len(one_pack) > 20
    assert all(float(gradient.norm()) > 0 for gradient in one_pack.values())
    assert _distance(other, one_pack) <= TOLERANCE
    # fp32 rounding of other summation orders; every tensor by itself, so that a small one cannot hide
    assert max(_distance({n: other[n]}, {n: one_pack[n]}) for n in one_pack) <= 5 * TOLERANCE


def test_control_mean_of_pack_means_is_another_gradient(gradients) -> None:
    """The check can fail: weighting every pack alike, as the plain Trainer does, moves the gradient by far more."""
    assert _distance(gradients["1: 42-3-per-pack"], gradients["1: 1000-1"]) > 1000 * TOLERANCE


def test_torchrun_command(forked, tmp_path, encoder_folder, llm_folder) -> None:
    """`torchrun ... mtllm_fast.cli adapt` trains one model on two processes, and two processes resume it."""
    (tmp_path / "text.txt").write_text("\n".join(LINES * 4) + "\n")
    arguments = [
        "adapt", "--encoder", encoder_folder, "--llm", llm_folder, "--text", str(tmp_path / "text.txt"),
        "--output", str(tmp_path / "run"), "--max-steps", "6", "--save-steps", "4", "--log-steps", "2", "--tokens", "64",
        "--max-length", "32", "--no-progress", "--report-to", "none",
    ]  # fmt: skip
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    launcher += ["--rdzv-endpoint=localhost:0", "-m", "mtllm_fast.cli"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *launcher, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=480,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("adapt:") == 1
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    (tmp_path / "run" / "result.json").unlink()
    outs = forked.group(*arguments, "--resume")
    assert ["adapt:" in out for out in outs] == [True, False]
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if "loss" in entry] == [2, 4, 6]
    assert {path.name for path in (tmp_path / "run" / "checkpoint-6").glob("rng*")} == {
        "rng_state_0.pth",
        "rng_state_1.pth",
    }
