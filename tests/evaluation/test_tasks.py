import gzip
import json

import pytest

from mtllm_fast.evaluation.tasks import TASKS, FolderTask, Task, get_task
from mtllm_fast.evaluation.tasks.folder import Table
from mtllm_fast.evaluation.tasks.nli import NLI
from mtllm_fast.evaluation.tasks.nusax import NUSAX
from mtllm_fast.evaluation.tasks.sib200 import LANGUAGES, SIB200, WITHOUT_MT_CODE
from tests.evaluation.fakes import put, write_folder


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_tasks_follow_the_protocol(task):
    assert isinstance(task, Task)
    assert task.mt_code(task.english) == "eng_Latn"


def test_language_tables():
    """`test_task_sets` compares the MT codes with NLLB's."""
    assert len(LANGUAGES) == len(set(LANGUAGES)) == 205
    assert {code for code in LANGUAGES if SIB200.mt_code(code) is None} == set(WITHOUT_MT_CODE)
    assert [c for c in NUSAX.mt_codes if NUSAX.mt_code(c) is None] == ["madurese", "ngaju", "toba_batak"]
    assert {c: NLI.mt_code(c) for c in ("aym", "gn", "quy", "nah", "zh")} == {
        "aym": "ayr_Latn",
        "gn": "grn_Latn",
        "quy": "quy_Latn",
        "nah": None,
        "zh": "zho_Hans",
    }
    assert SIB200.mt_code("tlh_Latn") is None


def test_sib200_quoting_and_crlf(tmp_path):
    put(
        tmp_path / "eng_Latn/test.tsv",
        '\ufeffindex_id\tcategory\ttext\r\n7\ttravel\t"He said ""go"", and went"\r\n9\thealth\tplain\r\n',
    )
    rows = SIB200.rows(tmp_path, "eng_Latn")
    assert [row.text for row in rows] == ['He said "go", and went', "plain"]
    assert [(row.id, row.label, row.language) for row in rows] == [("7", 1, "eng_Latn"), ("9", 4, "eng_Latn")]


def test_nusax_newline_in_a_field_and_valid_as_dev(tmp_path):
    put(tmp_path / "toba_batak/valid.csv", 'id,text,label\n3,"one\ntwo, three",neutral\n4,"four",positive\n')
    rows = NUSAX.rows(tmp_path, "toba_batak", "validation")
    assert [row.text for row in rows] == ["one\ntwo, three", "four"]
    assert [row.label for row in rows] == [1, 2]
    assert rows[0].language == "toba_batak"  # no MT code: the set's own
    assert NUSAX.splits(tmp_path, "toba_batak") == ("dev",)


def test_xnli_without_header_or_quoting_and_labels_by_row(tmp_path):
    odd = 'a "quote\x1d and \u2028 more\tb\n"c\td\n'
    put(tmp_path / "el/test.tsv.gz", odd)
    put(tmp_path / "el/dev.tsv.gz", "p\th\tneutral\n")
    put(tmp_path / "derived/test.labels.tsv", "row\tlabel\tgenre\n0\tcontradiction\tx\n1\tentailment\tx\n")
    rows = NLI.rows(tmp_path, "el")
    assert [(row.text, row.text_pair) for row in rows] == [('a "quote\x1d and \u2028 more', "b"), ('"c', "d")]
    assert [row.label for row in rows] == [2, 0]
    assert rows[1].id == "1"
    assert rows[0].language == "ell_Grek"
    assert NLI.rows(tmp_path, "el", "dev")[0].label == 1
    assert NLI.languages(tmp_path) == ["el"]  # derived/ is no language


def test_xnli_test_without_labels(tmp_path):
    path = put(tmp_path / "el/test.tsv", "p\th\n")
    with pytest.raises(ValueError, match=r"split='test'.*has no labels.*derived/test\.labels\.tsv"):
        NLI.rows(tmp_path, "el")
    assert NLI.rows(tmp_path, "el", labelled=False)[0].label is None
    put(tmp_path / "test.labels.tsv", "row\tlabel\n0\tneutral\n1\tneutral\n")
    with pytest.raises(ValueError, match="2 labels for the 1 rows"):
        NLI.rows(tmp_path, "el")
    assert path.exists()


def test_americasnli_keeps_blank_premises(tmp_path):
    put(tmp_path / "nah/test.tsv", 'id\tlanguage\tpremise\thypothesis\tlabel\n25576\tnah\t \t"ki\tneutral\n')
    (row,) = NLI.rows(tmp_path, "nah")
    assert (row.text, row.text_pair, row.id, row.label, row.language) == (" ", '"ki', "25576", 1, "nah")


def test_mnli_json_and_integer_labels(tmp_path):
    put(tmp_path / "en/train.json", json.dumps({"0": {"text_a": "x", "text_b": "y", "label": "contradiction"}}))
    put(tmp_path / "aym/dev.jsonl", json.dumps({"premise": "x", "hypothesis": "y", "label": 0}) + "\n")
    assert NLI.rows(tmp_path, "en", "train")[0].label == 2
    assert NLI.rows(tmp_path, "aym", "dev")[0].label == 0


def test_folder_task_infers_labels_and_columns(tmp_path):
    write_folder(tmp_path / "mini")
    task = get_task("folder", tmp_path / "mini")
    assert task.labels == ("a", "b", "c")
    assert task.languages(tmp_path / "mini") == ["eng_Latn", "fra_Latn", "swh_Latn"]
    rows = task.rows(tmp_path / "mini", "fra_Latn", limit=4)
    assert [row.label for row in rows] == [0, 1, 2, 0]
    (tmp_path / "mini/labels.txt").write_text("c\nb\na\n")
    assert FolderTask.from_folder(tmp_path / "mini").labels == ("c", "b", "a")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("index_id\tcategory\ttext\n1\ttravel\n", "line 2: 2 fields, expected 3"),
        ("index_id\tcategory\ttext\n1\tsport\tx\n", "label 'sport' is not one of"),
        ("index_id\tlabel\ttext\n1\ttravel\tx\n", "has no labels .no column 'category'"),
        ("index_id\tcategory\tsentence\n1\ttravel\tx\n", "does not have the columns text"),
        ("index_id\tcategory\ttext\n", "holds no rows"),
        ("", "holds no rows"),
        ('index_id\tcategory\ttext\n1\ttravel\t"open\n', "line 2"),
        ("index_id\tcategory\ttext\ttext\n1\ttravel\tx\ty\n", "occurs twice"),
    ],
)
def test_malformed_files(tmp_path, content, match):
    put(tmp_path / "eng_Latn/test.tsv", content)
    with pytest.raises(ValueError, match=match) as caught:
        SIB200.rows(tmp_path, "eng_Latn")
    assert "\n" not in str(caught.value)
    assert "test.tsv" in str(caught.value)


def test_damaged_files(tmp_path):
    (tmp_path / "en").mkdir()
    path = tmp_path / "en/test.tsv.gz"
    path.write_bytes(gzip.compress(b"a\tb\tneutral\n" * 50)[:-9])
    with pytest.raises(ValueError, match="damaged gzip"):
        NLI.rows(tmp_path, "en")
    path.unlink()
    (tmp_path / "en/test.tsv").write_bytes(b"a\xff\tb\tneutral\n")
    with pytest.raises(ValueError, match="not UTF-8 at byte 1"):
        NLI.rows(tmp_path, "en")
    (tmp_path / "en/test.tsv").write_text("a\tb\tneutral\nonly one\n")
    with pytest.raises(ValueError, match="line 2: 1 fields, expected 3"):
        NLI.rows(tmp_path, "en")
    (tmp_path / "en/test.tsv").unlink()
    (tmp_path / "en/test.json").write_text('{"0": ')
    with pytest.raises(ValueError, match="not JSON"):
        NLI.rows(tmp_path, "en")


def test_errors_name_the_argument(tmp_path):
    write_folder(tmp_path)
    task = FolderTask("mini", ("a", "b", "c"))
    (tmp_path / "swh_Latn/test.tsv").unlink()
    cases = [
        (lambda: task.rows(tmp_path, "fra_Latm"), "language='fra_Latm'.*nearest: fra_Latn"),
        (lambda: task.rows(tmp_path, "swh_Latn"), "split='test'.*has only train, dev"),
        (lambda: task.rows(tmp_path, "eng_Latn", "tset"), "split='tset': expected one of"),
        (lambda: task.rows(tmp_path / "nothing", "eng_Latn"), "source=.*no such folder"),
        (lambda: task.rows(tmp_path, "eng_Latn", limit=0), "limit=0"),
        (lambda: task.languages(tmp_path / "eng_Latn"), "source=.*no <language>/<split> files"),
        (lambda: task.languages(tmp_path / "eng_Latn/test.tsv"), "source=.*expected a folder"),
        (lambda: get_task("sib"), "task='sib': expected one of sib200, nusax, nli"),
        (lambda: FolderTask("mini", ("a",)), "labels="),
    ]
    for call, match in cases:
        with pytest.raises(ValueError, match=match) as caught:
            call()
        assert "\n" not in str(caught.value)
    put(tmp_path / "eng_Latn/test.csv", "text,label\nx,a\n")
    with pytest.raises(ValueError, match="could both be meant"):
        task.rows(tmp_path, "eng_Latn")


class FakeSplit(list):
    def __init__(self, rows, features):
        super().__init__(rows)
        self.features = features


def test_hub_sets_through_datasets(monkeypatch):
    import datasets

    label = datasets.ClassLabel(names=["negative", "neutral", "positive"])
    loaded = []

    def load(name, config, split):
        loaded.append((name, config, split))
        return FakeSplit([{"id": "7", "text": "t", "lang": config, "label": 2}], {"label": label, "text": object()})

    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name: ["nij", "eng"])
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, config: ["train", "validation", "test"])
    monkeypatch.setattr(datasets, "load_dataset", load)
    source = "indonlp/NusaX-senti"
    assert NUSAX.languages(source) == ["english", "ngaju"]
    assert NUSAX.splits(source, "ngaju") == ("train", "dev", "test")
    (row,) = NUSAX.rows(source, "ngaju", "dev")
    assert (row.id, row.text, row.label) == ("7", "t", 2)
    assert loaded == [(source, "nij", "validation")]


def test_hub_errors_and_script_sets(monkeypatch):
    import datasets
    import huggingface_hub

    def script(*arguments, **options):
        raise RuntimeError("Dataset scripts are no longer supported, but found sib200.py")

    def absent(*arguments, **options):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'shared/data' doesn't exist on the Hub\nmore")

    monkeypatch.setattr(datasets, "get_dataset_config_names", absent)
    with pytest.raises(ValueError, match="source='shared/data': no such folder here, and not readable") as caught:
        SIB200.languages("shared/data")
    assert "\n" not in str(caught.value)

    class Api:
        def list_repo_files(self, name, repo_type, revision):
            assert revision == "refs/convert/parquet"
            return ["README.md", "eng_Latn/test/0000.parquet", "fra_Latn/test/0000.parquet"]

    def load(kind, data_files, split):
        assert kind == "parquet"
        assert data_files == {"test": ["hf://datasets/o/n@refs%2Fconvert%2Fparquet/eng_Latn/test/0000.parquet"]}
        return FakeSplit([{"index_id": 3, "text": "t", "category": "travel"}], {})

    for name in ("get_dataset_config_names", "get_dataset_split_names"):
        monkeypatch.setattr(datasets, name, script)
    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert SIB200.languages("o/n") == ["eng_Latn", "fra_Latn"]
    assert SIB200.splits("o/n", "eng_Latn") == ("test",)
    assert SIB200.rows("o/n", "eng_Latn")[0].label == 1


def test_table_needs_its_columns():
    assert Table("premise", "hypothesis", id="id").required() == ["premise", "hypothesis", "id"]
