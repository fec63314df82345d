"""Fingerprints of files, models, data and settings: equal when, and practically only when, results would be.

They stand in folders on disk, so how each is made must not change.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# a larger file is known by its size and blocks spread over it: training changes all of a weight file
WHOLE_BYTES = 64 * 2**20
BLOCKS, BLOCK_BYTES = 64, 2**16

_CONFIGS = ("config.json", "stack_tokenizer.json", "generation_config.json", "adapter_config.json")
_PARTS = ("encoder", "llm", "mt_tokenizer", "llm_tokenizer")


def sha256_of(path: Path) -> str:
    """Of all of a file, about a second per GB."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_json(data: object) -> str:
    """Of plain data; what is none counts as its str."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()


def of_file(path: Path) -> str:
    """Bytes and SHA-256 of a file; of one above 64 MiB, of 256 blocks spread over it."""
    size = path.stat().st_size
    if size <= WHOLE_BYTES:
        return f"{size} bytes {sha256_of(path)}"
    return f"{size} bytes, in parts {_of_blocks(path, size, 256, 2**18)}"


def _of_blocks(path: Path, size: int, blocks: int, block_bytes: int, start: bytes = b"") -> str:
    """SHA-256 of `start` and blocks of a file, evenly spread, its first and its last bytes among them."""
    digest = hashlib.sha256(start)
    with path.open("rb") as file:
        for block in range(blocks):
            file.seek(block * (size - block_bytes) // (blocks - 1))
            digest.update(file.read(block_bytes))
    return digest.hexdigest()


def of_settings(**settings: object) -> str:
    """Of plain data."""
    return short(json.dumps(settings, sort_keys=True, ensure_ascii=False, default=str))


def of_tensors(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes; tensors are hashed side by side, which threads can do."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        described = pool.map(lambda name: _described(name, state[name]), sorted(state))
        return hashlib.sha256("\n".join(described).encode()).hexdigest()


def _described(name: str, tensor: Tensor) -> str:
    """Name, dtype, shape and digest. A tensor that only wraps others, as torchao's do, counts as what it wraps."""
    import torch
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    if is_traceable_wrapper_subclass(tensor):
        names, context = tensor.__tensor_flatten__()
        inner = [_described(name, getattr(tensor, name)) for name in names]
        content = hashlib.sha256("\n".join([repr(context), *inner]).encode())
    else:
        tensor = tensor.detach().cpu().contiguous()
        content = hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return f"{name} {tensor.dtype} {tuple(tensor.shape)} {content.hexdigest()}"


def of_model(name: str | Path) -> str:
    """Of a model folder (an MTLLM, or any Hugging Face model) with the base models that its config names, or of a hub
    name.

    Files up to 64 MiB are read whole, larger ones (base models) in 64 places. A hub name counts as its newest commit,
    without the hub as the one in the local cache, or as the name where there is none.

    Raises:
        ValueError: a folder without config.json.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if folder.exists() or str(name).startswith((".", "/", "~")):
            raise ValueError(f"model={str(name)!r}: no such folder")
        return short(f"hub {name} {_hub_commit(str(name))}")
    if not (folder / "config.json").is_file():
        raise ValueError(f"model={str(name)!r}: the folder holds no config.json, so it is not a (complete) model")
    parts = [f"{path.relative_to(folder)} {_of_model_file(path)}" for path in _model_files(folder)]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for role in ("encoder", "llm"):
        base = config.get(role)
        if isinstance(base, str) and base:
            parts.append(f"{role} {of_model(base)}")
    return short("\n".join(parts))


def _model_files(folder: Path) -> list[Path]:
    """What loading a model reads; not checkpoints, logs and reports beside it."""
    top = [folder / name for name in _CONFIGS]
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")]
    tokenizer = [*folder.glob("tokenizer*"), *folder.glob("*.model"), *folder.glob("special_tokens_map.json")]
    inside = [path for part in _PARTS for path in (folder / part).rglob("*")]
    return sorted({path for path in (*top, *weights, *tokenizer, *inside) if path.is_file()})


def _of_model_file(path: Path) -> str:
    status = path.stat()
    return _of_unchanged(path.resolve(), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1024)
def _of_unchanged(path: Path, size: int, mtime_ns: int) -> str:
    start = str(size).encode()
    if size > WHOLE_BYTES:
        return _of_blocks(path, size, BLOCKS, BLOCK_BYTES, start)
    return hashlib.sha256(start + path.read_bytes()).hexdigest()


def hub_config(name: str) -> Path | None:
    """config.json of a hub model, at the commit that loading the model would take; None where it cannot be had."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(hf_hub_download(name, "config.json"))
    except (HfHubHTTPError, OSError):
        found = try_to_load_from_cache(name, "config.json")
        return Path(found) if isinstance(found, str) else None


def _hub_commit(name: str) -> str:
    config = hub_config(name)
    return "not in the cache" if config is None else config.parent.name


def short(content: str) -> str:
    """32 hex digits of the SHA-256 of a text."""
    return hashlib.sha256(content.encode()).hexdigest()[:32]
