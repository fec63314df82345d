"""What the library asks of a family of MT encoders."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from ...data.pack import PackedBatch
from ...data.tokenise import StackTokenizer
from ..attention import AttentionPlan

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


Encoder = TypeVar("Encoder", bound="PreTrainedModel")


class EncoderFamily(ABC, Generic[Encoder]):
    """One kind of encoder: how it runs on packed rows, and the figures that the rest of the library needs of it.

    A config is the transformers config of the model, a model what transformers loads, an encoder the part that runs.

    Attributes:
        model_types: values of `model_type` in the config.json of its models.
        about: models that people know, for messages and `mtllm doctor`.
        language_codes: texts begin with a language token, so that its tokenizers must have language codes.
        even_layers: its layers are built alike, so that some of them make a shallower encoder (models/shrink.py).
    """

    model_types: ClassVar[tuple[str, ...]]
    about: ClassVar[str]
    language_codes: ClassVar[bool] = False
    even_layers: ClassVar[bool] = False

    @abstractmethod
    def encoder_class(self, config: PreTrainedConfig) -> type[Encoder]:
        """The transformers class of the encoder."""

    @abstractmethod
    def run(self, encoder: Encoder, batch: PackedBatch, plan: AttentionPlan) -> Tensor:
        """States (T, E) of the packed tokens before the final norm."""

    @abstractmethod
    def layers(self, encoder: Encoder) -> nn.ModuleList:
        """The encoder's layers, a ModuleList."""

    @abstractmethod
    def final_norm(self, encoder: Encoder) -> nn.Module | None:
        """The norm that ends the encoder, LayerNorm or RMSNorm; None where the last layer ends in its own."""

    def fuses(self, config: Any, layer: int) -> bool:
        """Whether a layer can read two texts end to end (models/fusion.py): its attention sees all of a text, and knows
        places by the texts' own positions alone."""
        return False

    def layers_root(self, encoder: Encoder) -> nn.Module:
        """The module whose linear layers "all-linear" adapters mean."""
        return encoder

    def prepare(self, encoder: Encoder) -> None:
        """Make an encoder ready to run packed, in place."""

    def encoder_of(self, model: Any) -> Encoder:
        """The encoder inside a model; an encoder is returned as it is."""
        return model

    def load(self, name: str, config: PreTrainedConfig, **options: Any) -> Encoder:
        """The encoder of the model in a folder or on the hub; `options` are those of transformers' from_pretrained."""
        return self.encoder_class(config).from_pretrained(name, config=config, **options)

    def build(self, config: PreTrainedConfig, dtype: torch.dtype | None = None) -> Encoder:
        """An encoder with random weights, on the device that is the default."""
        return self.encoder_class(config)._from_config(config, dtype=dtype)

    def width(self, config: Any) -> int:
        """E, the width of the states."""
        return int(config.hidden_size)

    def num_layers(self, config: Any) -> int:
        return int(config.num_hidden_layers)

    def vocab_size(self, config: Any) -> int:
        return int(config.vocab_size)

    def check_tokenizer(self, tokenizer: StackTokenizer, name: str) -> None:
        """Raise ValueError where the MT side of `tokenizer` writes what the encoder `name` would not read."""
        if self.language_codes and not tokenizer.languages:
            raise ValueError(
                f"tokenizer: has no language codes, but encoder {name!r} ({', '.join(self.model_types)}) begins every "
                "text with one: take the tokenizer that was trained with it"
            )

    def max_positions(self, config: Any) -> int | None:
        """Tokens of the longest text that the encoder can read, None where there is no limit."""
        return None
