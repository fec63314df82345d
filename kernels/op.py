"""An op is declared once: a frozen dataclass of its arguments, with its kernels, fake and derivative as methods.

    @dataclass(frozen=True, kw_only=True, eq=False)
    class Scale(Op[Tensor]):
        x: Tensor  # (T, D)
        by: float = 1.0

        def cpu(self) -> Tensor: ...               # the kernels; `cuda` imports its launcher when it is called
        def cuda(self) -> Tensor: ...
        def fake(self) -> Tensor: ...              # shapes and dtypes
        def keep(self, y): return {"by": self.by}  # for backward
        @staticmethod
        def backward(kept, dy): return {"x": kept["by"] * dy}

    scale = Registered(Scale, "scale", errors="scale")  # torch.ops.mtllm_fast.scale; called as scale(x=x, by=2.0)

Ops can be differentiated once, in reverse, also under `torch.func`. Everything else is refused: `torch.library` derives
a custom op by an autograd.Function of the old kind, which no transform of torch.func takes, and which loses the
tangents of forward-mode AD in silence; a second derivative would be missing a term.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any, Generic, TypeVar, get_args, get_type_hints

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .device_checks import on_device_of_arguments

Result = TypeVar("Result")
Kept = dict[str, Any]


def needs_gradient(x: Tensor | None) -> bool:
    return x is not None and x.requires_grad and torch.is_grad_enabled()


class Op(Generic[Result]):
    """Base of a declaration. Its fields are the arguments in the order of the schema, which has no defaults."""

    def cpu(self) -> Result:
        """The kernel for the CPU, and for every other device where `cuda` is not defined."""
        raise NotImplementedError

    def cuda(self) -> Result:
        raise NotImplementedError

    def fake(self) -> Result:
        """Empty tensors in the shapes and dtypes of the results."""
        raise NotImplementedError

    def keep(self, output: Result) -> Kept:
        """What `backward` needs, by name: arguments, results, anything."""
        raise NotImplementedError

    @staticmethod
    def backward(kept: Kept, *gradients: Any) -> dict[str, Tensor | None]:
        """Gradients of the arguments by name, given those of the results (None: 0); kept["needs"]: which are used."""
        raise NotImplementedError


class Registered(Generic[Result]):
    """The op `mtllm_fast::{name}` of a declaration, called by keyword.

    Args:
        errors: what errors call an op that can be differentiated.
        gradient_of: of an op that is the backward of others, what errors call those; deriving it raises RuntimeError.
            With neither the op has no derivative.

    Raises (a call):
        NotImplementedError: an argument of an op with a derivative carries a tangent of forward-mode AD.
    """

    def __init__(self, declaration: type[Op[Result]], name: str, *, errors: str = "", gradient_of: str = "") -> None:
        hints = get_type_hints(declaration)
        arguments = fields(declaration)  # type: ignore[arg-type]
        self.declaration, self.errors = declaration, errors or f"the gradient of {gradient_of}"
        self.names = tuple(field.name for field in arguments)
        self.defaults = {field.name: field.default for field in arguments if field.default is not MISSING}
        self._gradient_of = gradient_of
        (result,) = get_args(declaration.__orig_bases__[0])  # type: ignore[attr-defined]

        everywhere = declaration.cuda is Op.cuda
        cpu = self._kernel(declaration.cpu)
        cpu.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=hints[n]) for n in self.names],
            return_annotation=result,
        )
        self.op = torch.library.custom_op(
            f"mtllm_fast::{name}", cpu, mutates_args=(), device_types=None if everywhere else "cpu"
        )
        if not everywhere:
            self.op.register_kernel("cuda", on_device_of_arguments(self._kernel(declaration.cuda)))
        self.op.register_fake(lambda *inputs: self._declared(inputs).fake())
        self._function: type[torch.autograd.Function] | None = None
        if errors or gradient_of:
            self.op.register_autograd(self._backward, setup_context=self._setup_context)
            self._function = self._under_transforms()

    def _under_transforms(self) -> type[torch.autograd.Function]:
        """What a call goes through under a transform of torch.func: an autograd.Function that has its `setup_context`
        apart, and whose vmap is that of the op: one call per example."""
        op = self

        class Function(torch.autograd.Function):
            generate_vmap_rule = True
            forward = staticmethod(lambda *inputs: op.op(*inputs))
            setup_context = staticmethod(lambda ctx, inputs, output: op._setup_context(ctx, inputs, output))
            backward = staticmethod(lambda ctx, *gradients: op._backward(ctx, *gradients))
            jvp = staticmethod(lambda ctx, *tangents: op._refuse_tangents())

        return Function

    def inputs(self, **arguments: object) -> tuple[object, ...]:
        """The arguments as the schema orders them, defaults filled in."""
        given = {**self.defaults, **arguments}
        if len(given) != len(self.names):
            raise TypeError(f"{self.op} takes {self.names}, got {tuple(given)}")
        return tuple([given[name] for name in self.names])

    def raw(self, **arguments: object) -> Result:
        """The op by itself, for the kernels of other ops, where no derivative is taken."""
        return self.op(*self.inputs(**arguments))

    def __call__(self, **arguments: object) -> Result:
        inputs = self.inputs(**arguments)
        if self._function is None or torch.compiler.is_compiling():
            return self.op(*inputs)
        if any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in inputs):
            self._refuse_tangents()
        call = self._function.apply if torch._C._are_functorch_transforms_active() else self.op
        return call(*inputs)

    def _declared(self, inputs: tuple[object, ...]) -> Op[Result]:
        declared = object.__new__(self.declaration)  # the constructor of a frozen dataclass takes 4 µs for 16 fields
        vars(declared).update(zip(self.names, inputs, strict=True))
        return declared

    def _kernel(self, method: Callable[[Op[Result]], Result]) -> Callable[..., Result]:
        def kernel(*inputs: object) -> Result:
            device = next(x.device.type for x in inputs if isinstance(x, Tensor))
            if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
                return method(self._declared(inputs))
            # An enclosing autocast region would round the fp32 GEMMs in here to 16 bits.
            with torch.autocast(device, enabled=False):
                return method(self._declared(inputs))

        return kernel

    def _setup_context(self, ctx: Any, inputs: tuple[object, ...], output: Result) -> None:
        ctx.set_materialize_grads(False)  # or backward would allocate zeros for outputs that have no derivative
        if self._gradient_of:
            return
        kept = self._declared(inputs).keep(output)
        ctx.tensors = [name for name, value in kept.items() if isinstance(value, Tensor)]
        ctx.save_for_backward(*(kept.pop(name) for name in ctx.tensors))
        ctx.others = kept

    def _backward(self, ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if self._gradient_of:
            raise RuntimeError(
                f"{self._gradient_of} has no second derivative: its gradient cannot be differentiated again (gradient "
                "penalties, torch.func.hessian, grad of grad)"
            )
        needs = dict(zip(self.names, ctx.needs_input_grad))
        kept = {**ctx.others, **dict(zip(ctx.tensors, ctx.saved_tensors)), "needs": needs}
        found = self.declaration.backward(kept, *gradients)
        assert found.keys() <= needs.keys(), found.keys()
        return tuple(found.get(name) if needed else None for name, needed in needs.items())

    def _refuse_tangents(self, *_: object) -> None:
        raise NotImplementedError(
            f"{self.errors} has no forward-mode derivative (jvp, jacfwd, hessian, dual numbers); use reverse mode: "
            "backward, torch.func.grad, vjp or jacrev"
        )
