"""Loss terms over packed batches, each a `(sum, count)` pair, and the objectives that weigh them."""

from .distillation import DistillationLoss, DistillationWeights, LabelWeights, TargetWeights
from .objective import Objective
from .table import TERMS
from .term import LossTerm

__all__ = [
    "TERMS",
    "DistillationLoss",
    "DistillationWeights",
    "LabelWeights",
    "LossTerm",
    "Objective",
    "TargetWeights",
]
