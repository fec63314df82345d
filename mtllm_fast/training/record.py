"""What a run has done since its first step: over all processes, and over every part of a run that was resumed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..data.collate import StreamCounts

Metrics = dict[str, Any]  # what a run has come to, by name

RECORD = "record"  # in the Trainer's state


@dataclass
class RunRecord:
    """Sums that a checkpoint keeps, so that a resumed run reports what the uninterrupted one would.

    Fields:
        loss: sum of the losses of `steps`, the logged steps that changed the weights.
        rows: documents trained on. seconds: training time, all parts together.
        epochs: passes over the data that are over; epoch_rows: documents of the pass that is not.
        rows_per_epoch: documents of a pass; None while it is not known (a stream in its first pass).
        sums: terms since the latest log, mean over the processes; since: the step of that log; bad: steps since then
            that changed no weight.
    """

    loss: float = 0.0
    steps: int = 0
    rows: int = 0
    seconds: float = 0.0
    epochs: int = 0
    epoch_rows: int = 0
    rows_per_epoch: int | None = None
    sums: dict[str, float] = field(default_factory=dict)
    since: int = 0
    bad: int = 0

    @classmethod
    def from_state(cls, state: Mapping[str, Any], steps: int) -> RunRecord:
        """Of a trainer's state after `steps` steps; empty for one that was written without a record."""
        found = state.get("stateful_callbacks", {}).get(RECORD)
        return cls(**found) if found else cls(since=steps)

    def state(self) -> dict[str, object]:
        return asdict(self)

    def add(self, rows: int, epochs: int) -> None:
        """The documents of one step, before which `epochs` passes were over."""
        if epochs > self.epochs:
            self.rows_per_epoch, self.epoch_rows, self.epochs = self.epoch_rows, 0, epochs
        self.rows, self.epoch_rows = self.rows + rows, self.epoch_rows + rows

    @property
    def epoch(self) -> float | None:
        """Passes over the data, with the share of the present one; None while the length of a pass is not known."""
        if not self.rows_per_epoch:
            return None
        return self.epochs + min(self.epoch_rows / self.rows_per_epoch, 1.0)

    def good_steps(self, step: int) -> int:
        """Steps since the latest log that changed the weights."""
        return step - self.since - self.bad

    def summary(self, weights: Mapping[str, float], steps: int) -> dict[str, float]:
        """The Trainer's own names of a run's results, after `steps` steps; what is not logged yet counts too."""
        rest = sum(weights[name] * total for name, total in self.sums.items())
        seconds = max(self.seconds, 1e-9)
        found = {
            "train_runtime": round(self.seconds, 4),
            "train_samples_per_second": round(self.rows / seconds, 3),
            "train_steps_per_second": round(steps / seconds, 3),
            "train_loss": (self.loss + rest) / max(self.steps + self.good_steps(steps), 1),
        }
        return found if self.epoch is None else {**found, "epoch": self.epoch}


def best_of(history: list[dict[str, float]], checkpoint: str | None) -> Metrics:
    """Step and English accuracy of the best checkpoint, if there is one."""
    if checkpoint is None:
        return {}
    step = int(Path(checkpoint).name.rsplit("-", 1)[-1])
    (accuracy,) = {entry["eval_accuracy"] for entry in history if "eval_accuracy" in entry and entry["step"] == step}
    return {"best_step": step, "best_eval_accuracy": accuracy}


def data_report(counts: StreamCounts) -> dict[str, object]:
    """What the last epoch read, for the run's metrics."""
    return {
        "rows": counts.rows,
        "truncated": dict(counts.truncated),
        "fallbacks": dict(counts.fallbacks),
        "packing_efficiency": round(counts.efficiency, 4),
        "skipped_rows": sum(getattr(counts.source, name, 0) for name in ("failed", "empty")) + counts.unreadable,
    }
