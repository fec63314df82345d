import numpy as np
import pytest

from mtllm_fast.evaluation.alignment import METRICS, alignment, parallel

RNG = np.random.default_rng(0)
ENGLISH = RNG.normal(size=(40, 16))
ROTATION = np.linalg.qr(RNG.normal(size=(16, 16)))[0]


def test_equal_states_are_perfect_and_unrelated_ones_are_not():
    perfect = alignment(ENGLISH, ENGLISH)
    assert set(perfect) == set(METRICS)
    assert list(perfect.values()) == pytest.approx([1.0] * 5)
    unrelated = alignment(RNG.normal(size=(40, 16)), ENGLISH)
    assert unrelated["to_english"] < 0.2
    assert unrelated["from_english"] < 0.2
    assert unrelated["mexa"] < 0.15
    assert abs(unrelated["cosine"]) < 0.2
    assert unrelated["cka"] < 0.6  # biased upwards at this N, as its docstring says


def test_shuffled_rows_are_not_aligned():
    """The measures are about which text is which, except CKA's and the mean cosine's own notions, which fall too."""
    shuffled = alignment(np.roll(ENGLISH, 1, 0), ENGLISH)
    assert shuffled["to_english"] == shuffled["from_english"] == shuffled["mexa"] == 0.0
    assert shuffled["cosine"] < 0.5
    assert shuffled["cka"] < 0.6


def test_known_answers():
    english = np.eye(3)
    states = np.array([[1.0, 0, 0], [0.8, 0.6, 0], [0, 0, 2.0]])  # text 2 lies nearer to English text 1
    metrics = alignment(states, english)
    assert metrics["to_english"] == pytest.approx(2 / 3)
    assert metrics["from_english"] == 1.0  # English text 2's nearest is text 2: 0.6 > 0
    assert metrics["mexa"] == pytest.approx(1 / 3 + 1 / 3)  # texts 1 (1 > 0.8) and 3; text 2 has 0.6 < 0.8
    assert metrics["cosine"] == pytest.approx((1 + 0.6 + 1) / 3)


def test_mexa_is_stricter_than_either_direction():
    states = ENGLISH + 1.2 * RNG.normal(size=ENGLISH.shape)
    metrics = alignment(states, ENGLISH)
    assert 0 < metrics["mexa"] <= min(metrics["to_english"], metrics["from_english"]) < 1


def test_ties_are_misses():
    same = np.ones((5, 4))
    metrics = alignment(same, same)
    assert metrics["to_english"] == metrics["from_english"] == metrics["mexa"] == 0.0
    assert metrics["cka"] == 0.0  # no variance at all
    assert metrics["cosine"] == pytest.approx(1.0)


def test_cka_sees_through_rotation_and_scale_but_not_through_any_map():
    assert alignment(3 * ENGLISH @ ROTATION + 5, ENGLISH)["cka"] == pytest.approx(1.0)
    stretched = ENGLISH * np.geomspace(1, 100, 16)
    assert alignment(stretched, ENGLISH)["cka"] < 0.7
    assert alignment(ENGLISH @ ROTATION, ENGLISH)["to_english"] < 0.3
    wide = np.hstack([RNG.normal(size=(12, 48)), ENGLISH[:12]])
    english = np.hstack([ENGLISH[:12], np.zeros((12, 48))])
    expected = np.square((wide - wide.mean(0)).T @ (ENGLISH[:12] - ENGLISH[:12].mean(0))).sum()
    x, e = wide - wide.mean(0), ENGLISH[:12] - ENGLISH[:12].mean(0)
    expected /= np.linalg.norm(x.T @ x) * np.linalg.norm(e.T @ e)
    assert alignment(wide, english)["cka"] == pytest.approx(expected)


def test_parallel_rows():
    assert parallel(["a", "b", "x", None, "d", "d"], ["b", "a", "d", None, "y"]) == [(0, 1), (1, 0)]
    assert parallel([], ["a"]) == []


@pytest.mark.parametrize(
    ("states", "english", "match"),
    [
        (np.ones((3, 4)), np.ones((4, 4)), "expected .N, D."),
        (np.ones((1, 4)), np.ones((1, 4)), "at least two"),
        (np.full((3, 4), np.nan), np.ones((3, 4)), "not finite"),
        (np.ones(4), np.ones(4), "expected .N, D."),
    ],
)
def test_bad_states(states, english, match):
    with pytest.raises(ValueError, match=match):
        alignment(states, english)
