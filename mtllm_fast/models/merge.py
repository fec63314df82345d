"""A model without adapters: LoRA added into the base weights, everything in one folder."""

from __future__ import annotations

from pathlib import Path

import torch

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
