import pytest
import torch

from mtllm_fast.data import TextRow
from mtllm_fast.inference.translator import Translator

TEXTS = [
    "The river runs past the mill.",
    "bread",
    "Trains leave every hour, even at night.",
    " ",
    "bread",
    "some cheese and bread",
]
CODES = ["fra_Latn", "deu_Latn", "fra_Latn", "deu_Latn", "fra_Latn", "swh_Latn"]


@pytest.fixture(scope="module")
def translator(encoder_folder):
    made = Translator.from_pretrained(encoder_folder, device="cpu")
    with torch.no_grad():  # as initialised it says the same to everything
        for weight in made.model.parameters():
            weight.mul_(8.0 if weight.ndim > 1 else 1.0)
    return made


def plain(translator, text, code, target="eng_Latn", num_beams=1, limit=None):
    """One text, by Hugging Face's own tokenizer and generate."""
    tokenizer = translator.tokenizer.mt
    tokenizer.src_lang = code
    inputs = tokenizer(text, return_tensors="pt")
    limit = limit or 2 * inputs["input_ids"].shape[1] + 32
    target_id = tokenizer.convert_tokens_to_ids(target)
    output = translator.model.generate(
        **inputs, forced_bos_token_id=target_id, num_beams=num_beams, do_sample=False, max_new_tokens=limit
    )
    return tokenizer.batch_decode(output, skip_special_tokens=True)[0].strip()


@pytest.mark.parametrize("num_beams", [1, 3])
def test_equals_hugging_face_row_by_row(translator, num_beams):
    got = translator.translate(TEXTS, CODES, num_beams=num_beams, max_tokens=64)
    expected = [
        plain(translator, text, code, num_beams=num_beams) if text.strip() else text for text, code in zip(TEXTS, CODES)
    ]
    assert got == expected
    assert len(set(got)) > 3
    codes = translator.languages[:24]
    assert len(set(translator.translate([TEXTS[0]] * 24, codes))) > 1, "the source language has to matter"
    other = translator.translate(TEXTS, CODES, target="swh_Latn", num_beams=num_beams)
    assert other != got, "the target language has to matter"


def test_order_and_batching_do_not_matter(translator):
    whole = translator.translate(TEXTS, CODES, max_tokens=4096)
    assert translator.translate(TEXTS, CODES, max_tokens=1) == whole
    assert translator.translate(TEXTS[::-1], CODES[::-1], max_tokens=40) == whole[::-1]


def test_each_distinct_text_is_translated_once(translator, monkeypatch):
    sizes = []
    generate = translator.model.generate
    monkeypatch.setattr(
        translator.model, "generate", lambda **inputs: sizes.append(len(inputs["input_ids"])) or generate(**inputs)
    )
    translator.translate(["bread"] * 5 + ["cheese"], "fra_Latn")
    assert sum(sizes) == 2


def test_rows_and_pairs(translator):
    rows = [TextRow("bread", "fra_Latn", "some cheese", 1, "x"), TextRow("The river", "deu_Latn", None, 0, "y")]
    first, second = translator.translate_rows(rows, max_new_tokens=12)
    direct = translator.translate(
        ["bread", "some cheese", "The river"], ["fra_Latn", "fra_Latn", "deu_Latn"], max_new_tokens=12
    )
    assert [first.text, first.text_pair, second.text] == direct
    assert (first.language, first.label, first.id, second.text_pair) == ("eng_Latn", 1, "x", None)


def test_choices_and_kept_endings(translator):
    row = TextRow("some cheese What was the cause?", "fra_Latn", None, 1, "x", ("bread", "The river"))
    (found,) = translator.translate_rows([row], keep=("What was the cause?", "What else?"), max_new_tokens=12)
    cheese, bread, river = translator.translate(["some cheese", "bread", "The river"], "fra_Latn", max_new_tokens=12)
    assert found == TextRow(f"{cheese} What was the cause?", "eng_Latn", None, 1, "x", (bread, river))
    assert translator.translate(["  What else?"], "fra_Latn", keep=("What else?",)) == ["  What else?"]


@pytest.mark.parametrize("num_beams", [1, 3])
def test_scores_are_mean_log_probabilities(translator, matches, num_beams):
    found = translator.translate_scored(TEXTS, CODES, num_beams=num_beams, max_new_tokens=9)
    assert [one.text for one in found] == translator.translate(TEXTS, CODES, num_beams=num_beams, max_new_tokens=9)
    assert found[3].score is None  # a blank text
    tokenizer, model = translator.tokenizer.mt, translator.model
    got, expected = [], []
    for text, code, one in zip(TEXTS, CODES, found):
        if not text.strip():
            continue
        tokenizer.src_lang = code
        inputs = tokenizer(text, return_tensors="pt")
        (tokens,) = model.generate(
            **inputs,
            forced_bos_token_id=tokenizer.convert_tokens_to_ids("eng_Latn"),
            num_beams=num_beams,
            max_new_tokens=9,
        )
        with torch.no_grad():
            logits = model(**inputs, decoder_input_ids=tokens[None, :-1]).logits[0].double()
        logs = logits.log_softmax(-1).gather(-1, tokens[1:, None]).squeeze(-1)
        expected.append(logs[1:].mean())
        got.append(one.score)
    matches(torch.tensor(got, dtype=torch.double), torch.stack(expected), 1e-4)


def test_repetition_control(translator):
    text, code = TEXTS[0], "fra_Latn"
    tokenizer = translator.tokenizer.mt

    def most_repeated(**decoding):
        (found,) = translator.translate([text], code, max_new_tokens=60, **decoding)
        tokens = tokenizer(found, add_special_tokens=False)["input_ids"]
        return max(tokens.count(token) for token in tokens)

    plain = most_repeated()
    assert plain > 3, "this model repeats itself, or there is nothing to control"
    assert most_repeated(repetition_penalty=5.0) < plain
    assert most_repeated(no_repeat_ngram_size=1) < plain


def test_limits_are_counted(encoder_folder):
    translator = Translator.from_pretrained(encoder_folder, device="cpu", max_length=8)
    (text,) = translator.translate(["The river runs past the old mill and under the bridge."], "fra_Latn")
    assert translator.truncated == 1
    assert translator.unfinished in (0, 1)
    assert len(translator.tokenizer.mt(text, add_special_tokens=False)["input_ids"]) <= 8
    assert translator.translate([], []) == []


@pytest.mark.parametrize(
    ("arguments", "options", "match"),
    [
        ((["x"], "fra_Latm"), {}, "fra_Latn"),
        ((["x"], "fra_Latn"), {"target": "klingon"}, "klingon"),
        ((["x", "y"], ["fra_Latn"]), {}, "languages: 1 codes for 2 texts"),
        ((["x"], "fra_Latn"), {"num_beams": 0}, "num_beams=0"),
        ((["x"], "fra_Latn"), {"max_new_tokens": 1}, "max_new_tokens=1: expected at least 2"),
        ((["x"], "fra_Latn"), {"repetition_penalty": 0.0}, "repetition_penalty=0.0: expected more than 0"),
    ],
)
def test_bad_arguments(translator, arguments, options, match):
    with pytest.raises(ValueError, match=match):
        translator.translate(*arguments, **options)


def test_bad_models(tmp_path, llm_folder, encoder_folder):
    with pytest.raises(ValueError, match=r"translator='/no/such'.*config\.json"):
        Translator.from_pretrained("/no/such")
    with pytest.raises(ValueError, match=r"translator=.*cannot be loaded") as caught:
        Translator.from_pretrained(llm_folder)
    assert "\n" not in str(caught.value)
    with pytest.raises(TypeError, match="texts"):
        Translator.from_pretrained(encoder_folder, device="cpu").translate("one text", "fra_Latn")
