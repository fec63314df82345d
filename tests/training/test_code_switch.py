"""Code-switched text in stage 1: what is replaced, what the teacher reads, resuming with another dictionary."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from mtllm_fast import TextRow
from mtllm_fast.data.code_switch import CodeSwitched, read_dictionary
from mtllm_fast.data.collate import collate
from mtllm_fast.losses import DistillationWeights
from mtllm_fast.models import LoraSettings
from mtllm_fast.training import AdaptConfig, adapt
from mtllm_fast.training.adapt import build
from mtllm_fast.training.run import Data
from tests.tiny import LINES
from tests.training.short_runs import optim

ROWS = [TextRow(f"{line} {i}", "eng_Latn") for i, line in enumerate(LINES * 8)]
WORDS = "the\tder\nthe die\nriver fleuve\nTeacher\tmwalimu mkuu\n\n"


@pytest.fixture
def dictionary(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text(WORDS)
    return path


def config(encoder: str, llm: str, output: Path, dictionary: Path | str, **changes) -> AdaptConfig:
    settings = {"lora": LoraSettings(r=2, dropout=0.0), "train": optim(max_steps=2, tokens=160, save_steps=1)}
    return AdaptConfig(encoder, llm, str(output), code_switch=str(dictionary), **{**settings, **changes})


def test_words_are_replaced_and_nothing_else(dictionary) -> None:
    words = read_dictionary(dictionary)
    assert words == {"the": ["der", "die"], "river": ["fleuve"], "teacher": ["mwalimu mkuu"]}
    rows = CodeSwitched([TextRow("The river, the old river; a Teacher's theme.", "eng_Latn", id="a")], words, 1.0)
    (row,) = rows
    assert re.fullmatch(r"(Der|Die) fleuve, (der|die) old fleuve; a Mwalimu mkuu's theme\.", row.text)
    assert row.teacher_text == "The river, the old river; a Teacher's theme."
    assert (row.id, row.language) == ("a", "eng_Latn")
    assert [again.text for again in rows] == [row.text], "the same in every pass"


def test_the_share_is_that_of_the_words_in_the_dictionary(dictionary) -> None:
    rows = [TextRow(f"the {i} stone") for i in range(2000)]
    for share in (0.2, 0.7):
        report = CodeSwitched(rows, read_dictionary(dictionary), share).report(2000)
        assert report["rows"] == 2000 and report["words"] == 6000
        assert report["replaced"] / 2000 == pytest.approx(share, abs=0.04)
    seeds = [[row.text for row in CodeSwitched(rows, read_dictionary(dictionary), 0.5, seed)] for seed in (0, 1)]
    assert seeds[0] != seeds[1]


def test_the_student_reads_the_mix_and_the_teacher_the_text(dictionary, encoder_folder, llm_folder, tmp_path) -> None:
    settings = config(encoder_folder, llm_folder, tmp_path / "run", dictionary, code_switch_share=1.0)
    stage = build(settings, Data(ROWS), torch.float32)
    rows = list(stage.rows)[:3]
    assert all(row.teacher_text == plain.text != row.text for row, plain in zip(rows, ROWS))
    batch = collate(rows, stage.student.tokenizer, align=False)
    plain = collate(ROWS[:3], stage.student.tokenizer, align=False)
    assert torch.equal(batch.llm.input_ids, plain.llm.input_ids)
    assert not torch.equal(batch.mt.input_ids, plain.mt.input_ids)
    metrics = adapt(settings, ROWS)
    assert metrics["code_switch"]["replaced"] > 0 and metrics["train_loss"] > 0


def test_resuming_with_another_dictionary_is_refused(dictionary, encoder_folder, llm_folder, tmp_path) -> None:
    adapt(config(encoder_folder, llm_folder, tmp_path / "run", dictionary), ROWS)
    dictionary.write_text(WORDS + "mill moulin\n")
    with pytest.raises(ValueError, match="code_switch has changed since the run"):
        adapt(config(encoder_folder, llm_folder, tmp_path / "run", dictionary, resume=True), ROWS)


@pytest.mark.parametrize(
    ("content", "changes", "said"),
    [
        (None, {}, "no such file"),
        ("word\n", {}, "line 1 is 'word'"),
        ("\n", {}, "holds no words"),
        (WORDS, {"loss": DistillationWeights(kl=1.0)}, "compare tokens that end at the same character"),
    ],
)
def test_what_it_refuses_is_said_before_anything_is_loaded(content, changes, said, tmp_path) -> None:
    if content is not None:
        (tmp_path / "words.txt").write_text(content)
    with pytest.raises(ValueError, match=said):
        adapt(config("no", "no", tmp_path / "run", tmp_path / "words.txt", **changes), ROWS)
    assert not (tmp_path / "run").exists()


def test_rows_and_shares_that_mean_nothing() -> None:
    with pytest.raises(ValueError, match="code_switch_share=0"):
        AdaptConfig("a", "b", code_switch="c", code_switch_share=0.0)
    with pytest.raises(ValueError, match="without a teacher_text"):
        list(CodeSwitched([TextRow("a", text_pair="b")], {"a": ["c"]}, 0.5))
