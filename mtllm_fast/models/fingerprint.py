"""Fingerprints of models in memory: other weights, settings or tokens, another fingerprint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..data.store import tokenizer_key
from ..jobs.fingerprint import of_tensors, sha256_of_json

if TYPE_CHECKING:
    from .mtllm import MTLLM


def fingerprint(model: MTLLM) -> str:
    """16 hex digits over all weights, the configuration and the tokenizers of `model`."""
    from .storage import config_to_dict

    parts: list[Any] = [of_tensors(model.state_dict()), config_to_dict(model.config)]
    if model.tokenizer is not None:
        sides = [side for side in ("mt", "llm") if getattr(model.tokenizer, side) is not None]
        parts.append(tokenizer_key(model.tokenizer, sides))
    return sha256_of_json(parts)[:16]
