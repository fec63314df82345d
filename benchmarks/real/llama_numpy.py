"""A Llama in NumPy on the tensors of a GGUF file, as llama.cpp lays them out.

Written from the equations, beside transformers: weights by the dequantiser of the package gguf, rotary positions on
neighbouring pairs (the file's own order of rows, which Hugging Face's differs from), float64 throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, dequantize
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Llama:
    """A GGUF file of the Llama architecture, tied embeddings or not."""

    def __init__(self, path: Path) -> None:
        reader = GGUFReader(path)
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}

        def value(name: str) -> Any:
            field = reader.get_field(f"llama.{name}")
            assert field is not None, name
            return field.contents()

        self.layers, self.heads = value("block_count"), value("attention.head_count")
        self.kv_heads, self.epsilon = value("attention.head_count_kv"), value("attention.layer_norm_rms_epsilon")
        self.theta, self.width = value("rope.freq_base"), value("embedding_length")
        self.head_width = self.width // self.heads

    def weight(self, name: str) -> Array:
        """One tensor, (out, in) or (width,)."""
        tensor = self.tensors[f"{name}.weight"]
        return dequantize(tensor.data, tensor.tensor_type).astype(np.float64)

    def logits(self, ids: Sequence[int], rotate: bool = True) -> Array:
        """(T, V) logits. `rotate` off leaves the positions out: the negative control."""
        words = self.weight("token_embd")
        x = words[list(ids)]
        for layer in range(self.layers):
            x = x + self.attention(f"blk.{layer}", x, rotate)
            h = self.norm(x, f"blk.{layer}.ffn_norm")
            gate, up = h @ self.weight(f"blk.{layer}.ffn_gate").T, h @ self.weight(f"blk.{layer}.ffn_up").T
            x = x + (gate / (1 + np.exp(-gate)) * up) @ self.weight(f"blk.{layer}.ffn_down").T
        head = self.weight("output") if "output.weight" in self.tensors else words
        return self.norm(x, "output_norm") @ head.T

    def norm(self, x: Array, name: str) -> Array:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.epsilon) * self.weight(name)

    def attention(self, block: str, x: Array, rotate: bool) -> Array:
        h = self.norm(x, f"{block}.attn_norm")
        shape = (len(x), -1, self.head_width)
        q, k, v = ((h @ self.weight(f"{block}.attn_{name}").T).reshape(shape) for name in "qkv")
        if rotate:
            q, k = self.rotated(q), self.rotated(k)
        k, v = (np.repeat(one, self.heads // self.kv_heads, axis=1) for one in (k, v))
        scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(self.head_width)
        scores[:, np.triu(np.ones(scores.shape[1:], bool), 1)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        mixed = np.einsum("hts,shd->thd", weights, v).reshape(len(x), -1)
        return mixed @ self.weight(f"{block}.attn_output").T

    def rotated(self, x: Array) -> Array:
        """(T, heads, head width) with each pair of neighbours turned by its position's angle."""
        frequency = self.theta ** (-np.arange(0, self.head_width, 2) / self.head_width)
        angle = np.arange(len(x))[:, None, None] * frequency
        even, odd, cos, sin = x[..., 0::2], x[..., 1::2], np.cos(angle), np.sin(angle)
        return np.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)
