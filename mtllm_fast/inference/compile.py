"""torch.compile for packed models, one graph per kind of layer for batches of any size."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface

from ..models.attention import NAME, packed_attention


def compile_layers(layers: Any, backend: str = "inductor") -> None:
    """Compile each layer of a model, in place.

    Attention stays out of the graphs: it depends on the lengths of the batch, and every batch would be compiled anew.
    """
    AttentionInterface.register(NAME, torch.compiler.disable(packed_attention))
    for layer in layers:
        layer.compile(dynamic=True, backend=backend)
