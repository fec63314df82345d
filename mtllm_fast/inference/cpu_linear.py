"""Linear layers of unmodified models on the CPU by the library that is fastest there (see `kernels.gemms`)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..kernels.gemms import cpu_nt, has_onednn_fp32


class OneDnnLinear(TorchFunctionMode):
    """Inside the block `F.linear` of plain fp32 CPU tensors is computed by oneDNN, in fp32. Without gradients."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.nn.functional.linear and len(args) == 3 and not kwargs and _plain(args[0]) and _plain(args[1]):
            x, weight, bias = args
            return cpu_nt(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)
        return func(*args, **(kwargs or {}))


def fast_linear(device: torch.device) -> AbstractContextManager[object]:
    """The block in which a model on `device` runs its linear layers fastest."""
    plain = device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    return OneDnnLinear() if plain and has_onednn_fp32() else nullcontext()


def _plain(x: Any) -> bool:
    return type(x) in (Tensor, nn.Parameter) and x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() > 0
