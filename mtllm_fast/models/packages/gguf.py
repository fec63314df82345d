"""A GGUF file of llama.cpp as a Llama of Hugging Face.

transformers reads weights and tokenizer (with the package `gguf`), and then refuses to store the model, which it calls
quantised although its weights are fp32 by now: they move into a model whose config says nothing of GGUF.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


def read_gguf(path: Path) -> tuple[LlamaForCausalLM, Any]:
    """The model, in fp32, and its tokenizer.

    Raises:
        ValueError: no GGUF file, a damaged one, or one of another architecture than Llama.
    """
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    check_architecture(path)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # its bar
            read = LlamaForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except (ValueError, KeyError, IndexError, OSError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: cannot be read as a Llama: {reason}") from error
    plain = read.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path", "dtype", "architectures"):
        plain.pop(name, None)
    model = LlamaForCausalLM(LlamaConfig(**plain, architectures=["LlamaForCausalLM"], dtype="float32"))
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    tokenizer.model_max_length = model.config.max_position_embeddings
    return model.eval(), tokenizer


def check_architecture(path: Path) -> None:
    """Refuse what is not the GGUF file of a Llama.

    Raises:
        ValueError: see there. ImportError: the package gguf is missing.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path}: is no GGUF file (it does not begin with GGUF)")
    from gguf import GGUFReader

    try:
        field = GGUFReader(path).get_field("general.architecture")
        architecture = None if field is None else field.contents()
    except (ValueError, KeyError, IndexError, OverflowError, MemoryError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: is damaged or cut short ({error})") from error
    if architecture != "llama":
        raise ValueError(f"{path}: is of the architecture {architecture!r}, only 'llama' can be converted")
