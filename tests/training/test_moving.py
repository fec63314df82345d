"""Folders that move, runs that go on further, and models that training starts from."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtllm_fast import MTLLM, TextRow
from mtllm_fast.losses import DistillationWeights
from mtllm_fast.models import HeadConfig, LoraSettings, ProjectionConfig
from mtllm_fast.models.fingerprint import same_model
from mtllm_fast.models.mtllm import MTLLMConfig
from mtllm_fast.models.names import is_path
from mtllm_fast.models.storage import local_folder
from mtllm_fast.training import AdaptConfig, adapt
from mtllm_fast.training.stage import Stage
from mtllm_fast.training.task_teacher import check_teacher
from tests.tiny import LINES
from tests.training.short_runs import entries, optim, weights

ROWS = [TextRow(f"{line} {i}") for i, line in enumerate(LINES * 4)]


@pytest.fixture
def home(tmp_path, encoder_folder, llm_folder) -> Path:
    """A folder with base models and a stack on them."""
    home = tmp_path / "home"
    for name, source in {"encoder": encoder_folder, "llm": llm_folder}.items():
        shutil.copytree(source, home / "bases" / name)
    torch.manual_seed(0)
    stack = MTLLM.stack(str(home / "bases/encoder"), str(home / "bases/llm"), lora=LoraSettings(), dtype=torch.float32)
    stack.save_pretrained(home / "runs/adapted")
    return home


def _projection(folder: Path, **bases: str) -> torch.Tensor:
    model = MTLLM.from_pretrained(folder, **bases)
    assert model.projection is not None and model.llm is not None and model.encoder is not None
    return next(model.projection.parameters()).detach()


def test_a_model_is_found_after_its_folder_moved_with_its_base_models(home, tmp_path) -> None:
    before = _projection(home / "runs/adapted")
    shutil.move(home, tmp_path / "elsewhere")
    assert torch.equal(_projection(tmp_path / "elsewhere/runs/adapted"), before)


def test_base_models_can_be_named_where_they_are(home, tmp_path, llm_folder, encoder_folder) -> None:
    before = _projection(home / "runs/adapted")
    shutil.move(home / "runs/adapted", tmp_path / "adapted")
    assert torch.equal(_projection(tmp_path / "adapted"), before)  # the base models stayed
    shutil.rmtree(home)
    with pytest.raises(ValueError, match=r"its encoder='.*' is no folder here; say where it is now with --encoder"):
        MTLLM.from_pretrained(tmp_path / "adapted")
    with pytest.raises(ValueError, match=r"its llm=.*--llm"):
        MTLLM.from_pretrained(tmp_path / "adapted", encoder=encoder_folder)
    assert torch.equal(_projection(tmp_path / "adapted", encoder=encoder_folder, llm=llm_folder), before)
    model = MTLLM.from_pretrained(tmp_path / "adapted", encoder=encoder_folder, llm=llm_folder)
    model.save_pretrained(tmp_path / "again")  # and from then on
    assert torch.equal(_projection(tmp_path / "again"), before)
    alone = MTLLM.stack(None, llm_folder, reader="llm", dtype=torch.float32)
    alone.save_pretrained(tmp_path / "alone")
    with pytest.raises(ValueError, match="has no encoder"):
        MTLLM.from_pretrained(tmp_path / "alone", encoder=encoder_folder)


def test_models_are_compared_by_content(llm_folder, tmp_path) -> None:
    copy, sharded, other, wider = (tmp_path / name for name in ("copy", "sharded", "other", "wider"))
    for folder in (copy, other, wider, sharded):
        shutil.copytree(llm_folder, folder)
    assert same_model(llm_folder, str(copy))
    state = load_file(copy / "model.safetensors")
    names = sorted(state)
    (sharded / "model.safetensors").unlink()
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, held in parts.items():
        save_file({name: state[name] for name in held}, sharded / file, {"format": "pt"})
    index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    assert same_model(llm_folder, str(sharded)), "the same tensors in other files"
    changed = {name: tensor.clone() for name, tensor in state.items()}
    changed[names[-1]].view(-1)[-1] += 1
    save_file(changed, other / "model.safetensors", {"format": "pt"})
    assert not same_model(llm_folder, str(other)), "one value of one tensor"
    config = json.loads((wider / "config.json").read_text())
    (wider / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    assert not same_model(llm_folder, str(wider)), "another configuration"
    assert not same_model(llm_folder, str(tmp_path / "gone"))
    # a teacher on the copy is no other teacher
    student = MTLLMConfig(llm=llm_folder, encoder="e", adapters={"student": LoraSettings()})
    head = HeadConfig("classification", ("a", "b"))

    def teacher(folder: Path) -> MTLLMConfig:
        return MTLLMConfig("llm", llm=str(folder), adapters={"student": LoraSettings()}, head=head)

    check_teacher(student, teacher(copy), "runs/teacher")
    with pytest.raises(ValueError, match="which is another"):
        check_teacher(student, teacher(other), "runs/teacher")


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("facebook/nllb-200-distilled-600M", False),
        ("gpt2", False),
        ("here/model", True),  # misspelt: `here` is a folder
        ("here", True),
        ("./model", True),
        ("../model", True),
        ("/models/llama", True),
        ("~/llama", True),
        ("models/llama/8b", True),
        ("models/llama/", True),
        ("models\\llama", True),
        ("my model", True),
    ],
)
def test_names_that_are_paths_never_go_to_the_hub(name, path, tmp_path, monkeypatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    asked = []

    def ask(name: str, **options: object) -> str:
        asked.append(name)
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", ask)
    assert is_path(name) == path
    if path or "/" not in name:
        assert local_folder(name) == Path(name) and not asked
        with pytest.raises(ValueError, match=r"no such folder|holds no config\.json"):
            MTLLM.from_pretrained(name)
    else:
        with pytest.raises(ValueError, match="neither a folder nor reachable"):
            local_folder(name)
        assert asked == [name]


def test_a_lost_tokenizer_folder_is_named(home) -> None:
    shutil.rmtree(home / "runs/adapted/llm_tokenizer")
    with pytest.raises(ValueError, match="llm_tokenizer is missing"):
        MTLLM.from_pretrained(home / "runs/adapted")


# ---- further
_optim = partial(optim, max_steps=3, lr=1e-3, warmup=0.0)


def _adapt(output: Path, *, resume: bool = False, config: dict, **train) -> dict:
    loss = DistillationWeights(pooled_mse=1.0)
    return adapt(AdaptConfig(output=str(output), loss=loss, resume=resume, train=_optim(**train), **config), ROWS)


def _logged(output: Path, name: str) -> list[float]:
    return [entry[name] for entry in entries(output) if name in entry]


def test_a_finished_run_goes_on_with_more_steps(encoder_folder, llm_folder, tmp_path, monkeypatch) -> None:
    seen, plain = [], Stage.forward

    def forward(self, batch):
        seen.append(batch.mt.input_ids.tolist())
        return plain(self, batch)

    monkeypatch.setattr(Stage, "forward", forward)
    config = {"encoder": encoder_folder, "llm": llm_folder}
    _adapt(tmp_path / "whole", config=config, max_steps=7)
    whole = list(seen)
    seen.clear()
    _adapt(tmp_path / "run", config=config)
    assert len(seen) == 3
    metrics = _adapt(tmp_path / "run", resume=True, config=config, max_steps=7)
    assert seen == whole, "the texts of steps 4 to 7 come after those of steps 1 to 3"
    # 3 steps fall from lr to 0, then those of the longer schedule: (7 - step) / 7, from the first new one on
    rates = [1e-3 * (3 - step) / 3 for step in range(3)] + [1e-3 * (7 - step) / 7 for step in range(3, 7)]
    assert _logged(tmp_path / "run", "learning_rate") == pytest.approx(rates)
    assert metrics["train_loss"] == pytest.approx(sum(_logged(tmp_path / "run", "loss")) / 7)
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["extended"] == [{"train.max_steps": [3, 7]}] and record["train"]["max_steps"] == 7


def test_adaptation_starts_from_an_adapted_model(home, tmp_path) -> None:
    model = home / "runs/adapted"
    state = load_file(model / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for name in state:  # nothing that a new stack starts with
        if "lora_B" in name:
            state[name] = torch.randn(state[name].shape, generator=generator) * 0.1
    save_file(state, model / "model.safetensors", {"format": "pt"})
    _adapt(tmp_path / "same", config={"model": str(model)}, max_steps=0)
    kept = weights(tmp_path / "same")
    assert kept.keys() == state.keys() and all(torch.equal(kept[name], state[name]) for name in state)
    _adapt(tmp_path / "run", config={"model": str(model)})
    trained = weights(tmp_path / "run")
    assert not any(torch.equal(trained[name], state[name]) for name in state if "lora_B" in name)
    assert json.loads((tmp_path / "run/run.json").read_text())["model"] == str(model)
    MTLLM.from_pretrained(tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"projection": ProjectionConfig(kind="mlp")}, "projection="),
        ({"causal": True}, "causal=True"),
        ({"init": "ridge"}, "init="),
    ],
)
def test_what_an_adapted_model_has_of_its_own(changes, named) -> None:
    with pytest.raises(ValueError, match=rf"^{named}.*model='runs/adapted' has its own"):
        AdaptConfig(model="runs/adapted", **changes)


def test_the_lora_of_an_adapted_model(home, tmp_path) -> None:
    model = str(home / "runs/adapted")
    with pytest.raises(ValueError, match=r"^lora=.*r=3.* has its own"):
        _adapt(tmp_path / "run", config={"model": model, "lora": LoraSettings(r=3)})
    assert not (tmp_path / "run").exists()


def test_models_that_adaptation_cannot_start_from(home, llm_folder, tmp_path) -> None:
    head = HeadConfig("classification", ("a", "b"))
    MTLLM.stack(None, llm_folder, reader="llm", head=head, dtype=torch.float32).save_pretrained(tmp_path / "teacher")
    for folder, reason in {tmp_path / "teacher": "not an adapted stack", tmp_path / "gone": "no such folder"}.items():
        with pytest.raises(ValueError, match=reason):
            _adapt(tmp_path / "run", config={"model": str(folder)})
    assert not (tmp_path / "run").exists()
