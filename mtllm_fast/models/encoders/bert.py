"""BERT: learnt positions from 0, token type 0, post-norm layers, so that no norm follows the last one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ...data.pack import PackedBatch
from ..attention import AttentionPlan
from .family import EncoderFamily

if TYPE_CHECKING:
    from transformers import (
        BertConfig,
        BertModel,
        PreTrainedConfig,
        RobertaConfig,
        RobertaModel,
        XLMRobertaConfig,
        XLMRobertaModel,
    )

    Config = BertConfig | RobertaConfig | XLMRobertaConfig
    Model = BertModel | RobertaModel | XLMRobertaModel


class Bert(EncoderFamily["Model"]):
    model_types: ClassVar[tuple[str, ...]] = ("bert",)
    about = "multilingual-E5-small, LaBSE, mBERT"
    even_layers = True

    def encoder_class(self, config: PreTrainedConfig) -> type[Model]:
        from transformers import BertModel

        return BertModel

    def run(self, encoder: Model, batch: PackedBatch, plan: AttentionPlan) -> Tensor:
        positions = batch.positions + self.first_position(encoder.config)
        hidden = encoder.embeddings(input_ids=batch.input_ids[None], position_ids=positions[None])
        for layer in encoder.encoder.layer:
            hidden = layer(hidden, None, plan=plan)
        return hidden[0]

    def first_position(self, config: Config) -> int:
        """Row of the position table at which a text begins."""
        return 0

    def fuses(self, config: PreTrainedConfig, layer: int) -> bool:
        return True

    def layers(self, encoder: Model) -> nn.ModuleList:
        return encoder.encoder.layer

    def final_norm(self, encoder: Model) -> nn.Module | None:
        return None

    def layers_root(self, encoder: Model) -> nn.Module:
        return encoder.encoder

    def prepare(self, encoder: Model) -> None:
        encoder.pooler = None  # reads one state that nobody asks for, and adapters would fit its `dense`

    def encoder_of(self, model: Any) -> Model:
        return getattr(model, model.base_model_prefix, model)

    def load(self, name: str, config: PreTrainedConfig, **options: Any) -> Model:
        return super().load(name, config, add_pooling_layer=False, **options)

    def build(self, config: PreTrainedConfig, dtype: torch.dtype | None = None) -> Model:
        return self.encoder_class(config)._from_config(config, dtype=dtype, add_pooling_layer=False)

    def max_positions(self, config: Config) -> int:
        return int(config.max_position_embeddings) - self.first_position(config)
