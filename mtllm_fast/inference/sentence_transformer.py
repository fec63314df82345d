"""An MTLLM as a module of sentence-transformers.

    save_sentence_transformer(model, "folder")
    model = SentenceTransformer("folder", trust_remote_code=True)
    model.encode(["Mto unapita kando ya kinu."], language="swh_Latn")
    model.encode([{"text": "A river.", "language": "eng_Latn"}, {"text": "Une rivière.", "language": "fra_Latn"}])

sentence-transformers asks for `trust_remote_code=True` wherever a module class is not its own. No code of the folder is
run: the class is the one in this package. `encode` sorts its inputs and cuts them into batches, but not a list of
languages beside them; so a language per text travels with the text, in a dict.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.language import reads_language
from ..data.read import TextRow
from ..models import MTLLM
from .texts import check_one_language, padded

try:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import InputModule
except ImportError as error:
    raise ImportError(
        f"sentence-transformers 6 or newer is needed ({error}): pip install 'mtllm-fast[doors]'"
    ) from error

logger = logging.getLogger(__name__)

_FIELDS = {"text", "text_pair", "language"}


class MTLLMModule(InputModule):
    """The one module of a SentenceTransformer: tokens, encoder, projection, LLM and mean pooling.

    `batch_size` of `encode` is the number of texts that are packed into one forward pass; their padding is never
    computed. Token embeddings (`output_value="token_embeddings"`) are the last hidden states, and gradients flow.

    Args:
        model: with its tokenizer.
        language: MT code of texts that come without one; None: `encode` is to name it, where the encoder has languages.

    Raises:
        ValueError: the model has no tokenizer, or `language` is no language of it.
    """

    config_file_name = "sentence_mtllm_config.json"
    config_keys = ["language"]  # noqa: RUF012  (the base class declares it so)
    forward_kwargs = {"language"}  # noqa: RUF012
    save_in_root = True

    def __init__(self, model: MTLLM, language: str | None = None, *, include_base: bool | None = None) -> None:
        super().__init__()
        if model.tokenizer is None:
            raise ValueError("model: has no tokenizer; load it with MTLLM.from_pretrained or stack it from folders")
        if language is not None and reads_language(model.tokenizer, model.side):
            model.tokenizer.language_id(language)
        self.model = model
        self.tokenizer: Any = getattr(model.tokenizer, model.side)
        self.language = language
        self.include_base = include_base

    @property
    def max_seq_length(self) -> int:
        """Tokens per text, special ones included; longer texts are cut."""
        return getattr(self.model.tokenizer, f"max_{self.model.side}_tokens")

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        setattr(self.model.tokenizer, f"max_{self.model.side}_tokens", value)

    def get_embedding_dimension(self) -> int:
        return self.model.hidden_size

    def preprocess(
        self, inputs: Sequence[object], prompt: str | None = None, language: str | None = None, **kwargs: object
    ) -> dict[str, Tensor]:
        """Texts -> `input_ids` and `attention_mask` (B, L) int64.

        An input without a token (an empty text, for an LLM that writes no BOS) gets zeros, and a log line.

        Args:
            inputs: texts, pairs of texts, or dicts with "text" and optionally "text_pair" and "language".
            prompt: stands before every text.
            language: MT code of the inputs that name none themselves.
        """
        check_one_language(language)
        rows = [as_row(item, prompt or "", language or self.language) for item in inputs]
        features, empty = padded(rows, self.model.require_tokenizer(), self.model.side)
        if empty:
            logger.warning(
                "%d inputs have no token, so there is nothing to read: their embeddings are zeros", len(empty)
            )
        return features

    def forward(self, features: dict[str, Any], **kwargs: object) -> dict[str, Any]:
        """Adds `token_embeddings` (B, L, D), zeros at padding, and `sentence_embedding` (B, D) float32."""
        output = self.model(features["input_ids"], features["attention_mask"])
        return {**features, "token_embeddings": output.last_hidden_state, "sentence_embedding": output.pooled}

    def save(self, output_path: str, *args: object, **kwargs: object) -> None:
        """Write the MTLLM folder, which `MTLLM.from_pretrained` reads as well."""
        self.model.save_pretrained(output_path, include_base=self.include_base)
        (Path(output_path) / self.config_file_name).write_text(json.dumps(self.get_config_dict()) + "\n")

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **kwargs: Any) -> MTLLMModule:  # type: ignore[override]
        """What `SentenceTransformer(...)` calls. Of `model_kwargs`, `dtype` is used."""
        where: dict[str, Any] = {name: kwargs.get(name) for name in ("token", "cache_folder", "revision")}
        where["local_files_only"] = bool(kwargs.get("local_files_only"))
        settings = cls.load_config(model_name_or_path, subfolder=subfolder, **where)
        options = dict(kwargs.get("model_kwargs") or {})
        dtype = options.pop("dtype", options.pop("torch_dtype", None))
        if options:
            raise ValueError(f"model_kwargs: {', '.join(options)} cannot be used here, only dtype")
        if isinstance(dtype, str):
            dtype = None if dtype == "auto" else getattr(torch, dtype)
        folder: Any = cls.load_dir_path(model_name_or_path, subfolder=subfolder, **where)
        return cls(MTLLM.from_pretrained(folder, dtype=dtype), **settings)


def as_row(item: object, prompt: str, language: str | None) -> TextRow:
    """One input of `encode` as a text row.

    Raises:
        ValueError, TypeError: it is none of text, pair and dict, or the dict has other keys.
    """
    if isinstance(item, str):
        return TextRow(prompt + item, language)
    if isinstance(item, Mapping):
        unknown = sorted(set(item) - _FIELDS)
        if unknown or not isinstance(item.get("text"), str):
            raise ValueError(f"input {dict(item)!r}: expected the keys text and, optionally, text_pair and language")
        return TextRow(prompt + item["text"], item.get("language") or language, item.get("text_pair"))
    if isinstance(item, tuple | list) and len(item) == 2 and all(isinstance(text, str) for text in item):
        return TextRow(prompt + item[0], language, item[1])
    raise TypeError(f"input {item!r}: expected a text, a pair of texts or a dict with text and language")


def save_sentence_transformer(
    model: MTLLM, folder: str | Path, *, language: str | None = None, include_base: bool | None = None
) -> None:
    """Write `model` so that `SentenceTransformer(folder, trust_remote_code=True)` loads it.

    Args:
        language: MT code of texts that come without one; None: `encode` is to name it.
        include_base: as in `MTLLM.save_pretrained`.
    """
    device = str(next(model.parameters()).device)
    module = MTLLMModule(model, language, include_base=include_base)
    SentenceTransformer(modules=[module], device=device, similarity_fn_name="cosine").save(
        str(folder), create_model_card=False
    )
