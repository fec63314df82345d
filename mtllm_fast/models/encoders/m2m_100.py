"""M2M-100 and NLLB-200: pre-norm layers, sinusoidal positions, a language token before the text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from ...data.pack import PackedBatch
from ..attention import AttentionPlan
from .family import Encoder, EncoderFamily

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers.models.m2m_100.modeling_m2m_100 import M2M100Encoder


class SequenceToSequence(EncoderFamily[Encoder]):
    """Base of the families whose pre-norm encoder comes out of a translation model, with a language in every text."""

    language_codes = True
    even_layers = True

    def fuses(self, config: PreTrainedConfig, layer: int) -> bool:
        return True

    def layers(self, encoder: Any) -> nn.ModuleList:
        return encoder.layers

    def final_norm(self, encoder: Any) -> nn.Module:
        return encoder.layer_norm

    def encoder_of(self, model: Any) -> Encoder:
        return model.get_encoder() if hasattr(model, "decoder") or hasattr(model, "model") else model

    def load(self, name: str, config: PreTrainedConfig, **options: Any) -> Encoder:
        from transformers import AutoModel

        own = self.encoder_class(config)
        if own.__name__ in (config.architectures or []):  # an encoder that was saved alone
            return own.from_pretrained(name, config=config, **options)
        return self.encoder_of(AutoModel.from_pretrained(name, config=config, **options))


class M2M100(SequenceToSequence["M2M100Encoder"]):
    model_types = ("m2m_100",)
    about = "NLLB-200, M2M-100"

    def encoder_class(self, config: PreTrainedConfig) -> type[M2M100Encoder]:
        from transformers.models.m2m_100.modeling_m2m_100 import M2M100Encoder

        return M2M100Encoder

    def run(self, encoder: Any, batch: PackedBatch, plan: AttentionPlan) -> Tensor:
        # position p sits at table row p + padding_idx + 1; the table grows with the texts
        table, offset = encoder.embed_positions, encoder.padding_idx + 1
        if batch.max_seqlen + offset > table.weights.shape[0]:
            table.make_weights(batch.max_seqlen + offset, table.embedding_dim, table.padding_idx)
        hidden = encoder.embed_tokens(batch.input_ids)
        hidden = hidden + table.weights.index_select(0, batch.positions + offset).to(hidden.dtype)
        hidden = F.dropout(hidden, encoder.dropout, encoder.training)[None]
        for layer in encoder.layers:
            hidden = layer(hidden, None, plan=plan)
        return hidden[0]

    def prepare(self, encoder: M2M100Encoder) -> None:
        # layers are not dropped here: the encoder is distilled, not pre-trained
        if encoder.config.encoder_layerdrop:
            encoder.config.encoder_layerdrop = 0.0
