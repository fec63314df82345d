"""Composed and decomposed text, character maps, and what a token has read."""

import random
import re
import unicodedata

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, normalizers
from transformers import NllbTokenizer, PreTrainedTokenizerFast

from mtllm_fast.data import StackTokenizer, TextRow, align_rows
from mtllm_fast.data.characters import CharacterMap, Written, _clusters, composed, read_up_to
from mtllm_fast.data.text_tokens import encode

from .charsmap import compile_map, latin_rules

LATIN = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,…12"
MARKED = [chr(c) for c in (*range(0xC0, 0x250), *range(0x1E00, 0x1F00))]


@pytest.fixture(scope="module")
def rules():
    return latin_rules()


@pytest.fixture(scope="module")
def mapped(rules):
    """An NllbTokenizer with a real precompiled character map; every character and a few pairs are pieces."""
    single = dict.fromkeys([*LATIN, *MARKED, *"\u0300\u0301\u0302\u0303\u0323", "▁"])
    pieces = [*single, "ng", "▁T", "▁V", "▁a", "▁o", "fi"]
    vocab = {token: i for i, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *pieces])}
    merges = [("n", "g"), ("▁", "T"), ("▁", "V"), ("▁", "a"), ("▁", "o"), ("f", "i")]
    return NllbTokenizer(vocab=vocab, merges=merges, _spm_precompiled_charsmap=compile_map(rules))


def pieces(tokenizer, ids):
    return tokenizer.convert_ids_to_tokens(np.asarray(ids).tolist())


TEXTS = ["Tiếng Việt", "été a", "Ẹ̀kọ́ ọ̀rọ̀", "ệ", "naïve Ǻ", "Ǘ ǘ", "Å"]


@pytest.mark.parametrize("text", TEXTS)
def test_decomposed_text_has_the_pieces_of_the_composed(mapped, llama_like, text):
    nfc, nfd = (unicodedata.normalize(form, text) for form in ("NFC", "NFD"))
    stack = StackTokenizer(mapped, llama_like)
    side = stack.mt_side([TextRow(nfc), TextRow(nfd)])
    assert side.ids[0].tolist() == side.ids[1].tolist()
    read = "".join(pieces(mapped, side.ids[1][1:-1])).replace("▁", " ").strip()
    assert read == unicodedata.normalize("NFKC", text)
    # each end of the composed text, in the decomposed one
    there = [len(unicodedata.normalize("NFD", nfc[:end])) if end >= 0 else -1 for end in side.ends[0]]
    assert [end for end in there if end >= 0] == [end for end in side.ends[1].tolist() if end in there and end >= 0]


def test_vietnamese_as_sentencepiece_reads_it(mapped):
    text = unicodedata.normalize("NFD", "Tiếng Việt")
    side = StackTokenizer(mapped, None).mt_side([TextRow(text, language="vie_Latn")])
    assert pieces(mapped, side.ids[0][1:-1]) == ["▁T", "i", "ế", "ng", "▁V", "i", "ệ", "t"]
    assert side.ends[0][1:-1].tolist() == [1, 2, 5, 7, 9, 10, 13, 14]
    # control: the library alone loses the tones
    alone = mapped(text, add_special_tokens=False)["input_ids"]
    assert pieces(mapped, alone) == ["▁T", "i", "ê", "ng", "▁V", "i", "ẹ", "t"]


@pytest.mark.parametrize("kind", ["mapped", "plain"])
def test_an_llm_with_a_character_map_keeps_the_tones_too(mapped, nllb, kind):
    llm = {"mapped": mapped, "plain": nllb}[kind]
    texts = [unicodedata.normalize(form, "Việt") for form in ("NFC", "NFD")]
    ids = [ids.tolist() for ids in StackTokenizer(None, llm).llm_side([TextRow(text) for text in texts]).ids]
    assert (ids[0] == ids[1]) == (kind == "mapped")  # a tokenizer that tells them apart gets the text as it is


def test_white_space_at_the_end_is_left_out_on_the_mt_side_alone(mapped):
    row = TextRow("ab", text_pair="ab ")
    stack = StackTokenizer(mapped, mapped, pair_separator="\n")
    space = mapped.convert_tokens_to_ids("▁")
    assert space not in stack.mt_side([row]).ids[0]
    alone = [i for text in ("ab", "\n", "ab ") for i in mapped(text, add_special_tokens=False)["input_ids"]]
    llm = stack.llm_side([row]).ids[0].tolist()
    assert llm[-len(alone) :] == alone and llm.count(space) == 2


def test_a_wide_letter_keeps_its_mark(mapped):
    """A sibling that composing does not mend: the map has the wide letter alone."""
    ids = StackTokenizer(mapped, None).mt_side([TextRow("Ｂ\u0301a")]).ids[0]
    assert pieces(mapped, ids[1:-1]) == ["▁", "B", "\u0301", "a"]
    assert "\u0301" not in pieces(mapped, mapped("Ｂ\u0301a", add_special_tokens=False)["input_ids"])  # control


ALPHABET = [*"ab eéö \n", "\u0301", "\u0323", "\u0302", "\x01", "\u00ad", "\u200d", *"ﬁİÅ각ß½猫🙂\r\u00a0…Ａ", "\u11a8"]


def random_texts(count):
    generator = random.Random(0)
    return ["".join(generator.choices(ALPHABET, k=generator.randint(1, 8))) for _ in range(count)]


def letters(text):
    return "".join(c for c in text if not c.isspace() and c != "▁" and unicodedata.category(c) != "Cf")


@pytest.mark.parametrize(
    "text", ["\x01ab cd", "e\u0301te\u0301 a", "oﬃce ab", "a\r\nb", "ab\x01 cd", *random_texts(300)]
)
def test_no_pair_has_read_different_characters(mapped, llama_like, rules, text):
    """The LLM's bytes give the original prefix; the MT pieces must be what the rules make of that prefix."""
    stack = StackTokenizer(mapped, llama_like)
    mt, llm = stack.mt_side([TextRow(text)]), stack.llm_side([TextRow(text)])
    (ids, ends), (llm_ids, llm_ends) = (mt.ids[0], mt.ends[0]), (llm.ids[0], llm.ends[0])
    rows = align_rows(ends, np.zeros_like(ends), llm_ends, np.zeros_like(llm_ends))
    for i, j in zip(*(row.tolist() for row in rows), strict=True):
        prefix = stack.llm.decode(llm_ids[1 : j + 1].tolist(), clean_up_tokenization_spaces=False)
        assert text.startswith(prefix)
        assert "\x01" not in prefix  # which the MT side never reads
        want = letters(by_hand(unicodedata.normalize("NFC", prefix), rules))
        got = [".*" if piece == "<unk>" else re.escape(letters(piece)) for piece in pieces(mapped, ids[1 : i + 1])]
        assert re.fullmatch("".join(got), want)


def by_hand(text, rules):
    out, at = "", 0
    while at < len(text):
        key = next((text[at:end] for end in range(len(text), at, -1) if text[at:end] in rules), None)
        out += text[at] if key is None else rules[key]
        at += len(key or "x")
    return out


def test_the_map_is_applied_as_the_rules_say(rules):
    characters = CharacterMap(compile_map(rules))
    for text in [*random_texts(500), *rules]:
        assert characters(text).text == by_hand(text, rules)
    with pytest.raises(ValueError, match="precompiled_charsmap: 7 bytes"):
        CharacterMap(b"\xff\0\0\0abc")


def test_composed_is_what_unicodedata_says():
    for form in ("NFC", "NFKC"):
        generator = random.Random(1)
        characters = [chr(c) for c in range(0x300) if unicodedata.decomposition(chr(c))]
        characters += [chr(c) for c in (*range(0x300, 0x370), *range(0x900, 0xE00), *range(0xF40, 0xFC0)) if chr(c)]
        characters += [*"abe", *map(chr, range(0x1100, 0x1200)), "가", "각", *map(chr, range(0xFF60, 0xFFE0))]
        for _ in range(5000):
            text = "".join(generator.choices(characters, k=generator.randint(1, 6)))
            written = composed(text, form)
            assert written.text == unicodedata.normalize(form, text)
            for k, end in enumerate(written.ends or []):
                assert end < 0 or unicodedata.normalize(form, text[:end]) == written.text[:k]
        changing = (c for c in range(0x110000) if not unicodedata.is_normalized(form, chr(c)))
        assert all(_clusters(form).search(chr(c)) for c in changing)


NORMALIZERS = {
    "nfc": normalizers.NFC(),  # Qwen's
    "nfkc": normalizers.NFKC(),
    "lower, then nfc": normalizers.Sequence([normalizers.Lowercase(), normalizers.NFC()]),
    "bert": normalizers.BertNormalizer(lowercase=True),
    "a letter away": normalizers.Replace("\x01", ""),
    "two letters are one": normalizers.Replace("ab", "x"),
    "spaces": normalizers.Replace(Regex(" {2,}"), " "),
}


@pytest.mark.parametrize("name", NORMALIZERS)
@pytest.mark.parametrize("compose", [True, False])
def test_ends_after_other_normalisers(name, compose):
    normalizer = NORMALIZERS[name]
    texts = random_texts(400)
    forms = [unicodedata.normalize(form, t) for t in texts for form in ("NFC", "NFD", "NFKC", "NFKD")]
    known = sorted({c for t in [*texts, *forms] for c in normalizer.normalize_str(t) + t.lower()})
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(["<unk>", *known])}, merges=[], unk_token="<unk>"))
    inner.normalizer = normalizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    found = 0
    for text in texts:
        ids, ends = encode(tokenizer, [text], True, compose)
        read = ""
        for piece, end in zip(pieces(tokenizer, ids[0]), ends[0], strict=True):
            read += "?" if piece == "<unk>" else piece
            if end >= 0:
                prefix = unicodedata.normalize("NFC", text[:end]) if compose else text[:end]
                want, got = letters(normalizer.normalize_str(prefix)), letters(read)
                assert len(want) == len(got)
                assert all(b in (a, "?") for a, b in zip(want, got, strict=True))
                found += 1
    assert found > 500


def test_nothing_is_read_after_characters_that_no_token_holds():
    assert read_up_to([(0, 2), (3, 5)], Written("ab cd")) == [2, 5]  # white space need not be held
    assert read_up_to([(0, 2), (3, 5)], Written("abXcd")) == [-1, -1]
    assert read_up_to([(0, 2)], Written("ab")) == [2]
    assert read_up_to([(0, 1), (1, 2)], Written("abX")) == [1, -1]
