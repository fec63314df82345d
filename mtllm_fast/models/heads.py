"""Pooling and task heads on packed states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from ..data.pack import PackedBatch
from ..kernels import hidden_mse


@dataclass(frozen=True)
class HeadConfig:
    """A linear head on the mean-pooled states.

    kind "classification": (B, D) -> (B, C), one row per label. kind "choice": one shared score per choice span.
    """

    kind: Literal["classification", "choice"] = "classification"
    labels: tuple[str, ...] = ()


def segment_mean(states: Tensor, batch: PackedBatch, pooling: str = "mean") -> Tensor:
    """Mean state of every sequence, partners left out: (T, D) -> (B, D) in float32; an empty one gives zeros.

    `pooling`: "mean", or the "first" or "last" state.
    """
    pooled = hidden_mse.segment_mean(states, batch.cu_seqlens, pooling=pooling)
    return pooled[::2] if batch.partners else pooled


def partner_mean(states: Tensor, batch: PackedBatch) -> Tensor:
    """Mean state of every row's partner: (T, D) -> (B, D) in float32; where there is none, zeros."""
    return hidden_mse.segment_mean(states, batch.cu_seqlens)[1::2]


def span_mean(states: Tensor, spans: Tensor) -> Tensor:
    """Mean state of row spans: states (T, D), spans (B, C, 2) start/end packed rows -> (B, C, D) in float32."""
    return hidden_mse.segment_mean(states, spans=spans)


class TaskHead(nn.Module):
    """Linear head without bias (as the authors'): labels of a text, or one score per choice.

    forward takes pooled states: (B, D) for classification, (B, C, D) for choice; gives logits (B, C) in float32.
    """

    def __init__(self, hidden_size: int, config: HeadConfig) -> None:
        super().__init__()
        if config.kind not in ("classification", "choice"):
            raise ValueError(f"head.kind={config.kind!r}: expected 'classification' or 'choice'")
        if config.kind == "classification" and len(config.labels) < 2:
            raise ValueError(f"head.labels={config.labels!r}: a classification head needs at least two labels")
        self.config = config
        self.linear = nn.Linear(hidden_size, len(config.labels) if config.kind == "classification" else 1, bias=False)

    def forward(self, pooled: Tensor) -> Tensor:
        logits = self.linear(pooled.to(self.linear.weight.dtype)).float()
        return logits.squeeze(-1) if self.config.kind == "choice" else logits
