"""Who reads a text: the LLM, the MT encoder, or the stack of both. Each is a view of the parts that it surely has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..data.pack import PackedBatch
from .encoder import PackedEncoder
from .fusion import FusionSettings
from .llm import PackedLLM
from .projection import Projection

Side = Literal["mt", "llm"]


@dataclass(frozen=True)
class LLMReader:
    """The LLM with adapters on its own tokens."""

    llm: PackedLLM
    side: ClassVar[Side] = "llm"

    @property
    def backbone(self) -> PackedLLM:
        return self.llm

    def states(self, batch: PackedBatch) -> Tensor:
        return self.llm(batch)


@dataclass(frozen=True)
class EncoderReader:
    """The MT encoder alone; shift: see `MTLLM`; fusion: layers that read texts and their partners end to end."""

    encoder: PackedEncoder
    shift: Tensor | None = None
    fusion: FusionSettings | None = None
    side: ClassVar[Side] = "mt"

    @property
    def backbone(self) -> PackedEncoder:
        return self.encoder

    def encoder_states(self, batch: PackedBatch) -> Tensor:
        """The last hidden states (T, E)."""
        return _shifted(self.encoder(batch, fusion=self.fusion), self.shift)

    def states(self, batch: PackedBatch) -> Tensor:
        return self.encoder_states(batch)


@dataclass(frozen=True)
class StackReader:
    """MT encoder -> projection -> LLM with adapters; shift: see `MTLLM`."""

    encoder: PackedEncoder
    projection: Projection
    llm: PackedLLM
    shift: Tensor | None = None
    side: ClassVar[Side] = "mt"

    @property
    def backbone(self) -> PackedLLM:
        return self.llm

    def encoder_states(self, batch: PackedBatch) -> Tensor:
        """States (T, E) that the projection reads: before the encoder's final norm."""
        trained = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.encoder.parameters())
        with torch.set_grad_enabled(trained):
            if self.projection.fusion is None:
                return _shifted(self.encoder(batch, final_norm=False), self.shift)
            states = self.encoder.all_states(batch)
        return _shifted(self.projection.fuse(states), self.shift)

    def projected(self, batch: PackedBatch, prefix: Tensor | None = None, suffix: Tensor | None = None) -> Tensor:
        """What the LLM reads in place of embeddings, (T, D) of its dtype: the projected encoder states of `batch`.

        Args:
            prefix, suffix: (n, D) or (B, n, D), put before and after every sequence.
        """
        around: dict[str, Tensor | None] = {}
        if prefix is not None or suffix is not None:
            around = {"cu_seqlens": batch.cu_seqlens, "prefix": prefix, "suffix": suffix}
        # the residual stream keeps the LLM's dtype
        return self.projection(self.encoder_states(batch), self.encoder.final_norm, self.llm.model.dtype, **around)

    def states(self, batch: PackedBatch) -> Tensor:
        return self.llm(batch, embeds=self.projected(batch))


TextReader = LLMReader | EncoderReader | StackReader


def _shifted(states: Tensor, shift: Tensor | None) -> Tensor:
    return states if shift is None else states + shift.to(states)
