"""mtllm-fast: stack a machine-translation encoder into an LLM by self-distillation.

Public names load on first use, so `import mtllm_fast` is cheap.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .auto import register_when_imported

__version__ = "0.1.0"

_PUBLIC = {
    "MTLLM": "models",
    "MTLLMConfig": "models",
    "LoraSettings": "models",
    "ProjectionConfig": "models",
    "HeadConfig": "models",
    "PackedBatch": "data",
    "StackTokenizer": "data",
    "TextRow": "data",
    "read_rows": "data",
    "DistillationLoss": "losses",
    "DistillationWeights": "losses",
    "Engine": "inference",
    "adapt": "training.adapt",
    "finetune": "training.finetune",
    "distill": "training.distill",
}

__all__ = [
    "MTLLM",
    "DistillationLoss",
    "DistillationWeights",
    "Engine",
    "HeadConfig",
    "LoraSettings",
    "MTLLMConfig",
    "PackedBatch",
    "ProjectionConfig",
    "StackTokenizer",
    "TextRow",
    "__version__",
    "adapt",
    "distill",
    "finetune",
    "read_rows",
]

if TYPE_CHECKING:
    from .data import PackedBatch, StackTokenizer, TextRow, read_rows
    from .inference import Engine
    from .losses import DistillationLoss, DistillationWeights
    from .models import MTLLM, HeadConfig, LoraSettings, MTLLMConfig, ProjectionConfig
    from .training.adapt import adapt
    from .training.distill import distill
    from .training.finetune import finetune


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)


register_when_imported()
