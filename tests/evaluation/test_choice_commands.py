"""Multiple choice from the command line: a task in a YAML file, a teacher with a choice head, translate-test."""

import json

import pytest

from mtllm_fast import cli

TASK = """
name: quiz
kind: choice
columns: {text: [passage, question], choices: [a, b], label: right, id: id}
label_base: 1
english: en
languages: {en: eng_Latn, fr: fra_Latn, xx: null}
files: {train: "train.jsonl", dev: "dev.jsonl", test: "{language}.jsonl"}
"""
WORDS = ["river", "bread", "cheese", "light", "stone", "train", "night", "teacher"]


def write(path, count):
    rows = []
    for i in range(count):
        choices = [WORDS[i % 8], WORDS[(i * 3 + 1) % 8]]
        row = {"id": i, "passage": f"She bought {choices[i % 2]}.", "question": "What?", "right": 1 + i % 2}
        rows.append(json.dumps(row | dict(zip("ab", choices))) + "\n")
    path.write_text("".join(rows))


@pytest.fixture
def quiz(tmp_path):
    for name, count in (("train", 24), ("dev", 8), ("en", 6), ("fr", 6), ("xx", 2)):
        write(tmp_path / f"{name}.jsonl", count)
    (tmp_path / "quiz.yaml").write_text(TASK)
    return str(tmp_path / "quiz.yaml")


def test_finetune_translate_and_evaluate(capsys, quiz, encoder_folder, llm_folder, tmp_path):
    teacher, translations, report = (str(tmp_path / name) for name in ("teacher", "t.parquet", "scores"))
    quick = ["--no-progress", "--report-to", "none", "--epochs", "1", "--tokens", "128", "--max-length", "64"]
    cli.main(["finetune", "--llm", llm_folder, "--task", quiz, "--output", teacher, *quick])
    assert json.loads((tmp_path / "teacher/config.json").read_text())["head"]["kind"] == "choice"
    cli.main(
        ["translate", "--model", encoder_folder, "--task", quiz, "--output", translations, "--max-new-tokens", "4"]
    )
    out = capsys.readouterr().out
    assert "18 texts to eng_Latn" in out and "no MT code: xx" in out and "already in eng_Latn: en" in out
    evaluate = ["evaluate", "--task", quiz, "--model", teacher, "--teacher", teacher, "--translations", translations]
    cli.main([*evaluate, "--output", report, "--no-progress"])
    (scores,) = json.loads((tmp_path / "scores/scores.json").read_text())["tasks"]
    assert scores["task"] == "quiz" and "6 rows whose text also stands in the training split" in capsys.readouterr().out
    rows = [{code: score["rows"] for code, score in model["languages"].items()} for model in scores["models"]]
    assert rows[0]["fr"] == 6 and rows[1]["fr"] == 6


def test_translate_test_leaves_english_questions_alone(encoder_folder, llm_folder, tmp_path):
    from mtllm_fast.evaluation import Translator
    from mtllm_fast.evaluation.scorers import TranslateScorer
    from mtllm_fast.evaluation.tasks import TASKS

    seen = []

    class Classifier:
        notes = ()

        def logits(self, rows):
            seen.extend(rows)

    (tmp_path / "qu").mkdir()
    row = {"premise": "river", "choice1": "bread", "choice2": "light", "question": "cause", "label": 0, "idx": 0}
    (tmp_path / "qu/test.qu.jsonl").write_text(json.dumps(row) + "\n")
    task = TASKS["xcopa"]
    translator = Translator.from_pretrained(encoder_folder, device="cpu")
    TranslateScorer(translator, Classifier(), target="eng_Latn", keep=task.fixed_words, max_new_tokens=4).logits(
        task.rows(tmp_path, "qu")
    )
    assert seen[0].text.endswith(" What was the cause?") and seen[0].language == "eng_Latn"
    assert seen[0].text == translator.translate(["river"], "quy_Latn", max_new_tokens=4)[0] + " What was the cause?"
