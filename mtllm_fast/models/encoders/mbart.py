"""mBART: pre-norm layers behind a normed embedding, learnt positions from row 2, a language code in the text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from ...data.pack import PackedBatch
from ...data.tokenise import StackTokenizer
from ..attention import AttentionPlan
from .m2m_100 import SequenceToSequence

if TYPE_CHECKING:
    from transformers import MBartConfig, PreTrainedConfig
    from transformers.models.mbart.modeling_mbart import MBartEncoder


class MBart(SequenceToSequence["MBartEncoder"]):
    model_types = ("mbart",)
    about = "mBART-50"

    def encoder_class(self, config: PreTrainedConfig) -> type[MBartEncoder]:
        from transformers.models.mbart.modeling_mbart import MBartEncoder

        return MBartEncoder

    def run(self, encoder: MBartEncoder, batch: PackedBatch, plan: AttentionPlan) -> Tensor:
        table = encoder.embed_positions
        hidden = encoder.embed_tokens(batch.input_ids) + table.weight[batch.positions + table.offset]
        hidden = F.dropout(encoder.layernorm_embedding(hidden), encoder.dropout, encoder.training)[None]
        for layer in encoder.layers:
            hidden = layer(hidden, None, plan=plan)
        return hidden[0]

    def max_positions(self, config: MBartConfig) -> int:
        return int(config.max_position_embeddings)

    def check_tokenizer(self, tokenizer: StackTokenizer, name: str) -> None:
        super().check_tokenizer(tokenizer, name)
        if tokenizer.ends_with_language:
            raise ValueError(
                f"tokenizer: ends a text with its language (mBART-25), but encoder {name!r} would be given it at the "
                "beginning (mBART-50): take an mBART-50"
            )
