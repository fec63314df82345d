"""Devices by name."""

from __future__ import annotations

import torch


def check_device(name: str | None, argument: str = "--device ") -> None:
    """Refuse a device that is not here. Raises ValueError; None is any."""
    if name is None:
        return
    kind, _, index = name.partition(":")
    if kind == "cpu" and not index:
        return
    if kind != "cuda" or (index and not index.isdecimal()):
        raise ValueError(f"{argument}{name}: expected cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise ValueError(f"{argument}{name}: no CUDA device is visible; see `mtllm doctor`")
    if index and int(index) >= count:
        raise ValueError(f"{argument}{name}: the CUDA devices here are 0 to {count - 1}")
