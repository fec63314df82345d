"""Fingerprints of models, and whether two names mean the same weights."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..data.store import tokenizer_key
from .config import config_to_dict
from .loading import read_safetensors
from .names import is_path

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .mtllm import MTLLM

_FREE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")  # of a config: nothing that is computed


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
    parts = [weights_digest(model.state_dict()), config_to_dict(model.config)]
    if model.tokenizer is not None:
        sides = [side for side in ("mt", "llm") if getattr(model.tokenizer, side) is not None]
        parts.append(tokenizer_key(model.tokenizer, sides))
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


@lru_cache
def same_model(one: str, other: str) -> bool:
    """Whether two folders or hub names hold the same model: the same tensors, in whatever files, and configuration."""
    if one == other or Path(one).resolve() == Path(other).resolve():
        return True
    first, second = _local(one), _local(other)
    if first is None or second is None or _config(first) != _config(second):
        return False
    if _tensors(first) != _tensors(second):  # names and sizes tell most apart without a look at the bytes
        return False
    return weights_digest(read_safetensors(first, "model")) == weights_digest(read_safetensors(second, "model"))


def _local(name: str) -> Path | None:
    """The folder of a model, or where the hub's cache has it; None where it is not on this machine."""
    if is_path(name):
        return Path(name) if Path(name).is_dir() else None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json")
    return Path(found).parent if isinstance(found, str) else None


def _config(folder: Path) -> dict[str, Any] | None:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return {name: value for name, value in config.items() if name not in _FREE}


def _tensors(folder: Path) -> dict[str, list[int]]:
    from safetensors import safe_open

    found: dict[str, list[int]] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return found
