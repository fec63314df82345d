"""What a continued run takes from its new command, what its best checkpoint is, and what it says of its steps."""

from __future__ import annotations

import json
import logging
import shutil
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from mtllm_fast import TextRow
from mtllm_fast.jobs.checkpoint import Publisher, publish
from mtllm_fast.losses import DistillationWeights
from mtllm_fast.models import LoraSettings
from mtllm_fast.training import AdaptConfig, FinetuneConfig, adapt, finetune, trainer
from tests.tiny import LINES
from tests.training.short_runs import logged, optim, stopped_in, weights

ROWS = [TextRow(f"{line} {i}", id=f"row-{i}") for i, line in enumerate(LINES * 4)]
TASK = [TextRow(line + " " + ("good", "bad")[i % 2], label=i % 2) for i, line in enumerate(LINES * 4)]


_optim = partial(optim, max_steps=8, save_steps=2, keep=9)


def _adapt(encoder: str, llm: str, output: Path, *, resume: bool = False, **train) -> dict:
    config = AdaptConfig(
        encoder=encoder, llm=llm, output=str(output), lora=LoraSettings(dropout=0.1), resume=resume,
        loss=DistillationWeights(pooled_mse=1.0, paired_mse=0.5), train=_optim(**train),
    )  # fmt: skip
    return adapt(config, ROWS)


def _saved(output: Path) -> set[int]:
    return {int(path.name.rsplit("-", 1)[1]) for path in output.glob("checkpoint-*")}


def test_new_intervals_hold_after_a_resume(encoder_folder, llm_folder, tmp_path) -> None:
    """And the first log after it has the means of the steps since."""
    _adapt(encoder_folder, llm_folder, tmp_path / "whole", log_steps=2)
    with stopped_in(4):
        _adapt(encoder_folder, llm_folder, tmp_path / "run", save_steps=100)
    assert _saved(tmp_path / "run") == {4}
    _adapt(encoder_folder, llm_folder, tmp_path / "run", resume=True, save_steps=3, log_steps=2)
    assert _saved(tmp_path / "run") == {4, 6, 8}
    whole, run = logged(tmp_path / "whole"), logged(tmp_path / "run")
    assert set(run) == {1, 2, 3, 4, 6, 8}
    for step in (6, 8):
        for name in ("loss", "pooled_mse", "paired_mse"):
            assert run[step][name] == pytest.approx(whole[step][name], rel=1e-6), (step, name)


# ---- the best checkpoint
def _finetune(llm: str, output: Path, scores: list[float], monkeypatch, *, resume: bool = False, **train) -> dict:
    """Validated after every epoch with these accuracies in place of the real ones; stops where they end."""
    left = iter(scores)

    def validate() -> dict[str, float]:
        accuracy = next(left, None)
        if accuracy is None:
            raise KeyboardInterrupt
        return {"accuracy": accuracy, "loss": 1.0}

    with monkeypatch.context() as patched:
        patched.setitem(finetune.__globals__, "validation", lambda *_: validate)
        settings = {"max_steps": -1, "epochs": 3, "save_steps": 1000}
        config = FinetuneConfig(llm=llm, output=str(output), resume=resume, train=_optim(**{**settings, **train}))
        return finetune(config, TASK, ["good", "bad"], TASK[:4])


def _per_epoch(output: Path) -> int:
    return min(_saved(output))


def test_save_steps_count_between_validations(llm_folder, tmp_path, monkeypatch) -> None:
    metrics = _finetune(llm_folder, tmp_path / "run", [0.5, 0.9, 0.8], monkeypatch)
    epoch = _per_epoch(tmp_path / "run")
    assert epoch > 2 and _saved(tmp_path / "run") == {epoch, 2 * epoch, 3 * epoch}
    assert (metrics["best_step"], metrics["best_eval_accuracy"]) == (2 * epoch, 0.9)
    metrics = _finetune(llm_folder, tmp_path / "more", [0.5, 0.9, 0.8], monkeypatch, save_steps=2, keep=99)
    wanted = {*range(2, 3 * epoch + 1, 2), epoch, 2 * epoch, 3 * epoch}
    assert _saved(tmp_path / "more") == wanted
    assert metrics["best_step"] == 2 * epoch
    equal = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("run", "more")]
    assert equal[0] == equal[1]


def test_after_an_error_the_checkpoint_in_flight_is_there(llm_folder, tmp_path, monkeypatch) -> None:
    """The disk is slow, and whoever caught the error goes on at once."""

    def slow(path: Path, step: int) -> Path:
        time.sleep(1.0)
        return publish(path, step)

    monkeypatch.setattr("mtllm_fast.jobs.checkpoint.publish", slow)
    with pytest.raises(KeyboardInterrupt):
        _finetune(llm_folder, tmp_path, [0.9, 0.5], monkeypatch, async_save=True)
    assert len(_saved(tmp_path)) == 2


def test_the_best_one_is_known_in_a_folder_that_moved(llm_folder, tmp_path, monkeypatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        _finetune(llm_folder, tmp_path / "before", [0.9, 0.5], monkeypatch)
    shutil.move(tmp_path / "before", tmp_path / "after")
    metrics = _finetune(llm_folder, tmp_path / "after", [0.7], monkeypatch, resume=True)
    best = _per_epoch(tmp_path / "after")
    assert (metrics["best_step"], metrics["best_eval_accuracy"]) == (best, 0.9)
    kept, state = (weights(tmp_path / "after" / path) for path in ("", f"checkpoint-{best}"))
    assert all(torch.equal(kept[name], state[name]) for name in state)


@pytest.mark.parametrize("background", [False, True])
def test_a_best_one_that_is_lost_gives_way(background, llm_folder, tmp_path, monkeypatch) -> None:
    """0.9 could not be written, so 0.8 is the best of 0.5, 0.9, 0.8, also where it is published in the background."""
    count = [0]

    def full(path: Path, step: int) -> Path:
        count[0] += 1
        if count[0] == 2:
            raise OSError(28, "No space left on device")
        return publish(path, step)

    monkeypatch.setattr("mtllm_fast.jobs.checkpoint.publish", full)
    metrics = _finetune(llm_folder, tmp_path, [0.5, 0.9, 0.8], monkeypatch, async_save=background)
    epoch = _per_epoch(tmp_path)
    assert _saved(tmp_path) == {epoch, 3 * epoch}
    assert (metrics["best_step"], metrics["best_eval_accuracy"]) == (3 * epoch, 0.8)


def test_a_run_killed_before_its_metrics_keeps_its_score(llm_folder, tmp_path, monkeypatch) -> None:
    before = _finetune(llm_folder, tmp_path / "run", [0.5, 0.9, 0.8], monkeypatch)
    for name in ("metrics.json", "result.json", "model.safetensors"):
        (tmp_path / "run" / name).unlink()
    again = _finetune(llm_folder, tmp_path / "run", [], monkeypatch, resume=True)
    for name in ("best_step", "best_eval_accuracy"):
        assert again[name] == before[name]
    assert json.loads((tmp_path / "run" / "result.json").read_text())["best_eval_accuracy"] == 0.9


def test_a_checkpoint_that_cannot_be_deleted_is_no_failure(tmp_path, monkeypatch, caplog) -> None:
    def refuse(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("mtllm_fast.jobs.checkpoint.rotate", refuse)
    publisher = Publisher(tmp_path, keep=1, background=False)
    (tmp_path / ".checkpoint-1").mkdir()
    with caplog.at_level(logging.WARNING):
        publisher.publish(1, None)
        assert publisher.settle() is None
    assert publisher.newest == tmp_path / "checkpoint-1"
    assert "could not be deleted" in caplog.text


def test_one_process_never_uses_two_gpus(encoder_folder, llm_folder, tmp_path, monkeypatch) -> None:
    """The Trainer would wrap the model in nn.DataParallel, which cannot split a Batch."""
    plain, seen = trainer.training_arguments, []

    def two_gpus(*args, **kwargs):
        arguments = plain(*args, **kwargs)
        arguments._n_gpu = 2
        seen.append(arguments)
        return arguments

    monkeypatch.setattr(trainer, "training_arguments", two_gpus)
    _adapt(encoder_folder, llm_folder, tmp_path / "run", max_steps=1)
    assert [arguments.n_gpu for arguments in seen] == [1]
