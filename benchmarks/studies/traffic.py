"""Bytes that one layer of the student moves besides its products and its attention, traced without running anything.

python -m benchmarks.studies.traffic [--json FILE]

One layer at Llama-3-8B's shapes, frozen in bf16, with LoRA in fp32 under bf16 autocast, as `adapt --bf16` trains it on
a GPU; forward and backward run on fake tensors, which have shapes and no numbers (how they count: traffic_count.py).
Matrix products and attention are counted apart, but what a layer's output or dx moves because an adapter's share is
added to it counts here.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface

from mtllm_fast.models import MTLLM
from mtllm_fast.models.adapters import LoraSettings
from mtllm_fast.planning.presets import config
from mtllm_fast.planning.simulate import StepSpec, build
from mtllm_fast.reporting.table import Table

from ..cases.lora import pefts_layers
from ..common import parser_of
from .traffic_count import Traffic, compiled, counted_launches, liger_layers

TOKENS = 8192
LAYERS = ("peft's layers", "LoRA as one op", "with Liger's layers", "compiled by Inductor")


def _dropped(x: Tensor, p: float, training: bool) -> Tensor:
    """Dropout as CUDA runs it, in one pass."""
    return torch.native_dropout(x, p, training)[0] if training and p else x


@torch.compiler.disable
def _attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: None, **_: Any) -> tuple[Tensor, None]:
    """Outside of the graphs and without repeated heads, as packed attention is."""
    return nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2), None


AttentionInterface.register("benchmarks_traffic", _attention)


def student_of_8b(dropout: float) -> MTLLM:
    """A student of one layer without numbers, its adapter in fp32."""
    encoder, llm = config("NLLB-600M"), config("Llama-3-8B")
    llm.num_hidden_layers = 1
    model = build(StepSpec(encoder, llm, lora=LoraSettings(dropout=dropout)))
    model.require_llm().train_adapter("student")
    return model


def traced(dropout: float, layers: str = LAYERS[1]) -> dict[str, Any]:
    """Kilobytes per token of forward and backward."""
    model = student_of_8b(dropout)
    llm = model.require_llm()
    layer, rotary = llm.layers[0], llm.layers_root.rotary_emb
    forward, backward = Traffic(), Traffic()
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        for module in (*layer.modules(), *rotary.modules()):  # type: ignore[union-attr]
            for values in (module._parameters, module._buffers):
                for name, value in values.items():
                    if value is not None:
                        fake = torch.empty(value.shape, dtype=value.dtype)
                        values[name] = nn.Parameter(fake, value.requires_grad) if values is module._parameters else fake
        x = torch.empty(1, TOKENS, 4096, dtype=torch.bfloat16).requires_grad_()
        trained = [x, *(p for p in layer.parameters() if p.requires_grad)]
        dy = torch.empty(1, TOKENS, 4096, dtype=torch.bfloat16)
        places = rotary(x, torch.arange(TOKENS)[None])  # type: ignore[operator]
        layer.self_attn.config._attn_implementation = "benchmarks_traffic"
        stack.enter_context(
            patch("torch.nn.functional.dropout", lambda x, p, training, _=False: _dropped(x, p, training))
        )
        counting = None
        if layers == LAYERS[0]:
            stack.enter_context(pefts_layers())
        elif layers == LAYERS[2]:
            stack.enter_context(liger_layers(model))
        elif layers == LAYERS[3]:
            counting = stack.enter_context(compiled(layer))

        def step(forward: Traffic, backward: Traffic) -> None:
            with counted_launches(forward), torch.autocast("cpu", torch.bfloat16), forward:
                y = layer(x, position_embeddings=places, attention_mask=None)
            with counted_launches(backward), backward:
                torch.autograd.grad(y, trained, dy)

        if counting is not None:  # what compiles does not count
            step(Traffic(), Traffic())
            counting.forward, counting.backward = forward, backward
        step(forward, backward)
    return {
        name: {
            "elementwise": round(sum(part.elementwise.values()) / TOKENS / 1e3),
            "products": round(sum(part.products.values()) / TOKENS / 1e3),
            "largest": {key: round(value / TOKENS / 1e3) for key, value in part.elementwise.most_common(6)},
        }
        for name, part in (("forward", forward), ("backward", backward))
    }


def main() -> None:
    parser = parser_of("benchmarks.studies.traffic", __doc__)
    options = parser.parse_args()
    found = {f"{layers}, dropout {dropout}": traced(dropout, layers) for dropout in (0.05, 0.0) for layers in LAYERS}
    rows = []
    for name, parts in found.items():
        moved = [part["elementwise"] for part in parts.values()]
        rows.append([name, *map(str, [*moved, sum(part["products"] for part in parts.values())])])
    header = ["elementwise KB per token and layer", "forward", "backward", "products, both"]
    print("\n".join(Table(header, rows).markdown()))
    for name, parts in found.items():
        print(f"{name}: {parts['forward']['largest']}; backward {parts['backward']['largest']}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
