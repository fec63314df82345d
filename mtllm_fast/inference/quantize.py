"""Weights in 8 bits, by torchao."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

from torch import nn

Quantization = Literal["int8", "fp8"]


def check_quantization(kind: str) -> None:
    """Raise ValueError where `kind` is unknown or torchao is missing."""
    if kind not in ("int8", "fp8"):
        raise ValueError(f"quantize={kind!r}: expected 'int8', 'fp8' or None")
    if find_spec("torchao") is None:
        raise ValueError(f"quantize={kind!r} needs torchao: pip install 'mtllm-fast[quant]'")


def quantize_layers(root: nn.Module, kind: Quantization) -> None:
    """Replace the weights of the linear layers of `root` by 8-bit ones, in place; activations keep their dtype.

    Args:
        kind: "int8" (any device) or "fp8" (GPUs of compute capability 8.9 or newer).

    Raises:
        ValueError: an unknown kind, torchao is missing.
    """
    check_quantization(kind)
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    def wanted(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and ".lora_" not in name

    quantize_(root, Int8WeightOnlyConfig() if kind == "int8" else Float8WeightOnlyConfig(), filter_fn=wanted)
