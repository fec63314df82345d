"""Small random models and tokenizers trained on a given text, saved as ordinary Hugging Face folders.

python -m tests.tiny --output DIR [--text FILE]      writes DIR/encoder and DIR/llm
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

LINES = (
    "The river runs past the old mill and under the stone bridge.",
    "A teacher explains how plants turn light into food.",
    "Trains between the two cities leave every hour, even at night.",
    "She bought three apples, a loaf of bread and some cheese.",
    "Scientists measured the distance to the star with great care.",
    "Nobody knew why the lights in the harbour went out at once.",
)


def write_task(folder: Path, languages: Sequence[str], labels: str = "good bad", repeats: int = 1) -> None:
    """A task "folder": `LINES` with two labels in turn, the same rows in every language and split."""
    names = labels.split()
    rows = "".join(f"{line}\t{names[i % 2]}\n" for i, line in enumerate(LINES * repeats))
    for language in languages:
        (folder / language).mkdir(parents=True)
        for split in ("train", "dev", "test"):
            (folder / language / f"{split}.tsv").write_text("text\tlabel\n" + rows, encoding="utf-8")


def _lines(text: str | None) -> list[str]:
    return Path(text).read_text(encoding="utf-8").splitlines() if text else list(LINES)


def nllb_tokenizer(lines: list[str], vocab_size: int = 600):
    """An NllbTokenizer with all of NLLB's language codes over a small BPE vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import NllbTokenizer

    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<s>", "<pad>", "</s>", "<unk>"], show_progress=False
    )
    trained.train_from_iterator(lines, trainer)
    import json

    model = json.loads(trained.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    return NllbTokenizer(vocab=model["vocab"], merges=merges, src_lang="eng_Latn")


def llm_tokenizer(lines: list[str], vocab_size: int = 800):
    """A byte-level BPE tokenizer with a BOS token, as Llama 3 has."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|begin|>", "<|end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=trained, bos_token="<|begin|>", eos_token="<|end|>", pad_token="<|pad|>"
    )


def m2m100_config(vocab_size: int = 64, **changes):
    from transformers import M2M100Config

    settings = {
        "vocab_size": vocab_size,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 1,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "max_position_embeddings": 256,
        "dropout": 0.0,
        "encoder_layerdrop": 0.0,
        "decoder_layerdrop": 0.0,
    }
    return M2M100Config(**{**settings, **changes})


def build_encoder_folder(folder: Path, text: str | None = None, **changes) -> str:
    from transformers import M2M100ForConditionalGeneration

    torch.manual_seed(0)
    tokenizer = nllb_tokenizer(_lines(text))
    model = M2M100ForConditionalGeneration(m2m100_config(len(tokenizer), **changes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def build_llm_folder(folder: Path, text: str | None = None, **changes) -> str:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    tokenizer = llm_tokenizer(_lines(text))
    settings = {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **{**settings, **changes}))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True)
    parser.add_argument("--text", help="a text file to train the tokenizers on")
    arguments = parser.parse_args()
    print(build_encoder_folder(Path(arguments.output) / "encoder", arguments.text))
    print(build_llm_folder(Path(arguments.output) / "llm", arguments.text))


if __name__ == "__main__":
    main()


def e5_file(path: Path, width: int = 32, layers: int = 2, vocabulary: int = 64) -> dict[str, Any]:
    """Write an E5S1 file of random weights (see `models/packages/e5_q4.py`), matrices as Q4_0.

    Returns:
        what was written, by name: (scales, nibbles) of a matrix, numbers of a vector.
    """
    import struct

    import numpy as np

    rng = np.random.default_rng(0)
    inner, positions = 2 * width, 16
    shapes: dict[str, int | tuple[int, int]] = {"emb.word": (vocabulary, width), "emb.pos": (positions, width)}
    shapes |= {"emb.type": (2, width), "emb.ln.w": width, "emb.ln.b": width}
    for i in range(layers):
        for name in ("q", "k", "v", "ao", "fi", "fo"):
            rows, columns = {"fi": (inner, width), "fo": (width, inner)}.get(name, (width, width))
            shapes |= {f"l{i}.{name}.w": (rows, columns), f"l{i}.{name}.b": rows}
        for name in ("aln", "oln"):
            shapes |= {f"l{i}.{name}.w": width, f"l{i}.{name}.b": width}
    written: dict[str, Any] = {}
    blobs: dict[str, bytes] = {}
    for name, shape in shapes.items():
        if isinstance(shape, int):
            written[name] = rng.normal(1 if name.endswith("n.w") else 0, 0.1, shape).astype("<f4")
            blobs[name] = written[name].tobytes()
        else:
            blocks = shape[0] * shape[1] // 32
            scale, nibbles = rng.uniform(0.01, 0.03, blocks).astype("<f2"), rng.integers(0, 256, (blocks, 16), "u1")
            written[name] = scale, nibbles
            blobs[name] = b"".join(s.tobytes() + n.tobytes() for s, n in zip(scale, nibbles))
    head = b"E5S1" + struct.pack("<I7ifi", 1, width, layers, 2, inner, vocabulary, positions, 2, 1e-12, 32)
    head += struct.pack("<5iQ", 2, 0, 2, 1, 3, 3) + struct.pack("<3I2f", 0, 1, 3, 0.0, -1.0) + b"abc"
    head += struct.pack("<iI", 1, 5) + b"a\0\0\0b" + struct.pack("<i", len(blobs))
    at = len(head) + sum(2 + len(name) + 21 for name in blobs)
    for name, blob in blobs.items():
        numbers = len(blob) // 4 if isinstance(shapes[name], int) else len(blob) // 18 * 32
        head += struct.pack("<H", len(name)) + name.encode()
        head += struct.pack("<BIQQ", 0 if isinstance(shapes[name], int) else 1, numbers, at, len(blob))
        at += len(blob)
    path.write_bytes(head + b"".join(blobs.values()))
    return written
