"""Checks of values that live on the device: an assertion there, which costs no synchronisation, or a host check."""

from __future__ import annotations

import os

import torch
from torch import Tensor


def debugging() -> bool:
    """MTLLM_DEBUG is set to something other than 0: checks stop the host at the call that is wrong."""
    return os.environ.get("MTLLM_DEBUG", "0") not in ("", "0")


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
