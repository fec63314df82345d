"""The distillation loss: weighted terms over packed student and teacher states."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from .objective import Objective
from .table import TERMS

if TYPE_CHECKING:
    from ..data.batch import Batch


class Weights:
    """Weight of every term as fields of a frozen dataclass, with what the terms can be set to.

    Raises:
        ValueError: a weight or an option out of range, or no weight above 0.
    """

    def __post_init__(self) -> None:
        for name, weight in self.by_term.items():
            if not weight >= 0:
                raise ValueError(f"{name}={weight}: a loss weight must be >= 0")
        options = {name: value for name, value in self.options.items() if isinstance(value, float)}
        if not options.get("temperature", 1.0) > 0:
            raise ValueError(f"temperature={options['temperature']}: must be > 0")
        if not 0 <= options.get("label_smoothing", 0.0) < 1:
            raise ValueError(f"label_smoothing={options['label_smoothing']}: must be at least 0 and below 1")
        if not any(self.by_term.values()):
            raise ValueError(f"{', '.join(self.by_term)}: at least one weight must be > 0")

    @property
    def by_term(self) -> dict[str, float]:
        """The weights without the options."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name in TERMS}  # type: ignore[arg-type]

    @property
    def options(self) -> dict[str, object]:
        """What the terms can be set to."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in TERMS}  # type: ignore[arg-type]

    def objective(self) -> Objective:
        return Objective(self.by_term, **self.options)


@dataclass(frozen=True)
class DistillationWeights(Weights):
    """Weight of every term; 0 leaves the term out."""

    pooled_mse: float = 1.0
    """MSE of mean-pooled last hidden states (the paper's loss)."""
    paired_mse: float = 0.0
    """MSE of last hidden states at rows that end at the same character."""
    kl: float = 0.0
    """KL of the LM head's distributions at those rows, times temperature^2."""
    head_kl: float = 0.0
    """KL of the task head's distributions, times temperature^2 (stage 3)."""
    temperature: float = 1.0
    """Of both KL terms; above 1 it makes the distributions flatter."""

    @property
    def needs_pairs(self) -> bool:
        return any(weight > 0 and "pairs" in TERMS[name].needs for name, weight in self.by_term.items())

    def counts(self, batch: Batch) -> dict[str, float]:
        """What each active term of `batch` is divided by once summed over the whole step; known before the forward."""
        return DistillationLoss(self).counts(batch)


@dataclass(frozen=True)
class TargetWeights(Weights):
    """Weight of every term of a student that learns to write; 0 leaves the term out."""

    target_ce: float = 1.0
    """Cross-entropy of the target's tokens."""
    kl: float = 0.0
    """KL at the target's tokens from the bare LLM that reads the text itself and the same target, times temperature^2:
    self-distillation on the same answer rows."""
    temperature: float = 1.0
    """Of the KL; above 1 it makes the distributions flatter."""
    label_smoothing: float = 0.0
    """Share of the cross-entropy's target distribution that is spread over the vocabulary."""


class DistillationLoss(Objective):
    """Distils a teacher's states into a student's over one pack.

    Source: arXiv 2406.12739 (pooled MSE), extended by token-aligned MSE and temperature-scaled KL.
    """

    def __init__(self, weights: DistillationWeights | None = None) -> None:
        weights = weights or DistillationWeights()
        super().__init__(weights.by_term, **weights.options)
        self.weights = weights
