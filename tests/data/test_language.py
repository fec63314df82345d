"""No text is read as English in silence: every door asks for the language, or says that it is not read."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from mtllm_fast import MTLLM, Engine, HeadConfig, StackTokenizer, TextRow, cli, read_rows
from mtllm_fast.data.language import english_code
from mtllm_fast.inference.pipeline import MTLLMTokenizer
from tests.data.conftest import train_llm, train_nllb, train_words
from tests.tiny import LINES

TEXTS = list(LINES[:3])


@pytest.fixture(scope="module")
def stack(encoder_folder: str, llm_folder: str) -> MTLLM:
    return MTLLM.stack(encoder_folder, llm_folder, causal=True, dtype=torch.float32).eval()


@pytest.fixture
def codeless(llm_folder: str) -> MTLLM:
    """A stack on a BERT, whose tokenizer has no language codes."""
    words = train_words([])
    config = BertConfig(vocab_size=len(words), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=32, max_position_embeddings=64)  # fmt: skip
    torch.manual_seed(0)
    model = MTLLM.stack(BertModel(config), llm_folder, tokenizer=StackTokenizer(words, train_llm()), causal=True)
    model.set_head(HeadConfig(labels=("a", "b")))
    return model.eval()


def doors(model: MTLLM) -> dict:
    """Every way to read texts, as `call(language)`; None names no language."""
    engine, tokenizer = Engine(model), model.tokenizer

    def named(language):
        return {} if language is None else {"language": language}

    found = {
        "languages": lambda code: engine.encode(TEXTS, *([] if code is None else [code])),
        "TextRow.language": lambda code: np.concatenate(list(engine.encode_rows(TextRow(t, code) for t in TEXTS))),
        "language": lambda code: MTLLMTokenizer(tokenizer)(TEXTS, **named(code))["input_ids"].numpy(),
    }
    if model.config.causal:
        found["languages, generate"] = lambda code: np.array(
            model.generate(TEXTS, *([] if code is None else [code]), max_new_tokens=4)
        )
    try:
        from mtllm_fast.inference.sentence_transformer import MTLLMModule
    except ImportError:
        return found
    found["language, sentence-transformers"] = lambda code: (
        MTLLMModule(model).preprocess(TEXTS, **named(code))["input_ids"].numpy()
    )
    return found


NAMES = ["languages", "TextRow.language", "language", "languages, generate", "language, sentence-transformers"]


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_language_is_said(stack: MTLLM, name: str, recwarn: pytest.WarningsRecorder) -> None:
    """For one release it means English, with a warning that names the argument."""
    call = doors(stack).get(name) or pytest.skip("sentence-transformers is not installed")
    with pytest.warns(FutureWarning, match=rf"^{name.split(',')[0]} is missing.*English \(eng_Latn\)"):
        unnamed = call(None)
    assert np.array_equal(unnamed, call("eng_Latn"))
    recwarn.clear()
    french = call("fra_Latn")
    assert not [one for one in recwarn if one.category is FutureWarning]
    if "generate" not in name:  # control: the language is read
        assert not np.array_equal(french, unnamed)


@pytest.mark.parametrize("name", NAMES)
def test_a_language_that_is_not_read_is_said_once(codeless: MTLLM, name: str, caplog, recwarn) -> None:
    call = doors(codeless).get(name) or pytest.skip("sentence-transformers is not installed")
    unnamed = call(None)
    assert not caplog.records and not [one for one in recwarn if one.category is FutureWarning]
    assert np.array_equal(call("fra_Latn"), unnamed) and np.array_equal(call("xx"), unnamed)
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    if name != "TextRow.language":  # a row's language is data
        assert lines == [f"{name.split(',')[0]} is ignored: the encoder takes no language codes"]


def test_texts_without_languages_are_classified(codeless: MTLLM) -> None:
    found = Engine(codeless).classify(TEXTS)
    logits = Engine(codeless).classify([TextRow(text) for text in TEXTS])
    assert found.labels == [("a", "b")[k] for k in logits.argmax(1)]
    with pytest.raises(TypeError, match="one str"):
        Engine(codeless).classify(TEXTS[0])


def test_the_llm_reads_no_language(llm_folder: str, caplog) -> None:
    engine = Engine(MTLLM.stack(None, llm_folder, reader="llm").eval())
    assert np.array_equal(engine.encode(TEXTS), engine.encode(TEXTS, "swh_Latn"))
    assert [r.getMessage() for r in caplog.records] == ["languages is ignored: the LLM reads its own tokens"]


def test_english_is_what_the_tokenizer_calls_it() -> None:
    for codes, expected in ((["__fr__", "__en__"], "en"), (["en_XX", "fr_XX"], "en_XX"), (["xab_Latn"], None)):
        tokenizer = StackTokenizer(train_words(codes), None)
        assert english_code(tokenizer) == expected
        if expected is None:
            with pytest.raises(ValueError, match=r"TextRow.language is missing: name .* one of xab_Latn"):
                tokenizer.mt_side([TextRow("a b")])
            continue
        with pytest.warns(FutureWarning):
            ids = tokenizer.mt_side([TextRow("a b")]).ids[0]
        assert tokenizer.mt.convert_ids_to_tokens(ids.tolist())[0].strip("_") == expected
    assert english_code(StackTokenizer(train_nllb(), None)) == "eng_Latn"


def test_rows_of_a_file_have_the_language_that_was_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "a"}) + "\n")
    assert [row.language for row in read_rows(path)] == [None]
    assert [row.language for row in read_rows(path, language="fra_Latn")] == ["fra_Latn"]
    # what was begun when rows were English by default can go on
    assert read_rows(path).identity() == read_rows(path, language="eng_Latn").identity()


def test_the_commands_say_it(stack: MTLLM, codeless: MTLLM, tmp_path: Path, capfd, caplog) -> None:
    text = tmp_path / "t.txt"
    text.write_text("".join(f"{line}\n" for line in TEXTS))
    stack.save_pretrained(tmp_path / "stack")
    codeless.save_pretrained(tmp_path / "codeless", include_base=True)

    def encode(model: str, name: str, *more: str) -> np.ndarray:
        output = tmp_path / f"{name}.npy"
        command = ["encode", "--model", str(tmp_path / model), "--input", str(text), "--output", str(output)]
        cli.main([*command, "--device", "cpu", *more])
        return np.load(output)

    unnamed = encode("stack", "unnamed")
    assert "mtllm encode: --language is missing, so the texts are read as English (eng_Latn)" in capfd.readouterr().err
    english = encode("stack", "english", "--language", "eng_Latn")
    assert "--language" not in capfd.readouterr().err
    assert np.array_equal(unnamed, english)
    assert not np.array_equal(unnamed, encode("stack", "french", "--language", "fra_Latn"))
    caplog.clear()
    plain = encode("codeless", "plain")
    assert not caplog.records and "--language" not in capfd.readouterr().err
    assert np.array_equal(plain, encode("codeless", "named", "--language", "fra_Latn"))
    assert [r.getMessage() for r in caplog.records] == ["--language is ignored: the encoder takes no language codes"]
