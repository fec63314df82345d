"""The teacher's cache gives the states of the teacher on the fly, is shared, resumed, and refused when it does not fit."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mtllm_fast import MTLLM, TextRow
from mtllm_fast.data.collate import collate
from mtllm_fast.losses import DistillationLoss, DistillationWeights
from mtllm_fast.models import HeadConfig, LoraSettings
from mtllm_fast.models.frozen import quantize_frozen
from mtllm_fast.training import AdaptConfig, DistillConfig, adapt, distill, teacher_cache
from mtllm_fast.training.stage import Stage
from mtllm_fast.training.task_teacher import TEACHER, add_teacher
from mtllm_fast.training.teacher_cache import KeyedRows, open_or_build
from tests.models.weights import stir
from tests.tiny import LINES, build_llm_folder
from tests.training.short_runs import optim, same_weights, weights

ROWS = [TextRow(line) for line in (*LINES, LINES[0])]
CHOICES = [TextRow(line, choices=("yes it is", "no", "nobody can know"), label=i % 3) for i, line in enumerate(LINES)]
SETTINGS = {"max_tokens": 96, "max_length": 48, "bf16": False}


def _models(folder: Path, encoder: str, llm: str, head: HeadConfig) -> tuple[str, str]:
    """An adapted stack and a task teacher with weights that are not the identity."""
    torch.manual_seed(3)
    stack = MTLLM.stack(encoder, llm, lora=LoraSettings(dropout=0.0), dtype=torch.float32)
    teacher = MTLLM.stack(None, llm, reader="llm", lora=LoraSettings(dropout=0.0), head=head, dtype=torch.float32)
    for model, name in ((stack, "adapted"), (teacher, "teacher")):
        stir(model, 0.05).save_pretrained(folder / name)
    return str(folder / "adapted"), str(folder / "teacher")


@pytest.fixture(scope="module")
def models(tmp_path_factory, encoder_folder, llm_folder) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return _models(folder, encoder_folder, llm_folder, HeadConfig("classification", ("good", "bad")))


@pytest.fixture(scope="module")
def choice_models(tmp_path_factory, encoder_folder, llm_folder) -> tuple[str, str]:
    return _models(tmp_path_factory.mktemp("choice"), encoder_folder, llm_folder, HeadConfig("choice"))


def _built(folder: Path, teacher: str, rows=ROWS, **changes):
    return open_or_build(folder, rows, MTLLM.from_pretrained(teacher), **{**SETTINGS, **changes})


@pytest.mark.parametrize("kind", ["texts", "choices"])
def test_cached_losses_and_gradients_are_those_of_the_teacher_on_the_fly(
    kind, models, choice_models, tmp_path, matches
) -> None:
    (adapted, teacher), rows = (models, ROWS) if kind == "texts" else (choice_models, CHOICES)
    cache, report = _built(tmp_path, teacher, rows)
    assert (report.texts, report.computed) == (len(LINES), len(LINES))  # a text that stands twice is kept once
    found = []
    for cached in (False, True):
        torch.manual_seed(0)
        student = MTLLM.from_pretrained(adapted)
        add_teacher(student, teacher, adapter=not cached)
        loss = DistillationLoss(DistillationWeights(pooled_mse=1.0, head_kl=1.0, temperature=2.0))
        step = Stage(student, loss, teacher=cache if cached else None, adapter=TEACHER)
        batch = collate(
            list(KeyedRows(rows)), student.tokenizer, sides=("mt",) if cached else ("mt", "llm"), align=False
        )
        terms = step(batch)
        total = step.loss.total(terms, step.counts(batch))
        total.backward()
        gradient = student.projection.layers.weight.grad
        assert gradient is not None and student.head.linear.weight.grad is None
        found.append((torch.stack([term.sum for term in terms.values()]), gradient))
    for mine, theirs in zip(found[1], found[0], strict=True):
        matches(mine, theirs, 1e-4)


def test_keyed_rows_keep_their_names() -> None:
    rows = [TextRow("a text", id="a name"), TextRow("another text, which has none")]
    named = [row.id[:-33] for row in KeyedRows(rows)]
    assert named == ["a name", "'another text, which has none'"]


def test_it_is_built_once_and_then_only_read(models, tmp_path) -> None:
    first, _ = _built(tmp_path, models[1])
    again, report = _built(tmp_path, models[1], ROWS)
    assert report.computed == 0
    assert isinstance(again.states, np.memmap) and not again.states.flags.writeable
    assert np.array_equal(first.states, again.states)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [again.folder.name]


def test_another_teacher_other_data_or_settings_get_a_cache_of_their_own(models, tmp_path, caplog) -> None:
    first, _ = _built(tmp_path, models[1])
    state = weights(Path(models[1]))
    other = tmp_path / "other"
    MTLLM.from_pretrained(models[1]).save_pretrained(other)
    name = next(name for name in state if "lora_B" in name)
    state[name][0, 0] += 1e-3
    save_file(state, other / "model.safetensors")
    for part, build in {
        "teacher weights": lambda: _built(tmp_path, str(other)),
        "data": lambda: _built(tmp_path, models[1], ROWS[:4]),
        "settings": lambda: _built(tmp_path, models[1], max_length=24),
    }.items():
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            cache, report = build()
        assert cache.folder != first.folder and report.computed > 0
        assert any(part in message for message in caplog.messages)


def test_the_state_of_the_head_does_not_make_a_cache_stale(models, tmp_path) -> None:
    _built(tmp_path / "cache", models[1])
    state = weights(Path(models[1]))
    MTLLM.from_pretrained(models[1]).save_pretrained(tmp_path / "other")
    state["head.linear.weight"] += 1.0
    save_file(state, tmp_path / "other" / "model.safetensors")
    assert _built(tmp_path / "cache", str(tmp_path / "other"))[1].computed == 0


def test_a_stale_cache_is_refused(models, tmp_path) -> None:
    cache, _ = _built(tmp_path, models[1])
    meta = json.loads((cache.folder / "meta.json").read_text())
    meta["made_from"]["teacher weights"] = "0" * 64
    (cache.folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="stale, it was made from another teacher weights"):
        _built(tmp_path, models[1])


@pytest.mark.parametrize("damage", ["cut", "bit", "gone", "meta"])
def test_a_damaged_cache_is_refused(damage, models, tmp_path) -> None:
    cache, _ = _built(tmp_path, models[1])
    data, name = cache.folder / "states.bin", "states.bin"
    content = bytearray(data.read_bytes())
    if damage == "cut":
        data.write_bytes(content[:-4])
    elif damage == "bit":
        content[100] ^= 1
        data.write_bytes(content)
    elif damage == "gone":
        (cache.folder / "keys.npy").unlink()
        name = "keys.npy"
    else:
        (cache.folder / "meta.json").write_text("{")
        name = "meta.json"
    with pytest.raises(ValueError, match=name):
        _built(tmp_path, models[1])


def test_an_interrupted_build_goes_on(models, tmp_path, monkeypatch) -> None:
    whole, _ = _built(tmp_path / "whole", models[1])
    monkeypatch.setattr(teacher_cache, "WINDOW", 2)
    read, calls = teacher_cache._Pass.read, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return read(*arguments)

    monkeypatch.setattr(teacher_cache._Pass, "read", failing)
    with pytest.raises(OSError, match="4 of 6 texts are kept"):
        _built(tmp_path / "cut", models[1])
    (building,) = (tmp_path / "cut").glob("*.building")
    progress = json.loads((building / "progress.json").read_text())
    del progress["sizes"]  # as an older version left it
    (building / "progress.json").write_text(json.dumps(progress))
    with (building / "states.bin").open("ab") as handle:
        handle.write(b"a torn write")
    cache, report = _built(tmp_path / "cut", models[1])
    assert report.computed == 2
    assert np.allclose(cache.states, whole.states, atol=1e-5) and not building.exists()


def test_two_processes_share_one_build(forked, models, tmp_path) -> None:
    code = (
        "import sys; from mtllm_fast import MTLLM, TextRow; from tests.tiny import LINES\n"
        "from mtllm_fast.training.teacher_cache import open_or_build\n"
        "rows = [TextRow(line) for line in LINES]\n"
        "c, r = open_or_build(sys.argv[1], rows, MTLLM.from_pretrained(sys.argv[2]), max_tokens=96, max_length=48, bf16=False)\n"
        "print(r.computed, c.states.shape[0])"
    )
    outputs = sorted(out.split()[-2:] for out in forked.group(tmp_path / "shared", models[1], code=code, joined=False))
    assert outputs == [["0", "6"], ["6", "6"]]


def test_a_text_that_is_not_in_the_cache_is_named(models, tmp_path) -> None:
    cache, _ = _built(tmp_path, models[1])
    with pytest.raises(ValueError, match="has not all texts"):
        cache.places([next(iter(KeyedRows([TextRow("another text")]))).id])


def test_choices_of_different_numbers_are_refused(choice_models, tmp_path) -> None:
    rows = [*CHOICES, replace(CHOICES[0], choices=("a", "b"))]
    with pytest.raises(ValueError, match="choices"):
        _built(tmp_path, choice_models[1], rows)


def _config(models: tuple[str, str], output: Path, **changes) -> DistillConfig:
    return DistillConfig(*models, output=str(output), train=optim(max_steps=6, lr=1e-3), **changes)


def test_distill_from_a_cache_is_the_same_run_whether_it_was_there_or_not(models, tmp_path) -> None:
    for name in ("a", "b"):
        config = _config(
            models, tmp_path / name, teacher_cache=str(tmp_path / "cache"), loss=DistillationWeights(0.0, head_kl=1.0)
        )
        metrics = distill(config, ROWS)
        assert metrics["teacher_cache"]["computed"] == (len(LINES) if name == "a" else 0)
    assert same_weights(tmp_path / "a", tmp_path / "b")
    student, teacher = weights(tmp_path / "a"), weights(Path(models[1]))
    assert torch.equal(student["head.linear.weight"], teacher["head.linear.weight"])


def _adapt(models: tuple[str, str], output: Path, seed: int = 0, r: int = 4, **changes) -> dict[str, torch.Tensor]:
    """Weights of a short stage 1."""
    settings = {"lora": LoraSettings(r=r), "train": optim(max_steps=6, lr=1e-3, seed=seed)}
    adapt(AdaptConfig(*models, output=str(output), over_variance=True, **settings, **changes), ROWS)
    return weights(output)


def test_adapt_from_a_cache_is_the_run_without_it(encoder_folder, llm_folder, tmp_path, monkeypatch) -> None:
    models, cache = (encoder_folder, llm_folder), str(tmp_path / "cache")
    plain = _adapt(models, tmp_path / "plain")
    first = _adapt(models, tmp_path / "first", teacher_cache=cache)
    for name, value in plain.items():
        assert torch.allclose(first[name], value, rtol=1e-3, atol=1e-5), name
    with monkeypatch.context() as changed:  # control: what the cache holds is what is learned
        pack = teacher_cache._Pass._pack
        changed.setattr(teacher_cache._Pass, "_pack", lambda *a: (-pack(*a)[0], []))
        other = _adapt(models, tmp_path / "other", teacher_cache=str(tmp_path / "negated"))
    assert not torch.allclose(other["projection.layers.weight"], plain["projection.layers.weight"], rtol=1e-3)
    again = _adapt(models, tmp_path / "again", teacher_cache=cache)
    assert all(torch.equal(again[name], first[name]) for name in first)
    _adapt(models, tmp_path / "seed", seed=1, r=8, teacher_cache=cache)  # what a sweep varies shares the states
    computed = [
        json.loads((tmp_path / name / "result.json").read_text())["teacher_cache"]["computed"]
        for name in ("first", "again", "seed")
    ]
    assert computed == [len(LINES), 0, 0]


def test_an_adapter_does_not_change_what_the_bare_llm_teaches(models, tmp_path) -> None:
    student = MTLLM.from_pretrained(models[0])
    cache, _ = open_or_build(tmp_path, ROWS, student, **SETTINGS)
    batch = collate(list(KeyedRows(ROWS)), student.tokenizer, sides=("llm",), align=False)
    taught = student.pool(student.teacher_states(batch.llm), batch.llm)
    held = torch.from_numpy(cache.states[cache.places(batch.ids)])
    assert torch.allclose(held, taught, atol=1e-5)
    adapted = student.pool(student.llm(batch.llm), batch.llm)
    assert not torch.allclose(held, adapted, atol=1e-2)
    stir(student, 1.0, "lora_")
    assert open_or_build(tmp_path, ROWS, student, **SETTINGS)[1].computed == 0
    with torch.no_grad():
        next(iter(student.llm.decoder.layers[0].self_attn.q_proj.parameters())).add_(1e-3)
    assert open_or_build(tmp_path, ROWS, student, **SETTINGS)[1].computed == len(LINES)


@pytest.mark.parametrize("which", [0, 1])
def test_states_over_a_quantised_base_are_those_of_the_quantised_teacher(encoder_folder, tmp_path, which) -> None:
    llm = build_llm_folder(tmp_path / "llm", hidden_size=64)  # fp8 takes multiples of 16
    models = _models(tmp_path, encoder_folder, llm, HeadConfig("classification", ("good", "bad")))
    folder = tmp_path / "cache"
    plain, _ = _built(folder, models[which])
    cache, report = _built(folder, models[which], base_weights="fp8")
    assert report.computed == len(LINES) and cache.folder != plain.folder
    teacher = MTLLM.from_pretrained(models[which])
    assert quantize_frozen(teacher.backbone.layers_root, "fp8", "cpu")
    states = open_or_build(tmp_path / "own", ROWS, teacher, **SETTINGS)[0].states
    assert np.allclose(cache.states, states, atol=1e-5)
    assert not np.allclose(cache.states, plain.states, atol=1e-3)
    assert _built(folder, models[which], base_weights="fp8")[1].computed == 0
