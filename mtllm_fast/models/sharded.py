"""Weights that FSDP2 spreads over processes: whole again to save them, spread again to load them.

A spread weight is a DTensor. Every function here does nothing special where there is none, and is called by all
processes where there is one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def is_sharded(module: nn.Module) -> bool:
    """Whether a weight of the module is spread over processes."""
    return any(hasattr(parameter, "full_tensor") for parameter in module.parameters())


def writes(module: nn.Module) -> bool:
    """False where this process only helps to gather what process 0 writes."""
    return not is_sharded(module) or dist.get_rank() == 0


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on the CPU, contiguous and by itself, without gradient."""
    tensor = tensor.detach()
    full = getattr(tensor, "full_tensor", None)
    tensor = (tensor if full is None else full()).to("cpu").contiguous()
    # DeepSpeed's weights are parts of one buffer, and safetensors refuses a part
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """The module's state: spread tensors whole and on the CPU, others as they are; what is shared stays shared."""
    made: dict[int, Tensor] = {}
    state = module.state_dict(keep_vars=True)
    for tensor in state.values():
        if id(tensor) not in made:
            made[id(tensor)] = whole(tensor) if hasattr(tensor, "full_tensor") else tensor.detach()
    return {name: made[id(tensor)] for name, tensor in state.items()}


def spread_like(tensor: Tensor, like: Any) -> Tensor:
    """This process's part of a `tensor` that every process holds whole, where `like` is spread; else the tensor."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    # src_data_rank=None: every process cuts its part from its own copy, nothing is sent
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def load_whole(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy whole tensors into the module's weights and buffers of these names, which may be some of them."""
    held = module.state_dict()
    module.load_state_dict({name: spread_like(tensor, held[name]) for name, tensor in state.items()}, strict=False)
