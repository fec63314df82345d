"""From one model's log-probabilities in a file to another that learned them: `respond --labels` and `finetune`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mtllm_fast import MTLLM, Engine, HeadConfig, TextRow, cli
from tests.commands.recipe_steps import WORDS

LABELS = ["a", "b", "c"]


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


def finetuned(labelled: Path, encoder: str, output: Path, *options: str) -> None:
    words = ["--text", str(labelled), "--labels", *LABELS, "--language-column", "language", "--output", str(output)]
    quick = [
        "--max-steps",
        "30",
        "--lr",
        "3e-2",
        "--tokens",
        "512",
        "--max-length",
        "32",
        "--report-to",
        "none",
        "--no-progress",
    ]
    cli.main(["finetune", "--encoder", encoder, *words, "--lora.dropout", "0", *quick, *options])


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
    soft = ["--soft-label-column", "log_likelihoods", "--loss.task", "0", "--loss.label-kl", "1"]
    finetuned(labelled, encoder_folder, tmp_path / "soft", *soft)
    finetuned(labelled, encoder_folder, tmp_path / "hard")
    near, far = (distance(teacher, tmp_path / name, texts) for name in ("soft", "hard"))
    assert near < 0.5 * far, (near, far)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--loss.label-kl", "1"], "loss.label_kl=1.0: learns from soft labels, which the rows do not have"),
        (["--soft-label-column", "log_likelihoods"], "soft_label: the rows have some, but loss.label_kl=0 reads none"),
        (["--loss.task", "0"], "task, partner_task, label_kl: at least one weight must be > 0"),
        (["--soft-label-column", "text", "--loss.label-kl", "1"], "soft_label_column 'text': "),
    ],
)
def test_what_does_not_fit_is_refused(
    labelled: Path, encoder_folder: str, tmp_path: Path, capsys, options: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        finetuned(labelled, encoder_folder, tmp_path / "no", *options)
    message = capsys.readouterr().err
    assert caught.value.code == 2 and said in message and message.count("\n") == 1
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
    with pytest.raises(SystemExit) as caught:
        cli.main([*words, "--language-column", "language", "--device", "cpu", *options])
    message = capsys.readouterr().err
    assert caught.value.code == 2 and said in message and message.count("\n") == 1
    assert not list(tmp_path.iterdir())
