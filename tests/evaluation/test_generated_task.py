"""Tasks whose answers are written: MGSM's files, tasks of one's own, and what is wrong with either."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mtllm_fast.data import TextRow
from mtllm_fast.evaluation.answers import number_of
from mtllm_fast.evaluation.cells import of_rows
from mtllm_fast.evaluation.rows import task_sources
from mtllm_fast.evaluation.tasks import TASKS, FolderTask, Table, get_task
from tests.evaluation.fakes import put

MGSM = TASKS["mgsm"]


def test_published_tables(tmp_path: Path) -> None:
    put(tmp_path / "a/mgsm_te.tsv", 'He has "2.\t2,125\nHow many?\t18\n')
    put(tmp_path / "a/mgsm_xx.tsv", "no language of the set\t1\n")
    put(tmp_path / "b/te/test.tsv", 'He has "2.\t2,125\nHow many?\t18\n')
    for folder in ("a", "b"):
        assert MGSM.languages(tmp_path / folder) == ["te"] and MGSM.splits(tmp_path / folder, "te") == ("test",)
        assert MGSM.rows(tmp_path / folder, "te") == [
            TextRow('He has "2.', "tel_Telu", id="0", target="2,125"),
            TextRow("How many?", "tel_Telu", id="1", target="18"),
        ]
    (source, _) = task_sources(MGSM, tmp_path / "a", ["te"], {"te": "tel_Telu"})
    assert (source.text, source.mt_code, source.field) == ('He has "2.', "tel_Telu", "text")


def test_hub_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [
        {"question": "Q1", "answer": None, "answer_number": 2125, "equation_solution": None},
        {"question": "Q2", "answer": "Step-by-Step Answer: ... 3.", "answer_number": 3.0, "equation_solution": "1+2."},
    ]
    monkeypatch.setattr("mtllm_fast.evaluation.tasks.folder.hub_records", lambda *_: [dict(r) for r in records])
    assert [row.target for row in MGSM.rows("juletxara/mgsm", "sw")] == ["2125", "3"]
    put(tmp_path / "sw/train.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    assert [row.target for row in MGSM.rows(tmp_path, "sw", "train")] == ["2125", "3"]


def test_answers_without_a_number_are_refused(tmp_path: Path) -> None:
    put(tmp_path / "de/test.tsv", "Wie viele?\t18\nWie viele?\tviele\n")
    with pytest.raises(ValueError, match=r"test\.tsv' row 1: the answer 'viele' holds no number"):
        MGSM.rows(tmp_path, "de")
    put(tmp_path / "de/test.tsv", "Wie viele?\t18\nWie viele?\t\n")
    with pytest.raises(ValueError, match=r"row 1 has no label \(1 of 2 have none\)"):
        MGSM.rows(tmp_path, "de")
    assert [row.target for row in MGSM.rows(tmp_path, "de", labelled=False)] == ["18", None]
    with pytest.raises(ValueError, match="a generated task has none"):
        FolderTask("x", ("a", "b"), kind="generated")
    with pytest.raises(ValueError, match="1 choice columns for 0 labels"):
        FolderTask("x", (), (Table(choices=("a",)),), kind="generated")


def test_task_of_ones_own(tmp_path: Path) -> None:
    text = 'kind: generated\ncolumns: {text: q, label: a}\nlanguages: [eng_Latn]\nfiles: "{language}.{split}.csv"\n'
    put(tmp_path / "eng_Latn.test.csv", "q,a\nHow many?,18\n")
    task = get_task(put(tmp_path / "sums.yaml", text))
    assert (task.kind, task.labels) == ("generated", ())
    assert task.rows(tmp_path, "eng_Latn") == [TextRow("How many?", "eng_Latn", id="0", target="18")]
    for more, named in (("labels: [a, b]\n", "labels"), ("label_base: 1\n", "label_base")):
        with pytest.raises(ValueError, match=rf"{named}: a generated task has none"):
            get_task(put(tmp_path / "more.yaml", text + more))


def test_rows_are_known_by_their_targets() -> None:
    """Cells of other gold answers are others; rows without targets have the fingerprints that they always had."""
    assert of_rows([TextRow("q", target="1")]) != of_rows([TextRow("q", target="2")]) != of_rows([TextRow("q")])
    assert of_rows([TextRow("q", "eng_Latn", None, 1, "7")], ("a", "b")) == "0a0e2ade21688478361c93daa578a4f4"


def test_rows_of_the_published_set(data_root: Path) -> None:
    folder = data_root / "mgsm"
    rows = {code: MGSM.rows(folder, code) for code in MGSM.languages(folder)}
    assert len(rows) == 11 and all(len(some) == 250 for some in rows.values())
    numbers = [[number_of(str(row.target)) for row in some] for some in rows.values()]
    assert all(one == numbers[0] for one in numbers) and len(set(numbers[0])) > 100
