"""From one model's log-probabilities in a file to another that learned them: `respond --labels` and `finetune`."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from mtllm_fast import MTLLM, Engine, HeadConfig, TextRow, cli
from mtllm_fast.data import text_tokens
from mtllm_fast.training import soft_labels
from tests.commands.recipe_steps import WORDS
from tests.tiny import LINES
from tests.training.short_runs import refused, weights

LABELS = ["a", "b", "c"]
SOFT, KL = ["--soft-label-column", "log_likelihoods"], ["--loss.label-kl", "1"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, encoder_folder) -> Path:
    """A classifier with an opinion of every text, and other columns than `LABELS`."""
    torch.manual_seed(5)
    model = MTLLM.stack(encoder_folder, reader="encoder", head=HeadConfig(labels=("c", "a", "b")))
    with torch.no_grad():
        model.head.linear.weight.mul_(10)
    folder = tmp_path_factory.mktemp("soft") / "teacher"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    words = " ".join(WORDS.values()).split()
    rows = [
        {"text": " ".join(words[(i * k) % 11] for k in range(1, 4 + i % 3)), "language": "fra_Latn"} for i in range(24)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def labelled(teacher: Path, texts: Path) -> Path:
    path = teacher.parent / "labelled.jsonl"
    columns = ["--language-column", "language", "--device", "cpu", "--no-progress"]
    cli.main(
        ["respond", "--model", str(teacher), "--text", str(texts), "--labels", *LABELS, "--output", str(path), *columns]
    )
    return path


def test_a_heads_log_probabilities_are_written_by_name(teacher: Path, texts: Path, labelled: Path) -> None:
    rows = [TextRow(**json.loads(line)) for line in texts.read_text().splitlines()]
    logits = torch.from_numpy(Engine(MTLLM.from_pretrained(teacher)).classify(rows))
    expected = torch.log_softmax(logits.double(), -1)[:, [1, 2, 0]].numpy()
    records = [json.loads(line) for line in labelled.read_text().splitlines()]
    found = np.array([record["log_likelihoods"] for record in records])
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert not np.allclose(found, np.roll(expected, 1, 1), atol=0.1), "the order of the columns does not matter here"
    assert [record["label"] for record in records] == [LABELS[i] for i in expected.argmax(1)]
    assert {record["language"] for record in records} == {"fra_Latn"}


def finetuned(labelled: Path, encoder: str, output: Path, *options: str, main=cli.main) -> str | None:
    words = ["--text", str(labelled), "--labels", *LABELS, "--language-column", "language", "--output", str(output)]
    quick = ["--max-steps", "30", "--lr", "3e-2", "--tokens", "512", "--max-length", "32", "--lora.dropout", "0"]
    quiet = ["--report-to", "none", "--no-progress"]
    return main(["finetune", "--encoder", encoder, *words, *quick, *quiet, *options])


def distance(teacher: Path, student: Path, texts: Path) -> float:
    """Mean KL of the student's distributions from the teacher's, in the teacher's order."""
    rows = [TextRow(**json.loads(line)) for line in texts.read_text().splitlines()]
    models = [MTLLM.from_pretrained(folder) for folder in (teacher, student)]
    p, q = (torch.log_softmax(torch.from_numpy(Engine(model).classify(rows)), -1) for model in models)
    q = q[:, [LABELS.index(name) for name in models[0].config.labels]]
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_a_student_learns_the_distribution_and_not_the_label_alone(
    teacher: Path, texts: Path, labelled: Path, encoder_folder: str, tmp_path: Path
) -> None:
    finetuned(labelled, encoder_folder, tmp_path / "soft", *SOFT, *KL, "--loss.task", "0")
    finetuned(labelled, encoder_folder, tmp_path / "hard")
    near, far = (distance(teacher, tmp_path / name, texts) for name in ("soft", "hard"))
    assert near < 0.5 * far, (near, far)


def test_a_teacher_at_hand_is_the_file_that_it_would_have_written(
    teacher: Path, labelled: Path, encoder_folder: str, tmp_path: Path
) -> None:
    """Up to the six digits of the file: the same weights to 1e-3, and others with another teacher."""
    kl = [*KL, "--loss.task", "0", "--max-steps", "5"]
    finetuned(labelled, encoder_folder, tmp_path / "file", *SOFT, *kl)
    finetuned(labelled, encoder_folder, tmp_path / "teacher", "--teacher", str(teacher), *kl)
    other = MTLLM.from_pretrained(teacher)
    with torch.no_grad():
        other.head.linear.weight.mul_(-1)
    other.save_pretrained(tmp_path / "other")
    finetuned(labelled, encoder_folder, tmp_path / "control", "--teacher", str(tmp_path / "other"), *kl)
    file, at_hand, control = (weights(tmp_path / name) for name in ("file", "teacher", "control"))
    assert file.keys() == at_hand.keys()
    apart = max(float((file[name] - at_hand[name]).abs().max()) for name in file)
    assert 0 <= apart < 1e-3 < 1e-2 < max(float((file[name] - control[name]).abs().max()) for name in file)
    notes = json.loads((tmp_path / "teacher" / "result.json").read_text())["teacher"]
    assert notes == {"folder": str(teacher), "rows": 24, "unread": 0}


def test_of_any_reader_by_name_and_without_what_it_cannot_read(
    encoder_folder: str, llm_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = HeadConfig(labels=("c", "a", "b"))
    torch.manual_seed(1)
    rows = [TextRow(text, "fra_Latn", label=i % 3, id=str(i)) for i, text in enumerate(LINES * 2)]
    bad, encode = rows[2].text, text_tokens._encode

    def failing(tokenizer, texts, with_ends, compose):
        if bad in texts:
            raise text_tokens.BadText("no")
        return encode(tokenizer, texts, with_ends, compose)

    for reader, bases in (("stack", (encoder_folder, llm_folder)), ("llm", (None, llm_folder))):
        model = MTLLM.stack(*bases, reader=reader, head=head)
        expected = torch.log_softmax(torch.from_numpy(Engine(model).classify(rows)).double(), -1)[:, [1, 2, 0]]
        found, unread = soft_labels.labelled(model, rows, LABELS, max_tokens=256, bf16=False)
        np.testing.assert_allclose([row.soft_label for row in found], expected.numpy(), atol=1e-5)
        assert unread == 0 and [row.label for row in found] == [row.label for row in rows]
        with monkeypatch.context() as patch:
            patch.setattr(text_tokens, "_encode", failing)
            fewer, unread = soft_labels.labelled(model, rows, LABELS, max_tokens=256, bf16=False)
        kept = [row.id for row in rows if row.text != bad]
        assert unread == 2 and [row.id for row in fewer] == kept
        whole = {row.id: row.soft_label for row in found}
        np.testing.assert_allclose([row.soft_label for row in fewer], [whole[name] for name in kept], atol=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--teacher", "TEACHER"], "is for loss.label_kl, whose weight is 0"),
        (["--teacher", "TEACHER", *SOFT, *KL], "of another; leave one"),
        (["--teacher", "TEACHER", *KL, "--labels", "a", "b", "z"], "its head has the labels c, a, b, but"),
        (["--teacher", "none", *KL], "teacher='none': no such folder"),
        (KL, "loss.label_kl=1.0: learns from soft labels, which the rows do not have"),
        (SOFT, "soft_label: the rows have some, but loss.label_kl=0 reads none"),
        (["--loss.task", "0"], "task, partner_task, label_kl: at least one weight must be > 0"),
        (["--soft-label-column", "text", *KL], "soft_label_column 'text': "),
    ],
)
def test_what_does_not_fit_is_refused(
    teacher: Path, labelled: Path, encoder_folder: str, tmp_path: Path, capsys, options: list[str], said: str
) -> None:
    options = [str(teacher) if option == "TEACHER" else option for option in options]
    message = finetuned(labelled, encoder_folder, tmp_path / "no", *options, main=partial(refused, capsys))
    assert said in message and message.count("\n") == 1
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--labels", "a", "b"], "labels=['a', 'b']: the model has a task head for c, a, b"),
        (["--labels", *LABELS, "--after", "Answer:"], "has a task head, which reads no prompt"),
        ([], "has no LLM"),
    ],
)
def test_a_head_says_what_it_knows(
    teacher: Path, texts: Path, tmp_path: Path, capsys, options: list[str], said: str
) -> None:
    words = ["respond", "--model", str(teacher), "--text", str(texts), "--output", str(tmp_path / "a.jsonl")]
    message = refused(capsys, [*words, "--language-column", "language", "--device", "cpu", *options])
    assert said in message and message.count("\n") == 1
    assert not list(tmp_path.iterdir())
