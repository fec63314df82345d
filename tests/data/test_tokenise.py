import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtllm_fast.data import StackTokenizer, TextRow
from mtllm_fast.data.layout import _longest_first

from .conftest import train_words


def tokens(tokenizer, ids):
    return tokenizer.convert_ids_to_tokens(ids.tolist())


def plain(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_single_text_as_nllb_writes_it(stack, nllb):
    row = TextRow("The cat sat.", language="fra_Latn")
    nllb.src_lang = "fra_Latn"
    assert stack.mt_side([row]).ids[0].tolist() == nllb("The cat sat.")["input_ids"]


def test_every_row_has_its_own_language(stack, nllb):
    codes = ["eng_Latn", "deu_Latn", "zho_Hans", "eng_Latn"]
    side = stack.mt_side([TextRow("The dog.", language=code) for code in codes])
    assert [tokens(nllb, ids)[0] for ids in side.ids] == codes
    assert all(np.array_equal(side.ids[0][1:], ids[1:]) for ids in side.ids)


def test_pair_formats(stack, nllb, llama_like):
    row = TextRow("The cat", text_pair="the dog")
    a, b = plain(nllb, "The cat"), plain(nllb, "the dog")
    lang, eos = nllb.convert_tokens_to_ids("eng_Latn"), nllb.eos_token_id
    assert stack.mt_side([row]).ids[0].tolist() == [lang, *a, eos, *b, eos]
    a, b, separator = (plain(llama_like, text) for text in ("The cat", "the dog", "\n"))
    assert stack.llm_side([row]).ids[0].tolist() == [llama_like.bos_token_id, *a, *separator, *b]


@pytest.mark.parametrize("fixture", ["llama_like", "qwen_like", "unused_bos"])
def test_bos_only_where_the_tokenizer_writes_it(nllb, fixture, request):
    llm = request.getfixturevalue(fixture)
    ids = StackTokenizer(nllb, llm).llm_side([TextRow("The cat")]).ids[0].tolist()
    assert ids == llm("The cat")["input_ids"]
    assert (ids[0] == llm.bos_token_id) == (fixture == "llama_like")


@pytest.mark.parametrize("side", ["mt", "llm"])
@pytest.mark.parametrize("pair", [None, "the lazy dog"])
def test_ends_are_exclusive_character_offsets(stack, side, pair):
    row = TextRow("The quick brown fox, été", text_pair=pair)
    made = getattr(stack, f"{side}_side")([row])
    tokenizer = getattr(stack, side)
    whole = row.text + ("" if pair is None else "\n" + pair)
    ids, ends = made.ids[0], made.ends[0]
    assert ids.dtype == np.int64
    assert ends.dtype == np.int32
    assert ends[0] == -1
    assert ends.max() == len(whole)
    start = 0
    for index, end in zip(ids, ends, strict=True):
        if end < 0:
            continue
        piece = whole[start:end].strip()
        word = tokenizer.decode([index]).strip()
        assert word == piece or "�" in word or "<unk>" in word
        start = end


def test_special_tokens_in_the_text_are_text(stack, nllb, llama_like):
    row = TextRow("a </s> eng_Latn <|begin|> <|end|> b", text_pair="</s>")
    mt, llm = stack.mt_side([row]), stack.llm_side([row])
    specials = [nllb.convert_tokens_to_ids(t) for t in ("</s>", "eng_Latn")]
    assert [int(i) for i in mt.ids[0] if i in specials] == [specials[1], specials[0], specials[0]]
    assert (llm.ids[0] == llama_like.bos_token_id).sum() == 1
    assert (llm.ids[0] == llama_like.eos_token_id).sum() == 0
    # control: asked plainly, the tokenizer does let the text inject them
    assert plain(nllb, row.text).count(specials[0]) == 1


def test_unknown_language_names_the_nearest(stack):
    for code, nearest in (
        ("ell_Latn", "ell_Grek"),
        ("en", "eng_Latn"),
        ("nij_Latn", "_Latn"),
        ("eng", "eng_Latn"),
    ):
        with pytest.raises(ValueError, match=rf"language '{code}' is unknown .*nearest valid codes: .*{nearest}"):
            stack.language_id(code)
    with pytest.raises(ValueError, match="ell_Grek"):
        stack.mt_side([TextRow("x"), TextRow("y", language="ell_Latn")])
    with pytest.raises(TypeError, match="language must be a code"):
        stack.language_id(None)


def test_language_token_is_never_unknown(stack, nllb):
    assert len(stack.languages) == 202
    assert nllb.unk_token_id not in {stack.language_id(code) for code in stack.languages}
    # control: transformers maps an unknown code to <unk>
    assert nllb.convert_tokens_to_ids("ell_Latn") == nllb.unk_token_id


def test_fallbacks_are_counted_and_logged(nllb, caplog):
    stack = StackTokenizer(nllb, None, fallbacks={"arb_Latn": "arb_Arab"})
    with caplog.at_level("WARNING"):
        side = stack.mt_side([TextRow("a", language="arb_Latn"), TextRow("a", language="arb_Latn")])
    assert tokens(nllb, side.ids[0])[0] == "arb_Arab"
    assert stack.fallback_counts == {"arb_Latn": 2}
    assert [r.message for r in caplog.records] == ["language arb_Latn has no MT code, read as arb_Arab"]
    with pytest.raises(ValueError, match="arb_Latn"):
        StackTokenizer(nllb, None, fallbacks={"qqq_Latn": "arb_Latn"})
    with pytest.raises(ValueError, match="needs no fallback"):
        StackTokenizer(nllb, None, fallbacks={"eng_Latn": "fra_Latn"})


def test_m2m100_and_private_codes(m2m_words, words):
    assert StackTokenizer(m2m_words, None).languages == ("__en__", "__fr__")
    assert StackTokenizer(m2m_words, None).language_id("en") == m2m_words.convert_tokens_to_ids("__en__")
    assert StackTokenizer(words, None).languages == ("eng_Latn", "xab_Latn")
    side = StackTokenizer(words, None).mt_side([TextRow("the quick", language="xab_Latn")])
    assert tokens(words, side.ids[0]) == ["xab_Latn", "the", "quick", "</s>"]


def test_encoder_without_languages_keeps_its_own_template(llama_like):
    side = StackTokenizer(llama_like, None).mt_side([TextRow("The cat", language="anything")])
    assert side.ids[0].tolist() == llama_like("The cat")["input_ids"]


def test_separator_without_tokens_asks_for_another(words):
    stack = StackTokenizer(None, words)
    assert len(stack.llm_side([TextRow("the dog")]).ids[0]) == 2  # no pair, no complaint
    with pytest.raises(ValueError, match=r"tokenises to nothing.*set pair_separator"):
        stack.llm_side([TextRow("the", text_pair="dog.")])
    with pytest.raises(ValueError, match=r"unknown token.*set pair_separator"):
        StackTokenizer(None, words, pair_separator="§").llm_side([TextRow("the", text_pair="dog.")])
    side = StackTokenizer(None, words, pair_separator="and").llm_side([TextRow("the", text_pair="dog.")])
    assert tokens(words, side.ids[0]) == ["the", "and", "dog."]


def test_truncation_keeps_the_format_and_is_counted(nllb, llama_like):
    stack = StackTokenizer(nllb, llama_like, max_mt_tokens=12, max_llm_tokens=10)
    long, short = "the quick brown fox " * 20, "the dog"
    rows = [TextRow(long), TextRow(short), TextRow(long, text_pair=short), TextRow(long, text_pair=long)]
    mt, llm = stack.mt_side(rows), stack.llm_side(rows)
    assert mt.truncated == llm.truncated == 3
    assert [len(ids) for ids in mt.ids] == [12, 2 + len(plain(nllb, short)), 12, 12]
    assert [len(ids) for ids in llm.ids] == [10, 1 + len(plain(llama_like, short)), 10, 10]
    eos, short_ids = nllb.eos_token_id, plain(nllb, short)
    assert all(tokens(nllb, ids)[0] == "eng_Latn" and ids[-1] == eos for ids in mt.ids)
    assert mt.ids[2].tolist()[-len(short_ids) - 2 :] == [eos, *short_ids, eos]  # the short text is whole
    assert mt.ids[0].tolist()[1:-1] == plain(nllb, long)[:10]
    at = mt.ids[3].tolist().index(eos)
    assert (at - 1, 12 - at - 2) == (5, 4)
    # the second text's ends count on from the whole first text, cut or not
    assert (mt.ends[2][-len(short_ids) - 1 : -1] > len(long)).all()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=6), st.integers(0, 60))
def test_longest_first(lengths, room):
    keep = _longest_first(lengths, room)
    assert all(0 <= k <= n for k, n in zip(keep, lengths, strict=True))
    assert sum(keep) == min(room, sum(lengths))
    cut = [k for k, n in zip(keep, lengths, strict=True) if k < n]
    if cut:
        assert max(keep) <= min(cut) + 1  # nothing kept is longer than what was cut, but for the odd token


def test_choices_have_spans_on_both_sides(stack):
    row = TextRow("The cat sat where?", choices=("on the mat", "the dog", "été"), label=0)
    whole = row.text + "\n1 on the mat\n2 the dog\n3 été"
    for side, tokenizer in ((stack.mt_side([row]), stack.mt), (stack.llm_side([row]), stack.llm)):
        assert side.spans is not None
        assert side.spans[0].shape == (3, 2)
        for choice, (start, end) in zip(row.choices, side.spans[0], strict=True):
            text = tokenizer.decode(side.ids[0][start:end], clean_up_tokenization_spaces=False).strip()
            assert text == choice
            assert whole[: side.ends[0][end - 1]].endswith(choice)
        assert side.ends[0].max() == len(whole)


def test_choices_survive_truncation(nllb, llama_like):
    stack = StackTokenizer(nllb, llama_like, max_mt_tokens=24, max_llm_tokens=24)
    row = TextRow("the quick brown fox " * 20 + "where?", choices=("mat", "dog"))
    for side, tokenizer in ((stack.mt_side([row]), stack.mt), (stack.llm_side([row]), stack.llm)):
        assert side.truncated == 1
        assert len(side.ids[0]) == 24
        text = tokenizer.decode(side.ids[0][1:], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert "where?" in text  # the question at the end of the text stays
        for choice, (start, end) in zip(row.choices, side.spans[0], strict=True):
            assert tokenizer.decode(side.ids[0][start:end]).strip() == choice
    many = TextRow("x", choices=tuple("the dog" for _ in range(30)))
    with pytest.raises(ValueError, match="max_mt_tokens 24 leaves no room for 30 choices"):
        stack.mt_side([many])


def test_rows_that_do_not_fit_are_refused(stack):
    with pytest.raises(ValueError, match="text_pair or choices, not both"):
        stack.mt_side([TextRow("a", text_pair="b", choices=("c",))])
    with pytest.raises(ValueError, match="at least one choice"):
        stack.mt_side([TextRow("a", choices=())])
    with pytest.raises(ValueError, match="lone surrogate"):
        stack.mt_side([TextRow("fine"), TextRow("bad \ud800")])
    with pytest.raises(TypeError, match="text must be a string, got None"):
        stack.llm_side([TextRow("fine"), TextRow(None)])


def test_a_token_that_holds_no_character_has_no_end(stack, monkeypatch):
    inserted = ([[7, 8]], [[0, 1]])  # a normaliser may put a token before the text
    monkeypatch.setattr("mtllm_fast.data.text_tokens._encode", lambda *_: inserted)
    assert stack.mt_side([TextRow("x")]).ends[0].tolist() == [-1, -1, 1, -1]


def test_empty_text_is_only_special_tokens(stack):
    assert len(stack.mt_side([TextRow("")]).ids[0]) == 2
    assert len(stack.llm_side([TextRow("")]).ids[0]) == 1
    assert stack.mt_side([]).ids == []


class Slow:
    is_fast = False

    def __call__(self):
        raise AssertionError


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"mt": None, "llm": None}, ValueError, "mt and llm are both None"),
        ({"mt": Slow()}, ValueError, "mt: Slow gives no character offsets"),
        ({"llm": Slow()}, ValueError, "llm: Slow gives no character offsets"),
        ({"mt": "facebook/nllb"}, TypeError, "mt must be a Hugging Face tokenizer"),
        ({"max_mt_tokens": 3}, ValueError, "max_mt_tokens must be at least 4"),
        ({"max_llm_tokens": 1.5}, TypeError, "max_llm_tokens must be an integer"),
        ({"pair_separator": None}, TypeError, "pair_separator must be a string"),
    ],
)
def test_bad_arguments(nllb, llama_like, arguments, error, message):
    arguments = {"mt": nllb, "llm": llama_like} | arguments
    with pytest.raises(error, match=message):
        StackTokenizer(arguments.pop("mt"), arguments.pop("llm"), **arguments)


def test_a_side_that_is_not_there(nllb, llama_like):
    with pytest.raises(ValueError, match="mt is None"):
        StackTokenizer(None, llama_like).mt_side([TextRow("a")])
    with pytest.raises(ValueError, match="llm is None"):
        StackTokenizer(nllb, None).llm_side([TextRow("a")])
    with pytest.raises(ValueError, match="has no language codes"):
        StackTokenizer(llama_like, None).language_id("eng_Latn")


@pytest.mark.parametrize("fixtures", [("nllb", "llama_like"), ("words", "qwen_like"), ("nllb", None)])
def test_save_and_load(tmp_path, fixtures, request):
    mt, llm = (request.getfixturevalue(name) if name else None for name in fixtures)
    code = "eng_Latn"
    stack = StackTokenizer(
        mt, llm, max_mt_tokens=20, max_llm_tokens=30, pair_separator=" | ", fallbacks={"zzz_Latn": code}
    )
    stack.save_pretrained(tmp_path / "saved")
    again = StackTokenizer.from_pretrained(tmp_path / "saved", max_llm_tokens=16)
    assert (again.max_mt_tokens, again.max_llm_tokens, again.pair_separator) == (20, 16, " | ")
    assert again.languages == stack.languages
    assert again.language_id("zzz_Latn") == stack.language_id(code)
    rows = [TextRow("The quick été 猫", language=code), TextRow("the", text_pair="dog")]
    for side in ("mt", "llm"):
        if getattr(stack, side) is None:
            assert getattr(again, side) is None
            continue
        one, two = getattr(stack, f"{side}_side")(rows), getattr(again, f"{side}_side")(rows)
        assert [i.tolist() for i in one.ids] == [i.tolist() for i in two.ids]
        assert [e.tolist() for e in one.ends] == [e.tolist() for e in two.ends]


def test_load_from_a_folder_that_is_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no stack_tokenizer\.json"):
        StackTokenizer.from_pretrained(tmp_path)
    (tmp_path / "stack_tokenizer.json").write_text('{"sides": [')
    with pytest.raises(ValueError, match="is damaged"):
        StackTokenizer.from_pretrained(tmp_path)


def test_a_row_that_just_fits_is_not_cut(nllb, llama_like):
    text = "the quick brown fox"
    whole = StackTokenizer(nllb, llama_like)
    sizes = [len(getattr(whole, f"{name}_side")([TextRow(text)]).ids[0]) for name in ("mt", "llm")]
    for change, cut in ((0, 0), (-1, 1)):
        limits = {f"max_{name}_tokens": size + change for name, size in zip(("mt", "llm"), sizes)}
        stack = StackTokenizer(nllb, llama_like, **limits)
        for name, size in zip(("mt", "llm"), sizes):
            for with_ends in (True, False):
                side = getattr(stack, f"{name}_side")([TextRow(text)], ends=with_ends)
                assert (side.truncated, len(side.ids[0])) == (cut, size + change), (name, with_ends)
        mt = stack.mt_side([TextRow(text)], ends=False)
        assert mt.ids[0][-1] == nllb.eos_token_id


def test_no_more_tokens_than_the_encoder_has_positions(nllb):
    stack = StackTokenizer(nllb, None, max_mt_tokens=12)
    text = TextRow("the quick brown fox " * 9)
    for positions, length in ((None, 12), (7, 7), (99, 12)):
        stack.mt_positions = positions
        assert len(stack.mt_side([text]).ids[0]) == length


def test_a_token_that_begins_like_a_code_is_none():
    stack = StackTokenizer(train_words(["eng_Latn", "fra_Latn", "fra_Latn_old"]), None)
    assert stack.languages == ("eng_Latn", "fra_Latn")
