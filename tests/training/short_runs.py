"""Short runs on the CPU: their settings, what they leave behind, and what stops them on the way."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mtllm_fast import cli
from mtllm_fast.data.batch import Batch
from mtllm_fast.training import OptimSettings
from mtllm_fast.training.stage import Stage


def optim(**changes: Any) -> OptimSettings:
    """Small packs, a log of every step, and nothing shown."""
    settings = {"tokens": 96, "max_length": 48, "lr": 2e-3, "log_steps": 1, "report_to": "none", "progress": False}
    return OptimSettings(**{**settings, "device": "cpu", **changes})


def entries(output: Path) -> list[dict[str, Any]]:
    """All of the run's log."""
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def logged(output: Path) -> dict[int, dict[str, Any]]:
    """The log's entries with a loss, by step."""
    return {entry["step"]: entry for entry in entries(output) if "loss" in entry}


def weights(folder: Path) -> dict[str, Tensor]:
    """What a run or a checkpoint saved."""
    return load_file(folder / "model.safetensors")


def same_weights(one: Path, other: Path) -> bool:
    """Whether two folders hold the same weights, bit for bit."""
    mine, theirs = weights(one), weights(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@contextmanager
def in_pack(number: int, do: Callable[[], object]) -> Iterator[None]:
    """`do()` before a stage computes the `number`-th pack of the block."""
    plain, count = Stage.forward, [0]

    def forward(self: Stage, batch: Batch) -> Any:
        count[0] += 1
        if count[0] == number:
            do()
        return plain(self, batch)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Stage, "forward", forward)
        yield


@contextmanager
def stopped_in(number: int) -> Iterator[None]:
    """The run in the block is asked to stop while it computes its `number`-th pack, and does after that step."""
    with pytest.raises(SystemExit), in_pack(number, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        yield


@contextmanager
def lost_in(number: int) -> Iterator[None]:
    """The run in the block ends before its `number`-th pack, with what its checkpoints hold."""

    def lose() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), in_pack(number, lose):
        yield


def nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model can be loaded or stacked any more."""

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    for name in ("stack", "from_pretrained"):
        monkeypatch.setattr("mtllm_fast.MTLLM." + name, never)


def refused(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    """What a command says that ends with status 2."""
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2
    return capsys.readouterr().err
