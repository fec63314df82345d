"""Tokenising only the beginning of a long text gives the tokens that the whole text gives."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, normalizers, pre_tokenizers

import mtllm_fast.data.text_tokens as text_tokens
from mtllm_fast.data import StackTokenizer, TextRow
from mtllm_fast.data.long_text import CHARACTERS_PER_TOKEN, beginning, settled, splits_at_spaces
from tests.data.conftest import train_llm, train_nllb

LIMIT = 24
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = [
    "the",
    "cat",
    "naïve",
    "été,",
    "sat.",
    "(dog)",
    "\n",
    "\n\n",
    " ",
    "  ",
    "123456",
    "日本語の文章",
    "!?\n",
    "\u00a0",
    "x" * 40,
]
texts = st.lists(st.sampled_from(WORDS), min_size=0, max_size=60).map(lambda words: words * 7).map(" ".join)


def llama3():
    tokenizer = train_llm()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


STACK = StackTokenizer(train_nllb(), llama3(), max_mt_tokens=LIMIT, max_llm_tokens=LIMIT)


def equal(one, two):
    assert one.truncated == two.truncated
    for name in ("ids", "ends"):
        for a, b in zip(getattr(one, name), getattr(two, name), strict=True):
            assert np.array_equal(a, b)


@settings(max_examples=100, deadline=None)
@example([("the cat naïve été, " * 90, "sat. (dog) \n " * 80)], True)
@given(st.lists(st.tuples(texts, st.none() | texts), min_size=1, max_size=4), st.booleans())
def test_the_same_tokens(made, ends):
    rows = [TextRow(text or "a", text_pair=pair) for text, pair in made]
    for side in (STACK.mt_side, STACK.llm_side):
        found = side(rows, ends=ends)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(text_tokens, "beginning", lambda text, tokens: text)
            equal(found, side(rows, ends=ends))


def test_only_the_beginning_is_read(monkeypatch):
    seen = []
    encode = text_tokens._encode
    monkeypatch.setattr(
        text_tokens, "_encode", lambda t, texts, *rest: seen.extend(map(len, texts)) or encode(t, texts, *rest)
    )
    STACK.llm_side([TextRow("the cat sat on the mat " * 100_000)])
    assert sum(seen) < 2 * CHARACTERS_PER_TOKEN * (LIMIT + 64)
    seen.clear()
    blank = "\u00a0" * 4000 + "the cat " * 400  # few tokens in many characters, here: a word of its own
    side = STACK.mt_side([TextRow(blank)])
    assert side.truncated == 1
    row = TextRow("a text whose end is kept " * 400, choices=("x", "y"))
    seen.clear()
    STACK.llm_side([row])
    assert max(seen) == len(row.text)


def test_a_beginning_that_holds_too_few_tokens_is_not_settled(monkeypatch):
    """Words of 200 characters are one token each: the beginning has fewer than the limit, and the whole is read."""
    word = "z" * 200
    tokenizer = train_llm()
    tokenizer.add_tokens([word])
    stack = StackTokenizer(None, tokenizer, max_llm_tokens=LIMIT)
    row = TextRow(f"{word} " * 300)
    found = stack.llm_side([row])
    assert not settled(tokenizer(beginning(row.text, LIMIT))["input_ids"], LIMIT)
    monkeypatch.setattr(text_tokens, "beginning", lambda text, tokens: text)
    equal(found, stack.llm_side([row]))
    monkeypatch.setattr(text_tokens, "beginning", lambda text, tokens: text[:900])
    monkeypatch.setattr(text_tokens, "settled", lambda ids, tokens: True)
    assert stack.llm_side([row]).ids[0].tolist() != found.ids[0].tolist()  # what the check prevents


def test_which_tokenizers_split_at_spaces():
    tokenizer = train_llm()
    assert splits_at_spaces(tokenizer)
    assert splits_at_spaces(STACK.mt)
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    assert not splits_at_spaces(tokenizer)
    backend.normalizer, backend.pre_tokenizer = normalizers.Replace(" ", "▁"), pre_tokenizers.Split(" ", "isolated")
    assert not splits_at_spaces(tokenizer)  # as Gemma's: no space is left to split at
    backend.normalizer, backend.pre_tokenizer = (
        normalizers.Prepend("x "),
        pre_tokenizers.Split(Regex("^x "), "isolated"),
    )
    assert not splits_at_spaces(tokenizer)  # it splits, but not at a space between words
    backend.pre_tokenizer = None
    assert not splits_at_spaces(tokenizer)


def test_a_space_and_a_character_may_yet_change() -> None:
    assert not settled(range(LIMIT + 63), LIMIT)
    assert settled(range(LIMIT + 64), LIMIT)


@pytest.mark.parametrize("text", ["x" * 10_000, "the  cat  " * 2000, "a" * 700, ""])
def test_no_place_to_end_at(text):
    assert beginning(text, LIMIT) == text


def test_where_a_beginning_ends():
    text = "the cat sat " * 1000
    read = beginning(text, LIMIT)
    assert text.startswith(read)
    assert CHARACTERS_PER_TOKEN * (LIMIT + 64) < len(read) < CHARACTERS_PER_TOKEN * (LIMIT + 64) + 10
    assert read[-2] == " " and not read[-1].isspace() and not read[-3].isspace()
