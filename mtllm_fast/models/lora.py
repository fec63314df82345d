"""A frozen linear layer with LoRA as one product that is added to in place.

    y = x Wᵀ + bias + s (x Aᵀ) Bᵀ          dx = dy W + s (dy B) A

peft's own layer casts x to the adapter's dtype, writes both products, scales one and adds them: about seven passes over
rows as wide as the layer, forward and backward each, where two products need none. `fuse_lora` gives peft's layers this
forward and leaves them what they are: names, weights, switching, merging and saving stay peft's, and so does every call
that is more than plain LoRA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..kernels.op import Op, Registered
from .frozen import Fp8Linear, autocast_dtype, fp8_backward, fp8_forward


@dataclass(frozen=True, kw_only=True, eq=False)
class Products(Op[Tensor]):
    """x wᵀ + bias + scale · low bᵀ, the second product added to the first in place.

    An op because Inductor, which leaves it whole, would add out of place: one more copy.
    """

    x: Tensor  # (T, K)
    w: Tensor  # (N, K)
    bias: Tensor | None = None  # (N,)
    low: Tensor  # (T, r)
    b: Tensor  # (N, r)
    scale: float = 1.0

    def cpu(self) -> Tensor:
        return _plain(self.x, self.w, self.bias, self.low, self.b, self.scale)

    def fake(self) -> Tensor:
        return self.x.new_empty(self.x.shape[0], self.w.shape[0])


lora_products = Registered(Products, "lora_products")


def _plain(x: Tensor, w: Tensor, bias: Tensor | None, low: Tensor, b: Tensor, scale: float) -> Tensor:
    return F.linear(x, w, bias).addmm_(low, b.t(), alpha=scale)


def _products_here() -> Callable[..., Tensor]:
    """Called where it is used, by position: within a function of its own Dynamo loses track of its arguments."""
    return lora_products.op if torch.compiler.is_compiling() else _plain


class LoraProduct(torch.autograd.Function):
    """(y, low): y = x wᵀ + bias + scale · low bᵀ and low = x aᵀ, of x (T, K), w (N, K), bias (N) or None, a (r, K),
    b (N, r), all of one dtype; w and bias get no gradient.

    With `dropped` = x * keep / (1 - p), low is dropped aᵀ. Kept for backward are x, which the layer keeps anyway, low,
    and one byte of `keep` for each element of x. `low` is an output for second derivatives alone. With a w in fp8, w,
    w_scale, wt and scale_t are its `Fp8Weights`; the three are None otherwise.
    """

    @staticmethod
    def forward(
        x: Tensor,
        w: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        dropped: Tensor | None,
        keep: Tensor | None,
        p: float,
        w_scale: Tensor | None,
        wt: Tensor | None,
        scale_t: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        low = F.linear(x if dropped is None else dropped, a)
        if w_scale is not None:
            return fp8_forward(x, w, w_scale, bias).addmm_(low, b.t(), alpha=scale), low
        return _products_here()(x, w, bias, low, b, scale), low

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, w, _, a, b, ctx.scale, _, keep, ctx.p, _, wt, scale_t = inputs
        ctx.save_for_backward(x, w if wt is None else wt, a, b, keep, output[1], scale_t)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, d_more: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, w, a, b, keep, low, scale_t = ctx.saved_tensors
        need_x, _, _, need_a, need_b, *_ = ctx.needs_input_grad
        if dy is None:  # of a second derivative, through low alone
            dy = x.new_zeros(x.shape[0], b.shape[0])
        d_low = ctx.scale * (dy @ b)
        if d_more is not None:
            d_low = d_low + d_more
        db = dy.t() @ (ctx.scale * low) if need_b else None
        dx, rest = None, (None,) * 7
        if keep is None:
            if need_x and scale_t is None:
                dx = _products_here()(dy, w.t(), None, d_low, a.t(), 1.0)
            elif need_x:
                dx = fp8_backward(dy, w, scale_t).addmm_(d_low, a)
            return dx, None, None, d_low.t() @ x if need_a else None, db, *rest
        d_low = d_low / (1 - ctx.p)
        if need_x:
            dx = (dy @ w if scale_t is None else fp8_backward(dy, w, scale_t)).addcmul_(d_low @ a, keep)
        return dx, None, None, d_low.t() @ (x * keep) if need_a else None, db, *rest


class LoraLinear(PeftLinear):  # type: ignore[misc]
    """peft's LoRA layer over a frozen `nn.Linear` or `Fp8Linear`, its plain forward as one op (see `LoraProduct`)."""

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
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
        dropped = keep = None
        if p > 0:
            with torch.no_grad():
                dropped, keep = torch.native_dropout(flat, p, True)
        y, _ = LoraProduct.apply(flat, w, bias, a, b, self.scaling[name], dropped, keep, p, *more)
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
