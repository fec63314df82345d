"""Rows that a tokenizer fails on: counted and wrong in an evaluation, left out and counted in answers and translations."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mtllm_fast import MTLLM, HeadConfig, cli
from mtllm_fast.data import text_tokens
from mtllm_fast.data.prompt import Prompt
from mtllm_fast.evaluation import evaluate, get_task
from mtllm_fast.evaluation.cells import CellStore
from mtllm_fast.evaluation.metrics import UNREAD, accuracy, f1_per_class, macro_f1
from mtllm_fast.evaluation.statistics import macro_f1_samples
from tests.commands.recipe_steps import write_data

BAD = "☠"
WHERE = (2, 5)  # rows of the French test split that hold it
SAID = "rows_that_a_tokenizer_fails_on_(wrong)"


@pytest.fixture(autouse=True)
def failing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer that fails on `BAD`."""
    encode = text_tokens._encode

    def failing(tokenizer, texts, with_ends, compose):
        if any(BAD in text for text in texts):
            raise text_tokens.BadText(f"text {texts[0]!r} holds {BAD!r}")
        return encode(tokenizer, texts, with_ends, compose)

    monkeypatch.setattr(text_tokens, "_encode", failing)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_data(tmp_path)
    for language, rows in (("fra_Latn", WHERE), ("eng_Latn", (0,))):
        path = tmp_path / "task" / language / "test.tsv"
        lines = path.read_text().splitlines()
        for row in rows:
            name, text, label = lines[1 + row].split("\t")
            lines[1 + row] = f"{name}\t{text} {BAD}\t{label}"
        path.write_text("\n".join(lines) + "\n")
    return tmp_path / "task"


def models(encoder_folder: str, llm_folder: str) -> dict[str, MTLLM]:
    writer = MTLLM.stack(encoder_folder, llm_folder, causal=True)
    writer.config.prompt = Prompt(after="\nLabel:")
    head = MTLLM.stack(encoder_folder, llm_folder, head=HeadConfig(labels=("a", "b", "c")))
    return {"head": head, "probe": MTLLM.stack(encoder_folder, llm_folder), "likelihood": writer}


@pytest.mark.parametrize("kind", ["head", "probe", "likelihood"])
def test_a_row_that_is_not_read_is_wrong_and_counted(
    kind: str, encoder_folder: str, llm_folder: str, data: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    models(encoder_folder, llm_folder)[kind].save_pretrained(model)
    task, options = get_task("folder", data), {"progress": False, "resamples": 50, "alignment": True}
    store = CellStore(tmp_path / "cells")
    (found,) = evaluate({"ours": model}, task, data, cells=store, **options).models
    assert found.counts[SAID] == len(WHERE) + 1
    assert not found.skipped and set(found.languages) == {"eng_Latn", "fra_Latn", "swh_Latn"}
    assert found.languages["fra_Latn"].aligned == 12 - len(WHERE) - 1 and found.languages["swh_Latn"].aligned == 11
    cell = next(iter(tmp_path.glob("cells/**/fra_Latn*.safetensors")))
    arrays = np_arrays(cell)
    assert np.flatnonzero(arrays["predictions"] == UNREAD).tolist() == list(WHERE)
    right = (arrays["predictions"] == arrays["gold"]).sum()
    assert found.languages["fra_Latn"].accuracy == right / 12
    good = np.delete(np.arange(12), WHERE)
    assert arrays["predictions"][good].tolist() == arrays["logits"][good].argmax(1).tolist()
    (again,) = evaluate({"ours": model}, task, data, cells=CellStore(tmp_path / "cells"), **options).models
    assert again.languages["fra_Latn"] == found.languages["fra_Latn"], "from the store it is the same"


@pytest.mark.parametrize("kind", ["head", "probe", "likelihood"])
def test_a_language_that_is_not_read_at_all(
    kind: str, encoder_folder: str, llm_folder: str, data: Path, tmp_path: Path
) -> None:
    """As that of a script which a smaller vocabulary lost: every row is wrong, and the other languages are as ever."""
    path = data / "swh_Latn" / "test.tsv"
    header, *lines = path.read_text().splitlines()
    path.write_text("\n".join([header, *(line.replace("\t", f"\t{BAD} ", 1) for line in lines)]) + "\n")
    task, options = get_task("folder", data), {"progress": False, "resamples": 50, "alignment": True}
    store, model = CellStore(tmp_path / "cells"), tmp_path / "model"
    models(encoder_folder, llm_folder)[kind].save_pretrained(model)
    (found,) = evaluate({"ours": model}, task, data, cells=store, **options).models
    assert found.languages["swh_Latn"].accuracy == 0 == found.languages["swh_Latn"].macro_f1
    assert found.counts[SAID] == 12 + len(WHERE) + 1 and not found.languages["swh_Latn"].alignment
    assert found.languages["fra_Latn"].aligned == 12 - len(WHERE) - 1


def np_arrays(path: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(path)


def test_the_others_are_read_as_without_it(encoder_folder: str, llm_folder: str, data: Path) -> None:
    model = models(encoder_folder, llm_folder)["head"]
    task = get_task("folder", data)
    found = evaluate({"ours": model}, task, data, progress=False, resamples=50).models[0]
    path = data / "fra_Latn" / "test.tsv"
    path.write_text(path.read_text().replace(f" {BAD}", ""))
    clean = evaluate({"ours": model}, task, data, progress=False, resamples=50).models[0]
    assert clean.languages["swh_Latn"].accuracy == found.languages["swh_Latn"].accuracy
    assert clean.counts[SAID] == 1 and clean.languages["fra_Latn"].accuracy >= found.languages["fra_Latn"].accuracy


def test_scores_by_hand() -> None:
    """A row without a prediction is a miss of its class, and no false hit of another."""
    predictions, gold = np.array([0, 1, UNREAD, 1, UNREAD]), np.array([0, 1, 1, 2, 2])
    assert accuracy(predictions, gold) == 2 / 5
    assert f1_per_class(predictions, gold, 3).tolist() == [1.0, 2 / 4, 0.0]
    assert macro_f1(predictions, gold, 3) == 0.5
    assert accuracy([UNREAD, UNREAD], [0, 1]) == 0 == macro_f1([UNREAD, UNREAD], [0, 1], 2)
    samples = macro_f1_samples(np.tile(predictions, 40), np.tile(gold, 40), 3, 400)
    assert abs(samples.mean() - 0.5) < 0.02
    with pytest.raises(ValueError, match=r"predictions: classes must lie in 0\.\.2, got -2\.\.1"):
        accuracy([-2, 1, 0], [0, 1, 2])


@pytest.mark.parametrize("command", ["respond", "translate"])
def test_answers_and_translations_leave_it_out(
    command: str, encoder_folder: str, llm_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["one two", f"three {BAD}", "four", f"{BAD}"]
    (tmp_path / "in.txt").write_text("\n".join(texts) + "\n")
    output = tmp_path / "out.jsonl"
    words = {
        "respond": ["--llm", llm_folder, "--text", str(tmp_path / "in.txt"), "--max-new-tokens", "3"],
        "translate": ["--model", encoder_folder, "--input", str(tmp_path / "in.txt"), "--language", "fra_Latn"],
    }[command]
    cli.main([command, *words, "--output", str(output), "--device", "cpu", "--no-progress"])
    source = {"respond": "text", "translate": "source"}[command]
    assert [json.loads(line)[source] for line in output.read_text().splitlines()] == ["one two", "four"]
    assert f"{command}: 2 rows skipped: 0 empty, 2 cannot be tokenised" in capsys.readouterr().err
