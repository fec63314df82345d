"""Whether a model's name means a folder or a model of the hub, and whether two names mean the same weights."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FREE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")  # of a config: nothing that is computed


def is_path(name: str | Path) -> bool:
    """Whether `name` can only mean a folder here, so that the hub is not asked for it.

    It is there, begins as paths do, has more parts than a hub name, or lies in a folder that is there.
    """
    text = str(name)
    if isinstance(name, Path) or Path(text).expanduser().exists() or not _HUB_NAME.fullmatch(text):
        return True
    return "/" in text and Path(text.split("/")[0]).is_dir()


def check_folder(role: str, name: str | Path) -> None:
    """Raise ValueError where `name` is a path and no folder with a config.json is there."""
    if not is_path(name):
        return
    if not Path(name).is_dir():
        raise ValueError(f"{role}={str(name)!r}: no such folder")
    if not (Path(name) / "config.json").is_file():
        raise ValueError(f"{role}={str(name)!r}: the folder holds no config.json, so it is not a model folder")


@lru_cache
def same_model(one: str, other: str) -> bool:
    """Whether two folders or hub names hold the same model: the same tensors, in whatever files, and configuration."""
    if one == other or Path(one).resolve() == Path(other).resolve():
        return True
    first, second = _local(one), _local(other)
    if first is None or second is None or _config(first) != _config(second):
        return False
    from ..jobs.fingerprint import of_tensors
    from .storage import read_safetensors

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
