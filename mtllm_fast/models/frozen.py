"""Frozen linear layers in few bits, for training adapters over them."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..kernels.fp8_linear import FP8, MULTIPLE, dequantised_rows, fp8_linear, quantise_rows

Frozen = Literal["int8", "nf4", "fp8"]
KINDS: tuple[Frozen, ...] = get_args(Frozen)
PACKAGES: dict[str, str] = {"int8": "torchao", "nf4": "bitsandbytes"}  # fp8 needs none


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


class Fp8Weights(NamedTuple):
    """A frozen W (N, K) twice, in rows along the dimension that each product sums over: bytes of e4m3, and scales."""

    w: Tensor  # (N, K) uint8
    scale: Tensor  # (N,) fp32
    wt: Tensor  # (K, N) uint8
    scale_t: Tensor  # (K,) fp32


def fp8_forward(x: Tensor, w: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + bias, (T, N) of x's dtype, of x (T, K)."""
    y = fp8_linear(x, w, scale, fast=True)
    return y if bias is None else y.add_(bias)


def fp8_backward(dy: Tensor, wt: Tensor, scale_t: Tensor) -> Tensor:
    """dy W, (T, K) of dy's dtype, of dy (T, N)."""
    return fp8_linear(dy, wt, scale_t, fast=False)


class _Fp8Product(torch.autograd.Function):
    """y = x Wᵀ + b, W in fp8; W and b get no gradient."""

    @staticmethod
    def forward(x: Tensor, w: Tensor, scale: Tensor, wt: Tensor, scale_t: Tensor, bias: Tensor | None) -> Tensor:
        return fp8_forward(x, w, scale, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[3], inputs[4])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return fp8_backward(dy, *ctx.saved_tensors), None, None, None, None, None


class Fp8Linear(nn.Linear):
    """A frozen linear layer in fp8, quantised once: 2 bytes a weight. Products are fp8's (see kernels/fp8_linear.py).

    The forward sums as fast as the hardware does, which loses bits where very many are summed; the backward does not:
    what it loses would be lost once per layer.

    The weights are buffers of bytes: nothing that casts, trains, spreads or averages parameters touches them.

    Args:
        layer: the layer it replaces; it keeps its bias.
        device: where the weights go.

    Raises:
        ValueError: a width that is no multiple of 16, which the hardware cannot multiply.
    """

    weight: None  # type: ignore[assignment]

    def __init__(self, layer: nn.Linear, device: torch.device | str, name: str = "") -> None:
        check_fp8_width(name, layer)
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_parameter("weight", None)
        self.bias = layer.bias if layer.bias is None else nn.Parameter(layer.bias.data.to(device), requires_grad=False)
        weight: Tensor = layer.weight.detach().to(device)
        for suffix, rows in (("", weight), ("_t", weight.t().contiguous())):
            q, scale = quantise_rows(rows)
            self.register_buffer(f"w{suffix[1:]}", q)
            self.register_buffer(f"scale{suffix}", scale)

    @property
    def weights(self) -> Fp8Weights:
        return Fp8Weights(self.w, self.scale, self.wt, self.scale_t)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        flat, dtype = x.reshape(-1, x.shape[-1]), autocast_dtype(x)
        bias: Tensor | None = self.bias
        if dtype is not None:
            flat, bias = flat.to(dtype), None if bias is None else bias.to(dtype)
        y = _Fp8Product.apply(flat, *self.weights, bias)
        return y.view(*x.shape[:-1], y.shape[-1])  # type: ignore[no-any-return]


def check_fp8_width(name: str, layer: nn.Linear) -> None:
    """Raise ValueError where fp8 cannot hold `layer`, called `name`."""
    sizes = (layer.out_features, layer.in_features)
    if any(size % MULTIPLE for size in sizes):
        raise ValueError(
            f"base_weights='fp8': {name or 'the layer'} is {sizes[0]} x {sizes[1]}, and fp8 products take multiples of "
            f"{MULTIPLE}; int8 and nf4 take any"
        )


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast casts x to, None where it is off or leaves it, as it does float64."""
    kind = x.device.type
    on = x.dtype != torch.float64 and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


def frozen_linears(root: nn.Module) -> list[tuple[str, nn.Module, str, nn.Linear]]:
    """(path, parent, name in it, layer) of the plain linear layers within `root` that are not trained."""
    return [
        (f"{path}.{name}" if path else name, module, name, child)
        for path, module in root.named_modules()
        for name, child in module.named_children()
        if type(child) is nn.Linear and not child.weight.requires_grad and ".lora_" not in path
    ]


def quantize_frozen(root: nn.Module, kind: Frozen, device: torch.device | str) -> int:
    """Replace the frozen linear layers of `root` in place, on `device`, one after the other; returns how many.

    Args:
        kind: "int8" (torchao, one scale per output row; products in the activations' dtype), "nf4" (bitsandbytes, 64
            weights per scale, scales quantised again, as QLoRA; likewise), or "fp8" (`Fp8Linear`: weights and products
            in fp8; on a CPU the same numbers, slowly).

    Raises:
        ValueError: an unknown kind, its package is missing, or a width is not one of fp8's; nothing is replaced.
    """
    if kind not in KINDS:
        raise ValueError(f"base_weights={kind!r}: expected one of {', '.join(KINDS)}")
    if kind in PACKAGES and find_spec(PACKAGES[kind]) is None:
        raise ValueError(f"base_weights={kind!r} needs {PACKAGES[kind]}: pip install 'mtllm-fast[quant]'")
    found = frozen_linears(root)
    if kind == "fp8":
        for path, _, _, child in found:
            check_fp8_width(path, child)
    for path, module, name, child in found:
        setattr(module, name, _replaced(path, child, kind, device).train(child.training))
    return len(found)


def _replaced(path: str, layer: nn.Linear, kind: Frozen, device: torch.device | str) -> nn.Module:
    if kind == "fp8":
        return Fp8Linear(layer, device, path)
    sizes, dtype = (layer.in_features, layer.out_features), layer.weight.dtype
    new: Any
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
    if isinstance(layer, Fp8Linear):
        return dequantised_rows(layer.weights.w.view(FP8), layer.weights.scale).float()
    weight: Any = layer.weight
    if hasattr(weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    return weight.dequantize() if hasattr(weight, "qdata") else weight.detach()


def dense_weight(layer: nn.Module) -> Tensor:
    """The weight of a linear layer, to add to in place. Raises ValueError where it is quantised."""
    weight = layer.weight
    if type(weight) is not nn.Parameter or not weight.is_floating_point() or is_traceable_wrapper_subclass(weight.data):
        raise ValueError("the base weights are quantised: load the model again to merge its adapter into them")
    return weight
