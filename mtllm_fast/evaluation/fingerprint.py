"""Fingerprints of models, data and settings: equal when, and practically only when, results would be."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..data.read import TextRow

# a larger file is hashed by its size and this many blocks spread over it: training changes all of a weight file
WHOLE_BYTES = 64 * 2**20
BLOCKS, BLOCK_BYTES = 64, 2**16

_CONFIGS = ("config.json", "stack_tokenizer.json", "generation_config.json", "adapter_config.json")
_PARTS = ("encoder", "llm", "mt_tokenizer", "llm_tokenizer")


def of_settings(**settings: Any) -> str:
    """Of plain data."""
    return _short(json.dumps(settings, sort_keys=True, ensure_ascii=False, default=str).encode())


def of_rows(rows: Sequence[TextRow], labels: Iterable[str] = ()) -> str:
    """Of everything that a row says, except the language code it is read under (that is a setting)."""
    content = [[row.text, row.text_pair, row.label, row.id, row.choices] for row in rows]
    return _short(json.dumps([list(labels), content], ensure_ascii=False).encode())


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
        return _short(f"hub {name} {_hub_commit(str(name))}".encode())
    if not (folder / "config.json").is_file():
        raise ValueError(f"model={str(name)!r}: the folder holds no config.json, so it is not a (complete) model")
    parts = [f"{path.relative_to(folder)} {_of_file(path)}" for path in _files(folder)]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for role in ("encoder", "llm"):
        base = config.get(role)
        if isinstance(base, str) and base:
            parts.append(f"{role} {of_model(base)}")
    return _short("\n".join(parts).encode())


def _files(folder: Path) -> list[Path]:
    """What loading a model reads; not checkpoints, logs and reports beside it."""
    top = [folder / name for name in _CONFIGS]
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")]
    tokenizer = [*folder.glob("tokenizer*"), *folder.glob("*.model"), *folder.glob("special_tokens_map.json")]
    inside = [path for part in _PARTS for path in (folder / part).rglob("*")]
    return sorted({path for path in (*top, *weights, *tokenizer, *inside) if path.is_file()})


def _of_file(path: Path) -> str:
    status = path.stat()
    return _of_content(str(path.resolve()), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1024)
def _of_content(path: str, size: int, mtime_ns: int) -> str:
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        if size <= WHOLE_BYTES:
            digest.update(file.read())
        else:
            for block in range(BLOCKS):
                file.seek(block * (size - BLOCK_BYTES) // (BLOCKS - 1))
                digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()


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


def _short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]
