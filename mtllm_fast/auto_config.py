"""What transformers needs to know of an MTLLM folder before its models are read."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from transformers import AutoConfig, PreTrainedConfig


class MTLLMPreTrainedConfig(PreTrainedConfig):
    """The labels of an MTLLM; reading one registers the model and tokenizer classes (`inference.pipeline`)."""

    model_type = "mtllm"  # models.config has it too, which is not to be imported for this

    def __init__(self, head: dict[str, Any] | None = None, **kwargs: Any) -> None:
        from .models import MTLLMConfig

        # what our config.json holds beyond the labels; transformers would read some of the names as its own
        ours = {field.name for field in fields(MTLLMConfig)} | {"format"}
        labels = (head or {}).get("labels")
        if labels:
            kwargs |= {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
        super().__init__(**{name: value for name, value in kwargs.items() if name not in ours})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> MTLLMPreTrainedConfig:
        from .inference import pipeline  # noqa: F401

        return super().from_dict(config_dict, **kwargs)


AutoConfig.register(MTLLMPreTrainedConfig.model_type, MTLLMPreTrainedConfig, exist_ok=True)
