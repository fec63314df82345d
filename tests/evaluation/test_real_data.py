"""Every published file loads with the counts that its SOURCE.md states. Skipped where the data is not there."""

from collections import Counter

import pytest

from mtllm_fast.evaluation.tasks import TASKS, check_rows
from mtllm_fast.evaluation.translations import has_translations, join_translations

AMERICAS = {"cni": (658, 750), "nah": (585, 738), "oto": (222, 748)}


@pytest.fixture
def folder(data_root):
    def find(name):
        if not (data_root / name).is_dir():
            pytest.skip(f"no {name} in {data_root}")
        return data_root / name

    return find


def load(task, source, split):
    return {code: task.rows(source, code, split) for code in task.languages(source)}


@pytest.mark.parametrize(
    ("split", "counts"),
    [
        ("train", (176, 138, 102, 85, 77, 65, 58)),
        ("dev", (25, 20, 14, 12, 11, 9, 8)),
        ("test", (51, 40, 30, 25, 22, 19, 17)),
    ],
)
def test_sib200(folder, split, counts):
    task, source = TASKS["sib200"], folder("sib200")
    rows = load(task, source, split)
    assert len(rows) == 205
    assert (source / "labels.txt").read_text().split("\n")[:7] == list(task.labels)
    english = [(row.id, row.label) for row in rows["eng_Latn"]]
    assert [Counter(label for _, label in english)[i] for i in range(7)] == list(counts)
    assert len({row_id for row_id, _ in english}) == sum(counts)
    for found in rows.values():
        assert [(row.id, row.label) for row in found] == english
        assert all(row.text.strip() and "\n" not in row.text for row in found)
    assert [code for code in rows if task.mt_code(code) is None] == ["arb_Latn", "min_Arab", "nqo_Nkoo", "sat_Olck"]


@pytest.mark.parametrize(
    ("split", "counts", "newlines"),
    [("train", (192, 119, 189), 26), ("dev", (38, 24, 38), 3), ("test", (153, 96, 151), 20)],
)
def test_nusax(folder, split, counts, newlines):
    task = TASKS["nusax"]
    rows = load(task, folder("nusax_senti"), split)
    assert len(rows) == 12
    english = [(row.id, row.label) for row in rows["english"]]
    assert [Counter(label for _, label in english)[i] for i in range(3)] == list(counts)
    for found in rows.values():
        assert [(row.id, row.label) for row in found] == english
    assert sum("\n" in row.text for found in rows.values() for row in found) == newlines


@pytest.mark.parametrize(("split", "count"), [("dev", 2490), ("test", 5010)])
def test_xnli(folder, split, count):
    rows = load(TASKS["nli"], folder("xnli"), split)
    assert len(rows) == 15
    assert load(TASKS["xnli"], folder("xnli"), split) == rows
    labels = [row.label for row in rows["en"]]
    assert Counter(labels) == dict.fromkeys(range(3), count // 3)
    for found in rows.values():
        assert [row.label for row in found] == labels
        assert [row.id for row in found] == [str(index) for index in range(count)]


def test_americasnli_joins_to_xnli(folder):
    task = TASKS["nli"]
    source, xnli = folder("americasnli"), folder("xnli")
    for number, (split, first) in enumerate((("dev", 12451), ("test", 25051))):
        english = task.rows(xnli, "en", split)
        rows = load(task, source, split)
        assert len(rows) == 10
        assert sum(map(len, rows.values())) == (6666, 7486)[number]
        assert load(TASKS["americasnli"], source, split) == rows
        for code, found in rows.items():
            assert len(found) == AMERICAS.get(code, (743, 750))[number]
            assert all(row.label == english[int(row.id) - first].label for row in found)
    issues = check_rows(rows["nah"])
    assert issues.blank == ("25576", "25577", "25578") and not issues.duplicate_ids
    assert not any(check_rows(found) for code, found in rows.items() if code != "nah")


def test_translated_americasnli_and_mnli(folder):
    task = TASKS["nli"]
    for code in ("aym", "gn", "quy"):
        for split, count in (("dev", 743), ("test", 750)):
            source = task.rows(folder("americasnli"), code, split)
            for name in ("amnli_nllb600m", "amnli_nllb600m/derived"):
                translated = task.rows(folder(name), code, split)
                assert [row.label for row in translated] == [row.label for row in source]
                assert len(translated) == count
    train, dev = (task.rows(folder("mnli_sample"), "en", split) for split in ("train", "dev"))
    assert TASKS["mnli"].rows(folder("mnli_sample"), "en", "train") == train
    assert not check_rows(dev, train)
    assert [Counter(row.label for row in train)[i] for i in range(3)] == [3061, 2980, 2958]
    assert [Counter(row.label for row in dev)[i] for i in range(3)] == [347, 333, 320]


def check(name, source, code, split):
    return check_rows(TASKS[name].rows(source, code, split), TASKS[name].rows(source, code, "train"))


def test_sib200_overlap_of_train_and_evaluation(folder):
    # SOURCE.md: text of an evaluation row also in train
    for split, where in (
        ("test", {"ary_Arab": 15, "azb_Arab": 7, "dyu_Latn": 23, "kbp_Latn": 89, "lua_Latn": 86, "sat_Olck": 47}),
        ("dev", {"bam_Latn": 56}),
    ):
        for code, line in where.items():
            found = check("sib200", folder("sib200"), code, split)
            rows = TASKS["sib200"].rows(folder("sib200"), code, split)
            assert found.in_train == (rows[line - 2].id,)  # file lines count from 1, after the header
            assert not found.blank and not found.duplicate_ids
    for code in ("eng_Latn", "swh_Latn"):
        assert not check("sib200", folder("sib200"), code, "test")


def test_nusax_has_no_overlap(folder):
    for code in TASKS["nusax"].languages(folder("nusax_senti")):
        assert not check("nusax", folder("nusax_senti"), code, "test")


@pytest.mark.parametrize(("name", "by"), [("amnli_nllb600m", "row"), ("amnli_nllb600m/derived", "id")])
def test_published_translations_join(folder, name, by):
    task, path = TASKS["americasnli"], folder(name)
    for split, count in (("dev", 743), ("test", 750)):
        for language in ("aym", "gn", "quy"):
            rows = task.rows(folder("americasnli"), language, split)
            joined = join_translations(path, task, rows, language=language, split=split)
            assert joined.by == by
            assert joined.counts() == {"joined": count, "missing": 0, "unused": 0, "duplicates": 0}
            assert [(row.id, row.label) for row in joined.rows] == [(row.id, row.label) for row in rows]
            assert {row.language for row in joined.rows} == {"eng_Latn"}
            assert sum(new.text == old.text for new, old in zip(joined.rows, rows)) < 5
        assert not has_translations(path, task, "nah", split)


def test_translate_test_from_published_translations(folder, llm_folder):
    from mtllm_fast.evaluation import evaluate
    from mtllm_fast.inference.engine import Engine
    from mtllm_fast.models import MTLLM
    from mtllm_fast.models.heads import HeadConfig

    task, source = TASKS["americasnli"], folder("americasnli")
    teacher = MTLLM.stack(None, llm_folder, reader="llm", head=HeadConfig(labels=task.labels))
    given = {"languages": ["quy"], "teacher": teacher, "progress": False}
    for split, count in (("test", 750), ("dev", 743)):
        found = []
        for name in ("amnli_nllb600m", "amnli_nllb600m/derived"):  # joined by row number, joined by id
            (model,) = evaluate({}, task, source, split=split, translations=folder(name), **given).models
            found.append((model.languages["quy"].rows, model.languages["quy"].accuracy))
        rows = task.rows(source, "quy", split)
        joined = join_translations(folder("amnli_nllb600m"), task, rows, language="quy", split=split)
        predicted = Engine(teacher).classify(joined.rows).argmax(1)
        right = sum(int(guess) == row.label for guess, row in zip(predicted, rows)) / count
        assert found[0] == found[1] == (count, pytest.approx(right))
        own = Engine(teacher).classify(rows[:100]).argmax(1)
        assert (own != predicted[:100]).any(), "the translations have to matter"
