"""A teacher's cache for losses that compare single tokens: states of tokens, or the moments of their distributions."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mtllm_fast import MTLLM, TextRow
from mtllm_fast.data.collate import collate
from mtllm_fast.losses import DistillationLoss, DistillationWeights
from mtllm_fast.models import LoraSettings
from mtllm_fast.training import AdaptConfig, OptimSettings, adapt, teacher_cache
from mtllm_fast.training.stage import Stage
from mtllm_fast.training.teacher_cache import Kept, KeyedRows, TeacherCache, open_or_build
from tests.tiny import LINES

ROWS = [TextRow(line) for line in (*LINES, LINES[0])]
SETTINGS = {"max_tokens": 96, "max_length": 48, "bf16": False}
LOSSES = {
    "moments": DistillationWeights(pooled_mse=1.0, kl=0.5, temperature=2.0),
    "moments, contrast": DistillationWeights(pooled_mse=0.0, kl=1.0, contrast=1.0),
    "states": DistillationWeights(pooled_mse=1.0, paired_mse=0.5, kl=0.5, temperature=2.0),
    "states, reverse": DistillationWeights(pooled_mse=0.0, kl=1.0, divergence="reverse"),
}


@pytest.fixture(scope="module")
def student(encoder_folder, llm_folder) -> MTLLM:
    torch.manual_seed(3)
    stack = MTLLM.stack(encoder_folder, llm_folder, lora=LoraSettings(dropout=0.0), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in stack.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return stack


def _cache(folder: Path, student: MTLLM, loss: DistillationWeights, **changes) -> TeacherCache:
    return open_or_build(folder, ROWS, student, **{**SETTINGS, **changes}, kept=Kept.for_loss(loss, student))[0]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", LOSSES)
def test_losses_and_gradients_are_those_of_the_teacher_on_the_fly(kind, bf16, student, tmp_path, matches) -> None:
    loss, found = LOSSES[kind], []
    cache = _cache(tmp_path, student, loss, bf16=bf16)
    assert cache.kept.tokens == kind.partition(",")[0]
    for teacher in (None, cache):
        student.zero_grad()
        step = Stage(student, DistillationLoss(loss), teacher=teacher)
        batch = collate(list(KeyedRows(ROWS)), student.tokenizer, sides=step.sides, align=step.align)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            terms = step(batch)
        step.loss.total(terms, step.counts(batch)).backward()
        gradient = student.projection.layers.weight.grad
        found.append((torch.stack([term.sum for term in terms.values()]).detach(), gradient.clone()))
        assert (step.taught(batch)[0].moments is not None) == (teacher is not None and kind.startswith("moments"))
    for mine, theirs in zip(found[1], found[0], strict=True):
        matches(mine, theirs, 1e-4)


def test_a_soft_capped_head_keeps_states(student, monkeypatch) -> None:
    assert Kept.for_loss(LOSSES["moments"], student).tokens == "moments"
    monkeypatch.setattr(student.llm.model.config, "final_logit_softcapping", 30.0, raising=False)
    assert Kept.for_loss(LOSSES["moments"], student).tokens == "states"


@pytest.mark.parametrize("kind", ["moments", "states"])
def test_an_interrupted_build_goes_on(kind, student, tmp_path, monkeypatch) -> None:
    whole = _cache(tmp_path / "whole", student, LOSSES[kind])
    monkeypatch.setattr(teacher_cache, "WINDOW", 2)
    sync, calls = teacher_cache.os.fsync, []

    def failing(descriptor: int) -> None:
        calls.append(1)
        if len(calls) == 8:  # in the second window
            raise OSError(28, "No space left on device")
        sync(descriptor)

    with monkeypatch.context() as full:
        full.setattr(teacher_cache.os, "fsync", failing)
        with pytest.raises(OSError, match="of 6 texts are kept"):
            _cache(tmp_path / "cut", student, LOSSES[kind])
    (building,) = (tmp_path / "cut").glob("*.building")
    kept = json.loads((building / "progress.json").read_text())["texts"]
    assert 0 < kept < len(LINES)
    again = _cache(tmp_path / "cut", student, LOSSES[kind])
    assert np.allclose(again.tokens, whole.tokens, atol=1e-5) and np.allclose(again.states, whole.states, atol=1e-5)
    for name in ("tokens.bin", "lengths.bin", "states.bin"):
        assert (again.folder / name).stat().st_size == (whole.folder / name).stat().st_size


def test_other_tokens_than_those_of_the_cache_are_refused(student, tmp_path) -> None:
    cache = _cache(tmp_path, student, LOSSES["states"])
    batch = collate(list(KeyedRows(ROWS)), student.tokenizer)
    renamed = replace(batch, ids=(*batch.ids[1:], batch.ids[0]))
    with pytest.raises(ValueError, match="its texts have other tokens than those of the batch"):
        cache.teach(renamed)


def _adapt(encoder: str, llm: str, output: Path, loss: DistillationWeights, cache: str = "") -> dict[str, torch.Tensor]:
    train = OptimSettings(
        max_steps=4, tokens=96, max_length=48, progress=False, report_to="none", device="cpu", lr=1e-3
    )
    config = AdaptConfig(encoder, llm, str(output), lora=LoraSettings(r=4), loss=loss, train=train, teacher_cache=cache)
    adapt(config, ROWS)
    return load_file(output / "model.safetensors")


@pytest.mark.parametrize("kind", ["moments", "states"])
def test_adapt_from_a_cache_is_the_run_without_it(kind, encoder_folder, llm_folder, tmp_path) -> None:
    models, loss, cache = (encoder_folder, llm_folder), LOSSES[kind], str(tmp_path / "cache")
    plain = _adapt(*models, tmp_path / "plain", loss)
    first = _adapt(*models, tmp_path / "first", loss, cache)
    for name, value in plain.items():
        assert torch.allclose(first[name], value, rtol=1e-3, atol=1e-5), name
    again = _adapt(*models, tmp_path / "again", replace(loss, pooled_mse=2.0), cache)
    assert not torch.allclose(
        again["projection.layers.weight"], plain["projection.layers.weight"], rtol=1e-3, atol=1e-5
    )
    _adapt(*models, tmp_path / "warmer", replace(loss, temperature=3.0), cache)
    computed = [
        json.loads((tmp_path / name / "result.json").read_text())["teacher_cache"]["computed"]
        for name in ("first", "again", "warmer")
    ]
    # weights of the terms change nothing of what is kept; the temperature is in the moments, and not in the states
    assert computed == [len(LINES), 0, len(LINES) if kind == "moments" else 0]


def test_what_a_loss_needs_is_kept_and_nothing_else(student) -> None:
    assert Kept.for_loss(DistillationWeights(), student) == Kept()
    assert asdict(Kept.for_loss(LOSSES["moments"], student)) == {"tokens": "moments", "temperature": 2.0}
    assert Kept.for_loss(LOSSES["states"], student) == Kept("states")
    jsd = DistillationWeights(kl=1.0, divergence="jsd", beta=0.3)
    assert Kept.for_loss(jsd, student) == Kept("states")


def test_a_head_that_the_kl_cannot_take_keeps_no_pooled_cache_away(student, tmp_path, monkeypatch) -> None:
    """Cohere and Granite scale their logits."""
    monkeypatch.setattr(student.llm.model.config, "logit_scale", 0.5, raising=False)
    assert not _cache(tmp_path, student, DistillationWeights()).needs_tokens
    with pytest.raises(ValueError, match="scales its logits by logit_scale"):
        _cache(tmp_path, student, LOSSES["moments"])


def test_another_head_is_another_cache(student, tmp_path, monkeypatch) -> None:
    first = _cache(tmp_path, student, LOSSES["moments"])
    head = student.llm.model.get_output_embeddings()
    monkeypatch.setattr(head, "bias", torch.nn.Parameter(torch.zeros(len(head.weight))))
    biased = _cache(tmp_path, student, LOSSES["moments"])
    with torch.no_grad():
        head.bias[3] = 5.0
    other = _cache(tmp_path, student, LOSSES["moments"])
    monkeypatch.setattr(head, "weight", torch.nn.Parameter(head.weight.detach() * 1.5))  # no longer the embeddings'
    untied = _cache(tmp_path, student, LOSSES["moments"])
    assert len({cache.folder for cache in (first, biased, other, untied)}) == 4
    assert not np.allclose(other.tokens, biased.tokens, atol=1e-3)
    assert not np.allclose(untied.tokens, other.tokens, atol=1e-3)
