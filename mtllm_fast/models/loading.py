"""Loading Hugging Face models safely: safetensors only, no remote code unless asked, one-line errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .names import check_folder, is_path


def load_pretrained(role: str, name: str, dtype: torch.dtype | None = None, trust_remote_code: bool = False) -> Any:
    """Load an "encoder" or an "llm" from a folder or the hub.

    Args:
        role: the argument's name, "encoder" or "llm"; also picks the model class.
        name: folder or hub name.
        dtype: weights' dtype, None for the one they are stored in.

    Raises:
        ValueError: `name` is no model (says what is missing), or it holds no safetensors.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, M2M100Config
    from transformers.models.m2m_100.modeling_m2m_100 import M2M100Encoder

    folder = Path(name)
    if is_path(name):
        check_folder(role, name)
        if not any(folder.glob("*.safetensors")):
            raise ValueError(f"{role}={name!r}: the folder holds no *.safetensors (only safetensors are read)")
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "use_safetensors": True}
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        auto: Any = AutoModelForCausalLM if role == "llm" else AutoModel
        if isinstance(config, M2M100Config) and "M2M100Encoder" in (config.architectures or []):
            auto = M2M100Encoder
            options.pop("trust_remote_code")
        return auto.from_pretrained(name, dtype="auto" if dtype is None else dtype, **options)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{role}={name!r}: cannot be loaded as a model: {reason}") from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise ValueError(f"{role}={name!r}: its safetensors file is damaged or cut short: {error}") from error
