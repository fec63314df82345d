"""Texts learned together with their translations (FILTER): finetune, respond and evaluate with them, end to end."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from mtllm_fast import MTLLM, Engine, HeadConfig, LoraSettings, TextRow, cli
from mtllm_fast.data.collate import collate
from mtllm_fast.data.split import halves
from mtllm_fast.evaluation import evaluate
from mtllm_fast.losses import LabelWeights
from mtllm_fast.models import FusionSettings
from mtllm_fast.training.live import ModelFlops
from mtllm_fast.training.stage import Stage
from tests.commands.recipe_steps import WORDS
from tests.training.short_runs import logged, refused

LABELS = ["a", "b", "c"]
LANGUAGE = ["--language-column", "language"]
ENGLISH = ["--teacher-text-column", "english"]
FUSED = ["--fusion.layers", "1"]


def rows(count: int = 36, seed: int = 0) -> list[dict[str, str]]:
    """Texts that say nothing of their label; their English does."""
    rng = random.Random(seed)
    made = []
    for number in range(count):
        label = LABELS[number % 3]
        english = " ".join([rng.choice(WORDS[label].split()[:2])] * rng.randint(2, 4))
        made.append({"id": str(number), "text": "le texte", "language": "fra_Latn", "english": english, "label": label})
    return made


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("fusion")
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return root


QUIET = ["--max-length", "32", "--report-to", "none", "--no-progress", "--device", "cpu"]


def finetune(encoder: str, world: Path, output: Path, *options: str, main=cli.main) -> str | None:
    quick = ["--max-steps", "60", "--lr", "8e-3", "--tokens", "1024", "--max-rows", "64", "--lora.dropout", "0"]
    words = ["--encoder", encoder, "--text", str(world / "rows.jsonl"), "--labels", *LABELS, "--output", str(output)]
    return main(["finetune", *words, *QUIET, *quick, *options])


@pytest.fixture(scope="module")
def trained(world: Path, encoder_folder: str) -> Path:
    finetune(encoder_folder, world, world / "fused", *LANGUAGE, *ENGLISH, *FUSED, "--loss.partner-task", "1")
    return world / "fused"


def given(partners: bool = True, seed: int = 1) -> list[TextRow]:
    """Rows that were not learned from."""
    made = []
    for row in rows(24, seed):
        english = row["english"] if partners else None
        label = LABELS.index(row["label"])
        made.append(TextRow(row["text"], row["language"], id=row["id"], label=label, teacher_text=english))
    return made


def accuracy(folder: Path, texts: list[TextRow]) -> float:
    found = Engine(MTLLM.from_pretrained(folder)).classify(texts).argmax(-1)
    return float(np.mean([label == row.label for label, row in zip(found, texts)]))


# ---- finetune
def test_a_label_is_learned_that_the_translation_alone_tells(trained: Path, world: Path, encoder_folder: str) -> None:
    assert MTLLM.from_pretrained(trained).config.fusion == FusionSettings(1, 1)
    assert accuracy(trained, given()) > 0.9
    assert accuracy(trained, given(partners=False)) < 0.5, "the control: the text tells nothing"
    finetune(encoder_folder, world, world / "plain", *LANGUAGE, "--max-steps", "20")
    assert accuracy(world / "plain", given()) < 0.5, "the control: a model without fusion reads no translation"
    terms = list(logged(trained).values())
    assert terms and all(abs(one["loss"] - one["task"] - one["partner_task"]) < 1e-4 for one in terms)
    assert terms[-1]["partner_task"] < 0.5 * terms[0]["partner_task"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (ENGLISH, "--teacher-text-column english: nothing here reads it; it is for distill, and for --fusion.layers"),
        ([*FUSED, *LANGUAGE], "fusion: a text is read with its translation, and the rows have no teacher_text"),
        (["--loss.partner-task", "1"], "loss.partner_task=1.0: is of the translations that texts are read with"),
        (["--fusion.layers", "2", *ENGLISH], "fusion.first=1, fusion.layers=2: encoder="),
        (["--fusion.first", "-1"], "fusion.first=-1: must be >= 0"),
        (
            [*FUSED, *ENGLISH],
            "language is missing: beside a teacher_text_column, name the language that the text is in",
        ),
    ],
)
def test_what_does_not_fit_is_refused(world: Path, encoder_folder: str, tmp_path: Path, capsys, options, said) -> None:
    assert said in finetune(encoder_folder, world, tmp_path / "no", *options, main=partial(refused, capsys))
    assert not (tmp_path / "no").exists()


def test_an_llm_and_a_model_with_its_own_are_refused(
    world: Path, trained: Path, llm_folder: str, tmp_path: Path, capsys
) -> None:
    words = ["--text", str(world / "rows.jsonl"), "--labels", *LABELS, "--output", str(tmp_path / "no"), *LANGUAGE]
    cases = [
        (["--llm", llm_folder, *FUSED, *ENGLISH], "fusion.layers=1: is for an encoder alone (--encoder)"),
        (["--model", str(trained), *FUSED, *ENGLISH], "reads texts as it was first trained to"),
        (["--model", str(trained)], "fusion: a text is read with its translation, and the rows have no teacher_text"),
        (["--model", str(world / "no"), *ENGLISH], "no such folder"),
    ]
    for options, said in cases:
        assert said in refused(capsys, ["finetune", *words, *options])
    assert not (tmp_path / "no").exists()


def test_a_fused_model_is_trained_on(trained: Path, world: Path, tmp_path: Path) -> None:
    words = ["--model", str(trained), "--text", str(world / "rows.jsonl"), "--labels", *LABELS, *LANGUAGE, *ENGLISH]
    quick = ["--output", str(tmp_path / "on"), "--loss.partner-task", "1", "--max-steps", "1", "--tokens", "512"]
    cli.main(["finetune", *words, *QUIET, *quick])
    assert MTLLM.from_pretrained(tmp_path / "on").config.fusion == FusionSettings(1, 1)


# ---- one step
@pytest.fixture
def student(encoder_folder: str) -> MTLLM:
    torch.manual_seed(0)
    lora = LoraSettings(r=2, dropout=0.0)
    model = MTLLM.stack(encoder_folder, reader="encoder", head=HeadConfig(labels=tuple(LABELS)), lora=lora)
    model.set_fusion(FusionSettings(1, 1))
    return model.float()


def test_a_steps_loss_does_not_depend_on_its_packs(student: MTLLM) -> None:
    """Rows with and without a partner, in one pack and in two: the same terms, counts and gradients."""
    texts = [row if i % 3 else alone for i, (row, alone) in enumerate(zip(given(), given(partners=False)))]
    batch = collate(texts, student.require_tokenizer(), sides=("mt",), align=False)
    stage = Stage(student, LabelWeights(task=0.5, partner_task=1.0).objective())
    counts = stage.counts(batch)
    assert counts == {"task": 24, "partner_task": 16}

    def gradient(*parts) -> list[torch.Tensor]:
        student.zero_grad()
        total = sum(stage.loss.total(stage(part), counts) for part in parts)
        total.backward()
        return [total.detach()[None], *(p.grad.flatten() for p in student.parameters() if p.requires_grad)]

    whole, parts = torch.cat(gradient(batch)), torch.cat(gradient(*halves(batch)))
    assert torch.allclose(whole, parts, rtol=1e-4, atol=1e-6)
    wrong = torch.cat(gradient(halves(batch)[0]))
    assert not torch.allclose(whole, wrong, rtol=1e-2, atol=1e-3), "the control"


def test_attention_across_texts_is_counted(student: MTLLM) -> None:
    batch = collate(given(), student.require_tokenizer(), sides=("mt",), align=False)
    fused, lengths = ModelFlops(student)(batch), batch.side("mt").lengths
    student.set_fusion(FusionSettings())
    apart = ModelFlops(student)(batch)
    own = sum(n * n for n in lengths)
    across = sum((a + b) ** 2 for a, b in zip(lengths[::2], lengths[1::2])) - own
    assert fused - apart == pytest.approx(3 * 4 * 32 * 1 * across) and across > 0


# ---- respond
def respond(world: Path, trained: Path, output: Path, *options: str) -> list[dict]:
    words = ["--model", str(trained), "--text", str(world / "rows.jsonl"), "--labels", *LABELS, *LANGUAGE]
    cli.main(["respond", *words, "--output", str(output), "--device", "cpu", "--no-progress", *options])
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_soft_labels_are_those_of_texts_with_their_translations(world: Path, trained: Path, tmp_path: Path) -> None:
    soft = respond(world, trained, tmp_path / "soft.jsonl", *ENGLISH, "--label-column", "label")
    model = MTLLM.from_pretrained(trained)
    texts = [TextRow(row["text"], row["language"], teacher_text=row["english"]) for row in rows()]
    right = torch.log_softmax(torch.from_numpy(Engine(model).classify(texts)).double(), -1).numpy()
    found = np.array([record["log_likelihoods"] for record in soft])
    np.testing.assert_allclose(found, right, atol=2e-5)
    assert [record["teacher_text"] for record in soft] == [row["english"] for row in rows()]
    assert [record["gold"] for record in soft] == [row["label"] for row in rows()]
    alone = respond(world, trained, tmp_path / "alone.jsonl")
    assert "gold" not in alone[0] and "teacher_text" not in alone[0]
    assert not np.allclose([record["log_likelihoods"] for record in alone], right, atol=0.1), "the control"


def test_gold_labels_are_not_what_the_model_says(world: Path, trained: Path, tmp_path: Path, capsys) -> None:
    shifted = tmp_path / "rows.jsonl"
    turned = [{**row, "label": LABELS[(LABELS.index(row["label"]) + 1) % 3]} for row in rows()]
    shifted.write_text("".join(json.dumps(row) + "\n" for row in turned))
    soft = respond(tmp_path, trained, tmp_path / "soft.jsonl", *ENGLISH, "--label-column", "label")
    assert [record["gold"] for record in soft] == [row["label"] for row in turned]
    assert np.mean([record["gold"] == record["label"] for record in soft]) < 0.2
    words = ["--llm", "x", "--text", str(shifted), "--output", str(tmp_path / "no.jsonl")]
    said = refused(capsys, ["respond", *words, "--label-column", "label"])
    assert "--label-column label: goes with --labels" in said


# ---- evaluate
@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A task of three languages; a translation into English of each but two rows, and of none of one language."""
    for language in ("eng_Latn", "fra_Latn", "swh_Latn"):
        folder = tmp_path / "task" / language
        folder.mkdir(parents=True)
        lines = [
            f"{row['id']}\t{row['english' if language == 'eng_Latn' else 'text']}\t{row['label']}"
            for row in rows(24, 2)
        ]
        for split in ("train", "test"):
            (folder / f"{split}.tsv").write_text("id\ttext\tlabel\n" + "\n".join(lines) + "\n")
    translations = [
        {"id": row["id"], "language": "fra_Latn", "split": "test", "translation": row["english"], "source": row["text"]}
        for row in rows(24, 2)[:22]
    ]
    (tmp_path / "translations.jsonl").write_text("".join(json.dumps(one) + "\n" for one in translations))
    return tmp_path


def scores_of(found, model: int = 0) -> dict[str, float]:
    return {code: score.accuracy for code, score in found.models[model].languages.items()}


def test_translations_are_read_beside_the_texts(trained: Path, task: Path) -> None:
    options = {"source": task / "task", "progress": False, "resamples": 10, "cells": task / "cells"}
    alone = evaluate({"x": str(trained)}, "folder", **options)
    path = task / "translations.jsonl"
    beside = evaluate({"x": str(trained)}, "folder", translations=path, **options)
    assert scores_of(alone)["fra_Latn"] < 0.5 < 0.8 < scores_of(beside)["fra_Latn"]
    assert scores_of(alone)["swh_Latn"] == scores_of(beside)["swh_Latn"]
    assert scores_of(alone)["eng_Latn"] == scores_of(beside)["eng_Latn"]
    assert [model.name for model in beside.models] == ["x"], "no teacher, no translate-test"
    assert "reads a text alone, without the English translation" in " ".join(alone.models[0].notes)
    assert "reads a text together with its translation into eng_Latn" in " ".join(beside.models[0].notes)
    assert beside.models[0].counts["translations_missing"] == 2 + 24, "read alone, and counted"
    again = evaluate({"x": str(trained)}, "folder", translations=path, **options)
    assert scores_of(again) == scores_of(beside)
    # other translations are other cells
    path.write_text(path.read_text().replace("river", "bread").replace("bridge", "apples"))
    assert scores_of(evaluate({"x": str(trained)}, "folder", translations=path, **options))["fra_Latn"] < 0.8


def test_what_translations_do_not_go_with(trained: Path, world: Path, task: Path, encoder_folder: str) -> None:
    options = {"source": task / "task", "progress": False, "translations": task / "translations.jsonl"}
    with pytest.raises(ValueError, match="centre=2: is of texts that are read alone"):
        evaluate({"x": str(trained)}, "folder", centre=2, **options)
    plain = MTLLM.stack(encoder_folder, reader="encoder", head=HeadConfig(labels=tuple(LABELS)))
    with pytest.raises(ValueError, match="translate-test needs both"):
        evaluate({"x": plain}, "folder", **options)
    with pytest.raises(ValueError, match="some of its seeds read texts with translations: no mean over both"):
        evaluate({"x": [str(trained), plain]}, "folder", **options)
    found = evaluate({"x": MTLLM.from_pretrained(trained)}, "folder", teacher=plain, resamples=10, **options)
    assert [model.name for model in found.models] == ["x", "translate-test"]
    assert scores_of(found)["fra_Latn"] > 0.8
