"""A model without adapters: LoRA added into the base weights, everything in one folder; an encoder by itself."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ..jobs.durable import scratch
from .frozen import dense_weight
from .mtllm import MTLLM


@torch.no_grad()
def merge(model: MTLLM) -> MTLLM:
    """Add the adapter of `model` into the weights of its backbone, in place and for good; returns `model`.

    The sum is formed in float32 and rounded once to the dtype of the weights.

    Raises:
        ValueError: there is no adapter, or several; the base weights are quantised.
    """
    if len(model.config.adapters) != 1:
        found = ", ".join(model.config.adapters) or "none"
        raise ValueError(f"model: its adapters are {found}; expected exactly one to merge")
    (name,) = model.config.adapters
    backbone = model.backbone
    backbone.unmerge_adapter()
    for layer in backbone.model.modules():
        if name in getattr(layer, "lora_A", ()):
            weight = dense_weight(layer.get_base_layer())
            weight.copy_((weight.float() + layer.get_delta_weight(name).float()).to(weight.dtype))
    backbone.remove_adapter(name)
    model.config.adapters = {}
    return model


def save_merged(model: MTLLM, folder: str | Path) -> None:
    """Merge `model` and write it with its base models, so that the folder needs nothing else.

    `MTLLM.from_pretrained(folder)` reads it as the same model without adapters, and so does
    `AutoModelForCausalLM.from_pretrained(folder / "llm")` the LLM alone, with its tokenizer (and transformers' own
    causal attention).

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
