"""How close a model's states of a text lie to its states of the English text that says the same.

All functions take states (N, D) of N parallel texts, row i of both the same text; more than one layer is (L, N, D), and
the result is the mean over layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

States = npt.NDArray[np.floating]  # (N, D) or (L, N, D)

METRICS = {
    "to_english": "retrieval to English",
    "from_english": "retrieval from English",
    "mexa": "MEXA",
    "cosine": "Language Ranker cosine",
    "cka": "linear CKA",
}


def alignment(states: States, english: States) -> dict[str, float]:
    """All of `METRICS`, 0 to 1 (the cosine -1 to 1)."""
    found = _layers(lambda x, e: np.array(_all(x, e)), states, english)
    return dict(zip(METRICS, map(float, found), strict=True))


def retrieval(states: States, english: States) -> tuple[float, float]:
    """Share of texts whose nearest English text by cosine is their own, and of English texts whose nearest text is
    theirs. A tie counts as a miss: a model that gives every text the same state retrieves nothing.

    The similarity search of Artetxe and Schwenk, TACL 2019, in both directions.
    """
    forward, backward = _layers(lambda x, e: np.array(_retrieval(cosines(x, e))), states, english)
    return float(forward), float(backward)


def mexa(states: States, english: States) -> float:
    """1/N sum_i [c_ii > max_{j != i} max(c_ij, c_ji)], c the cosines of all pairs: own translation nearest both ways.

    Kargaran et al., "MEXA: Multilingual Evaluation of English-Centric LLMs via Cross-Lingual Alignment", 2024
    (arXiv 2410.05873), which takes the mean or maximum over layers; here the mean.
    """
    return float(_layers(lambda x, e: np.array(_mexa(cosines(x, e))), states, english))


def language_ranker(states: States, english: States) -> float:
    """1/N sum_i cos(x_i, e_i): mean cosine of a text and its English translation.

    Li et al., "Language Ranker: A Metric for Quantifying LLM Performance Across High and Low-Resource Languages", 2024
    (arXiv 2404.11553), which compares last-token states of Llama's layers; here the states given.
    """
    return float(_layers(lambda x, e: np.array(np.diag(cosines(x, e)).mean()), states, english))


def linear_cka(states: States, english: States) -> float:
    """||X'E||_F^2 / (||X'X||_F ||E'E||_F), columns centred. Blind to rotation and scale.

    Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML 2019. Not corrected for its bias
    where N is smaller than D: unrelated states then score well above 0.
    """
    return float(_layers(lambda x, e: np.array(_cka(x, e)), states, english))


def cosines(states: States, english: States) -> States:  # (N, D), (N, D) -> (N, N)
    """Cosine of every text (row) with every English text (column), float64; 0 for a zero vector."""

    def unit(x: States) -> States:
        x = np.asarray(x, np.float64)
        return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)

    return unit(states) @ unit(english).T


def parallel(ids: Sequence[str | None], english_ids: Sequence[str | None]) -> list[tuple[int, int]]:
    """Positions of the rows that say the same: equal ids, leaving out ids that are missing or occur twice on a side."""
    sides = []
    for side in (ids, english_ids):
        seen: dict[str, int] = {}
        twice = set()
        for index, name in enumerate(side):
            if name is not None:
                if name in seen:
                    twice.add(name)
                seen[name] = index
        sides.append({name: index for name, index in seen.items() if name not in twice})
    return [(index, sides[1][name]) for name, index in sides[0].items() if name in sides[1]]


def _all(x: States, e: States) -> tuple[float, ...]:
    pairs = cosines(x, e)
    return (*_retrieval(pairs), _mexa(pairs), float(np.diag(pairs).mean()), _cka(x, e))


def _best_other(pairs: States) -> tuple[States, States]:
    """For every row and every column the highest cosine off the diagonal."""
    others = pairs.copy()
    np.fill_diagonal(others, -np.inf)
    return others.max(1), others.max(0)


def _retrieval(pairs: States) -> tuple[float, float]:
    row, column = _best_other(pairs)
    own = np.diag(pairs)
    # rounding must not decide between equal vectors
    return float((own > row + 1e-9).mean()), float((own > column + 1e-9).mean())


def _mexa(pairs: States) -> float:
    row, column = _best_other(pairs)
    return float((np.diag(pairs) > np.maximum(row, column) + 1e-9).mean())


def _cka(x: States, e: States) -> float:
    x, e = (np.asarray(side, np.float64) - np.asarray(side, np.float64).mean(0) for side in (x, e))
    if x.shape[1] > x.shape[0]:  # the same numbers from the N x N Gram matrices
        gram_x, gram_e = x @ x.T, e @ e.T
        cross, norms = (gram_x * gram_e).sum(), np.linalg.norm(gram_x) * np.linalg.norm(gram_e)
    else:
        cross, norms = np.square(x.T @ e).sum(), np.linalg.norm(x.T @ x) * np.linalg.norm(e.T @ e)
    return float(cross / norms) if norms > 0 else 0.0


def _layers(score: Callable[[States, States], npt.NDArray[np.float64]], states: States, english: States) -> States:
    if states.shape[:-1] != english.shape[:-1] or states.ndim not in (2, 3):
        raise ValueError(
            "states and english: expected (N, D) or (L, N, D) of the same N (and L), "
            f"got {states.shape} and {english.shape}"
        )
    if states.shape[-2] < 2:
        raise ValueError(f"states: at least two parallel texts are needed, got {states.shape[-2]}")
    if not (np.isfinite(states).all() and np.isfinite(english).all()):
        raise ValueError("states and english: hold values that are not finite")
    if states.ndim == 2:
        return score(states, english)
    return np.mean([score(x, e) for x, e in zip(states, english, strict=True)], axis=0)
