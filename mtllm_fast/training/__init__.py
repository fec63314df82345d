"""The stages: `adapt` (general), `finetune` (task teacher, baselines), `distill` (task), `sft` (targets), `compress`
(a smaller encoder)."""

from .adapt import adapt
from .compress import compress
from .config import OptimSettings
from .distill import distill
from .finetune import finetune
from .seeds import run_seeds
from .sft import sft
from .stage_config import AdaptConfig, CompressConfig, DistillConfig, FinetuneConfig, SftConfig
from .stages import STAGES

__all__ = [
    "STAGES",
    "AdaptConfig",
    "CompressConfig",
    "DistillConfig",
    "FinetuneConfig",
    "OptimSettings",
    "SftConfig",
    "adapt",
    "compress",
    "distill",
    "finetune",
    "run_seeds",
    "sft",
]
