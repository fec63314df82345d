"""The study of an LLM's own answers at tiny size: what each arm learns from, and that all are scored."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from benchmarks.real import own_answers
from mtllm_fast import cli
from tests.commands.recipe_steps import write_data


def test_arms_learn_from_what_they_say(encoder_folder: str, llm_folder: str, tmp_path: Path, monkeypatch) -> None:
    write_data(tmp_path)
    monkeypatch.setattr(own_answers, "run", lambda *words: cli.main(list(map(str, words))))
    monkeypatch.setattr(own_answers, "NOISE", 0.5)  # at 0.2 chance spares all of so few rows
    folder = tmp_path / "study"
    given = ["--encoder", encoder_folder, "--llm", llm_folder, "--task", "folder", "--data", str(tmp_path / "task")]
    arms = ["own answers + KL", "gold, 20 % wrong", "own answers, shuffled"]
    command = [*given, "--output", str(folder), "--seeds", "3", "--limit", "4", "--arms", *arms]
    own_answers.main(command)

    own, gold, noisy, mixed = (
        own_answers.read(folder / f"{name}.jsonl") for name in ("own", "gold", "noisy", "shuffled")
    )
    texts = [row["text"] for row in gold]
    assert len(texts) == 24 and all([row["text"] for row in rows] == texts for rows in (own, noisy, mixed))
    assert [row["target"] for row in gold] == ["a", "b", "c"] * 8
    wrong = sum(one["target"] != other["target"] for one, other in zip(gold, noisy, strict=True))
    assert 6 <= wrong <= 18 and {row["target"] for row in noisy} == {"a", "b", "c"}
    assert Counter(row["target"] for row in mixed) == Counter(row["target"] for row in own)
    for arm in arms:
        config = json.loads((folder / arm / "seed-3" / "result.json").read_text())
        assert config["train_loss"] > 0
    scores = json.loads((folder / "suite" / "scores.json").read_text())
    (task,) = scores["tasks"]
    assert [model["name"] for model in task["models"]] == ["LLM itself", *arms]
    assert all(len(model["languages"]) == 3 for model in task["models"])

    before = {path: path.stat().st_mtime_ns for path in folder.rglob("model.safetensors")}
    own_answers.main(command)  # goes on: nothing is trained again
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("model.safetensors")} == before
