from itertools import product
from math import comb

import numpy as np
import pytest

from mtllm_fast.evaluation.metrics import macro_f1
from mtllm_fast.evaluation.statistics import draws, holm, interval, macro_f1_samples, mean_samples, sign_flip_p


def brute_force(differences):
    """The share of all sign patterns whose sum is at least as far from zero."""
    observed = abs(sum(differences))
    sums = [abs(sum(s * d for s, d in zip(signs, differences))) for signs in product((1, -1), repeat=len(differences))]
    return sum(one >= observed for one in sums) / len(sums)


@pytest.mark.parametrize(
    "differences", [[1, 1, 1, -1, 0, 1], [2, -1, 3, 0, 1, 1, -2], [5], [1, -1], [0, 0], [3, 3, 3, 3, 3, 3, 3, 3]]
)
def test_sign_flip_is_exact(differences):
    expected = brute_force(differences)
    assert sign_flip_p(differences) == pytest.approx(expected, abs=1e-10)
    assert sign_flip_p([-d for d in differences]) == pytest.approx(expected, abs=1e-10)
    if sum(differences):  # a one-sided test would be another number
        assert sign_flip_p(differences) != pytest.approx(expected / 2, abs=1e-10)


@pytest.mark.parametrize(("b", "c"), [(7, 1), (20, 5), (30, 30), (400, 331), (3000, 2800)])
def test_sign_flip_is_mcnemar_for_single_models(b, c):
    n, low = b + c, min(b, c)
    mcnemar = min(1.0, 2 * sum(comb(n, k) for k in range(low + 1)) / 2**n)
    if b == c:
        mcnemar = 1.0
    assert sign_flip_p([1] * b + [-1] * c + [0] * 50) == pytest.approx(mcnemar, rel=1e-6)


def test_sign_flip_holds_its_level():
    """Under the null at most 5 % of the p-values lie below 0.05, and with a real difference nearly all do."""
    rng = np.random.default_rng(0)
    null = [sign_flip_p(rng.integers(-1, 2, 100)) for _ in range(1000)]
    assert 0.02 < np.mean(np.array(null) < 0.05) < 0.065
    real = [sign_flip_p(rng.choice([-1, 0, 1], 200, p=[0.1, 0.5, 0.4])) for _ in range(100)]
    assert np.mean(np.array(real) < 0.05) > 0.95


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
    raw = np.random.default_rng(1).random(50)
    adjusted = np.array(holm(raw))
    assert (adjusted >= raw).all()
    assert (np.diff(adjusted[np.argsort(raw)]) >= 0).all()
    assert holm(raw / 100)[int(raw.argmin())] == pytest.approx(50 * raw.min() / 100)


def test_interval_covers_like_the_binomial():
    """The bootstrap's standard error of an accuracy is sqrt(p (1 - p) / n); half of it would be wrong."""
    values = np.arange(400) < 300
    samples = mean_samples(values.astype(float), 4000)
    expected = np.sqrt(0.75 * 0.25 / 400)
    assert samples.std() == pytest.approx(expected, rel=0.05)
    assert samples.std() != pytest.approx(expected / np.sqrt(2), rel=0.05)
    low, high = interval(samples)
    assert low < 0.75 < high
    assert (high - low) / 2 == pytest.approx(1.96 * expected, rel=0.06)


def test_macro_f1_samples_are_macro_f1_of_the_resamples():
    rng = np.random.default_rng(2)
    gold, predictions = rng.integers(0, 4, 30), rng.integers(0, 4, 30)
    samples = macro_f1_samples(predictions, gold, 4, 20)
    for counts, sample in zip(draws(30, 20).astype(int), samples, strict=True):
        rows = np.repeat(np.arange(30), counts)
        assert sample == pytest.approx(macro_f1(predictions[rows], gold[rows], 4), abs=1e-6)
    plain = mean_samples((predictions == gold).astype(float), 20)
    assert np.abs(samples - plain).max() > 1e-3  # accuracy would not pass for it


def test_same_length_same_draws_and_nothing_random():
    a = mean_samples(np.arange(10.0), 50)
    draws.cache_clear()
    assert (mean_samples(np.arange(10.0), 50) == a).all()
    assert draws(10, 50).sum(1) == pytest.approx(np.full(50, 10))
    with pytest.raises(ValueError, match="rows=0"):
        draws(0, 5)
