"""Fingerprints of models, and whether two names mean the same weights."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.store import tokenizer_key
from ..jobs.fingerprint import of_tensors, sha256_of_json
from .config import config_to_dict
from .loading import read_safetensors
from .names import is_path

if TYPE_CHECKING:
    from .mtllm import MTLLM

_FREE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")  # of a config: nothing that is computed


def fingerprint(model: MTLLM) -> str:
    """16 hex digits over all weights, the configuration and the tokenizers of `model`."""
    parts: list[object] = [of_tensors(model.state_dict()), config_to_dict(model.config)]
    if model.tokenizer is not None:
        sides = [side for side in ("mt", "llm") if getattr(model.tokenizer, side) is not None]
        parts.append(tokenizer_key(model.tokenizer, sides))
    return sha256_of_json(parts)[:16]


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
    return of_tensors(read_safetensors(first, "model")) == of_tensors(read_safetensors(second, "model"))


def _local(name: str) -> Path | None:
    """The folder of a model, or where the hub's cache has it; None where it is not on this machine."""
    if is_path(name):
        return Path(name) if Path(name).is_dir() else None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json")
    return Path(found).parent if isinstance(found, str) else None


def _config(folder: Path) -> dict[str, object] | None:
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
