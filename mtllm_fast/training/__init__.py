"""The three stages: `adapt` (general), `finetune` (task teacher, baselines), `distill` (task distillation)."""

from .adapt import adapt
from .config import OptimSettings
from .distill import distill
from .finetune import finetune
from .seeds import run_seeds
from .stage_config import AdaptConfig, DistillConfig, FinetuneConfig
from .stages import STAGES

__all__ = [
    "STAGES",
    "AdaptConfig",
    "DistillConfig",
    "FinetuneConfig",
    "OptimSettings",
    "adapt",
    "distill",
    "finetune",
    "run_seeds",
]
