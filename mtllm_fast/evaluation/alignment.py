"""How close a model's states of a text lie to its states of the English text that says the same.

* to_english, from_english: share of texts whose nearest English text by cosine is their own, and of English texts whose
  nearest text is theirs. The similarity search of Artetxe and Schwenk, TACL 2019, in both directions.
* mexa: 1/N sum_i [c_ii > max_{j != i} max(c_ij, c_ji)], c the cosines of all pairs: own translation nearest both ways.
  Kargaran et al., "MEXA: Multilingual Evaluation of English-Centric LLMs via Cross-Lingual Alignment", 2024 (arXiv
  2410.05873), on the states given.
* cosine: 1/N sum_i cos(x_i, e_i), mean cosine of a text and its English translation. Li et al., "Language Ranker: A
  Metric for Quantifying LLM Performance Across High and Low-Resource Languages", 2024 (arXiv 2404.11553), which
  compares last-token states of Llama's layers; here the states given.
* cka: ||X'E||_F^2 / (||X'X||_F ||E'E||_F), columns centred. Blind to rotation and scale. Kornblith et al., "Similarity
  of Neural Network Representations Revisited", ICML 2019. Not corrected for its bias where N is smaller than D:
  unrelated states then score well above 0.

A tie counts as a miss: a model that gives every text the same state retrieves nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

States = npt.NDArray[np.floating]  # (N, D)

METRICS = {
    "to_english": "retrieval to English",
    "from_english": "retrieval from English",
    "mexa": "MEXA",
    "cosine": "Language Ranker cosine",
    "cka": "linear CKA",
}
_ROUNDING = 1e-9  # must not decide between equal vectors


def alignment(
    states: States,  # (N, D)
    english: States,  # (N, D)
) -> dict[str, float]:
    """All of `METRICS`, 0 to 1 (the cosine -1 to 1), of N parallel texts, row i of both the same text.

    Raises:
        ValueError: other shapes, fewer than two texts, or values that are not finite.
    """
    if states.ndim != 2 or english.ndim != 2 or len(states) != len(english):
        raise ValueError(f"states and english: expected (N, D) of the same N, got {states.shape} and {english.shape}")
    if len(states) < 2:
        raise ValueError(f"states: at least two parallel texts are needed, got {len(states)}")
    if not (np.isfinite(states).all() and np.isfinite(english).all()):
        raise ValueError("states and english: hold values that are not finite")
    cosines = _unit(states) @ _unit(english).T  # of every text (row) with every English text (column)
    pairs, others = np.diag(cosines), cosines.copy()
    np.fill_diagonal(others, -np.inf)
    of_text, of_english = others.max(1), others.max(0)
    return {
        "to_english": float((pairs > of_text + _ROUNDING).mean()),
        "from_english": float((pairs > of_english + _ROUNDING).mean()),
        "mexa": float((pairs > np.maximum(of_text, of_english) + _ROUNDING).mean()),
        "cosine": float(pairs.mean()),
        "cka": _cka(states, english),
    }


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


def _unit(x: States) -> States:
    """Rows of length 1, float64; a zero vector stays one."""
    x = np.asarray(x, np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def _cka(x: States, e: States) -> float:
    x, e = (np.asarray(side, np.float64) - np.asarray(side, np.float64).mean(0) for side in (x, e))
    if x.shape[1] > x.shape[0]:  # the same numbers from the N x N Gram matrices
        gram_x, gram_e = x @ x.T, e @ e.T
        cross, norms = (gram_x * gram_e).sum(), np.linalg.norm(gram_x) * np.linalg.norm(gram_e)
    else:
        cross, norms = np.square(x.T @ e).sum(), np.linalg.norm(x.T @ x) * np.linalg.norm(e.T @ e)
    return float(cross / norms) if norms > 0 else 0.0
