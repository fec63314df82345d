"""Two LoRA adapters as one: their ranks side by side, so that the sum is exact and the base weights stay as they are.

w1 s1 B1 A1 + w2 s2 B2 A2 = s [(w1 s1 / s) B1, (w2 s2 / s) B2] [A1; A2],   s_i = alpha_i / r_i

The shares w1 and w2 may differ from layer to layer: a layer of one adapter alone has zeros in B for the other's ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .adapters import LoraSettings
from .mtllm import MTLLM


def sum_settings(mine: LoraSettings, other: LoraSettings) -> LoraSettings:
    """The settings of the sum: r is the sum of both, alpha keeps the scale of `mine` where that is a whole number.

    Raises:
        ValueError: it is not known which layers both together adapt.
    """
    r = mine.r + other.r
    whole, rest = divmod(mine.alpha * r, mine.r)
    targets = mine.target_modules
    if targets != other.target_modules:
        named = (mine.target_modules, other.target_modules)
        if "all-linear" in named:
            targets = "all-linear"
        elif isinstance(targets, tuple) and isinstance(other.target_modules, tuple):
            targets = tuple(sorted({*targets, *other.target_modules}))
        else:
            raise ValueError(
                f"target_modules={named[0]!r} and {named[1]!r}: adapters are summed where both name the same layers, "
                "lists of layers, or all-linear"
            )
    return replace(mine, r=r, alpha=r if rest else whole, target_modules=targets)


@torch.no_grad()
def add_to_adapter(
    model: MTLLM,
    settings: LoraSettings,
    weights: dict[str, Tensor],
    name: str = "student",
    shares: Callable[[str], tuple[float, float]] | None = None,
) -> None:
    """Make the adapter `name` of `model` the sum of itself and another, in place.

    A layer that only one of them adapts keeps a fresh A of peft and zeros in B for the other's share.

    Args:
        settings: of the other adapter.
        weights: of the other adapter, under the names of the model's own (others are left aside).
        shares: of a weight's name, what the model's own adapter and the other one are multiplied by; None: 1 and 1.

    Raises:
        ValueError: the other adapter does not fit the model.
    """
    backbone, mine = model.backbone, model.config.adapters[name]
    summed = sum_settings(mine, settings)
    scale = summed.alpha / summed.r
    own = {key: value.clone() for key, value in model.state_dict().items() if f".{name}." in key and ".lora_" in key}
    weights = {key: value for key, value in weights.items() if f".{name}." in key and ".lora_" in key}
    backbone.remove_adapter(name)
    backbone.add_adapter(summed, name)
    model.config.adapters[name] = summed
    state = model.state_dict()
    for part, part_settings, first in ((own, mine, True), (weights, settings, False)):
        ranks = slice(0, mine.r) if first else slice(mine.r, summed.r)
        for key, value in part.items():
            lora_a = ".lora_A." in key
            target = state.get(key)
            place = None if target is None else (target[ranks] if lora_a else target[:, ranks])
            if place is None or place.shape != value.shape:
                raise ValueError(f"adapter: {key} {tuple(value.shape)} of the adapter to add does not fit the model")
            share = 1.0 if shares is None else shares(key)[0 if first else 1]
            place.copy_(value if lora_a else value * (share * part_settings.alpha / part_settings.r / scale))
