"""Layers of an encoder in which a text and its translation are read end to end, each token seeing both.

    [0, first)                one text apart from the other
    [first, first + layers)   as one sequence, in which each has its own positions
    the rest                  apart again

Packed, only the bounds of attention differ from layer to layer: the rows stay where they are. A text beside itself, or
beside nothing, is read as it is alone. Source: FILTER, arXiv 2009.05166.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .encoders import family_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# said, behind its name, of a fused model that is given no translations
READS_ALONE = "reads a text alone, without the English translation that it was trained to read it with"


@dataclass(frozen=True)
class FusionSettings:
    """Layers of the encoder that read a text and its English translation end to end, so that each token sees both; all
    others read them apart. As in FILTER."""

    first: int = 1
    """The first such layer, numbered from 0."""
    layers: int = 0
    """How many there are; 0: none, and a translation is not read."""

    def __post_init__(self) -> None:
        for name, value in (("first", self.first), ("layers", self.layers)):
            if value < 0:
                raise ValueError(f"fusion.{name}={value}: must be >= 0")

    @property
    def numbers(self) -> range:
        """Of the layers, from 0."""
        return range(self.first, self.first + self.layers)


def check_fusion(settings: FusionSettings, config: PreTrainedConfig, name: str | None = None) -> None:
    """Whether an encoder has the layers, and can read two texts end to end in them.

    Args:
        config: of the encoder, whose folder or hub name is `name`.

    Raises:
        ValueError: naming the layers that it can do it in.
    """
    family = family_of(config, name)
    count = family.num_layers(config)
    fit = [layer for layer in range(count) if family.fuses(config, layer)]
    if all(layer in fit for layer in settings.numbers):
        return
    which = config.model_type if name is None else f"encoder={name!r} ({config.model_type})"
    asked = f"fusion.first={settings.first}, fusion.layers={settings.layers}"
    if settings.first + settings.layers > count:
        raise ValueError(f"{asked}: {which} has {count} layers, numbered from 0")
    if not fit:
        raise ValueError(
            f"{asked}: {which} reads no two texts end to end: it knows places by distances in a text alone"
        )
    raise ValueError(
        f"{asked}: a layer among them sees no more than a window of a text; {which} can read two texts in the layers "
        f"{', '.join(map(str, fit))}"
    )
