"""Saving and loading an MTLLM folder.

config.json                 MTLLMConfig; written last, so a folder with it is complete
model.safetensors           what training changed: projection, adapters, head, unfrozen weights (sharded when large)
encoder/  llm/              the base models, only where they are stored with the model
mt_tokenizer/ llm_tokenizer/ stack_tokenizer.json
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..data.tokenise import StackTokenizer
from ..jobs.durable import scratch, sync, sync_below
from .config import BESIDE, ENCODER_ADAPTER, based_on, config_to_dict, read_config
from .encoder import PackedEncoder
from .llm import PackedLLM
from .loading import base_tokenizer, read_safetensors
from .names import is_path
from .sharded import load_whole, whole, writes

if TYPE_CHECKING:
    from .mtllm import MTLLM

_DOWNLOADED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


def own_state(model: MTLLM) -> dict[str, Tensor]:
    """The weights that belong to the model and not to its base models, by name, on CPU and contiguous."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    adapters = [f".{name}." for name in model.config.adapters]
    if model.config.encoder_adapter is not None:
        adapters.append(f".{ENCODER_ADAPTER}.")
    changed = set(map(_plain, model.changed))  # an adapter that came later gave the layers under it other names

    def owned(name: str) -> bool:
        if ".lora_" in name:  # a task teacher may be a guest in the model while it is distilled
            return any(adapter in name for adapter in adapters)
        return name in trained or _plain(name) in changed or name.startswith(("projection.", "head."))

    return {name: whole(tensor) for name, tensor in model.state_dict().items() if owned(name)}


def _plain(name: str) -> str:
    return name.replace(".base_layer.", ".")


def own_encoder_dtype(folder: Path) -> torch.dtype | None:
    """The dtype of the encoder's weights that are the model's own; None where training changed none of them."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(folder.glob("model*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    if name.startswith("encoder.") and ".lora_" not in name:
                        return file.get_slice(name)[:1].dtype
        except SafetensorError:  # said where the weights are read
            return None
    return None


def load_own_state(model: MTLLM, folder: Path) -> None:
    """Read the weights written from `own_state` into `model`.

    Raises:
        ValueError: a file is missing or damaged, or names or shapes do not fit the model.
    """
    state = read_safetensors(folder, "model")
    expected = own_state(model)
    held = model.state_dict()
    # base weights that training changed: they stay with the model, also when it is saved again
    changed = {name for name in set(state) - set(expected) if name in held and ".lora_" not in name}
    model.changed |= changed  # those that it knew stay, where its own checkpoint is read into it again
    expected |= {name: held[name] for name in changed}
    missing, surplus = sorted(set(expected) - set(state)), sorted(set(state) - set(expected))
    if missing or surplus:
        raise ValueError(
            f"model={str(folder)!r}: its weights do not fit its config: {len(missing)} missing {missing[:2]}, "
            f"{len(surplus)} unexpected {surplus[:2]}"
        )
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"model={str(folder)!r}: {name} is {tuple(tensor.shape)}, "
                f"the base model needs {tuple(expected[name].shape)}"
            )
    load_whole(model, state)


def save(model: MTLLM, folder: Path, *, include_base: bool | None = None) -> None:
    """See `MTLLM.save_pretrained`. Everything is written beside the folder first and moved in at the end."""
    from huggingface_hub import save_torch_state_dict
    from safetensors.torch import save_file

    model.adopt_adapters()
    own = own_state(model)
    stored = {
        role: part.bare_state()
        for role, part in model.bases.items()
        if include_base or (include_base is None and part.name is None)
    }
    if not writes(model):
        return
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder={str(folder)!r}: is a file")
    folder.mkdir(parents=True, exist_ok=True)
    with scratch(folder / f".saving-{os.getpid()}") as staging:
        config = config_to_dict(model.config)
        for role, part in model.bases.items():
            if role in stored:
                part.model.save_pretrained(staging / role, state_dict=stored[role])
                config[role] = None
            elif part.name is None:
                raise ValueError(
                    f"include_base=False: the {role} was made in memory, so the folder could not be loaded again"
                )
            elif Path(part.name).is_dir():
                config[role] = str(Path(part.name).resolve())
                # where it lies as seen from here, for folders that move together
                config.setdefault(BESIDE, {})[role] = Path(os.path.relpath(config[role], folder.resolve())).as_posix()
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(staging)
        if own:
            save_torch_state_dict(own, staging, max_shard_size="5GB")
        else:  # a bare reader: it would write no file at all
            save_file({}, staging / "model.safetensors")
        (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        sync_below(staging)
        made = {path.name for path in staging.iterdir()}
        if stale := [path for path in folder.glob("model*.safetensors*") if path.name not in made]:
            # shards of another number, or their index, would be read in place of these
            (folder / "config.json").unlink(missing_ok=True)
            for path in stale:
                path.unlink()
        for path in sorted(staging.iterdir(), key=lambda p: p.name == "config.json"):
            target = folder / path.name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(path, target)
        sync(folder)


def local_folder(name: str | Path) -> Path:
    """Where a model lies: the folder itself, or what is downloaded for a hub name.

    Raises:
        ValueError: a hub name that is not reachable.
    """
    path = Path(name)
    if is_path(name) or "/" not in str(name):
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(name), allow_patterns=list(_DOWNLOADED)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(f"model={str(name)!r}: neither a folder nor reachable on the hub") from error


def load(
    model_class: type[MTLLM],
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    encoder_name: str | None = None,
    llm_name: str | None = None,
    encoder_dtype: torch.dtype | None = None,
) -> MTLLM:
    """See `MTLLM.from_pretrained`, whose `encoder` and `llm` are `encoder_name` and `llm_name` here."""
    path = local_folder(folder)
    config = based_on(read_config(path), str(folder), encoder_name, llm_name)

    def base(role: str, name: str | None) -> str:
        if name is not None:  # a folder of an earlier save may lie beside it
            if is_path(name) and not Path(name).is_dir():
                raise ValueError(
                    f"model={str(folder)!r}: its {role}={name!r} is no folder here; say where it is now with --{role} "
                    f"({role}=... in Python)"
                )
            return name
        inside = path / role
        if not inside.is_dir():
            raise ValueError(f"model={str(folder)!r}: its {role} is neither stored in it nor named in its config")
        return str(inside)

    encoder = llm = None
    if config.reader != "llm":
        encoder_dtype = encoder_dtype or dtype or own_encoder_dtype(path)
        encoder = PackedEncoder.from_pretrained(
            base("encoder", config.encoder), encoder_dtype, trust_remote_code=trust_remote_code
        )
        encoder.name = config.encoder
    if config.reader != "encoder":
        llm = PackedLLM.from_pretrained(
            base("llm", config.llm), config.causal, dtype, trust_remote_code=trust_remote_code
        )
        llm.name = config.llm
    tokenizer = (
        StackTokenizer.from_pretrained(path) if (path / "stack_tokenizer.json").is_file() else base_tokenizer(config)
    )
    model = model_class(config, encoder, llm, tokenizer)
    load_own_state(model, path)
    return model.eval()
