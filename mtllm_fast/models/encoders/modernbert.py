"""ModernBERT: rotary positions, most layers see a window, pre-norm layers and a final norm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ...data.pack import PackedBatch
from ..attention import AttentionPlan
from .family import EncoderFamily

if TYPE_CHECKING:
    from transformers import ModernBertConfig, ModernBertModel, PreTrainedConfig


class ModernBert(EncoderFamily["ModernBertModel"]):
    model_types = ("modernbert",)
    about = "mmBERT"

    def encoder_class(self, config: PreTrainedConfig) -> type[ModernBertModel]:
        from transformers import ModernBertModel

        return ModernBertModel

    def run(self, encoder: Any, batch: PackedBatch, plan: AttentionPlan) -> Tensor:
        hidden = encoder.embeddings(input_ids=batch.input_ids[None])
        positions = batch.positions[None]
        rotary = {kind: encoder.rotary_emb(hidden, positions, kind) for kind in set(encoder.config.layer_types)}
        for layer in encoder.layers:
            hidden = layer(hidden, None, position_embeddings=rotary[layer.attention_type], plan=plan)
        return hidden[0]

    def fuses(self, config: ModernBertConfig, layer: int) -> bool:
        return (config.layer_types or [])[layer] == "full_attention"

    def layers(self, encoder: ModernBertModel) -> nn.ModuleList:
        return encoder.layers

    def final_norm(self, encoder: ModernBertModel) -> nn.Module:
        return encoder.final_norm

    def prepare(self, encoder: Any) -> None:
        # a token sees `sliding_window` tokens to either side; the layers add one, for FlashAttention's sake
        for layer in encoder.layers:
            if layer.attention_type == "sliding_attention":
                layer.attn.sliding_window = encoder.config.sliding_window

    def encoder_of(self, model: Any) -> ModernBertModel:
        return getattr(model, model.base_model_prefix, model)

    def max_positions(self, config: ModernBertConfig) -> int:
        return int(config.max_position_embeddings)
