"""Counting the bytes that a step moves, of operators one by one, of what Inductor compiles and of Liger's kernels.

An operator counts what it reads and writes once each; caches do not exist. What cannot run here is counted from what
would: a region that torch.compile has captured is lowered and fused by Inductor as for a GPU (the scheduler of its
Triton backend), and a fused kernel counts each buffer that it reads or writes once, which is Inductor's own accounting;
a launch of a Triton kernel counts each tensor once that the kernel's source loads from, and once that it stores to.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from mtllm_fast.models.lora import lora_products
from mtllm_fast.training.switches import apply_liger


def _bytes(x: Tensor) -> int:
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


class Traffic(TorchDispatchMode):
    """Bytes read and written inside the block, by operator: `elementwise`, and those of products and attention."""

    _paused: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.elementwise: Counter[str] = Counter()
        self.products: Counter[str] = Counter()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # compiled layers run inside the block as they do outside

    @staticmethod
    @contextmanager
    def paused() -> Iterator[None]:
        """Inside the block nothing counts."""
        with patch.object(Traffic, "_paused", True):
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if self._paused or name.startswith(("empty", "new_empty")):
            return out
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        known = {x.untyped_storage() for x in inputs}
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if func._schema.is_mutable or any(x.untyped_storage() not in known for x in outputs):  # else a view
            apart = func._overloadpacket in flop_registry or "attention" in name
            (self.products if apart else self.elementwise)[name] += sum(map(_bytes, [*inputs, *outputs]))
        return out


class CompiledTraffic:
    """A backend for `torch.compile` whose regions run operator by operator and count what Inductor's would move.

    Every run of a region adds to `forward` or `backward`; what runs between regions is nobody's.
    """

    def __init__(self) -> None:
        self.forward, self.backward = Traffic(), Traffic()

    def __call__(self, module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        from torch._inductor.compile_fx import compile_fx

        return compile_fx(module, inputs, inner_compile=self._compile)

    def _compile(self, module: Any, inputs: Sequence[Any], is_backward: bool = False, **_: Any) -> Callable[..., Any]:
        moved = scheduled(module, inputs, is_backward)

        def run(arguments: list[Any]) -> Any:
            total = self.backward if is_backward else self.forward
            total.elementwise += moved.elementwise
            total.products += moved.products
            values = list(arguments)
            arguments.clear()
            with Traffic.paused():
                return module(*values)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run


def scheduled(module: Any, inputs: Sequence[Any], is_backward: bool) -> Traffic:
    """What one run of a graph moves once Inductor has fused it."""
    from torch._guards import detect_fake_mode
    from torch._inductor import config
    from torch._inductor.compile_fx import _recursive_post_grad_passes, record_original_output_strides
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    fake, moved = detect_fake_mode(inputs), Traffic()
    with config.patch(cpu_backend="triton"), V.set_fake_mode(fake), V.set_debug_handler(DebugContext()):
        with Traffic.paused():
            record_original_output_strides(module)
            _recursive_post_grad_passes(module, is_inference=False)
            graph = GraphLowering(module, example_inputs=inputs, is_backward=is_backward, shape_env=fake.shape_env)
            with V.set_graph_handler(graph):
                graph.run(*inputs)
                graph._update_scheduler()
        with V.set_graph_handler(graph):
            for node in graph.scheduler.nodes:
                _count(node, moved)
    return moved


def _count(node: Any, moved: Traffic) -> None:
    from torch._inductor.ir import MultiOutput
    from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode

    if isinstance(node, NopKernelSchedulerNode) or isinstance(node.node, MultiOutput):
        return
    if not isinstance(node, ExternKernelSchedulerNode):
        moved.elementwise["fused"] += node.get_read_write_buffers_sizes()
    elif node.node.op_overload is lora_products.op._opoverload:
        (origin,) = (o for o in node.node.origins if o.target is node.node.op_overload)
        with _disable_current_modes(), moved:  # as the operator itself does it
            lora_products.op._init_fn(*(_on_meta(argument) for argument in origin.args))
    elif node.node.python_kernel_name in ("extern_kernels.mm", "extern_kernels.bmm"):
        moved.products["mm"] += node.get_read_write_buffers_sizes()
    elif node.node.python_kernel_name == "aten.randint.low_out":  # the seeds of dropout
        moved.elementwise["seeds"] += node.get_read_write_buffers_sizes()
    else:
        raise NotImplementedError(f"{node.node.python_kernel_name}: what it moves is not known")


def _on_meta(argument: Any) -> Any:
    if not isinstance(argument, torch.fx.Node):
        return argument
    x = argument.meta["val"]
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


@contextmanager
def compiled(layer: nn.Module) -> Iterator[CompiledTraffic]:
    """Inside the block the layer is compiled and counts; for one number of tokens, where training takes any."""
    counting = CompiledTraffic()
    torch.compiler.reset()
    layer.compile(dynamic=False, backend=counting)
    try:
        yield counting
    finally:
        torch.compiler.reset()


@lru_cache
def accessed(kernel: Any) -> tuple[frozenset[str], frozenset[str]]:
    """Arguments that a Triton kernel's source loads from, and those that it stores to (strides may be among them)."""
    (function,) = ast.parse(textwrap.dedent(inspect.getsource(kernel))).body
    assert isinstance(function, ast.FunctionDef)
    into = {argument.arg: {argument.arg} for argument in function.args.args}  # name -> arguments that it points into

    def of(node: ast.AST) -> set[str]:
        if isinstance(node, ast.Call):  # a value
            return set()
        if isinstance(node, ast.Name):
            return into.get(node.id, set())
        return set().union(*(of(child) for child in ast.iter_child_nodes(node)))

    nodes = list(ast.walk(function))
    for node in [*nodes, *nodes]:
        if isinstance(node, (ast.Assign, ast.AugAssign)):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name):
                    into[target.id] = into.get(target.id, set()) | of(node.value)
    found: dict[str, set[str]] = {"load": set(), "store": set()}
    for node in nodes:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in found:
            found[node.func.attr] |= of(node.args[0])
    return frozenset(found["load"]), frozenset(found["store"])


@contextmanager
def counted_launches(moved: Traffic) -> Iterator[None]:
    """Inside the block a launch of a Triton kernel runs nothing and counts as elementwise."""
    from triton.runtime import JITFunction

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        given = {**dict(zip(self.arg_names, args)), **kwargs}
        names = [name for part in accessed(self.fn) for name in part]
        tensors = [given[name] for name in names if isinstance(given.get(name), Tensor)]
        moved.elementwise[self.fn.__name__] += sum(map(_bytes, tensors))

    with patch.object(JITFunction, "run", run):
        yield


@contextmanager
def liger_layers(model: Any) -> Iterator[None]:
    """Inside the block a Llama has Liger's layers; its family gets its own back afterwards, the model does not."""
    from transformers.models.llama import modeling_llama

    names = ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP")
    before = {name: getattr(modeling_llama, name) for name in names}
    apply_liger(model)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(modeling_llama, name, value)
