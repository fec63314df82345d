"""The distillation loss: weighted terms over packed student and teacher states."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, get_args

from .objective import Objective
from .table import TERMS
from .term import Divergence, Need

if TYPE_CHECKING:
    from ..data.batch import Batch


@dataclass(frozen=True)
class Weights:
    """Weight of every term as fields of a frozen dataclass, with what the terms can be set to.

    Raises:
        ValueError: a weight or an option out of range, or no weight above 0.
    """

    def __post_init__(self) -> None:
        for name, weight in self.by_term.items():
            if not weight >= 0:
                raise ValueError(f"{name}={weight}: a loss weight must be >= 0")
        for name, value in self.options.items():
            if value is None:
                continue
            if name.endswith("temperature") and not value > 0:
                raise ValueError(f"{name}={value}: must be > 0")
            if name == "divergence" and value not in get_args(Divergence):
                raise ValueError(f"divergence={value!r}: expected one of {', '.join(get_args(Divergence))}")
            if name == "beta" and not 0 <= value <= 1:
                raise ValueError(f"beta={value}: must be between 0 and 1")
            if name == "label_smoothing" and not 0 <= value < 1:
                raise ValueError(f"label_smoothing={value}: must be at least 0 and below 1")
        if not any(self.by_term.values()):
            raise ValueError(f"{', '.join(self.by_term)}: at least one weight must be > 0")

    @property
    def by_term(self) -> dict[str, float]:
        """The weights without the options."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name in TERMS}

    @property
    def options(self) -> dict[str, Any]:
        """What the terms can be set to."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in TERMS}

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
    divergence: Divergence = "forward"
    """What `kl` is: forward, KL(teacher || student); reverse, KL(student || teacher); jsd, the generalised
    Jensen-Shannon divergence (arXiv 2306.13649)."""
    beta: float = 0.5
    """Of jsd: towards 0 it is the forward KL, towards 1 the reverse."""
    contrast: float = 0.0
    """One-way InfoNCE of mean-pooled last hidden states: a text's is to be nearer to the teacher's of the same text
    than to those of the other texts of its pack."""
    contrast_temperature: float = 0.1
    """Of `contrast`, whose cosines it divides; the lower, the more the nearest other texts count."""
    contrast_layer: int | None = None
    """Take `contrast` of the states after this layer of the LLM, from 1, in place of the last hidden states."""
    task: float = 0.0
    """Cross-entropy of the task head on the rows' labels (stage 3)."""
    rank_weights: bool = False
    """Divide a row's head_kl by the rank of its label in the teacher's logits: what the teacher has wrong counts
    less."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.contrast_layer is not None and not self.contrast:
            raise ValueError(f"contrast_layer={self.contrast_layer}: is that of contrast, whose weight is 0")
        if self.contrast_layer is not None and self.contrast_layer < 1:
            raise ValueError(f"contrast_layer={self.contrast_layer}: layers are counted from 1")
        if self.rank_weights and not self.head_kl:
            raise ValueError(f"rank_weights=True: weighs the rows of head_kl, but head_kl={self.head_kl}")

    @property
    def needs(self) -> frozenset[Need]:
        """What the active terms need."""
        return DistillationLoss(self).needs

    @property
    def needs_pairs(self) -> bool:
        return "pairs" in self.needs

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
    divergence: Divergence = "forward"
    """What `kl` is: forward, KL(bare LLM || student); reverse, KL(student || bare LLM); jsd, the generalised
    Jensen-Shannon divergence (arXiv 2306.13649)."""
    beta: float = 0.5
    """Of jsd: towards 0 it is the forward KL, towards 1 the reverse."""
    label_smoothing: float = 0.0
    """Share of the cross-entropy's target distribution that is spread over the vocabulary."""


@dataclass(frozen=True)
class LabelWeights(Weights):
    """Weight of every term of a reader that learns a task from labels; 0 leaves the term out."""

    task: float = 1.0
    """Cross-entropy of the task head on the rows' labels."""
    partner_task: float = 0.0
    """The same of the translations that texts are read with (`fusion`), over the rows that have one."""
    label_kl: float = 0.0
    """KL of the task head's distribution from the rows' soft labels, times temperature^2: another model's
    log-probabilities, as `mtllm respond --labels` writes them."""
    temperature: float = 1.0
    """Of the KL; above 1 it makes the distributions flatter."""


class DistillationLoss(Objective):
    """Distils a teacher's states into a student's over one pack.

    Source: arXiv 2406.12739 (pooled MSE), extended by token-aligned MSE and temperature-scaled KL.
    """

    def __init__(self, weights: DistillationWeights | None = None) -> None:
        weights = weights or DistillationWeights()
        super().__init__(weights.by_term, **weights.options)
        self.weights = weights
