"""The demo: its texts, its stages on tiny models, and what it refuses."""

from __future__ import annotations

import csv
import json
import math
import unicodedata
from pathlib import Path

import pytest

from mtllm_fast.demo import DemoConfig, run_demo
from mtllm_fast.demo.ask import ask
from mtllm_fast.demo.rows import ASSETS, ENGLISH, TOPICS, languages, write_task
from mtllm_fast.evaluation.languages import describe
from mtllm_fast.evaluation.pretraining import XLM_R


def lines(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    assert text.endswith("\n") and unicodedata.is_normalized("NFC", text), path.name
    return text.split("\n")[:-1]


def test_the_texts_are_whole_and_parallel() -> None:
    labels = lines(ASSETS / "test" / "labels.txt")
    assert {topic: labels.count(topic) for topic in TOPICS} == dict.fromkeys(TOPICS, 6)
    english = set(lines(ASSETS / "test" / f"{ENGLISH}.txt"))
    codes = languages()
    assert codes[0] == ENGLISH and len(codes) >= 41 and len({describe(code).script for code in codes}) >= 8
    assert len(set(codes) & XLM_R) >= 41
    for code in codes:
        texts = lines(ASSETS / "test" / f"{code}.txt")
        assert len(set(texts)) == 48 and all(text == text.strip() and text for text in texts), code
        assert code == ENGLISH or not english & set(texts), code


def test_nothing_of_the_test_is_in_the_training_texts() -> None:
    test = {text.lower() for text in lines(ASSETS / "test" / f"{ENGLISH}.txt")}
    rows = {split: [line.split("\t") for line in lines(ASSETS / f"{split}.tsv")] for split in ("train", "valid")}
    seen = [text.lower() for split in rows.values() for _, text in split] + [
        text.lower() for text in lines(ASSETS / "english.txt")
    ]
    assert len(set(seen)) == len(seen) and not test & set(seen)
    for split, count in (("train", 60), ("valid", 15)):
        found = [topic for topic, _ in rows[split]]
        assert {topic: found.count(topic) for topic in TOPICS} == dict.fromkeys(TOPICS, count)


def test_a_written_task_has_the_same_rows_in_every_language(tmp_path: Path) -> None:
    write_task(tmp_path, ["swh_Latn"], rows=16, train_rows=20)
    english, swahili = (
        list(csv.DictReader((tmp_path / code / "test.tsv").open(encoding="utf-8"), delimiter="\t"))
        for code in (ENGLISH, "swh_Latn")
    )
    assert [(row["id"], row["label"]) for row in english] == [(row["id"], row["label"]) for row in swahili]
    assert len(english) == 16 and {row["label"] for row in english} == set(TOPICS)
    for row in swahili:
        assert row["text"] == lines(ASSETS / "test" / "swh_Latn.txt")[int(row["id"])]
    for options, named in (
        ({"codes": ["swa_Latn"]}, "languages: no demo texts in swa_Latn"),
        ({"rows": 12}, "rows=12: expected one of 8, 16, 24"),
        ({"rows": 56}, "rows=56"),
        ({"train_rows": 481}, "train_rows=481: expected 1 to 480"),
    ):
        with pytest.raises(ValueError, match=named):
            write_task(tmp_path / "no", **{"codes": [ENGLISH], "rows": 8, "train_rows": 8, **options})
        assert not (tmp_path / "no").exists()


def test_the_whole_demo_on_tiny_models(tmp_path: Path, encoder_folder: str, llm_folder: str, monkeypatch) -> None:
    """The translator, which has tests of its own, stands for itself: it leaves the texts as they are."""
    monkeypatch.setattr("mtllm_fast.models.packages.translate.translate_portuguese", list)
    short = {"max_steps": 2, "epochs": 1}
    config = DemoConfig(rows=8, train_rows=16, teacher=short, encoder=short, adapt=short, distill=short)
    said: list[str] = []
    found = run_demo(
        tmp_path / "demo", encoder=encoder_folder, llm=llm_folder, codes=["deu_Latn", "hat_Latn", "por_Latn"],
        config=config, say=said.append,
    )  # fmt: skip
    assert found == json.loads((tmp_path / "demo" / "results.json").read_text())
    assert list(found["languages"]) == ["deu_Latn", "por_Latn", "hat_Latn"]
    assert found["mean_of"] == ["deu_Latn", "por_Latn"]
    for name in ("direct", "encoder_probe", "encoder_only", "mt_llm"):
        values = [found["languages"][code][name] for code in found["mean_of"]]
        assert math.isclose(found["mean"][name], sum(values) / 2)
        low, high = found["mean_intervals"][name]
        assert low <= found["mean"][name] <= high and found["texts_per_s"][name] > 0
    translated = found["translate_test"]
    assert (translated["language"], translated["rows"]) == ("por_Latn", 8)
    assert translated["accuracy"] == found["languages"]["por_Latn"]["direct"]  # by the same teacher, on the same texts
    report = (tmp_path / "demo" / "report.md").read_text()
    assert "not proofread by native speakers" in report and "| hat_Latn * | 8 |" in report
    assert (tmp_path / "demo" / "scores.png").stat().st_size > 1000
    assert "[6/6] Writing the report" in said

    answer = ask("Mto unapita kando ya kinu", tmp_path / "demo")
    assert answer.startswith("'Mto unapita kando ya kinu': ") and any(topic in answer for topic in TOPICS)
    with pytest.raises(ValueError, match="ask: the text is empty"):
        ask(" ", tmp_path / "demo")
    with pytest.raises(ValueError, match="no finished demo in"):
        ask("A river.", tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="holds something else than an earlier demo"):
        run_demo(tmp_path / "other", encoder=encoder_folder, llm=llm_folder, config=config)
    assert (tmp_path / "other" / "mine.txt").exists()
