"""The labels of a task teacher and of the task are compared by name, before anything is loaded."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mtllm_fast import MTLLM, Engine, TextRow
from mtllm_fast.losses import DistillationWeights
from mtllm_fast.models import LoraSettings
from mtllm_fast.models.heads import HeadConfig
from mtllm_fast.training import DistillConfig, distill
from mtllm_fast.training.task_teacher import in_teachers_order
from tests.tiny import LINES
from tests.training.short_runs import nothing_loaded, optim, refused

ROWS = [TextRow(line, label=i % 2) for i, line in enumerate(LINES)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, encoder_folder, llm_folder):
    root = tmp_path_factory.mktemp("labels")
    lora = LoraSettings()
    MTLLM.stack(encoder_folder, llm_folder, lora=lora).save_pretrained(root / "adapted")
    for name, labels in (("two", ("neg", "pos")), ("three", ("neg", "neutral", "pos"))):
        head = HeadConfig(labels=labels)
        MTLLM.stack(None, llm_folder, reader="llm", head=head, lora=lora).save_pretrained(root / name)
    choice = HeadConfig("choice")
    MTLLM.stack(None, llm_folder, reader="llm", head=choice, lora=lora).save_pretrained(root / "choice")
    return root


def config(folders, teacher, output) -> DistillConfig:
    settings = {"loss": DistillationWeights(head_kl=1.0), "train": optim(max_steps=2, lr=2e-4)}
    return DistillConfig(str(folders / "adapted"), str(folders / teacher), str(output), **settings)


def test_mapped_by_name(folders, tmp_path):
    """A task that says [pos, neg] to a teacher that says [neg, pos]: accuracy is that of names."""
    valid = [TextRow(line, label=label) for line, label in zip(LINES[:5], (0, 0, 0, 1, 0))]
    metrics = distill(config(folders, "two", tmp_path / "run"), ROWS, valid, labels=["pos", "neg"])
    student = MTLLM.from_pretrained(tmp_path / "run")
    said = [student.config.labels[k] for k in Engine(student).classify(valid).argmax(1)]
    right = sum(one == ("pos", "neg")[row.label] for one, row in zip(said, valid)) / 5
    assert metrics["best_eval_accuracy"] == pytest.approx(right)
    assert right != 1 - right
    assert student.config.labels == ["neg", "pos"]


def test_three_labels_in_another_order():
    """An order that is not its own inverse."""
    rows = [TextRow("a", label=0), TextRow("b", label=1), TextRow("c"), TextRow("d", label=2)]
    head = HeadConfig(labels=("neg", "neutral", "pos"))
    found = in_teachers_order(head, ("pos", "neg", "neutral"), rows, "teacher")
    assert [row.label for row in found] == [2, 0, None, 1]
    assert [row.label for row in rows] == [0, 1, None, 2]


@pytest.mark.parametrize(
    ("teacher", "labels", "match"),
    [
        ("two", list("abcdefg"), "its head has the labels neg, pos, but the task has a, b, c, d, e, f, g"),
        ("two", ["negative", "positive"], "has the labels neg, pos, but the task has negative, positive"),
        ("three", ["pos", "neg"], "has the labels neg, neutral, pos, but the task has pos, neg"),
        ("two", None, "teacher='.*two': has 2 labels, but a row has the label 6"),
    ],
)
def test_refused_before_loading(folders, tmp_path, monkeypatch, teacher, labels, match):
    nothing_loaded(monkeypatch)
    valid = [TextRow("a river", label=6 if labels is None else 0)]
    with pytest.raises(ValueError, match=match) as caught:
        distill(config(folders, teacher, tmp_path / "run"), ROWS, valid, labels=labels)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_a_choice_teacher_has_no_names(folders, tmp_path):
    """A label is the number of a choice, whatever the task calls it: accuracy is that of numbers, counted by hand."""
    words = [("one", "two"), ("bread", "a river"), ("the sun", "rain"), ("a ship", "iron"), ("salt", "an apple")]
    rows = [TextRow(line, label=0, choices=pair) for line, pair in zip(LINES, words)]
    distill(config(folders, "choice", tmp_path / "first"), rows)
    student = MTLLM.from_pretrained(tmp_path / "first")
    chosen = Engine(student).classify(rows).argmax(1)
    valid = [replace(row, label=int(k)) for row, k in zip(rows, chosen)]
    valid[0] = replace(valid[0], label=1 - valid[0].label)  # 4 of 5 right; with the numbers swapped 1 of 5
    metrics = distill(config(folders, "choice", tmp_path / "run"), rows, valid, labels=["2", "1"])
    assert metrics["best_eval_accuracy"] == pytest.approx(0.8)


def test_the_command_passes_the_names_of_the_task(folders, tmp_path, capsys):
    """Both sources of labels, --task and --text; nothing is written."""
    (tmp_path / "t.csv").write_text("text,label\nx,one\ny,two\n")
    (tmp_path / "task/eng_Latn").mkdir(parents=True)
    (tmp_path / "task/eng_Latn/train.tsv").write_text("text\tlabel\nx\tbad\ny\tgood\n")
    base = ["distill", "--model", str(folders / "adapted"), "--teacher", str(folders / "two"),
            "--output", str(tmp_path / "run"), "--no-progress", "--report-to", "none"]  # fmt: skip
    for source, names in (
        (["--text", str(tmp_path / "t.csv"), "--labels", "one", "two"], "one, two"),
        (["--task", "folder", "--data", str(tmp_path / "task")], "bad, good"),
    ):
        assert f"its head has the labels neg, pos, but the task has {names}" in refused(capsys, [*base, *source])
    assert not (tmp_path / "run").exists()
