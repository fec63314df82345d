"""Every task from files in its published format and from fakes of its hub set."""

import json

import pytest

from mtllm_fast.data import StackTokenizer, TextRow
from mtllm_fast.evaluation.tasks import TASKS, check_rows, get_task, overlap, sib200
from mtllm_fast.evaluation.tasks.belebele import LANGUAGES, WITHOUT_MT_CODE
from tests.evaluation.fakes import FakeEngine, put


def lines(*records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def test_codes_are_nllb_codes_and_remarks_belong_to_languages():
    from transformers.models.nllb.tokenization_nllb import FAIRSEQ_LANGUAGE_CODES

    known = set(FAIRSEQ_LANGUAGE_CODES)
    assert len(LANGUAGES) == len(set(LANGUAGES)) == 122
    assert set(LANGUAGES) - known == set(WITHOUT_MT_CODE)
    assert set(sib200.LANGUAGES) - known == set(sib200.WITHOUT_MT_CODE)
    for task in TASKS.values():
        assert {code for code in task.mt_codes.values() if code is not None} <= known
        assert set(task.notes) <= {code for code, mt in task.mt_codes.items() if mt is not None}
        kinds = {"belebele": "choice", "xcopa": "choice", "copa": "choice", "mgsm": "generated"}
        assert task.kind == kinds.get(task.name, "classification")
    assert TASKS["kardesnlu"].mt_code("ug") == "uig_Arab" and "Cyrillic" in TASKS["kardesnlu"].notes["ug"]
    assert TASKS["xcopa"].mt_code("qu") == "quy_Latn" and "Quechua" in TASKS["xcopa"].notes["qu"]
    assert {name: task.default_source for name, task in TASKS.items()} == {
        "sib200": "Davlan/sib200",
        "nusax": "indonlp/NusaX-senti",
        "nli": "facebook/xnli",
        "mnli": "nyu-mll/multi_nli",
        "xnli": "facebook/xnli",
        "americasnli": "nala-cub/americas_nli",
        "kardesnlu": None,
        "belebele": "facebook/belebele",
        "xcopa": "cambridgeltl/xcopa",
        "copa": "aps/super_glue",
        "mgsm": "juletxara/mgsm",
    }


@pytest.mark.parametrize("name", ["mnli", "nli"])
def test_multinli_zip_leaves_out_and_counts_rows_without_a_gold_label(tmp_path, name, caplog):
    record = {"sentence1": "p", "sentence2": 'h "x', "pairID": "31193n", "genre": "fiction"}
    put(tmp_path / "multinli_1.0_train.jsonl", lines(record | {"gold_label": "neutral"}))
    content = [record | {"gold_label": label, "pairID": label} for label in ("-", "contradiction", "-", "entailment")]
    put(tmp_path / "multinli_1.0_dev_matched.jsonl", lines(*content))
    put(tmp_path / "multinli_1.0_dev_mismatched.jsonl", lines(record | {"gold_label": "-"}))
    put(tmp_path / "multinli_1.0_train.txt", "not read\n")
    task = get_task(name)
    assert task.languages(tmp_path) == ["en"] and task.splits(tmp_path, "en") == ("train", "dev")
    assert task.rows(tmp_path, "en", "train") == [TextRow("p", "eng_Latn", 'h "x', 1, "31193n")]
    assert [(row.id, row.label) for row in task.rows(tmp_path, "en", "dev")] == [
        ("contradiction", 2),
        ("entailment", 0),
    ]
    assert "2 of 4 rows were never given a label" in caplog.text


def test_glue_tables_are_not_quoted(tmp_path):
    header = "index\tpromptID\tpairID\tgenre\tsentence1\tsentence2\tlabel1\tgold_label\n"
    put(tmp_path / "train.tsv", header + '0\t1\t1n\tfiction\tHe said "no\tand went"\tneutral\tneutral\r\n')
    (row,) = TASKS["mnli"].rows(tmp_path, "en", "train")
    assert (row.text, row.text_pair, row.label) == ('He said "no', 'and went"', 1)


@pytest.mark.parametrize("name", ["xnli", "nli"])
def test_xnli_zip_holds_all_languages_in_one_file(tmp_path, name):
    record = {"sentence1": "p", "sentence2": "h", "promptID": "1", "genre": "facetoface"}
    rows = [
        record | {"language": code, "gold_label": "neutral", "pairID": str(i)}
        for i, code in enumerate(("sw", "en", "sw"))
    ]
    put(tmp_path / "xnli.test.jsonl", lines(*rows))
    put(tmp_path / "xnli.test.tsv", "the same again\n")
    task = get_task(name)
    assert len(task.languages(tmp_path)) == 15
    assert [(row.id, row.language) for row in task.rows(tmp_path, "sw")] == [("0", "swh_Latn"), ("2", "swh_Latn")]
    with pytest.raises(ValueError, match=r"holds no rows of 'zh', 'test'"):
        task.rows(tmp_path, "zh")


def test_xtreme_and_americasnli_file_names(tmp_path):
    put(tmp_path / "x/dev-zh.tsv", "p\th\tneutral\n")
    put(tmp_path / "x/dev-xx.tsv", "p\th\tneutral\n")  # no language of the set
    assert TASKS["xnli"].languages(tmp_path / "x") == ["zh"]
    assert TASKS["xnli"].rows(tmp_path / "x", "zh", "dev")[0].language == "zho_Hans"
    put(
        tmp_path / "a/data/anli_final/test/quy.tsv",
        'id\tlanguage\tpremise\thypothesis\tlabel\n7\tquy\t"p\th\tneutral\n',
    )
    put(tmp_path / "a/data/anli_final/test/anli.test.tsv", "the union\n")
    for task in (TASKS["americasnli"], TASKS["nli"]):
        source = tmp_path / "a" / ("data/anli_final" if task.name == "nli" else ".")
        if task.name == "americasnli":
            assert task.languages(source) == ["quy"]
            (row,) = task.rows(source, "quy")
            assert (row.id, row.text, row.label, row.language) == ("7", '"p', 1, "quy_Latn")
        else:
            assert task.rows(source, "quy")[0].id == "7"


@pytest.mark.parametrize("name", ["kardesnlu", "nli"])
def test_kardesnlu_bom_crlf_nameless_id_and_newlines(tmp_path, name):
    head = "gold_label,sentence1,sentence2,s1_translation,s2_translation"
    put(tmp_path / "Data/uyghur/xnli.test.ug.csv", f'\ufeff,{head}\r\n5,neutral,a,b,"бир,\nикки","""уч"""\r\n')
    put(tmp_path / "Data/azeri/xnli.dev.az.csv", f"Unnamed: 0,{head}\n9,entailment,a,b,bir,iki\n")
    put(tmp_path / "Data/azeri/xcopa.dev.az.csv", "id\n1\n")
    put(tmp_path / "Data/azeri/sts.dev.az.csv", "id\n1\n")
    task = get_task(name)
    assert task.languages(tmp_path) == ["az", "ug"]
    assert task.splits(tmp_path, "az") == ("dev",)
    assert task.rows(tmp_path / "Data", "ug") == [TextRow("бир,\nикки", "uig_Arab", '"уч"', 1, "5")]
    assert task.rows(tmp_path, "az", "dev") == [TextRow("bir", "azj_Latn", "iki", 0, "9")]


BELEBELE = {
    "link": "https://en.wikibooks.org/wiki/Accordion",
    "question_number": 1,
    "flores_passage": "Make sure your hand is relaxed.",
    "question": "What would not be accurate?",
    **{f"mc_answer{i}": f"answer {i}" for i in range(1, 5)},
    "correct_answer_num": "3",
    "dialect": "eng_Latn",
    "ds": "2023-05-03",
}


@pytest.mark.parametrize("folder", ["", "data/"])
def test_belebele_files(tmp_path, folder):
    task = TASKS["belebele"]
    put(
        tmp_path / f"{folder}eng_Latn.jsonl",
        lines(BELEBELE, BELEBELE | {"question_number": 2, "correct_answer_num": 1}),
    )
    put(tmp_path / f"{folder}hin_Latn.jsonl", lines(BELEBELE))
    put(tmp_path / f"{folder}README.json", "{}")
    assert task.languages(tmp_path) == ["eng_Latn", "hin_Latn"] and task.splits(tmp_path, "eng_Latn") == ("test",)
    first, second = task.rows(tmp_path, "eng_Latn")
    assert first.text == "Make sure your hand is relaxed. What would not be accurate?"
    assert first.choices == ("answer 1", "answer 2", "answer 3", "answer 4") and first.text_pair is None
    assert (first.label, second.label, second.id) == (2, 0, "https://en.wikibooks.org/wiki/Accordion#2")
    assert task.mt_code("hin_Latn") is None
    put(tmp_path / f"{folder}eng_Latn.jsonl", lines(BELEBELE, BELEBELE | {"correct_answer_num": "5"}))
    with pytest.raises(ValueError, match=r"eng_Latn\.jsonl' row 1: label '5' is not 1 to 4"):
        task.rows(tmp_path, "eng_Latn")


def test_belebele_training_set(tmp_path):
    columns = ["", "dataset", "split", "passage_id", "question_id", "passage", "question"]
    columns += [f"answer{i}" for i in range(1, 5)] + ["correct_answer", "correct_answer_num"]
    rows = [
        ["0", "RACE", "train", "high1", "0", '"He said ""go"".\nThen left."', "Who?", "a", "b", "c", "d", "d", "4"],
        ["1", "RACE", "dev", "high2", "1", "Short.", "What?", "a", "b", "c", "d", "a", "1"],
    ]
    put(tmp_path / "belebele_training_set.tsv", "\n".join("\t".join(row) for row in [columns, *rows]) + "\n")
    put(tmp_path / "eng_Latn.jsonl", lines(BELEBELE))
    task = TASKS["belebele"]
    assert task.splits(tmp_path, "eng_Latn") == ("train", "dev", "test")
    (train,), (dev,) = (task.rows(tmp_path, "eng_Latn", split) for split in ("train", "dev"))
    assert train.text == 'He said "go".\nThen left. Who?' and train.choices == ("a", "b", "c", "d")
    assert (train.label, train.id, dev.label) == (3, "RACE#high1#0", 0)


def test_choices_reach_the_tokenizer_as_spans(tmp_path, encoder_folder, llm_folder):
    from transformers import AutoTokenizer

    put(tmp_path / "eng_Latn.jsonl", lines(BELEBELE))
    tokenizer = StackTokenizer(*(AutoTokenizer.from_pretrained(folder) for folder in (encoder_folder, llm_folder)))
    side = tokenizer.llm_side(TASKS["belebele"].rows(tmp_path, "eng_Latn"))
    assert side.spans is not None and side.spans[0].shape == (4, 2)
    assert [tokenizer.llm.decode(side.ids[0][a:b]) for a, b in side.spans[0]] == [f" answer {i}" for i in range(1, 5)]
    assert "relaxed. What would not be accurate?\n1 answer 1\n2 answer 2" in tokenizer.llm.decode(side.ids[0])


def test_xcopa_and_copa_files(tmp_path):
    record = {"premise": "Qhari.", "choice1": "a", "choice2": "b", "changed": False}
    for split in ("val", "test"):
        rows = [record | {"question": q, "label": i, "idx": i} for i, q in enumerate(("effect", "cause"))]
        put(tmp_path / f"x/data/qu/{split}.qu.jsonl", lines(*rows))
        put(tmp_path / f"x/data-gmt/qu/{split}.qu.jsonl", "not read\n")
    task = TASKS["xcopa"]
    for source in (tmp_path / "x", tmp_path / "x/data"):
        assert task.languages(source) == ["qu"] and task.splits(source, "qu") == ("dev", "test")
        assert task.rows(source, "qu", "dev") == [
            TextRow("Qhari. What happened as a result?", "quy_Latn", None, 0, "0", ("a", "b")),
            TextRow("Qhari. What was the cause?", "quy_Latn", None, 1, "1", ("a", "b")),
        ]
    columns = "id,asks-for,most-plausible-alternative,p,a1,a2,p_translation,a1_translation,a2_translation"
    put(tmp_path / "k/Data/uyghur/xcopa.test.ug.csv", f"\ufeff,{columns}\r\n0,501,effect,2,p,c,d,П,А,Б\r\n")
    (row,) = task.rows(tmp_path / "k", "ug")
    assert row == TextRow("П What happened as a result?", "uig_Arab", None, 1, "501", ("А", "Б"))
    put(tmp_path / "c/train.jsonl", lines(record | {"question": "cause", "label": 1, "idx": 0}))
    put(tmp_path / "c/test.jsonl", lines(record | {"question": "cause", "idx": 0}))
    copa = TASKS["copa"]
    assert copa.rows(tmp_path / "c", "en", "train")[0].label == 1
    with pytest.raises(ValueError, match=r"split='test'.*has no labels"):
        copa.rows(tmp_path / "c", "en")
    put(tmp_path / "c/val.jsonl", lines(record | {"question": "reason", "label": 1, "idx": 0}))
    with pytest.raises(ValueError, match=r"'question' is 'reason', expected one of cause, effect"):
        copa.rows(tmp_path / "c", "en", "dev")


class FakeSplit(list):
    def __init__(self, rows, features):
        super().__init__(rows)
        self.features = features


NLI_ROW = {"premise": "p", "hypothesis": "h", "label": 2}
COPA_ROW = {"premise": "p.", "choice1": "a", "choice2": "b", "question": "cause", "label": 1, "idx": 3}
TRAIN_ROW = {"passage": "P.", "question": "Q?", **{f"answer{i}": str(i) for i in range(1, 5)}, "correct_answer_num": 4}


@pytest.mark.parametrize(
    ("name", "source", "configs", "splits", "languages", "load", "record", "expected"),
    [
        ("mnli", "nyu-mll/multi_nli", ["default"], ["train", "validation_matched", "validation_mismatched"],
         ["en"], ("en", "dev", "default", "validation_matched"), NLI_ROW, TextRow("p", "eng_Latn", "h", 2, "0")),
        ("mnli", "nyu-mll/glue", ["ax", "cola", "mnli"], ["train", "validation_matched", "test_matched"],
         ["en"], ("en", "train", "mnli", "train"), NLI_ROW, TextRow("p", "eng_Latn", "h", 2, "0")),
        ("nli", "nyu-mll/multi_nli", ["default"], ["train", "validation_matched"],
         ["en"], ("en", "train", "default", "train"), NLI_ROW, TextRow("p", "eng_Latn", "h", 2, "0")),
        ("xnli", "facebook/xnli", ["all_languages", "ar", "zh"], ["train", "test", "validation"],
         ["ar", "zh"], ("zh", "test", "zh", "test"), NLI_ROW, TextRow("p", "zho_Hans", "h", 2, "0")),
        ("americasnli", "nala-cub/americas_nli", ["all_languages", "aym", "oto"], ["validation", "test"],
         ["aym", "oto"], ("aym", "dev", "aym", "validation"), NLI_ROW, TextRow("p", "ayr_Latn", "h", 2, "0")),
        ("belebele", "facebook/belebele", ["acm_Arab", "default", "eng_Latn"], ["test"],
         ["acm_Arab", "eng_Latn"], ("acm_Arab", "test", "acm_Arab", "test"), BELEBELE,
         TextRow("Make sure your hand is relaxed. What would not be accurate?", "acm_Arab", None, 2,
                 "https://en.wikibooks.org/wiki/Accordion#1", tuple(f"answer {i}" for i in range(1, 5)))),
        ("belebele", "WueNLP/belebele-fleurs-train-val-text", ["default"], ["train", "validation"],
         ["eng_Latn"], ("eng_Latn", "train", "default", "train"), TRAIN_ROW,
         TextRow("P. Q?", "eng_Latn", None, 3, "0", ("1", "2", "3", "4"))),
        ("xcopa", "cambridgeltl/xcopa", ["et", "qu", "translation-et"], ["validation", "test"],
         ["et", "qu"], ("qu", "dev", "qu", "validation"), COPA_ROW,
         TextRow("p. What was the cause?", "quy_Latn", None, 1, "3", ("a", "b"))),
        ("copa", "aps/super_glue", ["boolq", "copa"], ["train", "validation", "test"],
         ["en"], ("en", "train", "copa", "train"), COPA_ROW,
         TextRow("p. What was the cause?", "eng_Latn", None, 1, "3", ("a", "b"))),
    ],
)  # fmt: skip
def test_hub_sets(monkeypatch, name, source, configs, splits, languages, load, record, expected):
    import datasets

    language, split, config, hub_split = load
    names = {"mnli": 3, "nli": 3, "xnli": 3, "americasnli": 3}
    label = datasets.ClassLabel(names=["entailment", "neutral", "contradiction"])
    if name == "copa":
        label = datasets.ClassLabel(names=["choice1", "choice2"])

    def load_dataset(path, asked, split):
        assert (path, asked, split) == (source, config, hub_split)
        features = {"label": label} if name in names or name == "copa" else {}
        return FakeSplit([dict(record)], features)

    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda path: configs)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda path, config: splits)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = TASKS[name]
    assert task.languages(source) == languages
    assert split in task.splits(source, language)
    assert task.rows(source, language, split) == [expected]


def test_overlap_duplicates_and_blanks():
    train = [TextRow("a ", text_pair="b"), TextRow("c"), TextRow("q", choices=("x", "y"))]
    rows = [
        TextRow("a", text_pair=" b", id="1"),
        TextRow("a", text_pair="c", id="2"),
        TextRow("c", id="2"),
        TextRow(" ", text_pair="b", id="3"),
        TextRow("q", choices=("x", ""), id="4"),
        TextRow("q", choices=("x", "y"), id="5"),
    ]
    assert overlap(rows, train) == [0, 2, 5]
    issues = check_rows(rows, train)
    assert (issues.blank, issues.duplicate_ids, issues.in_train) == (("3", "4"), ("2",), ("1", "2", "5"))
    assert issues and not check_rows(rows[:2])


def test_odd_data_is_named_in_the_scores(tmp_path):
    from mtllm_fast.evaluation import evaluate

    table = "id,text,label\n"
    put(tmp_path / "english/train.csv", table + "0,same,neutral\n1,other,positive\n")
    put(tmp_path / "english/test.csv", table + "2,same,neutral\n2, ,positive\n")
    put(tmp_path / "ngaju/train.csv", table + "0,x,neutral\n")
    put(tmp_path / "balinese/notes.txt", "nothing\n")
    task = TASKS["nusax"]
    assert task.empty_folders(tmp_path) == ["balinese"]
    scores = evaluate({"fake": FakeEngine(task.labels)}, task, tmp_path, progress=False)
    for line in (
        "1 rows with an empty text (scored all the same): english 1",
        "1 rows with an id that occurs more than once (kept): english 1",
        "1 rows whose text also stands in the training split of the same language (kept): english 1",
        "1 folders named like a language hold no data file: balinese",
    ):
        assert line in scores.issues
    assert scores.models[0].skipped == {"ngaju": "no test split"}
    with pytest.raises(ValueError, match=r"language='balinese'.*holds no data files"):
        task.rows(tmp_path, "balinese")


def test_wrong_labels_are_counted(tmp_path):
    put(tmp_path / "english/test.csv", "id,text,label\n0,a,neutral\n1,b,mixed\n2,c,bad\n")
    with pytest.raises(ValueError, match=r"row 1: label 'mixed' is not one of .* \(and 1 rows more\)"):
        TASKS["nusax"].rows(tmp_path, "english")
    put(tmp_path / "english/test.csv", "id,text,label\n0,a,neutral\n1,b,\n2,c,\n")
    with pytest.raises(ValueError, match=r"row 1 has no label \(2 of 3 have none\)"):
        TASKS["nusax"].rows(tmp_path, "english")


def test_long_fields(tmp_path):
    put(tmp_path / "english/test.csv", f"id,text,label\n0,{'word ' * 60_000},neutral\n")
    assert len(TASKS["nusax"].rows(tmp_path, "english")[0].text) == 300_000
