"""T5, mT5, uMT5: no positions but a bias of the attention scores by distance, scores without scale, RMS norms.

T5 and mT5 have one bias, in the first layer, that all layers share; uMT5 has one in every layer.
"""

from __future__ import annotations

import copy
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...data.pack import PackedBatch
from ..attention import AttentionPlan, DistanceBias
from .family import EncoderFamily

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers.models.mt5.modeling_mt5 import MT5Stack
    from transformers.models.t5.modeling_t5 import T5Stack
    from transformers.models.umt5.modeling_umt5 import UMT5Stack

    Stack = T5Stack | MT5Stack | UMT5Stack


def compute_bias(self: Any, query_length: int, key_length: int, device: object = None, **_: object) -> DistanceBias:
    """In place of the method of the same name, which gives the bias of every pair of rows, across texts too."""
    distance = torch.arange(1 - query_length, key_length, device=self.relative_attention_bias.weight.device)
    if self.config.model_type == "umt5":
        buckets = self._relative_position_bucket(distance)
    else:
        buckets = self._relative_position_bucket(
            distance, True, self.relative_attention_num_buckets, self.relative_attention_max_distance
        )
    return DistanceBias(self.relative_attention_bias(buckets).T)


class T5(EncoderFamily["Stack"]):
    model_types = ("t5", "mt5", "umt5")
    about = "mT5, uMT5, MADLAD-400"

    def encoder_class(self, config: PreTrainedConfig) -> type[Stack]:
        from transformers.models.mt5.modeling_mt5 import MT5Stack
        from transformers.models.t5.modeling_t5 import T5Stack
        from transformers.models.umt5.modeling_umt5 import UMT5Stack

        return {"t5": T5Stack, "mt5": MT5Stack, "umt5": UMT5Stack}[config.model_type]

    def run(self, encoder: Stack, batch: PackedBatch, plan: AttentionPlan) -> Tensor:
        hidden, bias = encoder.dropout(encoder.embed_tokens(batch.input_ids))[None], None
        for layer in encoder.block:
            if encoder.config.model_type == "umt5":
                hidden = layer(hidden, None, plan=plan)
            else:
                hidden, bias, *_ = layer(hidden, None, bias, plan=plan)
        return hidden[0]

    def layers(self, encoder: Stack) -> nn.ModuleList:
        return encoder.block

    def final_norm(self, encoder: Stack) -> nn.Module:
        return encoder.final_layer_norm

    def prepare(self, encoder: Any) -> None:
        for layer in encoder.block:
            attention = layer.layer[0].SelfAttention
            if attention.has_relative_attention_bias:
                attention.compute_bias = MethodType(compute_bias, attention)

    def encoder_of(self, model: Any) -> Stack:
        return model if hasattr(model, "block") else model.get_encoder()

    def load(self, name: str, config: PreTrainedConfig, **options: Any) -> Stack:
        from transformers import MT5EncoderModel, T5EncoderModel, UMT5EncoderModel

        if self.encoder_class(config).__name__ in (config.architectures or []):  # an encoder that was saved alone
            return super().load(name, config, **options)
        whole: Any = {"t5": T5EncoderModel, "mt5": MT5EncoderModel, "umt5": UMT5EncoderModel}[config.model_type]
        return self.encoder_of(whole.from_pretrained(name, config=config, **options))

    def build(self, config: Any, dtype: torch.dtype | None = None) -> Stack:
        config = copy.deepcopy(config)
        config.is_decoder = config.is_encoder_decoder = config.use_cache = False
        return super().build(config, dtype)
