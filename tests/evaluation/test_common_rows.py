"""Systems are compared on the rows that all of them have, and every output says on how many."""

import csv
import io
import json
import re

import numpy as np
import pytest

from mtllm_fast.evaluation import FolderTask, evaluate
from mtllm_fast.evaluation.aggregate import ModelCells, summarise
from mtllm_fast.evaluation.cells import Cell
from mtllm_fast.evaluation.languages import describe
from mtllm_fast.evaluation.results import Scores
from mtllm_fast.evaluation.tasks import Table
from mtllm_fast.reporting import write_report
from mtllm_fast.reporting.scores import read_scores
from mtllm_fast.reporting.sentences import summary_lines
from mtllm_fast.reporting.tables import alignment_table, language_table, overview_table
from tests.evaluation.fakes import FakeEngine

CODES = ("eng_Latn", "fra_Latn", "swh_Latn")
TASK = FolderTask("mini", ("a", "b", "c"), (Table(id="id"),), mt_codes={code: code for code in CODES})
ROWS, THERE = 204, 30


class Sometimes(FakeEngine):
    """Wrong on every third row, by the row's own number; right on the others."""

    def classify(self, rows):
        rows = list(rows)
        logits = super().classify(rows)
        wrong = [int(row.text.split("word")[1]) % 3 == 0 for row in rows]
        logits[wrong] = np.roll(logits[wrong], 1, axis=1)
        return logits


@pytest.fixture
def source(tmp_path):
    """204 rows in three languages, in another order in Swahili."""
    for code in CODES:
        folder = tmp_path / "data" / code
        folder.mkdir(parents=True)
        order = range(ROWS) if code != "swh_Latn" else range(ROWS - 1, -1, -1)
        lines = [f"x{i}\t{code} k{i % 3} word{i}\t{'abc'[i % 3]}\n" for i in order]
        (folder / "test.tsv").write_text("id\ttext\tlabel\n" + "".join(lines))
    return tmp_path / "data"


def translate(path, keep, languages=CODES[1:], **more):
    """Translations of the rows whose number is in `keep`."""
    records = [
        {"id": f"x{i}", "language": code, "translation": f"English k{i % 3} word{i}", **more}
        for code in languages
        for i in keep
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def run(source, translations, **options):
    return evaluate(
        {"stack": Sometimes(["a", "b", "c"])},
        TASK,
        source,
        translations=translations,
        teacher=FakeEngine(["a", "b", "c"], side="llm"),
        resamples=200,
        progress=False,
        **options,
    )


def test_missing_translations(source, tmp_path):
    """30 of 204 rows translated: both systems count on those 30, whatever the model does on the others."""
    keep = [i for i in range(ROWS) if i % 4 == 1 or i in (0, 3, 6)][:THERE]
    scores = run(source, translate(tmp_path / "mt.jsonl", keep))
    stack, test = scores.models
    right = np.array([i % 3 != 0 for i in keep])
    assert 0 < right.mean() < 1 and right.mean() != np.mean([i % 3 != 0 for i in range(ROWS)])
    for code in CODES[1:]:
        mine, theirs = stack.languages[code], test.languages[code]
        assert (mine.rows, theirs.rows) == (THERE, THERE)
        assert (mine.scored, theirs.scored, mine.available, theirs.available) == (ROWS, None, ROWS, ROWS)
        assert mine.accuracy == pytest.approx(right.mean()) and theirs.accuracy == 1.0
        assert mine.gap.accuracy == pytest.approx(right.mean() - 1)
        gold = np.array([i % 3 for i in keep])
        predicted = np.where(right, gold, (gold + 1) % 3)
        f1 = [
            2 * np.sum((gold == k) & (predicted == k)) / (np.sum(gold == k) + np.sum(predicted == k)) for k in range(3)
        ]
        assert mine.macro_f1 == pytest.approx(np.mean(f1))
    english = stack.languages["eng_Latn"]  # needs no translation
    assert (english.rows, english.scored, english.available) == (ROWS, None, None)
    shared = stack.overall("shared")
    assert shared.gap.accuracy == pytest.approx(shared.accuracy - test.overall("shared").accuracy)
    assert stack.seed_means == [pytest.approx(right.mean())]
    assert scores.left_out() == dict.fromkeys(CODES[1:], (ROWS - THERE, ROWS))
    assert stack.rows == 3 * ROWS and test.rows == ROWS + 2 * THERE


def test_every_output_says_so(source, tmp_path):
    scores = run(source, translate(tmp_path / "mt.jsonl", range(THERE)))
    paths = write_report(scores, tmp_path / "out")
    sentence = "348 rows are left out of every score, because translate-test lacks them: fra_Latn 174 of 204, swh_Latn"
    assert sentence in paths["markdown"].read_text() and sentence in "\n".join(summary_lines(scores))
    page = paths["html"].read_text()
    assert sentence in page and "348 texts in 2 languages count for no model" in page
    assert "348 translations missing" in page
    for name in ("html", "markdown", "latex"):
        assert paths[name].read_text().count("30 of 204") >= 2, name
    rows = list(csv.DictReader(io.StringIO(paths["csv"].read_text())))
    numbers = {
        (row["model"], row["language"]): (row["rows"], row["rows_scored"], row["rows_available"]) for row in rows
    }
    assert numbers["stack", "fra_Latn"] == ("30", "204", "204")
    assert numbers["translate-test", "fra_Latn"] == ("30", "", "204")
    assert numbers["stack", "eng_Latn"] == ("204", "", "")
    assert read_scores(paths["json"]) == [scores]


def test_nothing_is_said_where_nothing_is_missing(source, tmp_path):
    scores = run(source, translate(tmp_path / "mt.jsonl", range(ROWS)))
    assert scores.left_out() == {} and {one.scored for m in scores.models for one in m.languages.values()} == {None}
    paths = write_report(scores, tmp_path / "out")
    for name in ("html", "markdown", "latex", "csv", "json", "groups"):
        text = paths[name].read_text()
        assert not re.search(r"left out of|of 204|missing|rows_scored|scored\"|limit_seed|aligned", text), name
    assert "rows_available" not in paths["csv"].read_text().splitlines()[0]


def test_translations_that_join_nothing(source, tmp_path):
    """An error before any model reads a row, with all languages or named ones."""
    teacher = FakeEngine(["a", "b", "c"], side="llm")

    def refused(path, match, **options):
        with pytest.raises(ValueError, match=match) as caught:
            evaluate({}, TASK, source, translations=path, teacher=teacher, progress=False, **options)
        assert "\n" not in str(caught.value)

    folder = tmp_path / "idless/fra_Latn"
    folder.mkdir(parents=True)
    lines = [f"English k{i % 3}\t{'abc'[i % 3]}\n" for i in range(THERE)]
    (folder / "test.tsv").write_text("text\tlabel\n" + "".join(lines))
    rows_without_ids = FolderTask("mini", TASK.labels, (Table(id="id"), Table()), mt_codes=TASK.mt_codes)
    for languages in ("all", "fra_Latn"):
        with pytest.raises(ValueError, match="has no ids and 30 rows: cannot be joined to 204 rows"):
            evaluate(
                {}, rows_without_ids, source, languages=languages, translations=tmp_path / "idless", teacher=teacher,
                progress=False,
            )  # fmt: skip
        refused(translate(tmp_path / "a.jsonl", [500]), "none in .*a.jsonl belongs to a row", languages=languages)
    refused(translate(tmp_path / "b.jsonl", [0], ("deu_Latn",)), "holds none of the 2 languages .fra_Latn, swh_Latn.")
    sourced = translate(tmp_path / "c.jsonl", range(ROWS), source="of another text")
    refused(sourced, "other ids, or other source texts")
    assert teacher.seen == []


def test_numbers_that_are_not_those_of_the_rows(tmp_path):
    """Rows without ids are numbered from 0; translations numbered from 1 would all go to their neighbour."""
    task = FolderTask("mini", TASK.labels, (Table(),), mt_codes=TASK.mt_codes)
    for code in CODES[:2]:
        (tmp_path / "data" / code).mkdir(parents=True)
        lines = [f"{code} k{i % 3} word{i}\t{'abc'[i % 3]}\n" for i in range(12)]
        (tmp_path / "data" / code / "test.tsv").write_text("text\tlabel\n" + "".join(lines))

    def test(first):
        path = tmp_path / f"{first}.jsonl"
        path.write_text(
            "".join(
                json.dumps({"id": i + first, "language": "fra_Latn", "translation": f"k{i % 3} word"}) + "\n"
                for i in range(12)
            )
        )
        teacher = FakeEngine(["a", "b", "c"], side="llm")
        return evaluate({}, task, tmp_path / "data", translations=path, teacher=teacher, progress=False)

    assert test(0).models[0].languages["fra_Latn"].accuracy == 1.0
    with pytest.raises(ValueError, match="has the id '12', but the rows have no ids and are numbered 0 to 11"):
        test(1)


def cell(ids, right):
    gold = np.array([int(name.strip("xyz")) % 3 for name in ids])
    predicted = np.where(np.array(right, bool), gold, (gold + 1) % 3)
    return Cell(np.zeros((len(ids), 3), np.float32), predicted, gold, tuple(ids))


def summaries(*models, reference="base"):
    described = {code: describe(code) for code in CODES}
    return summarise(models, described, english="eng_Latn", num_classes=3, reference=reference, resamples=50)


def test_ids_that_occur_twice():
    """They count where they occur equally often in all, and are then told by their number."""
    mine = cell(["x1", "x1", "x2", "x3", "x3"], [1, 0, 1, 1, 1])
    base = cell(["x3", "x1", "x2", "x1"], [1, 0, 0, 1])
    one, other = summaries(
        ModelCells("m", "task head", [], [{"fra_Latn": mine}]),
        ModelCells("base", "translate-test", [], [{"fra_Latn": base}]),
    )
    found, theirs = one.languages["fra_Latn"], other.languages["fra_Latn"]
    assert (found.rows, found.scored, theirs.rows, theirs.scored) == (3, 5, 3, 4)  # x1, x1, x2; x3 is two rows or one
    assert (found.accuracy, theirs.accuracy) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    assert found.gap.p == 1.0  # differences +1, -1, +1
    with pytest.raises(ValueError, match="fra_Latn: m and base have no row in common"):
        summaries(
            ModelCells("m", "task head", [], [{"fra_Latn": cell(["x1"], [1])}]),
            ModelCells("base", "translate-test", [], [{"fra_Latn": cell(["y1"], [1])}]),
        )


def test_three_models_with_other_rows_each():
    ids = [f"x{i}" for i in range(9)]
    lacking = {"m": (), "n": (0, 1), "base": (1, 5)}
    right = {"m": [1] * 9, "n": [1, 1, 1, 1, 0, 0, 0, 0, 0], "base": [0, 0, 0, 1, 1, 1, 1, 1, 1]}
    models = []
    for name, gone in lacking.items():
        kept = [i for i in range(9) if i not in gone]
        made = cell([ids[i] for i in kept], [right[name][i] for i in kept])
        models.append(ModelCells(name, "task head", [], [{"fra_Latn": made}, {"fra_Latn": made}]))
    common = [2, 3, 4, 6, 7, 8]
    for model, found in zip(models, summaries(*models)):
        assert found.languages["fra_Latn"].rows == 6
        assert found.languages["fra_Latn"].accuracy == pytest.approx(np.mean([right[model.name][i] for i in common]))


def scores_of(*models, reference=None):
    return Scores(
        "mini", "data", "test", ("a", "b", "c"), "eng_Latn", CODES, {}, summaries(*models, reference=reference or "-"),
        reference=reference,
    )  # fmt: skip


def test_alignment_means_over_the_same_languages():
    """One model was aligned in two languages, the other in one: the means are over that one."""

    def metrics(value):
        return dict.fromkeys(("to_english", "from_english", "mexa", "cosine", "cka"), value)

    ids = [f"x{i}" for i in range(6)]
    both = {code: cell(ids, [1] * 6) for code in CODES}
    one = {**both, "swh_Latn": Cell.without_rows("no MT code")}
    wide = ModelCells("wide", "task head", [], [both], [{"fra_Latn": metrics(0.8), "swh_Latn": metrics(0.2)}],
                      {"fra_Latn": 6, "swh_Latn": 4})  # fmt: skip
    narrow = ModelCells("narrow", "task head", [], [one], [{"fra_Latn": metrics(0.7)}], {"fra_Latn": 6})
    table = alignment_table(scores_of(wide, narrow))
    assert [row[1] for row in table.rows] == ["0.800", "0.700"]
    assert "the 1 non-English languages in which every model was compared with English" in table.note
    alone = scores_of(wide)
    assert [row[1] for row in alignment_table(alone).rows] == ["0.500"]
    assert "Of 4 to 6 pairs of texts by language" in alignment_table(alone).note
    assert alone.models[0].languages["swh_Latn"].aligned == 4 and alone.models[0].languages["fra_Latn"].aligned is None
    # two seeds, of which one could not be compared: no metric, instead of that of one
    half = ModelCells("half", "task head", [], [both, both], [{"fra_Latn": metrics(0.8)}, {}])
    assert scores_of(half).models[0].languages["fra_Latn"].alignment == {}


def test_means_over_other_languages_say_of_how_many():
    ids = [f"x{i}" for i in range(6)]
    wide = ModelCells("wide", "task head", [], [{code: cell(ids, [1] * 6) for code in CODES}])
    hard = {"eng_Latn": cell(ids, [1] * 6), "fra_Latn": cell(ids, [0] * 6), "swh_Latn": Cell.without_rows("no")}
    base = ModelCells("base", "translate-test", [], [hard])
    scores = scores_of(wide, base, reference="base")
    table = language_table(scores)
    row = next(row for row in table.rows if row[0].startswith("non-English mean"))
    assert row[4] == "100.0 (2)" and row[7] == "0.0 (1)" and row[6] == "-"  # no gap between other languages
    shared = next(row for row in table.rows if row[0].startswith("mean over the languages that all ran"))
    assert (shared[4], shared[6], shared[7]) == ("100.0", "+100.0", "0.0")
    assert scores.models[0].overall("non_english").gap is None
    assert scores.models[0].overall("shared").gap.accuracy == 1.0
    assert "over the 1 non-English languages" in overview_table(scores).note


def test_the_figure_compares_means_over_the_same_languages(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    from mtllm_fast.reporting.score_figure import draw_scores

    ids = [f"x{i}" for i in range(6)]
    easy = {**{code: cell(ids, [1] * 6) for code in CODES[:2]}, "swh_Latn": cell(ids, [0] * 6)}
    base = {**easy, "swh_Latn": Cell.without_rows("no")}
    scores = scores_of(ModelCells("m", "task head", [], [easy]), ModelCells("n", "task head", [], [base]))
    labels = []
    monkeypatch.setattr(Figure, "legend", lambda self, handles, names, **more: labels.extend(names))
    draw_scores(scores, tmp_path / "x.png")
    assert [label.split(", ")[1] for label in labels if "mean" in label] == ["mean of 1 100.0", "mean of 1 100.0"]


def test_seeds_that_are_read_in_two_ways(source, tmp_path):
    """A task head and a linear probe make no mean."""
    for code in CODES:
        for split in ("train", "dev"):
            (source / code / f"{split}.tsv").write_text((source / code / "test.tsv").read_text())
    seeds = [FakeEngine(["a", "b", "c"]), FakeEngine()]
    with pytest.raises(ValueError, match="model='m': its seeds are read by task head and by linear probe"):
        evaluate({"m": seeds}, TASK, source, progress=False)


def test_a_language_that_one_seed_lacks(source):
    seeds = [FakeEngine(["a", "b", "c"]), FakeEngine(["a", "b", "c"], languages=("eng_Latn", "swh_Latn"))]
    (model,) = evaluate({"m": seeds}, TASK, source, progress=False).models
    assert model.skipped == {"fra_Latn": "MT code fra_Latn unknown to the model in 1 of 2 seeds"}
    assert set(model.languages) == {"eng_Latn", "swh_Latn"}
