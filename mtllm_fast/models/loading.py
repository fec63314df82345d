"""Loading Hugging Face models safely: safetensors only, no remote code unless asked, one-line errors."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..data.tokenise import StackTokenizer
from .config import MTLLMConfig
from .encoders import family_of
from .names import check_folder

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def load_config(role: str, name: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config of an "encoder" or an "llm" in a folder or on the hub. Raises ValueError where there is none."""
    from transformers import AutoConfig

    check_folder(role, name)
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise _cannot(role, name, error) from error


def load_pretrained(
    role: str, name: str, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load an "encoder" or an "llm" from a folder or the hub.

    Args:
        role: the argument's name, "encoder" or "llm"; also picks the model class.
        name: folder or hub name.
        dtype: weights' dtype, None for the one they are stored in.
        trust_remote_code: run the code of a model that brings its own; encoders are of known families and need none.

    Raises:
        ValueError: `name` is no model (says what is missing), it holds no safetensors, an encoder is of no known
            family, or a weight is NaN or infinite.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(role, name, trust_remote_code)
    folder = Path(name)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{role}={name!r}: the folder holds no *.safetensors (of model weights, only safetensors are read)"
        )
    family = family_of(config, name) if role == "encoder" else None
    chosen = "auto" if dtype is None else dtype
    try:
        if family is not None:
            model = family.load(name, config, dtype=chosen, use_safetensors=True)
        else:
            model = AutoModelForCausalLM.from_pretrained(
                name, trust_remote_code=trust_remote_code, dtype=chosen, use_safetensors=True
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise _cannot(role, name, error) from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise ValueError(f"{role}={name!r}: its safetensors file is damaged or cut short: {error}") from error
    check_finite(f"{role}={name!r}", model.named_parameters(), folder)
    return model


def empty_llm(name: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """The causal LM of `name` without its weights, on the meta device. Raises ValueError where it is none."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    config = load_config("llm", name, trust_remote_code)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not hasattr(config, "auto_map"):
        raise ValueError(f"llm={name!r}: a {config.model_type!r} model is no causal LM")
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, RuntimeError, NotImplementedError, TypeError, AttributeError) as error:
        raise _cannot("llm", name, error) from error


def base_tokenizer(config: MTLLMConfig, max_mt_tokens: int = 512, max_llm_tokens: int = 512) -> StackTokenizer:
    """The tokenizers that lie beside the base models.

    Raises:
        ValueError: a base model was made in memory, or its folder holds no tokenizer.
    """
    from transformers import AutoTokenizer

    def load_one(role: str, name: str | None) -> PreTrainedTokenizerBase:
        if name is None:
            raise ValueError(
                f"tokenizer: pass a StackTokenizer, the {role} was made in memory and has no tokenizer beside it"
            )
        check_folder(role, name)
        try:
            return AutoTokenizer.from_pretrained(name, use_fast=True)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"{role}={name!r}: no tokenizer can be loaded from it: {reason}") from error

    mt = load_one("encoder", config.encoder) if config.reader != "llm" else None
    llm = load_one("llm", config.llm) if config.reader != "encoder" else None
    return StackTokenizer(mt, llm, max_mt_tokens=max_mt_tokens, max_llm_tokens=max_llm_tokens)


def read_safetensors(folder: Path, stem: str) -> dict[str, Tensor]:
    """All tensors of `stem`.safetensors or of its shards. Raises ValueError for missing or damaged files."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    index = folder / f"{stem}.safetensors.index.json"
    names = (
        sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if index.is_file()
        else [f"{stem}.safetensors"]
    )
    state: dict[str, Tensor] = {}
    for name in names:
        path = folder / name
        if not path.is_file():
            raise ValueError(f"model={str(folder)!r}: {name} is missing, the model is incomplete")
        try:
            part = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"model={str(folder)!r}: {name} is damaged or cut short ({error})") from error
        check_finite(f"model={str(folder)!r}: {name}", part.items())
        state.update(part)
    return state


def check_finite(what: str, tensors: Iterable[tuple[str, Tensor]], folder: Path | None = None, stem: str = "") -> None:
    """Raise ValueError, with the tensor and its file, where a weight is NaN or infinite.

    Args:
        what: the argument and its value, for the message.
        folder: where the safetensors lie, to name the file. stem: only files that begin so.
    """
    for name, tensor in tensors:
        if not tensor.is_floating_point() or tensor.is_meta or not tensor.numel() or tensor.element_size() < 2:
            continue
        # one pass and no copy: NaN and infinity both show in the extremes
        least, most = torch.aminmax(tensor.detach())
        if bool(torch.isfinite(least) & torch.isfinite(most)):
            continue
        count = int((~torch.isfinite(tensor)).sum())
        file = _file_of(folder, name, stem) if folder is not None and folder.is_dir() else None
        place = f"{file}: " if file else ""
        raise ValueError(f"{what}: {place}{name} holds {count} NaN or infinite of {tensor.numel()} values")


def _file_of(folder: Path, name: str, stem: str) -> str | None:
    """The safetensors file that holds the tensor `name` (or one that ends alike: models drop or add a prefix)."""
    from safetensors import safe_open

    def keys(path: Path) -> list[str]:
        with safe_open(path, "pt") as opened:
            return list(opened.keys())

    held = {path.name: keys(path) for path in sorted(folder.glob(f"{stem}*.safetensors"))}
    for fits in (lambda key: key == name, lambda key: key.endswith("." + name) or name.endswith("." + key)):
        for file, names in held.items():
            if any(map(fits, names)):
                return file
    return None


def _cannot(role: str, name: str, error: Exception) -> ValueError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ValueError(f"{role}={name!r}: cannot be loaded as a model: {reason}")
