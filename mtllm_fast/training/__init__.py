"""The stages: `adapt` (general), `finetune` (task teacher, baselines), `distill` (task), `sft` (targets)."""

from .adapt import adapt
from .config import OptimSettings
from .distill import distill
from .finetune import finetune
from .seeds import run_seeds
from .sft import sft
from .stage_config import AdaptConfig, DistillConfig, FinetuneConfig, SftConfig
from .stages import STAGES

__all__ = [
    "STAGES",
    "AdaptConfig",
    "DistillConfig",
    "FinetuneConfig",
    "OptimSettings",
    "SftConfig",
    "adapt",
    "distill",
    "finetune",
    "run_seeds",
    "sft",
]
