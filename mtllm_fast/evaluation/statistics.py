"""Uncertainty of scores: bootstrap intervals over rows, an exact paired test, and Holm's correction. In numpy.

* Intervals: percentile bootstrap over test rows (Efron and Tibshirani, 1993), with a fixed seed. Two vectors of one
  length are resampled with the same draws, so the difference of two models on the same rows, and a mean over languages
  whose rows are translations of each other, are resampled jointly. Samples of macro-F1, which are biased low, are
  centred on the score (in `aggregate`).
* Test: the two-sided paired sign-flip permutation test on per-row differences, over all 2^n sign patterns. For two
  single models it is the exact McNemar test (McNemar, 1947; Dietterich, 1998).
* Correction: Holm, "A Simple Sequentially Rejective Multiple Test Procedure", 1979.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]

RESAMPLES = 2000
LEVEL = 0.95
SEED = 0


@lru_cache(maxsize=2)
def draws(rows: int, resamples: int = RESAMPLES) -> Floats:  # (R, N)
    """How often each of N rows is drawn in each of R resamples, float32."""
    if rows < 1 or resamples < 1:
        raise ValueError(f"rows={rows}, resamples={resamples}: expected at least 1")
    generator = np.random.default_rng((SEED, rows))
    return generator.multinomial(rows, np.full(rows, 1 / rows), size=resamples).astype(np.float32)


def mean_samples(values: Floats, resamples: int = RESAMPLES) -> Floats:  # (N,) -> (R,)
    """The mean of `values` in each resample, float64."""
    counts = draws(len(values), resamples)
    return (counts @ np.asarray(values, np.float32)).astype(np.float64) / len(values)


def macro_f1_samples(
    predictions: npt.NDArray[np.integer],  # (N,)
    gold: npt.NDArray[np.integer],  # (N,)
    num_classes: int,
    resamples: int = RESAMPLES,
) -> Floats:  # (R,)
    """Macro-F1 in each resample, as `metrics.macro_f1` defines it."""
    classes = np.arange(num_classes)
    true, predicted = gold[:, None] == classes, predictions[:, None] == classes
    counts = draws(len(gold), resamples)
    hits = counts @ (true & predicted).astype(np.float32)  # (R, C)
    occurrences = counts @ (true.astype(np.float32) + predicted)
    scores = np.where(occurrences > 0, 2 * hits / np.maximum(occurrences, 1), np.nan)
    return np.nanmean(scores, axis=1).astype(np.float64)


def interval(samples: Floats) -> tuple[float, float]:
    """The percentile interval that holds 95 % of the samples."""
    low, high = np.quantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def sign_flip_p(differences: Sequence[int] | npt.NDArray[np.integer]) -> float:
    """Two-sided p-value of the sum of integer differences if every sign were a fair coin; exact up to rounding (1e-12).

    The sum's distribution is the inverse Fourier transform of prod_i cos(t d_i).
    """
    values = np.abs(np.asarray(differences, np.int64))
    observed = abs(int(np.sum(differences)))
    total = int(values.sum())
    if observed == 0:
        return 1.0
    angles = 2 * np.pi * np.arange(2 * total + 1) / (2 * total + 1)
    characteristic = np.ones_like(angles)
    for value, count in zip(*np.unique(values[values > 0], return_counts=True), strict=True):
        characteristic *= np.cos(angles * value) ** count
    # entry k of the transform is the probability of the sum k (k > total: of k - 2 total - 1)
    mass = np.fft.fft(characteristic).real / len(angles)
    p = float(mass[observed : 2 * total + 2 - observed].sum())
    return min(1.0, max(p, 1e-12))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm-adjusted p-values, in the given order: reject where they are below the level, and the chance of any false
    rejection among them stays below it."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted
