"""The variance of the teacher's states, which the MSE terms can be divided by."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from ..data.collate import Batch
from ..losses.term import Side
from .run_folder import read_json
from .stage import Stage

VARIANCE_FILE = "teacher_variance.json"
TEXTS = 512


class Variance:
    """Mean over the dimensions of the variance of rows (N, D) that come in parts; float64, each part about its mean."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | None = None
        self.squares = 0.0  # summed squared distances from the mean

    def add(self, rows: Tensor) -> None:
        if not len(rows):
            return
        rows = rows.double()
        mean, count = rows.mean(0), len(rows)
        squares = float((rows - mean).square().sum())
        if self.mean is None:
            self.count, self.mean, self.squares = count, mean, squares
            return
        shift, total = mean - self.mean, self.count + count
        self.squares += squares + float(shift.square().sum()) * self.count * count / total
        self.mean, self.count = self.mean + shift * (count / total), total

    @property
    def value(self) -> float:
        return 0.0 if self.mean is None else self.squares / (self.count * len(self.mean))


@torch.no_grad()
def measure_variance(stage: Stage, batches: Iterable[Batch], *, bf16: bool) -> dict[str, float]:
    """Variance of the teacher's states that each active term compares, on the first `TEXTS` texts (whole packs).

    Raises:
        ValueError: the states do not differ from each other, so nothing can be divided by their variance.
    """
    device = next(stage.parameters()).device
    variances: dict[str, Variance] = {}
    texts = 0
    for plain in batches:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            batch, states = stage.taught(plain.to(device))
        teacher = Side.of(batch, "llm", states, "teacher")
        for name, term in stage.loss.terms.items():
            if (rows := term.compared(teacher)) is not None:
                variances.setdefault(name, Variance()).add(rows)
        texts += batch.num_rows
        if texts >= TEXTS:
            break
    for name, variance in variances.items():
        if not variance.value > 0:
            raise ValueError(
                f"over_variance: the teacher's states for {name} do not differ in the first {texts} texts, so their "
                "variance is no measure; give more texts or leave it out"
            )
    return {name: variance.value for name, variance in variances.items()}


def recorded_variance(folder: Path) -> dict[str, float] | None:
    """What a run that is continued was started with, None where it had not come so far."""
    path = folder / VARIANCE_FILE
    return read_json(path) if path.is_file() else None
