"""Fingerprints of models in memory: other weights, settings or tokens, another fingerprint."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..data.store import tokenizer_key

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .mtllm import MTLLM


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes; tensors are hashed side by side, which threads can do."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        described = pool.map(lambda name: _described(name, state[name]), sorted(state))
        return hashlib.sha256("\n".join(described).encode()).hexdigest()


def _described(name: str, tensor: Tensor) -> str:
    """Name, dtype, shape and digest. A tensor that only wraps others, as torchao's do, counts as what it wraps."""
    if is_traceable_wrapper_subclass(tensor):
        names, context = tensor.__tensor_flatten__()
        inner = [_described(one, getattr(tensor, one)) for one in names]
        content = hashlib.sha256("\n".join([repr(context), *inner]).encode())
    else:
        tensor = tensor.detach().cpu().contiguous()
        content = hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return f"{name} {tensor.dtype} {tuple(tensor.shape)} {content.hexdigest()}"


def fingerprint(model: MTLLM) -> str:
    """16 hex digits over all weights, the configuration and the tokenizers of `model`."""
    from .storage import config_to_dict

    parts = [weights_digest(model.state_dict()), config_to_dict(model.config)]
    if model.tokenizer is not None:
        sides = [side for side in ("mt", "llm") if getattr(model.tokenizer, side) is not None]
        parts.append(tokenizer_key(model.tokenizer, sides))
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
