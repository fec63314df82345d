"""Models on packed rows: encoder, projection, LLM, the stack of the three, and task heads."""

from .adapters import LoraSettings
from .attention import AttentionPlan
from .encoder import PackedEncoder
from .fusion import FusionSettings
from .heads import HeadConfig, TaskHead, segment_mean, span_mean
from .llm import PackedLLM
from .mtllm import MTLLM, MTLLMConfig, MTLLMOutput
from .projection import Projection, ProjectionConfig

__all__ = [
    "MTLLM",
    "AttentionPlan",
    "FusionSettings",
    "HeadConfig",
    "LoraSettings",
    "MTLLMConfig",
    "MTLLMOutput",
    "PackedEncoder",
    "PackedLLM",
    "Projection",
    "ProjectionConfig",
    "TaskHead",
    "segment_mean",
    "span_mean",
]
