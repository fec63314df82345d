import numpy as np
import pytest

from mtllm_fast.evaluation.aggregate import ModelCells, summarise
from mtllm_fast.evaluation.cells import Cell
from mtllm_fast.evaluation.languages import describe
from mtllm_fast.evaluation.metrics import accuracy, macro_f1
from mtllm_fast.evaluation.statistics import holm, sign_flip_p

CODES = ("eng_Latn", "swh_Latn", "deu_Latn", "fra_Latn", "xho_Latn")
RNG = np.random.default_rng(0)
GOLD = RNG.integers(0, 3, 60)


def cell(share, ids=None, rows=60):
    predictions = np.where(RNG.random(60) < share, GOLD, (GOLD + 1) % 3)[:rows]
    return Cell(
        np.zeros((rows, 3), np.float32),
        predictions,
        GOLD[:rows],
        tuple(ids or map(str, range(rows))),
        counts={"truncated": 1},
    )


def run(*models, reference="base", resamples=500):
    described = {code: describe(code) for code in CODES}
    return summarise(models, described, english="eng_Latn", num_classes=3, reference=reference, resamples=resamples)


MINE = ModelCells("mine", "task head", ["n"], [{code: cell(0.7) for code in CODES} for _ in range(3)])
BASE = ModelCells(
    "base", "translate-test", [], [{code: cell(0.4) for code in CODES[:4]} | {"xho_Latn": Cell.without_rows("no")}]
)


def test_means_over_seeds_and_their_spread():
    mine, base = run(MINE, BASE)
    for code in CODES:
        values = [accuracy(seed[code].predictions, GOLD) for seed in MINE.seeds]
        f1 = [macro_f1(seed[code].predictions, GOLD, 3) for seed in MINE.seeds]
        found = mine.languages[code]
        assert found.accuracy == pytest.approx(np.mean(values))
        assert found.accuracy_sd == pytest.approx(np.std(values, ddof=1))
        assert found.accuracy_sd != pytest.approx(np.std(values))
        assert found.macro_f1 == pytest.approx(np.mean(f1))
        assert found.accuracy_interval[0] < found.accuracy < found.accuracy_interval[1]
        assert found.macro_f1_interval[0] < found.macro_f1 < found.macro_f1_interval[1]
    assert base.languages["swh_Latn"].accuracy_sd is None
    assert base.skipped == {"xho_Latn": "no"}
    assert (mine.seeds, mine.counts, base.counts) == (3, {"truncated": 15}, {"truncated": 4})
    shared = ["swh_Latn", "deu_Latn", "fra_Latn"]
    assert mine.seed_means == pytest.approx(
        [np.mean([accuracy(seed[code].predictions, GOLD) for code in shared]) for seed in MINE.seeds]
    )


def test_gaps_are_paired_tested_and_corrected():
    mine, base = run(MINE, BASE)
    assert all(score.gap is None for score in base.languages.values())
    assert mine.languages["xho_Latn"].gap is None
    raw = []
    for code in ("swh_Latn", "deu_Latn", "fra_Latn"):
        gap = mine.languages[code].gap
        differences = MINE.correct(code) - 3 * BASE.correct(code)
        assert gap.accuracy == pytest.approx(mine.languages[code].accuracy - base.languages[code].accuracy)
        assert gap.p == sign_flip_p(differences)
        assert gap.low < gap.accuracy < gap.high
        raw.append(gap.p)
    adjusted = [mine.languages[code].gap.p_holm for code in ("swh_Latn", "deu_Latn", "fra_Latn")]
    assert adjusted == holm(raw) != raw
    english = mine.languages["eng_Latn"].gap
    assert english is not None
    assert (english.p, english.p_holm, english.significant) == (None, None, False)
    assert any(mine.languages[code].gap.significant for code in CODES[1:4])
    alone = run(MINE, reference=None)[0]
    assert all(score.gap is None for score in alone.languages.values())


def test_rows_are_joined_by_id():
    """A translate-test that lacks rows is compared on those it has, whatever their order."""
    full = BASE.seeds[0]["swh_Latn"]
    keep = np.array([5, 3, 50, 7, 8, 9, 10, 11])
    part = Cell(full.logits[keep], full.predictions[keep], full.gold[keep], tuple(str(i) for i in keep))
    base = ModelCells("base", "translate-test", [], [{**BASE.seeds[0], "swh_Latn": part}])
    mine, _ = run(MINE, base)
    expected = (MINE.correct("swh_Latn")[keep] / 3 - BASE.correct("swh_Latn")[keep]).mean()
    assert mine.languages["swh_Latn"].gap.accuracy == pytest.approx(expected)
    assert mine.languages["swh_Latn"].gap.accuracy != pytest.approx(
        (MINE.correct("swh_Latn")[:8] / 3 - BASE.correct("swh_Latn")[keep]).mean()
    )


def test_groups():
    mine, base = run(MINE, BASE)
    assert mine.groups["overall"]["all"].languages == 5
    assert mine.groups["overall"]["non_english"].languages == 4
    assert base.groups["overall"]["non_english"].languages == 3
    shared = mine.groups["overall"]["shared"]
    codes = ["swh_Latn", "deu_Latn", "fra_Latn"]
    assert shared.accuracy == pytest.approx(np.mean([mine.languages[code].accuracy for code in codes]))
    assert shared.gap.accuracy == pytest.approx(shared.accuracy - base.groups["overall"]["shared"].accuracy)
    widths = [np.subtract(*mine.languages[code].accuracy_interval[::-1]) for code in codes]
    assert np.subtract(*shared.accuracy_interval[::-1]) < np.mean(widths)  # a mean is surer than its parts
    assert {name: one.languages for name, one in mine.groups["family"].items()} == {
        "Indo-European": 2,
        "Atlantic-Congo": 1,
    }
    assert list(mine.groups["script"]) == ["Latin"]
    assert set(mine.groups["resource"]) == {"class 2", "class 5"}
    assert shared.macro_f1_interval[0] < shared.macro_f1 < shared.macro_f1_interval[1]


def test_nothing_depends_on_chance():
    assert run(MINE, BASE) == run(MINE, BASE)
