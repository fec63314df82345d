"""What concerns the device: launching on that of the arguments; checks of values there without a synchronisation."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


def debugging() -> bool:
    """MTLLM_DEBUG is set to something other than 0: checks stop the host at the call that is wrong."""
    return os.environ.get("MTLLM_DEBUG", "0") not in ("", "0")


def on_device_of_arguments(kernel: Callable[..., Result]) -> Callable[..., Result]:
    """Wrap the CUDA kernel of an op: Triton launches on the current device, which need not be that of the tensors."""

    def launch(*args: object) -> Result:
        with torch.cuda.device(next(a.device for a in args if isinstance(a, Tensor))):
            return kernel(*args)

    return launch


def require_triton_dtype(name: str, x: Tensor) -> None:
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"{name} is {x.dtype}, but on {x.device.type} the kernels take float32, bfloat16 or float16")


def require(good: Tensor, message: str, error: type[Exception] = ValueError) -> None:
    """Fail with `message` unless the one-element `good` is true.

    On the device by an assertion, which does not stop the host: the error shows at a later call. With MTLLM_DEBUG=1 the
    host waits for the value and raises `error` here.
    """
    if not debugging():
        torch._assert_async(good, message)
    elif not bool(good):
        raise error(message)


def require_rows(rows: Tensor | None, limit: int, name: str) -> None:
    """Every entry of `rows` is a row number, 0 to limit - 1; IndexError in debug."""
    if rows is not None and rows.numel():
        good = ((rows >= 0) & (rows < limit)).all()
        require(good, f"{name} holds a row number outside 0 to {limit - 1}", IndexError)
