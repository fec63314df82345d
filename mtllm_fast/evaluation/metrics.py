"""Classification metrics, in numpy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Labels = Sequence[int] | npt.NDArray[np.integer]
UNREAD = -1  # the prediction for a row that a system could not read: none, and wrong


def confusion_matrix(
    predictions: Labels,  # (N,)
    gold: Labels,  # (N,)
    num_classes: int,
) -> npt.NDArray[np.int64]:  # (C, C)
    """Counts of rows by gold class (row) and predicted class (column); those with the prediction UNREAD are not there.

    Raises:
        ValueError: different lengths, no rows, or a class outside 0 ... num_classes - 1.
    """
    predicted, true = np.asarray(predictions, np.int64), np.asarray(gold, np.int64)
    if predicted.shape != true.shape or predicted.ndim != 1:
        raise ValueError(
            f"predictions and gold: expected two vectors of one length, got {predicted.shape} and {true.shape}"
        )
    if predicted.size == 0:
        raise ValueError("predictions: no rows, so no score is defined")
    read = predicted != UNREAD
    for name, values in (("predictions", predicted[read]), ("gold", true)):
        if values.size and (values.min() < 0 or values.max() >= num_classes):
            raise ValueError(f"{name}: classes must lie in 0..{num_classes - 1}, got {values.min()}..{values.max()}")
    cells = np.bincount(true[read] * num_classes + predicted[read], minlength=num_classes * num_classes)
    return cells.reshape(num_classes, num_classes).astype(np.int64)


def accuracy(predictions: Labels, gold: Labels) -> float:
    """Share of rows whose prediction equals the gold label, 0 to 1. Raises ValueError as `confusion_matrix` does."""
    classes = 1 + max((int(np.max(values)) for values in (predictions, gold) if len(values)), default=0)
    matrix = confusion_matrix(predictions, gold, classes)
    return float(np.trace(matrix) / len(gold))


def f1_per_class(predictions: Labels, gold: Labels, num_classes: int) -> npt.NDArray[np.float64]:  # (C,)
    """F1 of each class, 0 to 1; nan for a class that occurs neither in the gold labels nor in the predictions."""
    matrix = confusion_matrix(predictions, gold, num_classes)
    occurrences = matrix.sum(0) + np.bincount(np.asarray(gold, np.int64), minlength=num_classes)
    return np.where(occurrences > 0, 2 * np.diag(matrix) / np.maximum(occurrences, 1), np.nan)


def macro_f1(predictions: Labels, gold: Labels, num_classes: int) -> float:
    """Unweighted mean of the classes' F1, 0 to 1.

    Classes that occur neither in the gold labels nor in the predictions do not count (as in scikit-learn's default).
    """
    return float(np.nanmean(f1_per_class(predictions, gold, num_classes)))
