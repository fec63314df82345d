"""Tasks that a YAML file describes."""

import pytest

from mtllm_fast.data import TextRow
from mtllm_fast.evaluation.tasks import Task, get_task
from tests.evaluation.fakes import put

PAIR = """
name: reviews
kind: pair
columns: {text: title, pair: body, label: stars, id: number}
labels: [bad, good]
label_base: 1
english: en
languages: {en: eng_Latn, fr: fra_Latn, tlh: null}
files: "data/{language}/{split}.csv"
"""


def test_pairs_with_a_path_for_all(tmp_path):
    path = put(tmp_path / "my.yaml", PAIR)
    put(tmp_path / "data/en/train.csv", '\ufeffnumber,title,body,stars\r\n7,"a ""b""","c,\nd",2\r\n8,e,f,bad\r\n')
    put(tmp_path / "data/tlh/test.csv", "number,title,body,stars\n1,x,y,1\n")
    put(tmp_path / "data/other/test.csv", "number,title,body,stars\n1,x,y,1\n")
    task = get_task(path)
    assert isinstance(task, Task)
    assert (task.name, task.kind, task.english, task.default_source) == (
        "reviews",
        "classification",
        "en",
        str(tmp_path),
    )
    assert task.languages(task.default_source) == ["en", "tlh"]
    assert task.rows(tmp_path, "en", "train") == [
        TextRow('a "b"', "eng_Latn", "c,\nd", 1, "7"),
        TextRow("e", "eng_Latn", "f", 0, "8"),
    ]
    assert task.mt_code("tlh") is None and task.rows(tmp_path, "tlh")[0].language == "tlh"
    put(tmp_path / "data/tlh/test.csv", "number,title,body,stars\n1,x,y,3\n")
    with pytest.raises(ValueError, match="label '3' is not one of bad, good"):
        task.rows(tmp_path, "tlh")
    moved = tmp_path / "moved"
    moved.mkdir()
    (tmp_path / "data").rename(moved / "data")
    assert get_task(str(path), moved).languages(moved) == ["en", "tlh"]


def test_choices_with_a_path_per_language(tmp_path):
    path = put(
        tmp_path / "quiz.yml",
        """
kind: choice
columns: {text: [passage, question], choices: [a, b, c], label: right}
label_base: 1
languages: [eng_Latn, deu_Latn]
files:
  eng_Latn: {train: en.jsonl, validation: en-dev.jsonl}
  deu_Latn: {test: de.tsv}
""",
    )
    record = '{"passage": "P.", "question": "Q?", "a": "x", "b": "y", "c": "z", "right": 3}\n'
    put(tmp_path / "en.jsonl", record)
    put(tmp_path / "en-dev.jsonl", record)
    with pytest.raises(ValueError, match=r"quiz\.yml.*files: no file .*de\.tsv"):
        get_task(path)
    put(tmp_path / "de.tsv", "passage\tquestion\ta\tb\tc\tright\nP.\tF?\tx\ty\tz\t1\n")
    task = get_task(path)
    assert (task.name, task.kind, task.labels) == ("quiz", "choice", ("1", "2", "3"))
    assert task.splits(tmp_path, "eng_Latn") == ("train", "dev")
    assert task.rows(tmp_path, "eng_Latn", "dev") == [TextRow("P. Q?", "eng_Latn", None, 2, "0", ("x", "y", "z"))]
    assert task.rows(tmp_path, "deu_Latn") == [TextRow("P. F?", "deu_Latn", None, 0, "0", ("x", "y", "z"))]


def test_all_languages_in_one_file(tmp_path):
    path = put(
        tmp_path / "topic.yaml",
        """
columns: {text: sentence, label: topic, language: lang}
labels: [sport, news]
english: en
quoted: false
languages: {en: eng_Latn, "no": nob_Latn}
files: {train: train.tsv, test: "{language}.test.tsv"}
""",
    )
    put(tmp_path / "train.tsv", 'lang\tsentence\ttopic\nen\ta "b\tsport\nno\tc\tnews\nen\td\tnews\n')
    put(tmp_path / "no.test.tsv", "lang\tsentence\ttopic\nno\te\tsport\n")
    task = get_task(path)
    assert task.languages(tmp_path) == ["en", "no"]
    assert [row.text for row in task.rows(tmp_path, "en", "train")] == ['a "b', "d"]
    assert [row.text for row in task.rows(tmp_path, "no", "train")] == ["c"]
    assert task.rows(tmp_path, "no") == [TextRow("e", "nob_Latn", None, 0, "0")]
    assert task.splits(tmp_path, "en") == ("train",)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (("kind: pair", "kind: pairs"), "kind: 'pairs', expected one of classification, pair, choice"),
        (("kind: pair", "kind: choice"), "columns.pair: only for kind 'pair'"),
        (("pair: body, ", ""), "columns.pair: needed for kind 'pair'"),
        (("text: title", "txt: title"), "columns: unknown key 'txt'; nearest: text"),
        (("labels:", "label:"), "the file: unknown key 'label'; nearest: label"),
        (("[bad, good]", "[bad]"), "labels: expected at least two different names"),
        (("[bad, good]", "[no, yes]"), "labels: False is not text; put `no`, `yes`, `on` and `off` in quotes"),
        (("[bad, good]", "[good, off]"), "labels: False is not text"),
        (("[bad, good]", "[on, bad]"), "labels: True is not text"),
        (("label_base: 1", "label_base: one"), "label_base: 'one', expected an integer"),
        (("english: en", "english: eng"), "english: 'eng' is not among the languages; nearest: en"),
        (("{en: eng_Latn, fr: fra_Latn, tlh: null}", "{en: eng_Latn, no: nob_Latn}"), "languages: False is not text"),
        (("{language}/{split}", "{language}/test"), "holds no {split}"),
        (('"data/{language}/{split}.csv"', "{fr: {test: /data/fr.csv}}"), "no path relative to the YAML file"),
        (('"data/{language}/{split}.csv"', "{de: {test: fr.csv}}"), "files: 'de' is not among the languages"),
        (('"data/{language}/{split}.csv"', "{fr: {tset: fr.csv}}"), "files.fr: unknown key 'tset'; nearest: test"),
        (('files: "data/{language}/{split}.csv"', ""), "files: expected a path"),
        (("name: reviews", "name: [reviews"), "not YAML"),
        ((PAIR, "- a list"), "the file: expected a mapping"),
    ],
)
def test_faults_are_named(tmp_path, change, match):
    assert change[0] in PAIR
    path = put(tmp_path / "my.yaml", PAIR.replace(*change))
    with pytest.raises(ValueError, match=match) as caught:
        get_task(str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_absent_file():
    with pytest.raises(ValueError, match=r"task='no/such\.yaml': no such file"):
        get_task("no/such.yaml")


def test_quoted_names_are_the_labels(tmp_path):
    """Only the names that YAML takes for text by quotes."""
    path = put(tmp_path / "my.yaml", PAIR.replace("[bad, good]", '["no", "yes"]'))
    put(tmp_path / "data/en/train.csv", "number,title,body,stars\n1,a,b,yes\n2,c,d,no\n3,e,f,2\n")
    task = get_task(path)
    assert task.labels == ("no", "yes")
    assert [row.label for row in task.rows(tmp_path, "en", "train")] == [1, 0, 1]
