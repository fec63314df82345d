"""Weights that matter: a new adapter is the identity and a new model attends nearly evenly, which would hide faults."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import huggingface_hub
import pytest
import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def stir(model: Model, std: float = 0.1, *parts: str) -> Model:
    """Random values in the weights whose names hold one of `parts` (by default LoRA's B, which starts at zero)."""
    for name, parameter in model.named_parameters():
        if any(part in name for part in parts or ("lora_B",)):
            parameter.normal_(0, std)
    return model


@torch.no_grad()
def enlarge(model: Model, factor: float = 4.0, noise: float = 0.0) -> Model:
    """Matrices `factor` times as large as initialised, and `noise` on the vectors."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(factor)
        elif noise:
            parameter.add_(noise * torch.randn_like(parameter))
    return model


def in_shards(monkeypatch: pytest.MonkeyPatch, size: str) -> None:
    """Files of at most `size` for a model's own weights."""
    whole = huggingface_hub.save_torch_state_dict
    monkeypatch.setattr(
        huggingface_hub, "save_torch_state_dict", lambda *a, **options: whole(*a, **{**options, "max_shard_size": size})
    )


def saved_bytes(run: Callable[[], object], own: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps while `run` runs, the storages of `own` not counted."""
    found: dict[int, int] = {}
    left_out = {x.untyped_storage().data_ptr() for x in own}

    def count(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in left_out:
            found[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        kept = run()  # alive until the bytes are summed, or their addresses would be used again
    total = sum(found.values())
    del kept
    return total
