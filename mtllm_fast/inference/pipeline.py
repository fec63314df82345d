"""An MTLLM behind transformers' own pipelines and Auto classes, once `mtllm_fast` is imported (see `auto`).

    import mtllm_fast
    from transformers import AutoModel, pipeline

    classify = pipeline("text-classification", model="runs/sib200")
    classify(["Mto unapita kando ya kinu."], language="swh_Latn", batch_size=32)
    classify([{"text": "A river.", "language": "eng_Latn"}, {"text": "Une rivière.", "language": "fra_Latn"}], top_k=3)

    states = pipeline("feature-extraction", model="runs/adapted")
    states(["Mto unapita kando ya kinu."], tokenize_kwargs={"language": "swh_Latn"}, return_tensors=True)
    AutoModel.from_pretrained("runs/adapted")          # of AutoTokenizer's input_ids and attention_mask

The pipelines are transformers' own. They load a folder of `MTLLM.save_pretrained` through the Auto classes, where
models and tokenizer are registered here. The padding of its batches is taken out again before the model runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

import torch
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling, SequenceClassifierOutput
from transformers.tokenization_utils_base import BatchEncoding

from ..auto_config import MTLLMPreTrainedConfig
from ..data.read import TextRow
from ..data.tokenise import StackTokenizer
from ..models import MTLLM
from ..models.storage import base_tokenizer, local_folder, read_config
from .texts import check_one_language, padded


class _Wrapped(PreTrainedModel):
    """An MTLLM, called as transformers calls its own models."""

    config_class = MTLLMPreTrainedConfig

    def __init__(self, model: MTLLM) -> None:
        super().__init__(MTLLMPreTrainedConfig(head={"labels": model.config.labels}))
        self.mtllm = model
        self.eval()  # as transformers' own from_pretrained gives them

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        trust_remote_code: bool | None = False,
        device_map: object = None,
        **_: object,
    ) -> Self:
        """`MTLLM.from_pretrained`; `dtype` "auto" keeps what is stored. `device_map` is refused: use `device`."""
        if device_map is not None:
            raise ValueError(f"device_map={device_map!r}: not supported here, pass device")
        if isinstance(dtype, str):
            dtype = None if dtype == "auto" else getattr(torch, dtype)
        return cls(
            MTLLM.from_pretrained(pretrained_model_name_or_path, dtype=dtype, trust_remote_code=bool(trust_remote_code))
        )

    def save_pretrained(self, save_directory: str | Path, **_: object) -> None:  # type: ignore[override]
        """Write the MTLLM folder."""
        self.mtllm.save_pretrained(save_directory)


class MTLLMModel(_Wrapped):
    """What `AutoModel` gives: hidden states and their means."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: object
    ) -> BaseModelOutputWithPooling:
        """Of padded tokens (B, L): last hidden states (B, L, D), zeros at padding, and their means (B, D) float32."""
        output = self.mtllm(input_ids, attention_mask)
        return BaseModelOutputWithPooling(last_hidden_state=output.last_hidden_state, pooler_output=output.pooled)


class MTLLMForSequenceClassification(_Wrapped):
    """What `AutoModelForSequenceClassification` gives: an MTLLM with a classification head.

    Raises:
        ValueError: the model has no classification head.
    """

    def __init__(self, model: MTLLM) -> None:
        head = model.config.head
        if head is None or head.kind != "classification":
            raise ValueError(
                f"model: has {f'a {head.kind} head' if head else 'no head'}, this needs a classification head; train "
                "one with `mtllm finetune` or `mtllm distill`"
            )
        super().__init__(model)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: object) -> SequenceClassifierOutput:
        """Logits (B, C) float32 of padded tokens (B, L)."""
        return SequenceClassifierOutput(logits=self.mtllm(input_ids, attention_mask).logits)


class MTLLMTokenizer:
    """The tokens that the model reads, with a language per call or per text.

    Args:
        stack: the model's tokenizer.
        side: "mt" or "llm", whichever the model reads.
        language: MT code of texts that come without one; None: the call is to name it, where the encoder has languages.
    """

    padding_side = "right"
    model_input_names = ("input_ids", "attention_mask")

    def __init__(self, stack: StackTokenizer, side: str = "mt", language: str | None = None) -> None:
        self.stack, self.side, self.language = stack, side, language
        self.pad_token_id = getattr(stack, side).pad_token_id or 0

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *_: object, **__: object) -> MTLLMTokenizer:
        """Read the tokenizer of an MTLLM folder or hub name."""
        folder = local_folder(pretrained_model_name_or_path)
        config = read_config(folder)
        saved = (folder / "stack_tokenizer.json").is_file()
        stack = StackTokenizer.from_pretrained(folder) if saved else base_tokenizer(config)
        return cls(stack, "llm" if config.reader == "llm" else "mt")

    def __call__(
        self,
        text: str | list[str],
        text_pair: str | list[str] | None = None,
        *,
        language: str | None = None,
        return_tensors: str = "pt",
        truncation: object = True,
        padding: object = True,
    ) -> BatchEncoding:
        """`input_ids` and `attention_mask` (B, L) int64.

        Texts are always cut to the tokenizer's own limit and padded to the longest; `truncation`, `padding` and
        `return_tensors` are accepted because callers of transformers' tokenizers pass them.

        Raises:
            ValueError: an unknown language code, a text without a token, or lists of different lengths.
        """
        texts = [text] if isinstance(text, str) else list(text)
        none: list[None] = [None] * len(texts)
        pairs = [text_pair] if isinstance(text_pair, str) else list(text_pair or none)
        if len(texts) != len(pairs):
            raise ValueError(f"text_pair: {len(pairs)} for {len(texts)} texts")
        check_one_language(language)
        rows = [TextRow(one, language or self.language, pair) for one, pair in zip(texts, pairs)]
        inputs, empty = padded(rows, self.stack, self.side)
        if empty:
            raise ValueError(f"text[{empty[0]}] has no token, so there is nothing to read")
        return BatchEncoding(inputs)

    def save_pretrained(self, save_directory: str | Path, **_: object) -> None:
        """Write the tokenizer as `MTLLM.save_pretrained` does."""
        self.stack.save_pretrained(save_directory)


AutoModel.register(MTLLMPreTrainedConfig, MTLLMModel, exist_ok=True)
AutoModelForSequenceClassification.register(MTLLMPreTrainedConfig, MTLLMForSequenceClassification, exist_ok=True)
AutoTokenizer.register(MTLLMPreTrainedConfig, MTLLMTokenizer, exist_ok=True)
