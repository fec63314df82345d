"""Distillation losses over packed batches; every term is a `(sum, count)` pair."""

from .distillation import DistillationLoss, DistillationWeights, LossTerm

__all__ = ["DistillationLoss", "DistillationWeights", "LossTerm"]
