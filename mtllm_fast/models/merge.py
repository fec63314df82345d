"""A model without adapters: LoRA added into the base weights, everything in one folder; an encoder by itself."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ..jobs.durable import scratch
from .adapters import AdaptedModel
from .config import ENCODER_ADAPTER
from .frozen import dense_weight
from .mtllm import MTLLM


@torch.no_grad()
def merge(model: MTLLM) -> MTLLM:
    """Add the adapter of `model` into the weights of its backbone, and that of a stack's encoder into the encoder's, in
    place and for good; returns `model`.

    The sum is formed in float32 and rounded once to the dtype of the weights.

    Raises:
        ValueError: there is no adapter, or several in the backbone; the base weights are quantised.
    """
    names = list(model.config.adapters)
    if len(names) > 1 or not (names or model.config.encoder_adapter):
        raise ValueError(f"model: its adapters are {', '.join(names) or 'none'}; expected exactly one to merge")
    for name in names:
        _merge(model, model.backbone, name)
    if model.config.encoder_adapter is not None:
        _merge(model, model.require_stack().encoder, ENCODER_ADAPTER)
    model.config.adapters, model.config.encoder_adapter = {}, None
    return model


def _merge(model: MTLLM, part: AdaptedModel, name: str) -> None:
    # it is no more the model that it was loaded from, so it is saved whole
    part.name = None
    (role,) = (role for role, one in model.bases.items() if one is part)
    model.changed = {weight for weight in model.changed if not weight.startswith(f"{role}.")}
    part.unmerge_adapter()
    for layer in part.model.modules():
        if name in getattr(layer, "lora_A", ()):
            weight = dense_weight(layer.get_base_layer())
            weight.copy_((weight.float() + layer.get_delta_weight(name).float()).to(weight.dtype))
    part.remove_adapter(name)


def save_merged(model: MTLLM, folder: str | Path) -> None:
    """Merge `model` and write it with its base models, so that the folder needs nothing else.

    `MTLLM.from_pretrained(folder)` reads it as the same model without adapters, and so does
    `AutoModelForCausalLM.from_pretrained(folder / "llm")` the LLM alone, with its tokenizer (and transformers' own
    causal attention). The encoder in `folder / "encoder"` can be stacked again.

    Raises:
        ValueError: there is no adapter to merge, or several.
    """
    merge(model).save_pretrained(folder, include_base=True)
    for role, tokenizer in (("encoder", "mt"), ("llm", "llm")):
        part = getattr(model.tokenizer, tokenizer, None)
        if part is not None and (Path(folder) / role).is_dir():
            part.save_pretrained(str(Path(folder) / role))


def save_encoder(model: MTLLM, folder: str | Path) -> None:
    """Write the encoder that `model` reads through by itself, with its tokenizer: a Hugging Face folder that
    `MTLLM.stack(folder, ...)` takes. An adapter is merged into it.

    Raises:
        ValueError: the model reads through an LLM too, or has a task head, which the folder would be without.
    """
    encoder = model.encoder
    if model.config.reader != "encoder" or encoder is None:
        raise ValueError(f"model: reader={model.config.reader!r}; only one that is an encoder alone is written as such")
    if model.head is not None:
        raise ValueError("model: has a task head, which a plain encoder cannot have; `--to merged` keeps it")
    if model.config.adapters:
        merge(model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with scratch(folder / f".saving-{os.getpid()}") as staging:
        encoder.save(staging)
        model.require_tokenizer().mt.save_pretrained(str(staging))
        for path in folder.glob("model*.safetensors*"):  # shards of another number would be read beside these
            path.unlink()
        for path in sorted(staging.iterdir(), key=lambda p: p.name == "config.json"):
            os.replace(path, folder / path.name)
