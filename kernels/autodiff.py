"""What the ops can be differentiated by: once, in reverse, also under `torch.func`. Everything else is refused.

`torch.library` derives a custom op by an autograd.Function of the old kind, which no transform of torch.func takes, and
which loses the tangents of forward-mode AD in silence; a second derivative would be missing a term.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def differentiable(
    op: Any, setup_context: Callable[..., None], backward: Callable[..., Any], name: str
) -> Callable[..., Any]:
    """Register the derivative of a custom op, and return the function that callers use in place of the op.

    Under a transform of torch.func the call goes through an autograd.Function that has its `setup_context` apart, and
    whose vmap is that of the op: one call per example. `name` is what errors call the op.

    Raises (the function that is returned):
        NotImplementedError: an argument carries a tangent of forward-mode AD.
    """

    def refuse_tangents(*_: Any) -> None:
        raise NotImplementedError(
            f"{name} has no forward-mode derivative (jvp, jacfwd, hessian, dual numbers); use reverse mode: backward, "
            "torch.func.grad, vjp or jacrev"
        )

    op.register_autograd(backward, setup_context=setup_context)
    function: Any = type(
        op._name.split("::")[-1],
        (torch.autograd.Function,),
        {
            "forward": staticmethod(lambda *inputs: op(*inputs)),
            "setup_context": staticmethod(lambda ctx, inputs, output: setup_context(ctx, inputs, output)),
            "backward": staticmethod(backward),
            "jvp": staticmethod(refuse_tangents),
            "generate_vmap_rule": True,
        },
    )

    def call(*inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            return op(*inputs)
        if any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in inputs):
            refuse_tangents()
        return function.apply(*inputs) if torch._C._are_functorch_transforms_active() else op(*inputs)

    return call


def once_only(op: Any, name: str) -> Callable[..., Any]:
    """`differentiable` for an op that is the backward of `name`: a second derivative raises RuntimeError."""

    def refuse(ctx: Any, *gradients: Any) -> None:
        raise RuntimeError(
            f"{name} has no second derivative: its gradient cannot be differentiated again (gradient penalties, "
            "torch.func.hessian, grad of grad)"
        )

    return differentiable(op, lambda ctx, inputs, output: None, refuse, f"the gradient of {name}")
