"""Runs survive full disks, unreadable data, gradients that are not finite and packs that do not fit."""

from __future__ import annotations

import dataclasses
import os
import resource
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Trainer

from benchmarks.studies.survive import unreadable
from mtllm_fast import TextRow
from mtllm_fast.data.collate import collate
from mtllm_fast.data.prompt import Prompt
from mtllm_fast.data.split import halves
from mtllm_fast.data.tokenise import StackTokenizer
from mtllm_fast.failures import RunFailed
from mtllm_fast.jobs.checkpoint import last_complete
from mtllm_fast.losses import DistillationWeights
from mtllm_fast.models import LoraSettings
from mtllm_fast.training import AdaptConfig, adapt
from mtllm_fast.training import survival as survival_module
from mtllm_fast.training.stage import Stage
from tests.tiny import LINES, llm_tokenizer, nllb_tokenizer
from tests.training.short_runs import entries, optim, same_weights, weights

ROWS = [TextRow(f"{line} {i}", id=f"row-{i}") for i, line in enumerate(LINES * 4)]


def _config(encoder: str, llm: str, output: Path, resume: bool = False, dropout: float = 0.1, **train) -> AdaptConfig:
    return AdaptConfig(
        encoder=encoder, llm=llm, output=str(output), lora=LoraSettings(dropout=dropout), resume=resume,
        loss=DistillationWeights(pooled_mse=1.0, paired_mse=1.0),
        train=optim(**{"max_steps": 8, "save_steps": 2, **train}),
    )  # fmt: skip


@pytest.fixture
def steps(monkeypatch) -> dict:
    """Functions by step: `f(batch, terms)` changes what `Stage.forward` gives in that step (of one pack)."""
    actions: dict = {}
    plain, count = Stage.forward, [0]

    def forward(self, batch):
        count[0] += 1
        terms = plain(self, batch)
        action = actions.get(count[0]) or actions.get(0)
        return terms if action is None else action(batch, terms)

    actions["restart_at"] = lambda step: count.__setitem__(0, step)
    monkeypatch.setattr(Stage, "forward", forward)
    return actions


def _not_finite(batch, terms):
    return {name: term._replace(sum=term.sum * float("nan")) for name, term in terms.items()}


def test_a_step_that_is_not_finite_changes_nothing(steps, encoder_folder, llm_folder, tmp_path, monkeypatch) -> None:
    """Skipped and said, also over a stop and a resume right after it; without the check the weights are lost."""
    steps[3] = steps[6] = _not_finite
    metrics = adapt(_config(encoder_folder, llm_folder, tmp_path / "whole"), ROWS)
    assert metrics["skipped_steps"] == 2
    noted = [entry for entry in entries(tmp_path / "whole") if "skipped" in entry]
    assert [entry["step"] for entry in noted] == [3, 6]
    assert all(name.startswith("row-") for entry in noted for name in entry["rows"])
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "whole").values())
    losses = [entry["loss"] for entry in entries(tmp_path / "whole") if "loss" in entry]
    assert len(losses) == 8 and all(loss == loss for loss in losses)

    def stopped(batch, terms):
        os.kill(os.getpid(), signal.SIGTERM)
        return _not_finite(batch, terms)

    steps[3] = stopped
    steps["restart_at"](0)
    with pytest.raises(SystemExit) as stop:
        adapt(_config(encoder_folder, llm_folder, tmp_path / "stopped"), ROWS)
    assert stop.value.code == 0
    assert last_complete(tmp_path / "stopped") == tmp_path / "stopped" / "checkpoint-3"
    assert same_weights(*(tmp_path / "stopped" / f"checkpoint-{n}" for n in (2, 3)))
    metrics = adapt(_config(encoder_folder, llm_folder, tmp_path / "stopped", resume=True), ROWS)
    assert metrics["skipped_steps"] == 2
    assert same_weights(tmp_path / "whole", tmp_path / "stopped")

    steps["restart_at"](0)
    steps[3] = _not_finite
    monkeypatch.setattr(survival_module.SurvivingTrainer, "_get_grad_norm", Trainer._get_grad_norm)
    adapt(_config(encoder_folder, llm_folder, tmp_path / "lost", max_steps=4), ROWS)
    assert not all(tensor.isfinite().all() for tensor in weights(tmp_path / "lost").values())


def test_steps_that_stay_not_finite_end_the_run(steps, encoder_folder, llm_folder, tmp_path) -> None:
    """The count goes on over a stop and a resume."""

    def stopped(batch, terms):
        os.kill(os.getpid(), signal.SIGTERM)
        return _not_finite(batch, terms)

    steps[3], steps[4], steps[5] = _not_finite, stopped, _not_finite
    with pytest.raises(SystemExit):
        adapt(_config(encoder_folder, llm_folder, tmp_path / "run", bad_steps=3), ROWS)
    with pytest.raises(RunFailed, match=r"3 steps in a row, up to step 5 .*checkpoint-4 is complete: continue"):
        adapt(_config(encoder_folder, llm_folder, tmp_path / "run", resume=True, bad_steps=3), ROWS)


def test_a_pack_that_does_not_fit_is_split(steps, encoder_folder, llm_folder, tmp_path, monkeypatch, caplog) -> None:
    """The step of plain SGD is the gradient, so the change of the weights tells whether it is the same."""
    settings = {"max_steps": 1, "optim": "sgd", "lr": 0.1, "warmup": 0.0, "clip": 0.0, "weight_decay": 0.0}
    settings |= {"tokens": 200, "dropout": 0.0, "gradient_accumulation": 2}
    made, plain = [], Stage.__init__

    def remember(self, *arguments, **options):
        plain(self, *arguments, **options)
        made.append(self)

    monkeypatch.setattr(Stage, "__init__", remember)

    def trained(name: str, **changes) -> dict[str, torch.Tensor]:
        adapt(_config(encoder_folder, llm_folder, tmp_path / name, **{**settings, **changes}), ROWS)
        return weights(tmp_path / name)

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def in_forward(batch, terms):
        return terms if batch.num_rows <= 3 else fail()

    def in_backward(batch, terms):
        if batch.num_rows > 3:  # after the gradients of the layers above have been added up
            named = made[-1].student.named_parameters()
            first = next(p for name, p in named if p.requires_grad and "lora_B" in name)
            armed.append(first.register_hook(lambda gradient: (armed.pop().remove(), fail())))
        return terms

    start, fits, armed = trained("start", lr=1e-30), trained("fits"), []
    size = sum(float((fits[name] - start[name]).double().square().sum()) for name in fits) ** 0.5
    assert size > 1e-3

    def distance(other: dict[str, torch.Tensor]) -> float:
        return sum(float((other[n].double() - fits[n].double()).square().sum()) for n in fits) ** 0.5 / size

    for name, where in (("forward", in_forward), ("backward", in_backward)):
        steps[0] = where
        caplog.clear()
        assert distance(trained(name)) < 1e-4
        assert "does not fit into memory" in caplog.text
    # the control: the second half is left out
    monkeypatch.setattr(survival_module, "halves", lambda batch: (halves(batch)[0], halves(batch)[0]))
    steps[0] = in_forward
    assert distance(trained("half")) > 1e-2


def test_a_row_that_does_not_fit_ends_the_run(steps, encoder_folder, llm_folder, tmp_path) -> None:
    def never(batch, terms):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    steps[4] = lambda batch, terms: steps.update({0: never}) or never(batch, terms)
    with pytest.raises(
        RunFailed, match=r"out of memory at step 4 .*a single row does not fit; go on with .*checkpoint-2"
    ):
        adapt(_config(encoder_folder, llm_folder, tmp_path / "run"), ROWS)


def test_halves_of_a_batch() -> None:
    lines = list(LINES)
    tokenizer = StackTokenizer(nllb_tokenizer(lines), llm_tokenizer(lines), max_mt_tokens=48, max_llm_tokens=48)
    rows = [TextRow(f"{line} {i}", label=i, id=str(i), soft_label=(-0.1, -i - 1.0)) for i, line in enumerate(lines)]
    batch = collate(rows, tokenizer)
    first, second = halves(batch)
    cut = first.num_rows
    for part, own in ((first, rows[:cut]), (second, rows[cut:])):
        alone = collate(own, tokenizer)
        assert part.ids == alone.ids
        for name in ("mt_rows", "llm_rows", "labels", "soft_labels"):
            assert torch.equal(getattr(part, name), getattr(alone, name)), name
        for name in ("mt", "llm"):
            got, want = getattr(part, name), getattr(alone, name)
            assert got.lengths == want.lengths
            for field in ("input_ids", "cu_seqlens", "positions"):
                assert torch.equal(getattr(got, field), getattr(want, field)), field
    cost = np.add(batch.mt.lengths, batch.llm.lengths)
    apart = [abs(int(cost[:row].sum() - cost[row:].sum())) for row in range(1, len(rows))]
    assert min(apart) < apart[0] and apart[cut - 1] == min(apart)
    # a tokenizer without a prefix pairs the first tokens too: each goes with its own row
    starts = {f"{name}_rows": getattr(batch, name).cu_seqlens[:-1].long() for name in ("mt", "llm")}
    for part in halves(dataclasses.replace(batch, **starts)):
        for name in ("mt", "llm"):
            assert getattr(part, f"{name}_rows").tolist() == getattr(part, name).cu_seqlens[:-1].tolist()
    uneven = collate([*rows[:5], TextRow(" ".join(lines * 2), label=0, soft_label=(-1.0, -1.0))], tokenizer)
    cost = np.add(uneven.mt.lengths, uneven.llm.lengths)
    apart = [abs(int(cost[:row].sum() - cost[row:].sum())) for row in range(1, 6)]
    assert halves(uneven)[0].num_rows == 1 + int(np.argmin(apart))
    written = [TextRow(line, "eng_Latn", target=" ".join(line.split()[: 1 + i])) for i, line in enumerate(lines)]
    for prompt in (Prompt("Text: ", "\nWords:"), Prompt("{text}\n", "\n")):
        batch = collate(written, tokenizer, prompt=prompt)
        first, second = halves(batch)
        for part, own in ((first, written[: first.num_rows]), (second, written[first.num_rows :])):
            alone = collate(own, tokenizer, prompt=prompt)
            assert torch.equal(part.llm_rows, alone.llm_rows)
            for name in ("targets", "before", "after", "mt", "llm"):
                got, want = getattr(part, name), getattr(alone, name)
                assert got.lengths == want.lengths and torch.equal(got.input_ids, want.input_ids), name
    choices = [TextRow(line, choices=("yes", "or no"), label=0) for line in lines]
    batch = collate(choices, tokenizer, align=False)
    _, second = halves(batch)
    alone = collate(choices[-second.num_rows :], tokenizer, align=False)
    assert torch.equal(second.mt_spans, alone.mt_spans) and torch.equal(second.llm_spans, alone.llm_spans)
    with pytest.raises(ValueError, match="at least 2"):
        halves(collate(rows[:1], tokenizer))


@pytest.fixture
def file_limit():
    """Sets the size above which no file can be written, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (soft if size is None else size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_is_full_for_a_while(steps, encoder_folder, llm_folder, tmp_path, file_limit, caplog) -> None:
    adapt(_config(encoder_folder, llm_folder, tmp_path / "whole"), ROWS)
    steps["restart_at"](0)
    steps[3] = lambda batch, terms: file_limit(60_000) or terms
    steps[7] = lambda batch, terms: file_limit(None) or terms
    metrics = adapt(_config(encoder_folder, llm_folder, tmp_path / "run"), ROWS)
    assert metrics["train_runtime"] > 0
    for step in (4, 6):
        assert f"the checkpoint of step {step} could not be written" in caplog.text
    assert "bytes and" in caplog.text and "checkpoint-2 is complete" in caplog.text
    there = [step for step in range(2, 9, 2) if (tmp_path / "run" / f"checkpoint-{step}").exists()]
    assert there == [2, 8]
    assert unreadable(tmp_path / "run") == []
    assert same_weights(tmp_path / "whole", tmp_path / "run")


def test_a_disk_that_stays_full(steps, encoder_folder, llm_folder, tmp_path, file_limit) -> None:
    """A stop that cannot be saved, and a result that cannot, are errors that name what is kept."""

    def stopped(batch, terms):
        file_limit(60_000)
        os.kill(os.getpid(), signal.SIGTERM)
        return terms

    steps[3] = stopped
    with pytest.raises(OSError, match=r"checkpoint-2 is complete.*step 3 could not be written: .* needs [\d,]+ bytes"):
        adapt(_config(encoder_folder, llm_folder, tmp_path / "run"), ROWS)
    file_limit(None)
    steps["restart_at"](2)
    steps[3] = lambda batch, terms: file_limit(60_000) or terms
    with pytest.raises(OSError, match=r"the model could not be written: .* needs [\d,]+ bytes"):
        adapt(_config(encoder_folder, llm_folder, tmp_path / "run", resume=True), ROWS)
    file_limit(None)
    del steps[3]
    assert unreadable(tmp_path / "run") == []
    adapt(_config(encoder_folder, llm_folder, tmp_path / "run", resume=True), ROWS)
    assert (tmp_path / "run" / "model.safetensors").is_file()


class _Unreadable:
    """A stream of which the last half cannot be read until it is repaired."""

    def __init__(self, rows) -> None:
        self.rows, self.broken = rows, True

    def __iter__(self):
        for number, row in enumerate(self.rows):
            if self.broken and number >= len(self.rows) // 2:
                raise ValueError("shard-2.jsonl.gz is cut or damaged")
            yield row


def test_data_that_cannot_be_read_is_said_with_what_is_kept(encoder_folder, llm_folder, tmp_path) -> None:
    rows = _Unreadable(ROWS)
    settings = {"lookahead": 4, "save_steps": 100}
    with pytest.raises(RunFailed, match=r"shard-2.jsonl.gz is cut or damaged; .*checkpoint-(\d+) is complete") as error:
        adapt(_config(encoder_folder, llm_folder, tmp_path / "run", **settings), rows)
    kept = last_complete(tmp_path / "run")
    assert kept is not None and kept.name in str(error.value)
    rows.broken = False
    adapt(_config(encoder_folder, llm_folder, tmp_path / "run", resume=True, **settings), rows)
    adapt(_config(encoder_folder, llm_folder, tmp_path / "whole", **settings), rows)
    assert same_weights(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
