"""Trimmed tokenizers: texts whose tokens were kept read as before, others refused or counted, for every kind."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import mtllm_fast.demo
from mtllm_fast.data import StackTokenizer, TextRow
from mtllm_fast.data.batch import tokenise_readable
from mtllm_fast.data.text_tokens import BadText
from mtllm_fast.data.trim import Seen, Trimmed, Vocabulary, changed, count, tokens, trim
from tests.data.charsmap import compile_map
from tests.data.conftest import train_words
from tests.tiny import LINES, nllb_tokenizer

ASSETS = Path(mtllm_fast.demo.__file__).parent / "assets" / "test"
CODES = ("deu_Latn", "swh_Latn", "rus_Cyrl", "tha_Thai", "jpn_Jpan", "vie_Latn")
SPECIALS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
NAMES = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"}


@cache
def texts(code: str) -> list[str]:
    return (ASSETS / f"{code}.txt").read_text(encoding="utf-8").splitlines()


def rows(code: str, part: slice = slice(None)) -> list[TextRow]:
    return [TextRow(text, code) for text in texts(code)[part]]


def _metaspace(backend: Tokenizer) -> None:
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    backend.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always", split=True)


@cache
def make(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of six languages, as a multilingual encoder has one."""
    size: dict[str, Any] = {"vocab_size": 2600, "special_tokens": SPECIALS, "show_progress": False}
    trainer: Any
    if kind == "unigram":  # XLM-R, multilingual E5
        backend, trainer = Tokenizer(models.Unigram()), trainers.UnigramTrainer(unk_token="<unk>", **size)
        backend.normalizer = normalizers.Sequence(
            [normalizers.Precompiled(compile_map({"ﬁ": "fi", "…": "..."})), normalizers.Replace(" {2,}", " ")]
        )
        _metaspace(backend)
    elif kind == "bpe":  # NLLB
        backend, trainer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True)), trainers.BpeTrainer(**size)
        _metaspace(backend)
    elif kind == "bpe of bytes for what is unknown":  # Gemma, mmBERT
        size["special_tokens"] = [*SPECIALS, *(f"<0x{b:02X}>" for b in range(256))]
        backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        trainer = trainers.BpeTrainer(**size)
        _metaspace(backend)
    elif kind == "bpe over bytes":  # RoBERTa
        backend, alphabet = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel.alphabet()
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(initial_alphabet=alphabet, **size)
    else:  # mBERT, LaBSE
        backend, trainer = Tokenizer(models.WordPiece(unk_token="<unk>")), trainers.WordPieceTrainer(**size)
        backend.normalizer = normalizers.BertNormalizer(lowercase=True)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.train_from_iterator([text for code in CODES for text in texts(code)], trainer)
    ends = [("</s>", backend.token_to_id("</s>")), ("<s>", backend.token_to_id("<s>"))]
    if kind == "bpe over bytes":
        backend.post_processor = processors.RobertaProcessing(*ends)
    elif kind == "wordpiece":
        backend.post_processor = processors.BertProcessing(*ends)
    else:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=77, **NAMES)


KINDS = ("unigram", "bpe", "bpe of bytes for what is unknown", "bpe over bytes", "wordpiece")
KEPT = ("deu_Latn", "swh_Latn")


def trimmed(kind: str, codes: tuple[str, ...] = KEPT, **options) -> Trimmed:
    tokenizer = make(kind)
    return trim(tokenizer, count(tokenizer, [rows(code) for code in codes]), **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("codes", [KEPT, ("rus_Cyrl",), ("jpn_Jpan", "vie_Latn")])
def test_kept_texts_read_as_before(kind: str, codes: tuple[str, ...]) -> None:
    whole, small = make(kind), trimmed(kind, codes)
    assert len(small.rows) < 0.75 * len(whole) and len(small.tokenizer) == len(small.rows)
    for code in codes:
        for old, new in zip(tokens(whole, texts(code)), tokens(small.tokenizer, texts(code)), strict=True):
            assert old == small.rows[new].tolist()
        assert changed(whole, small, [rows(code)]) == (len(texts(code)), 0, 0)
    # with the special tokens that the tokenizer writes by itself
    for text in texts(codes[0])[:5]:
        assert small.rows[small.tokenizer(text)["input_ids"]].tolist() == whole(text)["input_ids"]
    assert small.tokenizer.pad_token_id == whole.pad_token_id == 1
    assert small.tokenizer.model_max_length == 77


@pytest.mark.parametrize("kind", KINDS)
def test_the_control_sees_one_token_that_is_missing(kind: str) -> None:
    whole = make(kind)
    seen = count(whole, [rows(code) for code in KEPT])
    vocabulary = Vocabulary(whole)
    used = [i for i in seen.share.argsort() if seen.share[i] > 0 and len(vocabulary.pieces[i]) > 3]
    seen.share[used[-1]] = 0
    number, other, refused = changed(whole, trim(whole, seen), [rows(code) for code in KEPT])
    assert number == 2 * len(texts("deu_Latn")) and other > 0 and refused == 0


@pytest.mark.parametrize("kind", KINDS)
def test_other_texts_are_refused_or_read_in_known_tokens(kind: str) -> None:
    """What the whole tokenizer knows is never an unknown token to the smaller one."""
    whole, small = make(kind), trimmed(kind)
    for code in ("rus_Cyrl", "tha_Thai", "jpn_Jpan"):
        assert changed(whole, small, [rows(code)]) == (len(texts(code)),) * 3
        with pytest.raises(BadText, match=r"holds '.', which the full vocabulary had"):
            StackTokenizer(small.tokenizer, None).mt_side(rows(code, slice(1)))
    # other texts of the same script are read, in other tokens
    first = trimmed(kind, ("deu_Latn",))
    number, other, refused = changed(whole, first, [rows("swh_Latn")])
    assert number >= other > 0 and refused == 0
    for text, old, new in zip(texts("swh_Latn"), *(tokens(t, texts("swh_Latn")) for t in (whole, first.tokenizer))):
        assert new, text
        assert whole.unk_token_id in old or first.tokenizer.unk_token_id not in new, text
    # a text of which one character is known no more
    with pytest.raises(BadText, match="holds 'я'"):
        tokens_of_one(small.tokenizer, "Das Wort я")


def tokens_of_one(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return StackTokenizer(tokenizer, None).mt_side([TextRow(text)]).ids[0].tolist()


def test_what_was_unknown_before_is_unknown_and_not_refused() -> None:
    whole, small = make("bpe"), trimmed("bpe")
    text = "Die Katze ሀ schläft"  # Ethiopic is in none of the six
    assert whole.unk_token_id in whole(text)["input_ids"]
    ids = small.rows[tokens_of_one(small.tokenizer, text)]
    assert ids.tolist().count(whole.unk_token_id) == 1


def test_letters_that_the_texts_lack_stay_with_their_script() -> None:
    """`ß` and `Q` are in no text here, and are letters of what the texts are written in."""
    whole = make("unigram")
    seen = count(whole, [[TextRow("Die Katze")]])
    kept = {Vocabulary(whole).pieces[i] for i in trim(whole, seen).rows}
    single = {piece for piece in Vocabulary(whole).pieces.values() if len(piece) == 1}
    assert {"ß", "ü", "ọ", "?", "7"} & single <= kept and "ß" in kept
    assert "я" in single - kept and "น" in single - kept


def test_a_quotation_in_another_script_keeps_its_own_characters_alone() -> None:
    whole = make("bpe")
    long = [TextRow(text) for text in texts("deu_Latn") * 3] + [TextRow("Er sagte нет.")]
    small = trim(whole, count(whole, [long]))
    assert changed(whole, small, [long]) == (len(long), 0, 0)
    assert "Я" in small.removed and "н" not in small.removed


def test_merges_on_the_way_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, small = make("bpe"), trimmed("bpe")
    monkeypatch.setattr(Vocabulary, "merged", lambda self, ids: set(ids))
    bare = trimmed("bpe")
    assert len(bare.rows) < len(small.rows)
    assert changed(whole, bare, [rows("deu_Latn")])[1] > 0, "the control: tokens without the way to them"


def test_what_an_unknown_character_costs_stays_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the piece of the least score `cb` and an unknown `q` would be better than `c` and `bq`."""
    pieces = [("<unk>", 0.0), ("▁", -1.0), ("b", -3.0), ("c", -15.0), ("cb", -2.0), ("bq", -15.0), ("zz", -30.0)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    _metaspace(backend)
    whole = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    kept = [TextRow("cbq"), TextRow("cb")]
    assert [Vocabulary(whole).pieces[i] for i in tokens(whole, ["cbq"])[0]] == ["▁", "c", "bq"]
    small = trim(whole, count(whole, [kept]))
    assert changed(whole, small, [kept]) == (2, 0, 0)
    plain = Vocabulary.special

    def forgets(self, *languages) -> set[int]:
        return plain(self, *languages) - {6}

    monkeypatch.setattr(Vocabulary, "special", forgets)
    assert changed(whole, trim(whole, count(whole, [kept])), [kept]) == (2, 1, 0)


def test_rare_tokens_go_and_are_counted() -> None:
    """By their frequency within one source: a small one is not drowned by a large one."""
    whole = make("unigram")
    seen = count(whole, [rows("deu_Latn") * 20, rows("swh_Latn")])
    frequent = trim(whole, seen, min_frequency=2e-3)
    assert len(frequent.rows) < len(trim(whole, seen).rows)
    ids = [i for one in tokens(whole, texts("swh_Latn")) for i in one]
    often = {i for i in ids if ids.count(i) >= 2e-3 * len(ids)}
    assert often <= set(frequent.rows.tolist())
    number, other, refused = changed(whole, frequent, [rows("deu_Latn"), rows("swh_Latn")])
    assert number == 2 * len(texts("deu_Latn")) and 0 < other <= number and refused == 0
    together = count(whole, [rows("deu_Latn") * 20 + rows("swh_Latn")])
    assert not often <= set(trim(whole, together, min_frequency=2e-3).rows.tolist()), "the control"


def test_language_codes() -> None:
    """Those asked for stay, and the one that the tokenizer writes by itself."""
    whole = nllb_tokenizer(list(LINES))
    stack = StackTokenizer(whole, None)
    languages = [stack.language_id(code) for code in stack.languages]
    seen = count(whole, [[TextRow(line) for line in LINES]])
    everything = StackTokenizer(trim(whole, seen, languages=languages, kept_languages=languages).tokenizer, None)
    assert everything.languages == stack.languages
    kept = [stack.language_id(code) for code in ("swh_Latn", "deu_Latn")]
    small = trim(whole, seen, languages=languages, kept_languages=kept)
    few = StackTokenizer(small.tokenizer, None)
    assert few.languages == ("deu_Latn", "eng_Latn", "swh_Latn")
    for code in few.languages:
        row = [TextRow(LINES[0], code)]
        assert small.rows[few.mt_side(row).ids[0]].tolist() == stack.mt_side(row).ids[0].tolist()
    with pytest.raises(ValueError, match="'tha_Thai' is unknown to the MT tokenizer; nearest valid codes"):
        few.mt_side([TextRow(LINES[0], "tha_Thai")])


def test_pairs_and_choices_count_too() -> None:
    whole = make("bpe")
    row = TextRow("Die Katze", text_pair="schläft unter"), TextRow("Was?", choices=("die Katze", "der Hund"))
    small = trim(whole, count(whole, [row]))
    assert changed(whole, small, [row]) == (7, 0, 0)
    old, new = (StackTokenizer(t, None).mt_side([row[1]]).ids[0] for t in (whole, small.tokenizer))
    assert small.rows[new].tolist() == old.tolist()


def test_a_saved_one_still_refuses(tmp_path: Path) -> None:
    """Saved by itself, within a stack's folder, and trimmed once more."""
    small = trimmed("unigram")
    small.tokenizer.save_pretrained(tmp_path / "alone")
    read = AutoTokenizer.from_pretrained(tmp_path / "alone")
    StackTokenizer(read, None).save_pretrained(tmp_path / "stack")
    again = StackTokenizer.from_pretrained(tmp_path / "stack")
    mine = json.loads(small.tokenizer.backend_tokenizer.to_str())
    assert json.loads(again.mt.backend_tokenizer.to_str()) == mine
    assert again.mt.special_tokens_map == small.tokenizer.special_tokens_map
    good = rows("swh_Latn", slice(3))
    readable, bad = tokenise_readable([*good, *rows("tha_Thai", slice(2))], again, ["mt"])
    assert len(readable) == 3 and len(bad) == 2 and "which the full vocabulary had" in bad[0][1]
    twice = trim(again.mt, count(again.mt, [rows("swh_Latn")]))
    assert len(twice.rows) < len(small.rows)
    assert set(small.removed) <= set(twice.removed)
    with pytest.raises(BadText):
        tokens_of_one(twice.tokenizer, texts("tha_Thai")[0])


def test_texts_that_cannot_be_read_are_left_out() -> None:
    whole = make("bpe")
    row = [TextRow("Die \ud800 Katze"), TextRow("Die Katze")]
    seen = count(whole, [row])
    assert (seen.texts, seen.unreadable) == (1, 1) and seen.tokens > 0
    assert changed(whole, trim(whole, seen), [row]) == (1, 0, 0)


def _fast(backend: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def _changed(kind: str, **parts: Any) -> PreTrainedTokenizerFast:
    """A tokenizer whose description says otherwise."""
    state = json.loads(make(kind).backend_tokenizer.to_str())
    model = parts.pop("model", {})
    return _fast(Tokenizer.from_str(json.dumps({**state, **parts, "model": {**state["model"], **model}})))


@pytest.mark.parametrize(
    ("tokenizer", "said"),
    [
        (lambda: train_words([]), "is of kind 'WordLevel'; only Unigram, BPE, WordPiece can be trimmed"),
        (lambda: _changed("bpe", model={"dropout": 0.1}), "a BPE with dropout=0.1"),
        (lambda: _changed("bpe", model={"end_of_word_suffix": "</w>"}), "end_of_word_suffix='</w>'"),
        (lambda: _changed("bpe", normalizer={"type": "ByteLevel"}), "normalizer writes bytes"),
    ],
)
def test_kinds_that_cannot_be_trimmed(tokenizer, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        count(tokenizer(), [rows("deu_Latn")])


def test_a_post_processor_that_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    from mtllm_fast.data import trim as module

    with pytest.raises(ValueError, match="post-processor 'Novel' is not known"):
        module._named({"type": "Sequence", "processors": [{"type": "ByteLevel"}, {"type": "Novel"}]})


def test_seen_says_what_was_read() -> None:
    whole = make("bpe")
    seen = count(whole, [rows("deu_Latn"), rows("rus_Cyrl")])
    assert isinstance(seen, Seen) and seen.texts == 2 * len(texts("deu_Latn"))
    assert seen.tokens == sum(len(one) for code in ("deu_Latn", "rus_Cyrl") for one in tokens(whole, texts(code)))
    assert {"LATIN", "CYRILLIC"} <= seen.scripts and "THAI" not in seen.scripts
