"""Bytes that one layer of the student moves besides its products and its attention, traced without running anything.

python -m benchmarks.traffic [--json FILE]

One layer at Llama-3-8B's shapes, frozen in bf16, with LoRA in fp32 under bf16 autocast, as `adapt --bf16` trains it on
a GPU; forward and backward run on fake tensors, which have shapes and no numbers. An elementwise operator counts what
it reads and writes once each, caches do not exist. Matrix products and attention are counted apart, but what a layer's
output or dx moves because an adapter's share is added to it counts here.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from mtllm_fast.models.adapters import LoraSettings
from mtllm_fast.planning.presets import config
from mtllm_fast.planning.simulate import StepSpec, build

from .lora import pefts_layers

TOKENS = 8192


class Traffic(TorchDispatchMode):
    """Bytes read and written inside the block, by operator: `elementwise`, and those of products and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.elementwise: Counter[str] = Counter()
        self.products: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        known = {x.untyped_storage() for x in inputs}
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if func._schema.is_mutable or any(x.untyped_storage() not in known for x in outputs):  # else a view
            counted = self.products if func._overloadpacket in flop_registry else self.elementwise
            if not func._schema.name.startswith(("aten::empty", "aten::new_empty")):
                counted[func._schema.name.removeprefix("aten::")] += sum(map(_bytes, [*inputs, *outputs]))
        return out


def _dropped(x: Tensor, p: float, training: bool) -> Tensor:
    """Dropout as CUDA runs it, in one pass."""
    return torch.native_dropout(x, p, training)[0] if training and p else x


def _bytes(x: Tensor) -> int:
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


def layer_of_8b(dropout: float) -> tuple[nn.Module, nn.Module]:
    """The first layer and the rotary embedding of a student without numbers, adapters in fp32."""
    encoder, llm = config("NLLB-600M"), config("Llama-3-8B")
    llm.num_hidden_layers = 1
    model = build(StepSpec(encoder, llm, lora=LoraSettings(dropout=dropout))).llm
    assert model is not None
    model.train_adapter("student")
    return model.layers[0], model.layers_root.rotary_emb  # type: ignore[return-value]


def traced(dropout: float) -> dict[str, Any]:
    """Kilobytes per token of forward and backward."""
    layer, rotary = layer_of_8b(dropout)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in (*layer.modules(), *rotary.modules()):
            for values in (module._parameters, module._buffers):
                for name, value in values.items():
                    if value is not None:
                        fake = torch.empty(value.shape, dtype=value.dtype)
                        values[name] = nn.Parameter(fake, value.requires_grad) if values is module._parameters else fake
        x = torch.empty(1, TOKENS, 4096, dtype=torch.bfloat16).requires_grad_()
        places = rotary(x, torch.arange(TOKENS)[None])
        layer.self_attn.config._attn_implementation = "sdpa"  # type: ignore[union-attr]
        gpu_dropout = patch("torch.nn.functional.dropout", lambda x, p, training, _=False: _dropped(x, p, training))
        with gpu_dropout, torch.autocast("cpu", torch.bfloat16), Traffic() as forward:
            y = layer(x, position_embeddings=places, attention_mask=None)
        with Traffic() as backward:
            (y[0] if isinstance(y, tuple) else y).backward(torch.empty(1, TOKENS, 4096, dtype=torch.bfloat16))
    return {
        name: {
            "elementwise": round(sum(part.elementwise.values()) / TOKENS / 1e3),
            "products": round(sum(part.products.values()) / TOKENS / 1e3),
            "largest": {key: round(value / TOKENS / 1e3) for key, value in part.elementwise.most_common(6)},
        }
        for name, part in (("forward", forward), ("backward", backward))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    found = {}
    for dropout in (0.05, 0.0):
        with pefts_layers():
            found[f"peft's layers, dropout {dropout}"] = traced(dropout)
        found[f"LoRA as one op, dropout {dropout}"] = traced(dropout)
    print("| elementwise KB per token and layer | forward | backward | products, both |")
    print("| --- | ---: | ---: | ---: |")
    for name, parts in found.items():
        products = sum(part["products"] for part in parts.values())
        print(f"| {name} | {parts['forward']['elementwise']} | {parts['backward']['elementwise']} | {products} |")
    for name, parts in found.items():
        print(f"{name}: {parts['forward']['largest']}; backward {parts['backward']['largest']}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
