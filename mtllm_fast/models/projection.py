"""The trained bridge from MT-encoder states to LLM input embeddings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..kernels import packed_projection


@dataclass(frozen=True)
class ProjectionConfig:
    """The bridge between encoder (states of width E) and LLM (embeddings of width D)."""

    kind: Literal["linear", "mlp"] = "linear"
    """linear: E -> D, as MT-LLM; mlp: E -> 2E -> activation -> D, as MindMerger."""
    activation: Literal["relu", "gelu", "silu"] = "relu"
    """Of mlp: relu, as MindMerger; gelu, as LangBridge's feed-forward; silu."""
    bias: bool = True
    fuse_layers: bool = False
    """Project a trained mean, weighted by a softmax, of the states of all encoder layers, not the last ones alone
    (arXiv 2508.09091); it starts nearly at the last layer."""
    boundary: bool = False
    """A trained embedding between the projected text and the LLM's own tokens, where such follow (`mtllm sft`,
    generation); it starts at zeros. MindMerger's boundary (arXiv 2405.17386), LangBridge's end token."""

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"projection.activation={self.activation!r}: expected one of {', '.join(ACTIVATIONS)}")
        if self.kind == "linear" and self.activation != "relu":
            raise ValueError(f"projection.activation={self.activation!r}: a linear projection has none")


ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}
# The weight of the last layer at the start; at 1 no other layer would get a gradient.
LAST_LAYER = 0.95
# Logits are this times the trained numbers, since AdamW moves those by about the learning rate a step, which is that of
# the projection.
FUSION_SCALE = 50.0


def norm_options(norm: nn.Module) -> dict[str, Any]:
    """What `packed_projection` must know of a final norm: a LayerNorm, or an RMSNorm of torch or transformers."""
    if isinstance(norm, nn.LayerNorm):
        return {"norm": "layer", "norm_weight": norm.weight, "norm_bias": norm.bias, "eps": norm.eps}
    eps = getattr(norm, "variance_epsilon", None)
    return {"norm": "rms", "norm_weight": norm.weight, "eps": norm.eps if eps is None else eps}


class Projection(nn.Module):
    """`y = W x + b`, or `y = W2 act(W1 x + b1) + b2`; x (T, E) -> y (T, D).

    Attributes:
        fusion: (L,), the trained numbers behind the weights of `fuse`; None without `fuse_layers`.
        boundary: (D,), what stands behind a projected text; None without `boundary`.
    """

    def __init__(
        self, d_encoder: int, d_llm: int, config: ProjectionConfig | None = None, encoder_layers: int | None = None
    ) -> None:
        super().__init__()
        config = config or ProjectionConfig()
        self.fusion: nn.Parameter | None = None
        self.boundary = nn.Parameter(torch.zeros(d_llm)) if config.boundary else None
        if config.fuse_layers:
            if encoder_layers is None or encoder_layers < 2:
                raise ValueError(f"projection.fuse_layers: needs an encoder of 2 layers or more, got {encoder_layers}")
            start = torch.zeros(encoder_layers)
            start[-1] = math.log(LAST_LAYER / (1 - LAST_LAYER) * (encoder_layers - 1)) / FUSION_SCALE
            self.fusion = nn.Parameter(start)
        if config.kind not in ("linear", "mlp"):
            raise ValueError(f"projection.kind={config.kind!r}: expected 'linear' or 'mlp'")
        self.layers: nn.Module
        self.activation = config.activation
        if config.kind == "linear":
            self.layers = nn.Linear(d_encoder, d_llm, bias=config.bias)
        else:
            self.layers = nn.Sequential(
                nn.Linear(d_encoder, 2 * d_encoder, bias=config.bias),
                ACTIVATIONS[config.activation](),
                nn.Linear(2 * d_encoder, d_llm, bias=config.bias),
            )

    def layer_weights(self) -> Tensor:
        """Weights (L,) of the encoder's layers; they sum to 1."""
        assert self.fusion is not None
        return (FUSION_SCALE * self.fusion.float()).softmax(0)

    def fuse(self, states: Tensor) -> Tensor:
        """One state (T, E) per token out of those of all layers (L, T, E)."""
        return (self.layer_weights()[:, None, None] * states).sum(0).to(states.dtype)

    @torch.no_grad()
    def scale_output(self, states: Tensor, std: float) -> None:
        """Rescale the last layer so that projected `states` (T, E) have standard deviation `std`."""
        last = self.layers if isinstance(self.layers, nn.Linear) else self.layers[-1]  # type: ignore[index]
        current = float(self(states.to(last.weight.dtype)).float().std())
        if current > 0 and std > 0:
            for parameter in last.parameters():
                parameter.mul_(std / current)

    def forward(
        self, states: Tensor, norm: nn.Module | None = None, dtype: torch.dtype | None = None, **around: Tensor | None
    ) -> Tensor:
        """Project packed states (T, E) to (T, D) of `dtype` (the weights' own by default), by `packed_projection`.

        Args:
            norm: the encoder's final norm, where the states come from before it; it is then part of the same op.
            around: what the op puts around the sequences: cu_seqlens, prefix, suffix.
        """
        options: dict[str, Any] = dict(around)
        last = self.layers
        if isinstance(self.layers, nn.Sequential):
            hidden, last = self.layers[0], self.layers[-1]
            options |= {"hidden_weight": hidden.weight, "hidden_bias": hidden.bias, "activation": self.activation}
        if norm is not None:
            options |= norm_options(norm)
        states = states.to(last.weight.dtype)  # type: ignore[arg-type]
        return packed_projection(states, last.weight, last.bias, dtype=dtype, **options)  # type: ignore[arg-type]
