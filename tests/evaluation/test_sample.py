"""`limit` draws the same rows in every language, and says so."""

import csv
import json

import numpy as np
import pytest

from mtllm_fast.commands.watch import WatchSettings
from mtllm_fast.data import TextRow
from mtllm_fast.evaluation import FolderTask, evaluate
from mtllm_fast.evaluation.results import Scores
from mtllm_fast.evaluation.rows import sample, task_sources
from mtllm_fast.evaluation.tasks import Table
from mtllm_fast.reporting import write_report
from tests.evaluation.fakes import FakeEngine
from tests.evaluation.test_real_suite import Constant

CODES = ("eng_Latn", "fra_Latn", "swh_Latn")
TASK = FolderTask("mini", ("a", "b", "c"), (Table(id="id"),), mt_codes={code: code for code in CODES})


@pytest.fixture
def source(tmp_path):
    """90 rows sorted by class; in French in reverse, in Swahili every seventh is missing."""
    for code in CODES:
        folder = tmp_path / "data" / code
        folder.mkdir(parents=True)
        rows = [f"x{i}\t{code} k{i // 30} word{i}\t{'abc'[i // 30]}\n" for i in range(90)]
        if code == "fra_Latn":
            rows.reverse()
        if code == "swh_Latn":
            del rows[::7]
        for split in ("train", "dev", "test"):
            (folder / f"{split}.tsv").write_text("id\ttext\tlabel\n" + "".join(rows))
    return tmp_path / "data"


def scored(source, **options):
    """The scores of a model that always says "a", and the ids of the rows that it read, by language."""
    engine = Constant(["a", "b", "c"])
    scores = evaluate(engine, TASK, source, resamples=20, progress=False, **options)
    seen = {code: [row.id for row in engine.seen if row.text.startswith(code)] for code in CODES}
    return scores, seen


def test_the_same_rows_in_every_language(source):
    scores, seen = scored(source, limit=30)
    assert seen["fra_Latn"] == seen["eng_Latn"][::-1] and len(set(seen["eng_Latn"])) == 30
    there = {f"x{i}" for i in range(90) if i % 7}
    assert set(seen["eng_Latn"]) & there <= set(seen["swh_Latn"]) and len(seen["swh_Latn"]) == 30
    numbers = sorted(int(name[1:]) for name in seen["eng_Latn"])
    share = np.mean([number < 30 for number in numbers])
    assert scores.models[0].languages["fra_Latn"].accuracy == pytest.approx(share)
    assert 0.1 < share < 0.6  # the first 30 rows are all of this class
    _, again = scored(source, limit=30)
    assert again == seen
    _, smaller = scored(source, limit=10)
    assert set(smaller["eng_Latn"]) < set(seen["eng_Latn"])
    every, _ = scored(source, limit=90)
    assert every.models[0].languages["eng_Latn"].available is None
    assert every.models[0].languages["eng_Latn"].accuracy == pytest.approx(1 / 3)


def test_every_row_is_as_likely():
    """Over many seeds each of 12 rows is drawn in a third of the samples of 4; equal ids are drawn apart."""
    rows = [TextRow("x", id=str(i)) for i in range(12)]
    counts = np.zeros(12)
    for seed in range(600):
        counts[sample(rows, 4, seed)] += 1
    assert counts.sum() == 2400 and (abs(counts - 200) < 5 * np.sqrt(600 * (1 / 3) * (2 / 3))).all()
    same = [TextRow("x", id="q") for _ in range(12)]
    drawn = {tuple(sample(same, 4, seed)) for seed in range(20)}
    assert len(drawn) > 10 and all(len(set(one)) == 4 and one == tuple(sorted(one)) for one in drawn)
    assert sample(rows, None) == sample(rows, 12) == list(range(12))
    with pytest.raises(ValueError, match="limit=0"):
        sample(rows, 0)


def test_every_output_says_so(source, tmp_path):
    scores, _ = scored(source, limit=30)
    paths = write_report(scores, tmp_path / "out")
    sentence = "only 30 rows of each language were scored: a random sample (seed 0)"
    for name in ("html", "markdown"):
        text = paths[name].read_text()
        assert sentence in text and "30 of 90" in text and "30 of 77" in text, name
    latex = paths["latex"].read_text()
    assert latex.count("Only a random sample of 30 rows of each language.") == latex.count(r"\caption") > 2
    for name in ("csv", "groups"):
        with paths[name].open() as file:
            assert {row["limit"] for row in csv.DictReader(file)} == {"30"}, name
    content = json.loads(paths["json"].read_text())["tasks"][0]
    assert (content["limit"], content["limit_seed"]) == (30, 0)
    # a report of before the draw says what it was: the first rows
    del content["limit_seed"]
    from mtllm_fast.reporting.sentences import notes

    assert "only the first 30 rows of each language were scored." in notes(Scores.from_dict(content))


def test_translations_of_the_sample(source, tmp_path):
    """Those of all rows serve a sample, with ids and by number, and `translate --limit` translates the sample."""
    teacher = FakeEngine(["a", "b", "c"], side="llm")
    texts = list(task_sources(TASK, source, CODES[1:], {code: code for code in CODES}, limit=30))
    _, seen = scored(source, limit=30)
    assert [one.id for one in texts if one.language == "swh_Latn"] == seen["swh_Latn"]
    file = tmp_path / "mt.jsonl"

    def put(ones):
        lines = [{"id": s.id, "language": s.language, "source": s.text, "translation": s.text} for s in ones]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))

    everything = list(task_sources(TASK, source, CODES[1:], {code: code for code in CODES}))
    for ones in (texts, everything):
        put(ones)
        (model,) = evaluate({}, TASK, source, translations=file, teacher=teacher, limit=30, progress=False).models
        assert {one.rows for one in model.languages.values()} == {30}
        assert not model.counts.get("translations_missing") and not model.counts.get("translations_unused")
    by_number = FolderTask("mini", TASK.labels, (Table(),), mt_codes=TASK.mt_codes)
    folder = tmp_path / "rows/fra_Latn"
    folder.mkdir(parents=True)
    (folder / "test.tsv").write_text((source / "fra_Latn/test.tsv").read_text())
    (model,) = evaluate(
        {}, by_number, source, translations=tmp_path / "rows", teacher=teacher, limit=30, progress=False
    ).models
    assert model.languages["fra_Latn"].rows == 30 and model.languages["fra_Latn"].accuracy == 1.0


def test_watch_takes_the_same_sample(source):
    _, seen = scored(source, limit=20, split="dev")
    engine = Constant(["a", "b", "c"])
    watch = WatchSettings(languages=CODES[1:], task="folder", data=str(source), limit=20).watch()
    found = watch.score(engine)
    share = np.mean([int(name[1:]) < 30 for name in seen["fra_Latn"]])
    assert found["fra_Latn_accuracy"] == pytest.approx(share) and 0 < share < 1
    assert (found["fra_Latn_rows"], found["swh_Latn_rows"]) == (20, 20)
    whole = WatchSettings(languages=CODES[1:], task="folder", data=str(source), limit=None).watch().score(engine)
    assert set(whole) == {"fra_Latn_accuracy", "swh_Latn_accuracy"}
    assert whole["fra_Latn_accuracy"] == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match=r"--watch\.limit 0: expected a positive number"):
        WatchSettings(languages=CODES[1:], task="folder", data=str(source), limit=0).watch()


def test_sorted_classes_of_a_real_set(data_root):
    """SIB-200's test split is sorted by class: a model that knows one class is at 25 %, and so is a sample of it."""
    with (data_root / "sib200/eng_Latn/test.tsv").open(encoding="utf-8") as file:
        found = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    labels, numbers = [row["category"] for row in found], [row["index_id"] for row in found]
    assert len(set(labels[:20])) == 1 and labels.count(labels[0]) == 51
    from mtllm_fast.evaluation.tasks import TASKS

    task = TASKS["sib200"]
    codes = task.languages(data_root / "sib200")[::12]
    engine = Constant(task.labels, side="llm", classes=7)
    scores = evaluate(engine, task, data_root / "sib200", languages=codes, limit=20, resamples=20, progress=False)
    accuracies = {one.accuracy for one in scores.models[0].languages.values()}
    ids = [row.id for row in engine.seen]
    drawn = [k for k, label in zip(numbers, labels) if k in set(ids) and label == task.labels[0]]
    assert accuracies == {len(drawn) / 20} and 0 < len(drawn) < 20
    whole = evaluate(engine, task, data_root / "sib200", languages=codes[:2], resamples=20, progress=False)
    share = labels.count(task.labels[0]) / 204  # the model says the first label alone
    assert {one.accuracy for one in whole.models[0].languages.values()} == {share}
    assert len(set(ids)) == 20 and len(ids) == 20 * len(codes)
