"""The three stages: `adapt` (general), `finetune` (task teacher, baselines), `distill` (task distillation)."""

from .adapt import AdaptConfig, adapt
from .config import OptimSettings
from .distill import DistillConfig, distill
from .finetune import FinetuneConfig, finetune
from .seeds import run_seeds

__all__ = [
    "AdaptConfig",
    "DistillConfig",
    "FinetuneConfig",
    "OptimSettings",
    "adapt",
    "distill",
    "finetune",
    "run_seeds",
]
