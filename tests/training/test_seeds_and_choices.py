"""Several seeds in one command; multiple choice through all stages; what validation accepts."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch

from mtllm_fast import MTLLM, Engine, TextRow
from mtllm_fast.losses import DistillationWeights
from mtllm_fast.models import LoraSettings
from mtllm_fast.training import DistillConfig, FinetuneConfig, distill, finetune, run_seeds
from tests.tiny import LINES
from tests.training.short_runs import optim, weights

TASK = [TextRow(line + " " + ("good", "bad")[i % 2], label=i % 2) for i, line in enumerate(LINES * 2)]
# the right choice repeats the last word of the text
CHOICES = [
    TextRow(line, choices=tuple("the bridge" if c == i % 3 else "a mill" for c in range(3)), label=i % 3)
    for i, line in enumerate(LINES * 3)
]


_optim = partial(optim, tokens=192, max_length=64, log_steps=5)


def test_seeds_run_once_each_and_go_on_where_they_stopped(llm_folder, tmp_path) -> None:
    output = tmp_path / "teacher"
    config = FinetuneConfig(llm=llm_folder, output=str(output), train=_optim(max_steps=4, lr=1e-3))
    ran: list[int] = []

    def train(settings: FinetuneConfig) -> dict:
        if settings.train.seed == 44 and ran == [42, 43]:
            raise KeyboardInterrupt
        ran.append(settings.train.seed)
        return finetune(settings, TASK, ["good", "bad"], TASK[:4])

    with pytest.raises(KeyboardInterrupt):
        run_seeds(config, (42, 43, 44), train)
    written = (output / "seed-42" / "model.safetensors").stat().st_mtime_ns
    summary = run_seeds(config, (42, 43, 44), train)
    assert (output / "seed-42" / "model.safetensors").stat().st_mtime_ns == written  # finished ones are only read
    assert json.loads((output / "summary.json").read_text()) == summary
    assert list(summary["seeds"]) == ["42", "43", "44"] and summary["sample_std"] is not None
    heads = [weights(output / f"seed-{seed}")["head.linear.weight"] for seed in (42, 43)]
    assert not torch.equal(*heads)
    for seeds in ((), (42, 42), (-1,)):
        with pytest.raises(ValueError, match="seeds"):
            run_seeds(config, seeds, train)
    changed = FinetuneConfig(llm=llm_folder, output=str(output), train=_optim(lr=5e-3))
    with pytest.raises(ValueError, match=r"lr=0\.005"):
        run_seeds(changed, (42,), train)


def test_the_placeholder_names_each_seeds_own_teacher(tmp_path) -> None:
    config = DistillConfig(model="m", teacher="t/seed-{seed}", output=str(tmp_path))
    seen: list[str] = []
    run_seeds(config, (1, 2), lambda one: seen.append(f"{one.teacher} {one.model} {one.train.seed}") or {})
    assert seen == ["t/seed-1 m 1", "t/seed-2 m 2"]


def test_multiple_choice_through_finetune_and_distill(encoder_folder, llm_folder, tmp_path) -> None:
    teacher, adapted = tmp_path / "teacher", tmp_path / "adapted"
    config = FinetuneConfig(llm=llm_folder, output=str(teacher), train=_optim(max_steps=40, lr=1e-2))
    metrics = finetune(config, CHOICES, (), CHOICES)
    assert metrics["best_eval_accuracy"] > 0.8
    assert MTLLM.from_pretrained(teacher).config.head.kind == "choice"
    MTLLM.stack(encoder_folder, llm_folder, lora=LoraSettings(), dtype=torch.float32).save_pretrained(adapted)
    for name, cache in (("fly", ""), ("cached", str(tmp_path / "cache"))):
        output = tmp_path / name
        settings = DistillConfig(
            str(adapted), str(teacher), str(output), cache, train_projection=True,
            loss=DistillationWeights(head_kl=1.0, temperature=2.0), train=_optim(max_steps=50, lr=1e-2),
        )  # fmt: skip
        assert distill(settings, CHOICES, CHOICES)["best_eval_accuracy"] > 0.8
        logits = Engine(MTLLM.from_pretrained(output)).classify(CHOICES)
        assert logits.shape == (len(CHOICES), 3)
    with pytest.raises(ValueError, match="has a choice head, but the rows have no choices"):
        distill(DistillConfig(str(adapted), str(teacher), str(tmp_path / "x"), train=_optim(max_steps=2)), TASK)


def test_the_direct_stack_learns_multiple_choice(encoder_folder, llm_folder, tmp_path) -> None:
    adapted = tmp_path / "adapted"
    MTLLM.stack(encoder_folder, llm_folder, lora=LoraSettings(), dtype=torch.float32).save_pretrained(adapted)
    before = weights(adapted)["projection.layers.weight"]
    for train_projection in (False, True):
        output = tmp_path / str(train_projection)
        config = FinetuneConfig(
            model=str(adapted), output=str(output), train_projection=train_projection, train=_optim(max_steps=3)
        )
        finetune(config, CHOICES, ())
        after = weights(output)["projection.layers.weight"]
        assert torch.equal(before, after) != train_projection


def test_the_best_checkpoint_is_chosen_on_labelled_english_only(llm_folder, tmp_path) -> None:
    config = FinetuneConfig(llm=llm_folder, output=str(tmp_path / "run"), train=_optim(max_steps=2))
    for bad, message in (
        (TextRow("un texte", "fra_Latn", label=0), "is fra_Latn: the best checkpoint is chosen on English alone"),
        (TextRow("a text"), "has no label"),
    ):
        with pytest.raises(ValueError, match=message):
            finetune(config, TASK, ["good", "bad"], [TASK[0], bad])


def test_a_run_killed_after_its_last_step_keeps_the_best_checkpoint(llm_folder, tmp_path) -> None:
    output = tmp_path / "run"
    config = FinetuneConfig(
        llm=llm_folder, output=str(output), train=_optim(max_steps=-1, epochs=6, lr=5e-2, keep=2)
    )  # so high a rate that accuracy goes up and down
    metrics = finetune(config, TASK, ["good", "bad"], TASK)
    best = weights(output)
    for name in ("result.json", "model.safetensors", "config.json"):
        (output / name).unlink()
    config.resume = True
    finetune(config, TASK, ["good", "bad"], TASK)
    again = weights(output)
    assert all(torch.equal(best[name], again[name]) for name in best)
    assert metrics["best_step"] > 0
