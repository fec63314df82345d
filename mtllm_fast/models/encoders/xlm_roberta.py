"""XLM-RoBERTa and RoBERTa: BERT's layers, with positions that begin after the padding index."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .bert import Bert

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, RobertaModel, XLMRobertaModel


class XLMRoberta(Bert):
    model_types = ("xlm-roberta", "roberta")
    about = "XLM-R, multilingual-E5-base and -large, BGE-M3"

    def encoder_class(self, config: PreTrainedConfig) -> type[RobertaModel | XLMRobertaModel]:
        from transformers import RobertaModel, XLMRobertaModel

        return RobertaModel if config.model_type == "roberta" else XLMRobertaModel

    def first_position(self, config: Any) -> int:
        return int(config.pad_token_id) + 1
