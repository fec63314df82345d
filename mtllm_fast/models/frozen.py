"""Frozen linear layers in few bits, for training adapters over them."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Frozen = Literal["int8", "nf4", "fp8"]
PACKAGES: dict[str, str] = {"int8": "torchao", "nf4": "bitsandbytes", "fp8": "torchao"}


class _FrozenProduct(torch.autograd.Function):
    """y = x Wᵀ + b for a W that is never trained: backward reads W again, so that no dense copy of it is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return dy @ ctx.weight.dequantize().to(dy.dtype), None, None


class FrozenLinear(nn.Linear):
    """A linear layer over a frozen, quantised weight of torchao.

    torchao's own product is one of inference: under autograd it keeps each dequantised weight until backward.
    """

    def forward(self, x: Tensor) -> Tensor:
        return _FrozenProduct.apply(x, self.weight, self.bias)


def quantize_frozen(root: nn.Module, kind: Frozen, device: torch.device | str, *, emulate: bool = False) -> int:
    """Replace the frozen linear layers of `root` in place, on `device`, one after the other; returns how many.

    Args:
        kind: "int8" (torchao, one scale per output row; products in the activations' dtype), "nf4" (bitsandbytes, 64
            weights per scale, scales quantised again, as QLoRA; likewise), or "fp8" (torchao's training layers: the
            weights keep their dtype and the products are fp8, scaled per tensor).
        emulate: fp8 products rounded in the activations' dtype, for devices without fp8.

    Raises:
        ValueError: an unknown kind, or its package is missing.
    """
    if kind not in PACKAGES:
        raise ValueError(f"base_weights={kind!r}: expected one of {', '.join(PACKAGES)}")
    if find_spec(PACKAGES[kind]) is None:
        raise ValueError(f"base_weights={kind!r} needs {PACKAGES[kind]}: pip install 'mtllm-fast[quant]'")
    found = [
        (module, name, child)
        for path, module in root.named_modules()
        for name, child in module.named_children()
        if type(child) is nn.Linear and not child.weight.requires_grad and ".lora_" not in path
    ]
    count = 0
    for module, name, child in found:
        new = _replaced(child, kind, device, emulate).train(child.training)
        setattr(module, name, new)
        count += new is not child
    return count


def _replaced(layer: nn.Linear, kind: Frozen, device: torch.device | str, emulate: bool) -> nn.Module:
    sizes, dtype = (layer.in_features, layer.out_features), layer.weight.dtype
    new: Any
    if kind == "fp8":
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        holder = nn.Sequential(layer.to(device))
        # the hardware takes multiples of 16; other layers stay as they are
        if all(size % 16 == 0 for size in sizes):
            convert_to_float8_training(holder, config=Float8LinearConfig(emulate=emulate, pad_inner_dim=not emulate))
        return holder[0]
    if kind == "nf4":
        from bitsandbytes.nn import Linear4bit, Params4bit

        new = Linear4bit(*sizes, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
        new.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=new)
        new.bias = layer.bias
        # in eval mode, which is the teacher's, the CPU path would repack the weights into a form without a backward
        new.support_avx512bf16_for_cpu = False
        return new.to(device)
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    new = FrozenLinear(*sizes, bias=False, device="meta", dtype=dtype)
    new.weight, new.bias = nn.Parameter(layer.weight.data.to(device), requires_grad=False), layer.bias
    quantize_(new, Int8WeightOnlyConfig())
    return new.to(device)


def dequantised(layer: nn.Module) -> Tensor:
    """The weight (out, in) that a layer of `quantize_frozen` multiplies by."""
    weight: Any = layer.weight
    if hasattr(weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    return weight.dequantize() if hasattr(weight, "qdata") else weight.detach()
