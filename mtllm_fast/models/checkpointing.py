"""Activation checkpointing by budget: as few layers as possible are run again in backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..data.pack import PackedBatch
from .adapters import AdaptedModel


def recompute_layers(model: AdaptedModel, count: int | None = None) -> None:
    """Let the first `count` layers (None: all) keep only their input and run again in backward.

    The last layers are the ones that keep their activations: those are freed before the first recomputation starts.
    By transformers' own checkpointing, not reentrant; results are those without it, dropout included.
    """
    # its name before transformers 5.23
    enable = getattr(model.model, "activation_checkpointing_enable", None) or model.model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    layer: Any
    for index, layer in enumerate(model.layers):
        layer.gradient_checkpointing = count is None or index < count


class _Reached(Exception):
    """Ends a forward pass at the first layer, with what the layer was called with."""


def kept_bytes_per_token(model: AdaptedModel, tokens: int = 128) -> tuple[float, float]:
    """Bytes per token that one layer keeps for backward: as it is, and when it is run again (its input).

    Measured on the first layer as it stands (dtype, adapters, kernels, autocast), on one sequence of `tokens` tokens.
    """
    layer: Any = model.layers[0]
    device = next(model.parameters()).device

    def stop(module: nn.Module, args: object, kwargs: object) -> None:
        raise _Reached(args, kwargs)

    handle = layer.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.no_grad():
            model(PackedBatch.from_sequences([[0] * tokens]).to(device))
        raise AssertionError("the model has no forward pass through its first layer")
    except _Reached as reached:
        args, kwargs = reached.args
    finally:
        handle.remove()
    hidden = args[0].detach().requires_grad_()
    # what all layers share is not counted: weights, position tables, the plan
    inputs = [hidden, *args[1:], *kwargs.values(), *(kwargs.get("position_embeddings") or ())]
    shared = {x.untyped_storage().data_ptr() for x in [*model.parameters(), *model.buffers(), *inputs] if _plain(x)}
    found: dict[int, int] = {}

    def count(x: Tensor) -> Tensor:
        if _plain(x) and (storage := x.untyped_storage()).data_ptr() not in shared:
            found[storage.data_ptr()] = storage.nbytes()
        return x

    training = layer.training
    layer.train()
    before, layer.gradient_checkpointing = layer.gradient_checkpointing, False
    try:
        with torch.random.fork_rng(), torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            output = layer(hidden, *args[1:], **kwargs)
    finally:
        layer.train(training)
        layer.gradient_checkpointing = before
    own = hidden.untyped_storage().nbytes()
    del output
    return (sum(found.values()) + own) / tokens, own / tokens


def _plain(x: object) -> bool:
    return isinstance(x, Tensor) and not is_traceable_wrapper_subclass(x)


def layers_within(budget: float, tokens: int, layers: int, kept: float, recomputed: float) -> int:
    """How many of `layers` must be run again so that `tokens` tokens keep at most `budget` bytes.

    Args:
        kept, recomputed: bytes per token of a layer, from `kept_bytes_per_token`.

    Raises:
        ValueError: not even with all of them.
    """
    least = tokens * layers * recomputed
    if least > budget:
        raise ValueError(
            f"activation_memory_gib={budget / 2**30:.2f}: a pack of {tokens} tokens keeps {least / 2**30:.2f} GiB with "
            "every layer run again in backward; allow more, or fewer tokens"
        )
    stay = int((budget - least) / (tokens * (kept - recomputed))) if kept > recomputed else layers
    return layers - min(layers, stay)
