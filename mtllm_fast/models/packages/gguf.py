"""A GGUF file of llama.cpp as a Llama of Hugging Face.

Little-endian (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md):

    "GGUF" · u32 version · u64 tensors · u64 pairs
    pairs, each: string key · u32 type · value; a string is u64 bytes · UTF-8, an array u32 type · u64 length · values
    tensors, each: string name · u32 axes · u64 sizes[axes], fastest axis first · u32 type · u64 offset
    padding to the alignment · the tensors' bytes, each at its offset from here

A block of 32 weights is `q · scale` in Q8_0 (fp16 scale, 32 signed bytes) and `q · scale + least` in Q4_1 (fp16 scale,
fp16 least, 16 bytes: low nibbles are weights 0 to 15, high ones 16 to 31).

llama.cpp turns neighbouring numbers of a head as a pair, Hugging Face those half a head apart: rows of q and k move.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerFast

MAGIC = b"GGUF"
VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
# by type of a value
NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
F32, Q4_1, Q8_0 = 0, 3, 8
# by type of a tensor: numbers in a block, and the block
BLOCKS = {
    F32: (1, np.dtype("<f4")),
    Q4_1: (32, np.dtype([("scale", "<f2"), ("least", "<f2"), ("nibbles", "u1", (16,))])),
    Q8_0: (32, np.dtype([("scale", "<f2"), ("values", "i1", (32,))])),
}
_SIZES = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "rope.dimension_count": "head_dim",
    "context_length": "max_position_embeddings",
    "vocab_size": "vocab_size",
}
_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# how text is cut before the merges, `tokenizer.ggml.pre`: GPT-2's expression, of whole text or of what stands between
# digits, each of which is a piece of its own
PRE_TOKENIZERS = ("gpt-2", "smollm")
CONTROL, USER_DEFINED = 3, 4  # in `tokenizer.ggml.token_type`


def read_gguf(path: Path) -> tuple[LlamaConfig, dict[str, Tensor], PreTrainedTokenizerFast]:
    """The config, the fp32 weights as `LlamaForCausalLM` names them, and the tokenizer.

    Raises:
        ValueError: no GGUF file, a damaged one, one of another architecture than Llama, or one with tensors or a
            tokenizer of kinds that are not known.
    """
    with path.open("rb") as file:
        if file.read(4) != MAGIC:
            raise ValueError(f"{path}: is no GGUF file (it does not begin with {MAGIC.decode()})")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        pairs, tensors = read_header(data)
    except (struct.error, ValueError) as error:  # also UnicodeDecodeError
        raise ValueError(f"{path}: is damaged or cut short ({error})") from error
    if (architecture := pairs.get("general.architecture")) != "llama":
        raise ValueError(f"{path}: is of the architecture {architecture!r}, only 'llama' can be converted")
    try:
        config = _config(pairs, tied="output.weight" not in tensors)
        state = _state(config, data, tensors)
        return config, state, _tokenizer(pairs, config.max_position_embeddings)
    except (ValueError, KeyError) as error:
        reason = f"lacks the key {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path}: cannot be read as a Llama: {reason}") from error


def read_header(data: mmap.mmap | bytes) -> tuple[dict[str, Any], dict[str, tuple[int, tuple[int, ...], int]]]:
    """The pairs, and of each tensor its type, its shape (slowest axis first) and where its bytes begin.

    Raises:
        ValueError or struct.error: a damaged file, one that is cut short, or a tensor of a type that is not known.
    """
    at = len(MAGIC)

    def take(form: str) -> Any:
        nonlocal at
        values = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize("<" + form)
        return values[0] if len(values) == 1 else values

    def taken(size: int) -> bytes:
        nonlocal at
        if size > len(data) - at:
            raise ValueError(f"{size} bytes from byte {at} on, of {len(data)}")
        at += size
        return data[at - size : at]

    def string() -> str:
        return taken(take("Q")).decode()

    def numbers(kind: int, length: int) -> list[int | float | bool]:
        if kind not in NUMBERS:
            raise ValueError(f"a value of type {kind} at byte {at}")
        dtype = np.dtype(NUMBERS[kind])
        return np.frombuffer(taken(length * dtype.itemsize), dtype).tolist()

    def value(kind: int) -> str | int | float | bool | list[str] | list[int | float | bool]:
        if kind == STRING:
            return string()
        if kind != ARRAY:
            return numbers(kind, 1)[0]
        kind, length = take("IQ")
        return [string() for _ in range(length)] if kind == STRING else numbers(kind, length)

    version, tensor_count, pair_count = take("IQQ")
    if version not in VERSIONS:
        raise ValueError(f"version {version}, known are {VERSIONS}")
    pairs: dict[str, Any] = {}
    for _ in range(pair_count):
        key = string()
        pairs[key] = value(take("I"))
    tensors: dict[str, tuple[int, tuple[int, ...], int]] = {}
    for _ in range(tensor_count):
        name, axes = string(), take("I")
        if not 1 <= axes <= 4:
            raise ValueError(f"{name} has {axes} axes")
        shape = [take("Q") for _ in range(axes)]
        kind, offset = take("IQ")
        tensors[name] = kind, tuple(reversed(shape)), offset
    alignment = pairs.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"an alignment of {alignment!r}")
    start = -(-at // alignment) * alignment
    for name, (kind, sizes, offset) in tensors.items():
        if kind not in BLOCKS:
            raise ValueError(f"{name} is of type {kind}, known are {F32} (F32), {Q4_1} (Q4_1) and {Q8_0} (Q8_0)")
        block, dtype = BLOCKS[kind]
        end = start + offset + math.prod(sizes) // block * dtype.itemsize
        if sizes[-1] % block or end > len(data):
            raise ValueError(f"{name} of shape {sizes} ends at byte {end}, the file at {len(data)}")
        tensors[name] = kind, sizes, start + offset
    return pairs, tensors


def numbers_of(data: mmap.mmap | bytes, kind: int, shape: tuple[int, ...], start: int) -> NDArray[np.float32]:
    """The values of a tensor whose bytes `read_header` has found to be there."""
    size, dtype = BLOCKS[kind]
    blocks = np.frombuffer(data, dtype, math.prod(shape) // size, start)
    if kind == F32:
        return blocks.astype(np.float32).reshape(shape)
    values = np.empty((len(blocks), size), np.float32)
    if kind == Q8_0:
        values[:] = blocks["values"]
    else:
        values[:, :16] = blocks["nibbles"] & 15
        values[:, 16:] = blocks["nibbles"] >> 4
    values *= blocks["scale"].astype(np.float32)[:, None]
    if kind == Q4_1:
        values += blocks["least"].astype(np.float32)[:, None]
    return values.reshape(shape)


def _config(pairs: dict[str, Any], tied: bool) -> LlamaConfig:
    from transformers import LlamaConfig

    sizes = {ours: pairs[f"llama.{name}"] for name, ours in _SIZES.items()}
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} is {size!r}")
    if scaling := [key for key in pairs if key.startswith("llama.rope.scaling.")]:
        raise ValueError(f"scaled rotary positions are not known ({scaling[0]})")
    names = ("bos", "eos", "unknown", "padding")
    bos, eos, unknown, padding = (pairs.get(f"tokenizer.ggml.{name}_token_id") for name in names)
    further: dict[str, Any] = {"unk_token_id": unknown}
    return LlamaConfig(
        **sizes,
        rms_norm_eps=pairs["llama.attention.layer_norm_rms_epsilon"],
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": pairs.get("llama.rope.freq_base", 10000.0)},
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=padding,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
        **further,
    )


def _state(
    config: LlamaConfig, data: mmap.mmap, tensors: dict[str, tuple[int, tuple[int, ...], int]]
) -> dict[str, Tensor]:
    from transformers import LlamaForCausalLM

    layers, found = config.num_hidden_layers, {_llama_name(name): name for name in tensors}
    if len(tensors) != (count := len(_LAYER) * layers + 3 - config.tie_word_embeddings):
        raise ValueError(f"has {len(tensors)} tensors, a Llama of {layers} layers has {count}")
    with torch.device("meta"):
        expected = LlamaForCausalLM(config).state_dict()
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]
    state, half_head = {}, int(config.head_dim or 0) // 2
    for name, should in expected.items():
        if name not in found:
            raise ValueError(f"lacks the tensor {name}, of {count} that its Llama has")
        kind, shape, start = tensors[found[name]]
        if shape != tuple(should.shape):
            raise ValueError(f"{name} is of shape {shape}, not {tuple(should.shape)} as its head says")
        values = numbers_of(data, kind, shape, start)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            pairs = values.reshape(-1, half_head, 2, config.hidden_size)
            values = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(shape)
        state[name] = torch.from_numpy(values)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return state


def _llama_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; names that are not known stay."""
    stem, _, what = name.rpartition(".")
    if what != "weight":
        return name
    if stem in _NAMES:
        return f"{_NAMES[stem]}.weight"
    block, _, rest = stem.partition(".")
    layer, _, part = rest.partition(".")
    return f"model.layers.{layer}.{_LAYER[part]}.weight" if block == "blk" and part in _LAYER else name


def _tokenizer(pairs: dict[str, Any], positions: int) -> PreTrainedTokenizerFast:
    """The byte-level tokenizer, its text cut as llama.cpp cuts it.

    transformers cuts every such file as GPT-2's: with `smollm`, two spaces before a digit would be a token more.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    kind, pre = pairs["tokenizer.ggml.model"], pairs.get("tokenizer.ggml.pre")
    if kind != "gpt2" or pre not in PRE_TOKENIZERS:
        raise ValueError(f"its tokenizer is {kind!r} with {pre!r}, known is 'gpt2' with one of {PRE_TOKENIZERS}")
    tokens, merges = pairs["tokenizer.ggml.tokens"], pairs["tokenizer.ggml.merges"]
    special = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if (index := pairs.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            if not 0 <= index < len(tokens):
                raise ValueError(f"{key}_token_id is {index}, of {len(tokens)} tokens")
            special[f"{name}_token"] = tokens[index]
    try:
        vocabulary = {token: index for index, token in enumerate(tokens)}
        backend = Tokenizer(
            models.BPE(
                vocabulary,
                [tuple(merge.split(" ")) for merge in merges],
                continuing_subword_prefix="",
                end_of_word_suffix="",
            )
        )
    except Exception as error:  # the tokenizers library raises Exception itself
        raise ValueError(f"its tokenizer: {error}") from error
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_of]) if pre == "smollm" else bytes_of
    backend.decoder = decoders.ByteLevel()
    for token, what in zip(tokens, pairs.get("tokenizer.ggml.token_type", ())):
        if what in (CONTROL, USER_DEFINED):
            add = backend.add_special_tokens if what == CONTROL else backend.add_tokens
            add([AddedToken(token, normalized=False, special=what == CONTROL)])
    chosen = {name: pairs.get(f"tokenizer.ggml.add_{name}_token", False) for name in ("bos", "eos")}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **special,
        chat_template=pairs.get("tokenizer.chat_template"),
        add_bos_token=chosen["bos"],
        add_eos_token=chosen["eos"],
        model_max_length=positions,
    )
