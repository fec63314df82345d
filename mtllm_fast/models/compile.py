"""torch.compile for packed models, one graph per kind of layer for batches of any size."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar

import torch
from transformers import AttentionInterface

from .attention import NAME, packed_attention

T = TypeVar("T")


def compile_layers(layers: Iterable[Any], backend: str | Callable[..., object] = "inductor") -> None:
    """Compile each layer of a model, in place; those that are run again in backward, inside of what runs them again.

    Attention stays out of the graphs: it depends on the lengths of the batch, and every batch would be compiled anew.
    """
    AttentionInterface.register(NAME, torch.compiler.disable(packed_attention))
    for layer in layers:
        forward = getattr(type(layer).forward, "__wrapped__", None)
        if getattr(layer, "gradient_checkpointing", False) and forward is not None:
            # checkpointing is in the forward that transformers wraps, and what it calls would not be compiled
            compiled = torch.compile(forward, dynamic=True, backend=backend)
            layer._gradient_checkpointing_func = partial(_again, layer._gradient_checkpointing_func, compiled)
        else:
            layer.compile(dynamic=True, backend=backend)


def _again(run_again: Callable[..., T], compiled: Callable[..., T], function: partial[T], *args: object) -> T:
    return run_again(partial(compiled, *function.args, **function.keywords), *args)
