"""Configs of the random models that benchmarks run, by the numbers that matter; `more` are fields of the config."""

from __future__ import annotations

from typing import Any


def llama(width: int, layers: int, inner: int, vocab: int, heads: int, **more: Any) -> Any:
    """A Llama with as many key heads as query heads, unless `more` says otherwise."""
    from transformers import LlamaConfig

    sizes = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": inner, "vocab_size": vocab}
    return LlamaConfig(**{**sizes, "num_attention_heads": heads, "num_key_value_heads": heads, **more})


def m2m100(width: int, layers: int, inner: int, vocab: int, heads: int, **more: Any) -> Any:
    """An NLLB encoder; the decoder, which nothing here runs, is of one small layer."""
    from transformers import M2M100Config

    sizes = {"d_model": width, "encoder_layers": layers, "encoder_ffn_dim": inner, "vocab_size": vocab}
    decoder = {"decoder_layers": 1, "decoder_attention_heads": heads, "decoder_ffn_dim": 64}
    return M2M100Config(**{**sizes, "encoder_attention_heads": heads, **decoder, **more})
