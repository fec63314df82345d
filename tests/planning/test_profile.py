"""`mtllm profile`: every part of a step is timed, the sum is the step, and a trace can be read."""

from __future__ import annotations

import json

import pytest
import torch

from mtllm_fast import MTLLM, LoraSettings, TextRow
from mtllm_fast.cli import main
from mtllm_fast.losses import DistillationWeights
from mtllm_fast.planning.profile import profile_steps
from tests.tiny import LINES

ROWS = [TextRow(line) for line in LINES]


@pytest.fixture
def stack(encoder_folder, llm_folder):
    return MTLLM.stack(encoder_folder, llm_folder, lora=LoraSettings(r=4))


def test_a_training_step(stack, tmp_path):
    trace = tmp_path / "trace.json"
    before = {n: p.detach().clone() for n, p in stack.named_parameters()}
    result = profile_steps(stack, ROWS, loss=DistillationWeights(kl=1.0), tokens=256, steps=2, trace=trace)
    parts = ["tokenise", "pack", "transfer", "encoder", "projection", "LLM teacher", "LLM student", "loss", "backward"]
    assert list(result.medians()) == [*parts, "optimizer", "other"]
    assert all(len(values) == 2 and min(values) >= 0 for values in result.seconds.values())
    assert all(result.seconds[part][0] > 0 for part in parts)
    assert all(0 < tokens <= 256 for tokens in result.mt_tokens + result.llm_tokens)
    changed = {n for n, p in stack.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert changed <= {n for n, p in stack.named_parameters() if p.requires_grad}
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert set(parts[3:]) <= names


def test_contrast_is_profiled_and_what_stage_1_lacks_is_named(stack):
    result = profile_steps(stack, ROWS, loss=DistillationWeights(0.0, contrast=1.0), tokens=256, steps=1, bf16=True)
    assert result.seconds["loss"][0] > 0 and result.texts[0] > 1
    with pytest.raises(ValueError, match="task > 0 needs task_head"):
        profile_steps(stack, ROWS, loss=DistillationWeights(task=1.0), tokens=256, steps=1)


def test_encoding_changes_nothing(stack):
    before = {n: p.detach().clone() for n, p in stack.named_parameters()}
    result = profile_steps(stack, ROWS, mode="encode", tokens=128, steps=1)
    assert {"encoder", "projection", "LLM", "pooling"} <= set(result.medians())
    assert not {"LLM teacher", "LLM student", "backward"} & set(result.medians())
    assert all(torch.equal(p, before[n]) for n, p in stack.named_parameters())


def test_bad_arguments(stack):
    with pytest.raises(ValueError, match="mode='train': expected adapt or encode"):
        profile_steps(stack, ROWS, mode="train")
    with pytest.raises(ValueError, match="need at least one"):
        profile_steps(stack, [])


def test_command(encoder_folder, llm_folder, tmp_path, capsys):
    text, file = tmp_path / "t.txt", tmp_path / "p.json"
    text.write_text("\n".join(LINES))
    options = ["--text", str(text), "--tokens", "128", "--max-length", "64", "--steps", "1", "--json", str(file)]
    main(["profile", "--encoder", encoder_folder, "--llm", llm_folder, *options])
    assert "whole step" in capsys.readouterr().out
    assert json.loads(file.read_text())["medians"]["backward"] > 0
    with pytest.raises(SystemExit):
        main(["profile", "--encoder", encoder_folder, "--text", str(text)])
    assert "name either --model, or both" in capsys.readouterr().err
