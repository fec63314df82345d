"""Quote marks that are text, and labels that are numbers."""

import csv
import json

import pandas
import pytest

from mtllm_fast.data.read import read_rows
from mtllm_fast.evaluation.tasks.custom import _Fault, _strings
from mtllm_fast.evaluation.tasks.files import records
from mtllm_fast.evaluation.tasks.table import Table

MERGING = ['"a\tpos\nb"\tneg\nc\tpos\n', 'c\tneg\n"a\tpos\nx\tneg\nb"\tneg\n', '"a\tpos\r\nb"\tneg\r\nc\tpos\r\n']


@pytest.mark.parametrize("body", MERGING)
def test_rows_do_not_merge(tmp_path, body):
    path = tmp_path / "a.tsv"
    path.write_text("text\tlabel\n" + body, newline="")
    line = 2 if body.startswith('"') else 3
    with pytest.raises(ValueError, match=rf"line {line}: a quote mark joins"):
        list(read_rows(path, label_column="label", labels=["neg", "pos"]))
    with pytest.raises(ValueError, match=rf"line {line}: a quote mark joins"):
        list(records(path))
    want = pandas.read_csv(path, sep="\t", quoting=csv.QUOTE_NONE)
    rows = list(read_rows(path, label_column="label", labels=["neg", "pos"], quoting=False))
    assert [row.text for row in rows] == want["text"].tolist()
    assert [["neg", "pos"][row.label] for row in rows] == want["label"].tolist()
    assert [one["text"] for one in records(path, quoted=False)] == want["text"].tolist()


def test_a_field_of_several_lines_is_one(tmp_path):
    path = tmp_path / "a.tsv"
    pandas.DataFrame({"text": ["a\nb", 'q "x"'], "label": ["pos", "neg"]}).to_csv(path, sep="\t", index=False)
    want = pandas.read_csv(path, sep="\t")["text"].tolist()
    assert [row.text for row in read_rows(path)] == [one["text"] for one in records(path)] == want


@pytest.mark.parametrize("value", [1, "1", 1.0])
def test_numbers_that_are_names(tmp_path, value):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "x", "label": value}) + "\n")
    names = ["1", "2", "3", "4", "5"]
    assert next(iter(read_rows(path, label_column="label", labels=names))).label == names.index("1")
    assert Table().index(value, names, choice=False) == names.index("1")
    assert Table().index(value, ["bad", "good"], choice=False) == (1 if value != "x" else None)  # an index
    path.write_text(json.dumps({"text": "x", "label": 0}) + "\n")
    with pytest.raises(ValueError, match="label_column"):
        list(read_rows(path, label_column="label", labels=names))
    assert Table().index(0, names, choice=False) is None


def test_yaml_truth_values_are_no_names():
    with pytest.raises(_Fault, match="labels: False is not text; put"):
        _strings([False, True], "labels")
    assert _strings(["no", 2], "labels") == ["no", "2"]
