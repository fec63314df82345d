"""`train_encoder` in adapt and sft: what changes, runs that stop and go on, models that go on into the next stage."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mtllm_fast import MTLLM, LoraSettings, ProjectionConfig, TextRow
from mtllm_fast.data.collate import collate
from mtllm_fast.losses import DistillationWeights
from mtllm_fast.models import HeadConfig
from mtllm_fast.models.config import ENCODER_ADAPTER
from mtllm_fast.models.frozen import PACKAGES, frozen_linears
from mtllm_fast.training import AdaptConfig, DistillConfig, SftConfig, adapt, distill, sft
from mtllm_fast.training.adapt import build as adapt_build
from mtllm_fast.training.adapt import starting_model as adapted_start
from mtllm_fast.training.layer_swap import swap_layers
from mtllm_fast.training.run import Data
from mtllm_fast.training.sft import build
from mtllm_fast.training.sft import starting_model as sft_start
from mtllm_fast.training.switches import apply_switches
from tests.conftest import relative_error
from tests.models.weights import stir
from tests.tiny import LINES, build_llm_folder
from tests.training import short_runs
from tests.training.short_runs import nothing_loaded, weights

ROWS = [TextRow(f"{line} {i}", "eng_Latn", target=" ".join(line.split()[:3])) for i, line in enumerate(LINES * 4)]
TASK = [TextRow(line, "eng_Latn", label=i % 2) for i, line in enumerate(LINES * 2)]
LORA = LoraSettings(r=2, alpha=8, dropout=0.1)


optim = partial(short_runs.optim, max_steps=4, tokens=256, save_steps=2, lr=5e-3, warmup=0.0)


def run(stage: str, output: Path, *, resume: bool = False, train: dict | None = None, **settings) -> dict[str, Tensor]:
    """Train; returns what is saved."""
    made = SftConfig if stage == "sft" else AdaptConfig
    settings |= {"max_target_tokens": 16} if stage == "sft" else {}
    config = made(output=str(output), train=optim(**(train or {})), resume=resume, **settings)
    (sft if stage == "sft" else adapt)(config, ROWS)
    return weights(output)


def kinds(names) -> set[str]:
    """Encoder or LLM, and LoRA or its own weights."""
    return {".".join([name.split(".")[0], *(["lora"] if ".lora_" in name else [])]) for name in names}


def plain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The base models' weights under the names that they have without adapters over them."""
    return {name.replace(".base_layer.", "."): value.clone() for name, value in state.items() if ".lora_" not in name}


@torch.no_grad()
def states(model: MTLLM) -> Tensor:
    batch = collate(ROWS[:4], model.tokenizer, sides=("mt",), align=False)
    return model.eval().states(batch.mt)


@pytest.fixture(scope="module")
def bases(encoder_folder, llm_folder) -> dict[str, str]:
    return {"encoder": encoder_folder, "llm": llm_folder}


@pytest.fixture(scope="module")
def made(bases, tmp_path_factory) -> Path:
    """Models of one short sft each, the LLM frozen: `no`, `lora`, `all`."""
    root = tmp_path_factory.mktemp("made")
    for how in ("no", "lora", "all"):
        run("sft", root / how, **bases, train_encoder=how, train_llm=False, lora=LORA, train={"max_steps": 2})
    return root


@pytest.mark.parametrize(
    ("stage", "settings", "trained"),
    [
        ("sft", {"train_encoder": "no"}, {"projection", "llm.lora"}),
        ("sft", {"train_encoder": "lora"}, {"projection", "llm.lora", "encoder.lora"}),
        ("sft", {"train_encoder": "all"}, {"projection", "llm.lora", "encoder"}),
        ("sft", {"train_encoder": "lora", "train_llm": False, "train_projection": False}, {"encoder.lora"}),
        ("sft", {"train_encoder": "all", "train_llm": False, "train_projection": False}, {"encoder"}),
        ("adapt", {"train_encoder": "no"}, {"projection", "llm.lora"}),
        ("adapt", {"train_encoder": "lora"}, {"projection", "llm.lora", "encoder.lora"}),
        ("adapt", {"train_encoder": "all"}, {"projection", "llm.lora", "encoder"}),
    ],
)
def test_what_is_trained(stage, settings, trained, bases, tmp_path) -> None:
    start = SftConfig if stage == "sft" else AdaptConfig
    config = start(**bases, train=optim(), lora=LORA, **settings)
    torch.manual_seed(0)
    student = (build if stage == "sft" else adapt_build)(config, Data(ROWS), torch.float32).student
    asked = {name for name, p in student.named_parameters() if p.requires_grad}
    assert student.train().encoder.training == (settings["train_encoder"] != "no")
    saved = run(stage, tmp_path / "run", **bases, lora=LORA, train={"max_steps": 1}, **settings)
    model = MTLLM.from_pretrained(tmp_path / "run")
    before = plain(MTLLM.stack(*bases.values(), dtype=torch.float32).state_dict())
    after = {name.replace(".base_layer.", "."): value for name, value in model.state_dict().items()}
    changed = {name for name, value in after.items() if name not in before or not torch.equal(value, before[name])}
    assert kinds(asked) == trained
    assert kinds(changed) - {"projection"} == trained - {"projection"}, "a projection starts anew"
    assert {name for name in saved if name.startswith("encoder.")} == {n for n in asked if n.startswith("encoder.")}
    moved = [name for name in saved if "lora_B" in name and name.startswith("encoder.")]
    assert all(bool(saved[name].abs().max() > 0) for name in moved) and bool(moved) == ("encoder.lora" in trained)
    assert (model.config.encoder_adapter == LORA) == ("encoder.lora" in trained)


@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        ("sft", {"train_encoder": "lora", "train_llm": False, "lora": LORA, "mask_targets": 0.5}),
        ("adapt", {"train_encoder": "all", "lora": LORA}),
        ("sft", {"model": "all", "train_llm": False}),  # the encoder's own weights, frozen now
        ("adapt", {"model": "lora", "train_encoder": "lora"}),
    ],
    ids=["lora", "all", "no, from all", "lora again"],
)
def test_a_run_that_is_resumed_ends_in_the_same_bytes(stage, settings, made, bases, tmp_path) -> None:
    settings = {**settings, "model": str(made / settings["model"])} if "model" in settings else {**settings, **bases}
    whole = run(stage, tmp_path / "run", **settings)
    shutil.rmtree(tmp_path / "run/checkpoint-4")
    (tmp_path / "run/model.safetensors").unlink()
    middle = weights(tmp_path / "run/checkpoint-2")
    again = run(stage, tmp_path / "run", resume=True, **settings)
    assert again.keys() == whole.keys() == middle.keys() and any(name.startswith("encoder.") for name in whole)
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    assert not all(torch.equal(middle[name], whole[name]) for name in whole), "the control: two steps change something"


def test_going_on_with_a_lora(made, tmp_path) -> None:
    before = weights(made / "lora")
    lora = [name for name in before if f".{ENCODER_ADAPTER}." in name]
    assert len(lora) == 2 * 2 * 6
    frozen = run("sft", tmp_path / "frozen", model=str(made / "lora"), train_llm=False, train={"max_steps": 1})
    assert all(torch.equal(frozen[name], before[name]) for name in lora)
    again = run("sft", tmp_path / "again", model=str(made / "lora"), train_encoder="lora", train={"max_steps": 1})
    assert not any(torch.equal(again[name], before[name]) for name in lora if "lora_B" in name)
    assert MTLLM.from_pretrained(tmp_path / "again").config.encoder_adapter == LORA
    # the same weights: after no step they are those of before, and nothing else is there
    start = run("sft", tmp_path / "start", model=str(made / "lora"), train_encoder="lora", train={"max_steps": 0})
    assert all(torch.equal(start[name], before[name]) for name in lora)
    added = run(
        "sft", tmp_path / "added", model=str(made / "no"), train_encoder="lora", lora=LORA, train={"max_steps": 1}
    )
    assert {name for name in added if f".{ENCODER_ADAPTER}." in name} == set(lora)


def test_going_on_with_trained_weights(made, tmp_path) -> None:
    before = weights(made / "all")
    own = {name for name in before if name.startswith("encoder.")}
    assert len(own) > 30
    frozen = run("adapt", tmp_path / "frozen", model=str(made / "all"), train={"max_steps": 1})
    assert all(torch.equal(frozen[name], before[name]) for name in own)
    again = run("adapt", tmp_path / "again", model=str(made / "all"), train_encoder="all", train={"max_steps": 1})
    assert own <= set(again) and not torch.equal(*(one["encoder.model.layers.0.fc1.weight"] for one in (again, before)))
    both = run("sft", tmp_path / "both", model=str(made / "all"), train_encoder="lora", train={"max_steps": 1})
    kept = plain(both)
    assert all(torch.equal(kept[name], before[name]) for name in own)
    assert any(f".{ENCODER_ADAPTER}." in name for name in both)


def test_adapt_gives_a_model_of_sft_an_adapter(made, tmp_path) -> None:
    assert MTLLM.from_pretrained(made / "lora").config.adapters == {}
    config = AdaptConfig(model=str(made / "lora"), lora=LoraSettings(r=3))
    student = adapted_start(config, torch.float32)
    assert student.config.adapters == {"student": LoraSettings(r=3)} and student.config.encoder_adapter == LORA
    assert kinds(name for name, p in student.named_parameters() if p.requires_grad) == {"projection", "llm.lora"}
    saved = run("adapt", tmp_path / "run", model=str(made / "lora"), lora=LoraSettings(r=3), train={"max_steps": 1})
    assert kinds(saved) == {"projection", "llm.lora", "encoder.lora"}
    with pytest.raises(ValueError, match=r"lora=.*r=4.* has its own"):
        run("adapt", tmp_path / "next", model=str(tmp_path / "run"), lora=LoraSettings(r=4))
    assert not (tmp_path / "next").exists()


@pytest.mark.parametrize("stage", ["sft", "adapt"])
def test_what_is_trained_is_float32_over_a_bf16_model(stage, made, bases, tmp_path) -> None:
    start, kind = (sft_start, SftConfig) if stage == "sft" else (adapted_start, AdaptConfig)
    for given in (bases, {"model": str(made / "no")}):
        whole = start(kind(**given, train_encoder="all"), torch.bfloat16)
        assert {p.dtype for p in whole.encoder.parameters()} == {torch.float32}
        assert whole.llm.model.dtype == torch.bfloat16 and whole.encoder.name == bases["encoder"]
        lora = start(kind(**given, train_encoder="lora"), torch.bfloat16)
        trained = [p.dtype for p in lora.encoder.parameters() if p.requires_grad]
        assert set(trained) == {torch.float32} and lora.encoder.model.dtype == torch.bfloat16
    kept = start(kind(model=str(made / "all")), torch.bfloat16)
    saved = weights(made / "all")
    assert all(torch.equal(value, saved[name]) for name, value in kept.state_dict().items() if name in saved)
    assert start(kind(**bases), torch.bfloat16).encoder.model.dtype == torch.bfloat16, "the control"
    if stage == "sft":  # bf16 autocast, as on a GPU
        train = {"max_steps": 1, "bf16": True, "base_weights": "bf16"}
        saved = run("sft", tmp_path / "run", **bases, train_encoder="all", train_llm=False, train=train)
        assert {value.dtype for name, value in saved.items() if name.startswith("encoder.")} == {torch.float32}
        reloaded = MTLLM.from_pretrained(tmp_path / "run")
        assert all(torch.equal(reloaded.state_dict()[name], value) for name, value in saved.items())


@pytest.mark.parametrize("kind", ["fp8", "int8", "nf4"])
def test_quantised_base_weights_are_those_of_the_llm(kind, bases, tmp_path) -> None:
    if kind in PACKAGES:
        pytest.importorskip(PACKAGES[kind])
    llm = build_llm_folder(tmp_path / "llm", hidden_size=64)  # fp8 takes multiples of 16
    config = SftConfig(encoder=bases["encoder"], llm=llm, train_encoder="lora", train_llm=False)
    stage = build(config, Data(ROWS), torch.float32)
    before = [layer.weight for *_, layer in frozen_linears(stage.student.encoder.layers_root)]
    apply_switches(stage.student, optim(base_weights=kind), torch.device("cpu"))
    after = [layer.weight for *_, layer in frozen_linears(stage.student.encoder.layers_root)]
    assert len(before) == 12 and all(a is b and type(a) is nn.Parameter for a, b in zip(before, after, strict=True))
    assert not frozen_linears(stage.student.llm.layers_root), "the LLM's are no plain layers any more"
    batch = collate(ROWS[:3], stage.student.tokenizer, sides=("mt",), prompt=stage.student.config.prompt)
    stage.train().step(batch).backward()
    gradients = [p.grad for n, p in stage.student.encoder.named_parameters() if "lora_B" in n]
    assert gradients and all(bool(g.abs().max() > 0) for g in gradients)


def test_full_checkpointing_covers_an_encoder_that_is_trained(made) -> None:
    for name, how, covered in (("no", "no", False), ("lora", "no", False), ("lora", "lora", True), ("no", "all", True)):
        student = sft_start(SftConfig(model=str(made / name), train_encoder=how), torch.float32)
        apply_switches(student, optim(checkpointing="full"), torch.device("cpu"))
        assert {layer.gradient_checkpointing for layer in student.encoder.layers} == {covered}
        assert {layer.gradient_checkpointing for layer in student.llm.layers} == {True}


@pytest.fixture(scope="module")
def task_models(bases, tmp_path_factory) -> Path:
    """`adapted`, with a LoRA in the encoder, and `teacher`, with adapters that matter."""
    root = tmp_path_factory.mktemp("task")
    torch.manual_seed(5)
    adapted = MTLLM.stack(*bases.values(), lora=LoraSettings(r=2), dtype=torch.float32)
    adapted.train_encoder("lora", LORA)
    head = HeadConfig(labels=("a", "b"))
    teacher = MTLLM.stack(None, bases["llm"], reader="llm", head=head, lora=LoraSettings(r=2), dtype=torch.float32)
    for name, model in (("adapted", adapted), ("teacher", teacher)):
        stir(model, 0.1, "lora_B", "head.linear").save_pretrained(root / name)
    return root


@pytest.mark.parametrize("init_from", ["adapted", "teacher"])
def test_stage_3_keeps_it_frozen_and_saves_it(init_from, task_models, tmp_path) -> None:
    config = DistillConfig(
        str(task_models / "adapted"), str(task_models / "teacher"), str(tmp_path / "run"), init_from=init_from,
        loss=DistillationWeights(1.0, head_kl=1.0), train=optim(max_steps=2),
    )  # fmt: skip
    distill(config, TASK, labels=["a", "b"])
    before, after = weights(task_models / "adapted"), weights(tmp_path / "run")
    lora = [name for name in before if name.startswith("encoder.")]
    assert len(lora) == 24 and all(torch.equal(after[name], before[name]) for name in lora)
    assert not any("teacher" in name for name in after)
    student = MTLLM.from_pretrained(tmp_path / "run")
    assert student.config.encoder_adapter == LORA and student.head is not None
    expected = states(student)
    with student.encoder.adapter(None):
        assert relative_error(states(student), expected) > 1e-2


def test_swapped_layers_leave_it_alone(task_models, tmp_path) -> None:
    swapped = swap_layers(str(task_models / "adapted"), str(task_models / "teacher"), 0, 1, 0)
    adapted = MTLLM.from_pretrained(task_models / "adapted")
    batch = collate(ROWS[:3], adapted.tokenizer, sides=("mt",), align=False).mt
    with torch.no_grad():
        assert torch.equal(swapped.encoder_states(batch), adapted.encoder_states(batch))
    swapped.save_pretrained(tmp_path / "swapped")
    assert torch.equal(states(MTLLM.from_pretrained(tmp_path / "swapped")), states(swapped))


@pytest.mark.parametrize(
    ("stage", "settings", "said"),
    [
        ("sft", {"train_encoder": "some"}, "train_encoder='some': expected one of no, lora, all"),
        ("adapt", {"train_encoder": "some"}, "train_encoder='some': expected one of no, lora, all"),
        ("sft", {"reader": "llm", "encoder": "", "train_encoder": "lora"}, "train_encoder='lora': the LLM alone"),
        ("sft", {"reader": "llm", "encoder": "", "mask_targets": 0.5}, "mask_targets=0.5: .* the LLM alone has none"),
        ("sft", {"mask_targets": 1.5}, r"mask_targets=1.5: must be a share in \[0, 1\]"),
        ("sft", {"mask_targets": float("nan")}, "mask_targets=nan"),
        (
            "sft",
            {"train_llm": False, "train_projection": False},
            "train_llm=False, train_projection=False, train_encoder='no': nothing is trained",
        ),
        (
            "sft",
            {"train_encoder": "lora", "train_llm": False, "lora": LoraSettings(target_modules=("gate_proj",))},
            "train_encoder='lora': encoder='.*': lora.target_modules=.*no linear layer",
        ),
        ("adapt", {"model": "lora", "train_encoder": "all"}, "has a LoRA in its encoder; merge it before"),
        ("sft", {"model": "lora", "train_encoder": "all"}, "has a LoRA in its encoder; merge it before"),
        ("sft", {"model": "lora", "train_encoder": "lora", "train_llm": False, "lora": LORA}, "lora=.* has its own"),
    ],
)
def test_what_it_refuses_is_said_before_anything_is_loaded(
    stage, settings, said, made, bases, tmp_path, monkeypatch
) -> None:
    nothing_loaded(monkeypatch)
    settings = {**settings, "model": str(made / settings["model"])} if "model" in settings else {**bases, **settings}
    with pytest.raises(ValueError, match=said):
        run(stage, tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_it_is_recorded_and_older_runs_go_on_without(bases, tmp_path) -> None:
    settings = {**bases, "projection": ProjectionConfig(), "train": {"max_steps": 1}}
    run("sft", tmp_path / "run", **settings)
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["train_encoder"] == "no" and record["mask_targets"] == 0.0
    with pytest.raises(ValueError, match="--resume: train_encoder='lora'"):
        run("sft", tmp_path / "run", resume=True, train_encoder="lora", **settings)
    with pytest.raises(ValueError, match=r"--resume: mask_targets=0\.5"):
        run("sft", tmp_path / "run", resume=True, mask_targets=0.5, **settings)
    for name in ("train_encoder", "mask_targets"):
        del record[name]
    (tmp_path / "run/run.json").write_text(json.dumps(record))
    run("sft", tmp_path / "run", resume=True, **settings)
