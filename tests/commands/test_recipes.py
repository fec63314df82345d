"""Every recipe of the library at tiny size: to its end, and stopped within a step and gone on with to the same bytes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from mtllm_fast import MTLLM, LoraSettings
from mtllm_fast.commands import recipe_run
from mtllm_fast.commands.recipe_file import names, read_recipe
from mtllm_fast.commands.recipe_run import Known, RecipeRun
from mtllm_fast.data.prompt import Prompt
from mtllm_fast.failures import RunFailed
from mtllm_fast.training.stage import Stage
from tests.commands.recipe_steps import QUICK, inside, write_data, write_pairs

STEPS = 3
TINY = [*QUICK, f"*.max_steps={STEPS}", "*.log_steps=1", "*.lr=1e-2"]
OWN = {"layer_swap": ["swapped.bottom=0", "swapped.top=1", "swapped.between=0"]}  # the LLM has two layers
OWN |= {name: ["answers.max_new_tokens=6"] for name in ("sdrrl", "sdrrl_ce")}
OWN["mid_align"] = ["align.loss.contrast_layer=1"]
OWN["copsd"] = ["first_answers.max_new_tokens=6", "second_answers.max_new_tokens=6"]
# the encoder has two layers; the whole one's classifier is not to be that of encoder_only, which would take it
OWN["bistil"] = ["smaller.layers=1", "whole_classifier.lr=2e-2"]
WRITERS = {"copsd", "mindmerger", "mindmerger_replaced", "langbridge", "sdrrl", "sdrrl_ce", "xcot"}
PROMPTED = WRITERS | {"lusifer"}  # it wrote in its first stage
WITH_ENCODER = {"lusifer"}  # whose encoder is trained


@pytest.fixture(scope="module")
def world(tmp_path_factory, encoder_folder, llm_folder):
    root = tmp_path_factory.mktemp("recipes")
    given = {**write_data(root), **write_pairs(root), "start": str(root / "start"), "labels": "a, b,c"}
    given["texts"] = given["prompts"]
    given["corpus"] = given["english"]
    stack = MTLLM.stack(encoder_folder, llm_folder, causal=True, lora=LoraSettings(r=2), dtype=torch.float32)
    stack.config.prompt = Prompt(after="\nAnswer:")
    stack.save_pretrained(root / "start")
    known: Known = {}

    def job(name: str, folder: str, save_steps: int = 100) -> RecipeRun:
        writes = any(step.takes("max_target_tokens") for step in read_recipe(name).steps.values())
        own = [f"*.save_steps={save_steps}", *OWN.get(name, []), *(["*.max_target_tokens=16"] * writes)]
        recipe = read_recipe(name, [*TINY, *own])
        data = recipe.complete({role: value for role, value in given.items() if role in recipe.data})
        models = {role: at for role, at in (("encoder", encoder_folder), ("llm", llm_folder)) if role in recipe.uses}
        return RecipeRun(recipe, str(root / folder / name), data=data, seed=3, **models)

    return job, known


def weights(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def stop_in_step(monkeypatch, number: int) -> None:
    """Ctrl-C in a training step after `number` of them."""
    done = []

    def forward(self, batch, forward=Stage.forward):
        done.append(1)
        if len(done) > number:
            raise KeyboardInterrupt
        return forward(self, batch)

    monkeypatch.setattr(Stage, "forward", forward)


@pytest.mark.parametrize("name", names())
def test_a_recipe_runs_and_goes_on_where_it_was_stopped(name: str, world, monkeypatch) -> None:
    job, known = world
    monkeypatch.setattr(recipe_run, "run_measured", inside)
    whole = job(name, "whole")
    before = len(known)
    whole.run(known)  # the steps that recipes share are run once here
    assert whole.model == Path(whole.output) / whole.recipe.steps[whole.recipe.result].output
    assert len(known) > before, "its last step is that of another recipe"
    model = MTLLM.from_pretrained(whole.model)
    assert (model.config.prompt is not None) == (name in PROMPTED)
    assert (model.config.encoder_adapter is not None) == (name in WITH_ENCODER)
    assert (model.head is None) == (name in WRITERS)
    assert (model.config.fusion is not None) == (name == "filter")

    # stopped in the last step but one that trains, or the only one, and gone on with; from there on every step is run
    part = job(name, "part", save_steps=1)
    training = [step for step in part.recipe.steps.values() if step.takes("resume")]
    stop = training[-2] if len(training) > 1 else training[0]
    order = list(part.recipe.steps)
    earlier, later = order[: order.index(stop.name)], order[order.index(stop.name) :]
    there = {key: known[key] for key in map(part._computes, earlier)}
    with monkeypatch.context() as patch:
        stop_in_step(patch, 2)
        with pytest.raises(RunFailed, match=f"step {stop.name}: mtllm .* ended with exit code 130"):
            part.run(there)
    stopped = Path(part.output) / stop.output
    assert list(stopped.glob("checkpoint-*")) and not (stopped / "model.safetensors").exists()
    again = job(name, "part", save_steps=1)
    again.run()
    assert json.loads((stopped / "versions.json").read_text())[1:], "it was not resumed"
    assert weights(again.model) == weights(whole.model)
    assert not any(again.record.steps[step].taken_from for step in later)


def test_recipes_that_share_steps_ran_them_once(world) -> None:
    job, _ = world
    contrast = job("mt_llm_contrast", "whole").record.steps
    plain = job("mt_llm", "whole").record.steps
    if not (contrast["teacher"].finished and plain["teacher"].finished):
        pytest.skip("needs the runs of the tests before")
    assert contrast["teacher"].taken_from and plain["teacher"].taken_from, "direct runs first, by its name"
    assert not contrast["adapt"].taken_from


def test_the_recipes_with_labels_in_the_test_languages_are_those_that_learn_from_translated_rows() -> None:
    assert [name for name in names() if read_recipe(name).labels_in_test_language] == ["filter", "xcot"]
