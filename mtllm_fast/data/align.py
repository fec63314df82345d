"""Which rows of two packed batches end at the same character of the same text."""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def align_rows(
    ends_a: ArrayLike,  # (T_a,) exclusive end character of each packed row, -1 for none
    seq_a: ArrayLike,  # (T_a,) sequence of each packed row
    ends_b: ArrayLike,  # (T_b,)
    seq_b: ArrayLike,  # (T_b,)
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs of packed rows that have read exactly the same characters of the same sequence.

    A row with a negative end (a special token) never matches. Where several rows of one side end at the same character
    (the bytes of one character, a lone `▁`), the last one stands for it, because only that row has read all of it.

    Args:
        ends_a, ends_b: (T,) integers, exclusive character ends in one shared coordinate per sequence.
        seq_a, seq_b: (T,) integers >= 0, the sequence each row belongs to.

    Returns:
        (rows_a, rows_b), each (P,) int64, strictly increasing in rows_a.

    Raises:
        ValueError: where `ends` and `seq` of one side differ in shape or are not one-dimensional.
    """
    end_a, sequence_a = _side("a", ends_a, seq_a)
    end_b, sequence_b = _side("b", ends_b, seq_b)
    stride = int(max(end_a.max(initial=0), end_b.max(initial=0))) + 1
    keys_a, last_a = _last_row_of_each_key(end_a, sequence_a, stride)
    keys_b, last_b = _last_row_of_each_key(end_b, sequence_b, stride)
    _, at_a, at_b = np.intersect1d(keys_a, keys_b, assume_unique=True, return_indices=True)
    rows_a, rows_b = last_a[at_a], last_b[at_b]
    order = np.argsort(rows_a, kind="stable")
    return rows_a[order], rows_b[order]


def _side(side: str, ends: ArrayLike, seq: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    end, sequence = np.asarray(ends, dtype=np.int64), np.asarray(seq, dtype=np.int64)
    if end.ndim != 1 or end.shape != sequence.shape:
        raise ValueError(
            f"ends_{side} and seq_{side} must be one-dimensional and equally long, got {end.shape} and {sequence.shape}"
        )
    return end, sequence


def _last_row_of_each_key(
    end: NDArray[np.int64], sequence: NDArray[np.int64], stride: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    rows = np.flatnonzero(end >= 0)[::-1]  # reversed: np.unique then reports the last row of each key
    keys, first = np.unique(sequence[rows] * stride + end[rows], return_index=True)
    return keys, rows[first]
