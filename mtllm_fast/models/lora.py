"""A frozen linear layer with LoRA as one product that is added to in place.

    y = x Wᵀ + bias + s (x Aᵀ) Bᵀ          dx = dy W + s (dy B) A

peft's own layer casts x to the adapter's dtype, writes both products, scales one and adds them: about seven passes over
rows as wide as the layer, forward and backward each, where two products need none. `fuse_lora` gives peft's layers this
forward and leaves them what they are: names, weights, switching, merging and saving stay peft's, and so does every call
that is more than plain LoRA.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .frozen import Fp8Linear, autocast_dtype, fp8_backward, fp8_forward


class LoraProduct(torch.autograd.Function):
    """x wᵀ + bias + scale · low bᵀ, of x (T, K), w (N, K), bias (N) or None, low (T, r), b (N, r), all of one dtype.

    With `a` (r, K), low is x aᵀ, and its share of dx is added to dy w in place: low then gets no gradient of its own.
    Without, low does (it is of a dropped-out x). w and bias get none. With a w in fp8, w, w_scale, wt and scale_t are
    its `Fp8Weights`; the three are None otherwise.
    """

    @staticmethod
    def forward(
        x: Tensor, w: Tensor, bias: Tensor | None, low: Tensor, a: Tensor | None, b: Tensor, scale: float,
        w_scale: Tensor | None, wt: Tensor | None, scale_t: Tensor | None,
    ) -> Tensor:  # fmt: skip
        y = F.linear(x, w, bias) if w_scale is None else fp8_forward(x, w, w_scale, bias)
        return y.addmm_(low, b.t(), alpha=scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, w, _, low, a, b, ctx.scale, _, wt, scale_t = inputs
        ctx.folded = a is not None
        ctx.save_for_backward(*((x, a) if ctx.folded else (None, None)), w if wt is None else wt, scale_t, low, b)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, a, w, scale_t, low, b = ctx.saved_tensors
        need_x, _, _, need_low, need_a, need_b, *_ = ctx.needs_input_grad
        d_low = ctx.scale * (dy @ b)
        dx = None
        if need_x:
            dx = dy @ w if scale_t is None else fp8_backward(dy, w, scale_t)
        if dx is not None and a is not None:
            dx = dx.addmm_(d_low, a)
        da = d_low.t() @ x if need_a else None
        db = dy.t() @ (ctx.scale * low) if need_b else None
        return dx, None, None, d_low if need_low and a is None else None, da, db, None, None, None, None


class DroppedProduct(torch.autograd.Function):
    """`dropped` aᵀ, where dropped = x * keep * scale, of x (T, K), keep (T, K) bool and a (r, K).

    Keeps x, which the layer keeps anyway, and one byte of `keep` for each of its elements, not the dropped-out copy.
    """

    @staticmethod
    def forward(x: Tensor, dropped: Tensor, keep: Tensor, a: Tensor, scale: float) -> Tensor:
        return dropped @ a.t()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, _, keep, a, ctx.scale = inputs
        ctx.save_for_backward(x, keep, a)

    @staticmethod
    def backward(ctx: Any, d_low: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, keep, a = ctx.saved_tensors
        scaled = ctx.scale * d_low
        dx = (scaled @ a) * keep if ctx.needs_input_grad[0] else None
        return dx, None, None, scaled.t() @ (x * keep), None


class LoraLinear(PeftLinear):  # type: ignore[misc]
    """peft's LoRA layer over a frozen `nn.Linear` or `Fp8Linear`, its plain forward as one op (see `LoraProduct`)."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = self._plain_adapter(x) if not (args or kwargs) else None
        if name is None:
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        base = cast(nn.Linear, self.base_layer)
        fp8 = base.weights if isinstance(base, Fp8Linear) else None
        w, bias = base.weight if fp8 is None else fp8.w, cast(Tensor | None, base.bias)
        a, b = (cast(Tensor, lora[name].weight) for lora in (self.lora_A, self.lora_B))
        dtype = autocast_dtype(x)
        if dtype is not None:
            x, a, b = x.to(dtype), a.to(dtype), b.to(dtype)
            w = w.to(dtype) if fp8 is None else w
            bias = None if bias is None else bias.to(dtype)
        more = (None, None, None) if fp8 is None else (fp8.scale, fp8.wt, fp8.scale_t)
        dropout = self.lora_dropout[name]
        p = float(getattr(dropout, "p", 0.0)) if dropout.training else 0.0
        flat = x.reshape(-1, x.shape[-1])
        if p > 0:
            with torch.no_grad():
                dropped, keep = torch.native_dropout(flat, p, True)
            low = DroppedProduct.apply(flat, dropped, keep, a, 1 / (1 - p))
            y = LoraProduct.apply(flat, w, bias, low, None, b, self.scaling[name], *more)
        else:
            # `low` keeps its graph, which only a second derivative needs: the first one comes folded into dx
            y = LoraProduct.apply(flat, w, bias, F.linear(flat, a), a, b, self.scaling[name], *more)
        return y.view(*x.shape[:-1], y.shape[-1])  # type: ignore[no-any-return]

    def _plain_adapter(self, x: Tensor) -> str | None:
        """The one adapter that is on, where the layer is no more than a frozen product and LoRA; None otherwise."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or len(active) != 1 or active[0] in self.lora_variant:
            return None
        base, down, up = self.base_layer, self.lora_A[active[0]], self.lora_B[active[0]]
        if type(base) not in (nn.Linear, Fp8Linear) or type(down) is not nn.Linear or type(up) is not nn.Linear:
            return None
        if down.bias is not None or up.bias is not None or not x.is_floating_point() or x.numel() == 0:
            return None
        frozen = [weight for weight in (base.weight, base.bias) if weight is not None]  # of fp8 the bias alone
        weights = [*frozen, down.weight, up.weight]
        if any(is_traceable_wrapper_subclass(weight) for weight in weights):  # spread over processes, quantised
            return None
        if any(weight.requires_grad for weight in frozen):
            return None
        if any(_has_hooks(module) for module in (base, down, up)):
            return None
        same = {x.dtype, *(weight.dtype for weight in weights)}
        cast_to_one = autocast_dtype(x) is not None and torch.float64 not in same
        return active[0] if len(same) == 1 or cast_to_one else None


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def fuse_lora(layers: Iterable[nn.Module]) -> None:
    """Give peft's plain LoRA layers among `layers` the forward of `LoraLinear`, in place; leave all others."""
    for layer in layers:
        if type(layer) is PeftLinear:
            layer.__class__ = LoraLinear
