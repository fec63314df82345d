"""Tiny tokenizers of the kinds that the library meets, trained here on a few sentences."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import NllbTokenizer, PreTrainedTokenizerFast

from mtllm_fast.data import StackTokenizer

SENTENCES = [
    "The cat sat on the mat and looked at the dog.",
    "Une phrase en français, avec des accents: été, naïve, garçon.",
    "Eine kurze Geschichte über Züge und Vögel.",
    "日本語の文章です。 猫が好きです。",
    "a b c d e f g h i j k l m n o p q r s t u v w x y z 0 1 2 3 4 5 6 7 8 9 ( ) [ ] < > / _ | ?",
    "the quick brown fox jumps over the lazy dog " * 3,
]


def train_nllb() -> NllbTokenizer:
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    bpe.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "<pad>", "</s>", "<unk>"])
    )
    model = json.loads(bpe.to_str())["model"]
    return NllbTokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])


def train_llm(bos: str | None = "<|begin|>", writes_bos: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE like Llama 3 (`writes_bos`) or Qwen (no BOS)."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    specials = [token for token in (bos, "<|end|>") if token]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=450, special_tokens=specials, initial_alphabet=alphabet)
    )
    steps = [processors.ByteLevel(trim_offsets=True)]
    if bos and writes_bos:
        template = {"single": f"{bos} $A", "pair": f"{bos} $A {bos} $B"}  # Llama's: a second BOS in pairs
        steps.append(processors.TemplateProcessing(**template, special_tokens=[(bos, 0)]))
    bpe.post_processor = processors.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=bos, eos_token="<|end|>", pad_token="<|end|>")


def train_words(codes: list[str]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer whose language codes are additional special tokens, like miniworld's."""
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.train_from_iterator(SENTENCES, trainers.WordLevelTrainer(special_tokens=["<pad>", "<unk>", "</s>", *codes]))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", eos_token="</s>", additional_special_tokens=codes
    )


@pytest.fixture(scope="session")
def nllb() -> NllbTokenizer:
    return train_nllb()


@pytest.fixture(scope="session")
def llama_like() -> PreTrainedTokenizerFast:
    return train_llm()


@pytest.fixture(scope="session")
def qwen_like() -> PreTrainedTokenizerFast:
    return train_llm(bos=None)


@pytest.fixture(scope="session")
def unused_bos() -> PreTrainedTokenizerFast:
    """Defines a bos_token that it never writes, as GPT-2 does."""
    return train_llm(writes_bos=False)


@pytest.fixture(scope="session")
def words() -> PreTrainedTokenizerFast:
    return train_words(["xab_Latn", "eng_Latn"])


@pytest.fixture(scope="session")
def m2m_words() -> PreTrainedTokenizerFast:
    return train_words(["__en__", "__fr__"])


@pytest.fixture
def stack(nllb: NllbTokenizer, llama_like: PreTrainedTokenizerFast) -> StackTokenizer:
    return StackTokenizer(nllb, llama_like, max_mt_tokens=64, max_llm_tokens=64)
