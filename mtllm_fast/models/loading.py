"""Loading Hugging Face models safely: safetensors only, no remote code unless asked, one-line errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def load_pretrained(role: str, name: str, dtype: torch.dtype | None = None, trust_remote_code: bool = False) -> Any:
    """Load an "encoder" or an "llm" from a folder or the hub.

    Args:
        role: the argument's name, "encoder" or "llm"; also picks the model class.
        name: folder or hub name.
        dtype: weights' dtype, None for the one they are stored in.
        trust_remote_code: run the code of a model that brings its own; encoders are of known families and need none.

    Raises:
        ValueError: `name` is no model (says what is missing), it holds no safetensors, or an encoder is of no known
            family.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from .encoders import family_of

    folder = Path(name)
    if folder.exists() or name.startswith((".", "/", "~")):
        if not folder.is_dir():
            raise ValueError(f"{role}={name!r}: no such folder")
        if not (folder / "config.json").is_file():
            raise ValueError(f"{role}={name!r}: the folder holds no config.json, so it is not a model folder")
        if not any(folder.glob("*.safetensors")):
            raise ValueError(f"{role}={name!r}: the folder holds no *.safetensors (only safetensors are read)")
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, RuntimeError) as error:
        raise _no_model(role, name, error) from error
    family = family_of(config, name) if role == "encoder" else None
    options: dict[str, Any] = {"dtype": "auto" if dtype is None else dtype, "use_safetensors": True}
    try:
        if family is not None:
            return family.load(name, config, **options)
        return AutoModelForCausalLM.from_pretrained(name, trust_remote_code=trust_remote_code, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise _no_model(role, name, error) from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise ValueError(f"{role}={name!r}: its safetensors file is damaged or cut short: {error}") from error


def _no_model(role: str, name: str, error: Exception) -> ValueError:
    return ValueError(f"{role}={name!r}: cannot be loaded as a model: {str(error).strip().splitlines()[0]}")
