"""Texts without a single token, which an LLM that writes no BOS makes of an empty one: named, or NaN, never a crash."""

from __future__ import annotations

import copy
import logging
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from mtllm_fast import MTLLM, Engine, HeadConfig, StackTokenizer, TextRow
from tests.data.conftest import train_llm
from tests.tiny import LINES

TEXTS = [LINES[0], "", LINES[1], "", LINES[2]]
GOOD = [0, 2, 4]


@pytest.fixture(scope="module")
def model() -> MTLLM:
    """An LLM without BOS that reads its own tokens, with a head."""
    tokenizer = train_llm(bos=None)
    torch.manual_seed(1)
    llm = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                    num_attention_heads=2, num_key_value_heads=2)
    )  # fmt: skip
    head = HeadConfig(labels=("a", "b"))
    return MTLLM.stack(None, llm, reader="llm", tokenizer=StackTokenizer(None, tokenizer), head=head).eval()


@pytest.fixture(scope="module")
def alone(model: MTLLM) -> np.ndarray:
    """Each good text by itself, by transformers' own modules: the mean of its states, which see the whole text."""
    assert not model.config.causal
    llama = LlamaModel(copy.deepcopy(model.llm.model.config)).eval()
    llama.set_attn_implementation("eager")
    llama.load_state_dict(model.llm.model.model.state_dict())
    found = []
    for k in GOOD:
        ids = model.tokenizer.llm(TEXTS[k], return_tensors="pt", add_special_tokens=False).input_ids
        everything = torch.zeros(1, 1, ids.shape[1], ids.shape[1])
        with torch.no_grad():
            found.append(llama(ids, attention_mask=everything).last_hidden_state.mean(1).numpy())
            causal = llama(ids).last_hidden_state.mean(1).numpy()
        assert abs(causal - found[-1]).max() > 1e-3  # control: the mask shows at the tolerances below
    return np.concatenate(found)


def rows(texts: list[str]) -> list[TextRow]:
    return [TextRow(text, id=f"r{k}") for k, text in enumerate(texts)]


@pytest.mark.parametrize("window", [1, 2, 8])
def test_named_or_nan(model: MTLLM, alone: np.ndarray, window: int, caplog: Any) -> None:
    engine = Engine(model, window=window)
    with pytest.raises(ValueError, match=r"row 1 \(id 'r1'\): its text has no token"):
        list(engine.encode_rows(rows(TEXTS)))
    with pytest.raises(ValueError, match=r"row 0 \(id 'r0'\): its text has no token"):
        engine.classify(rows(["", ""]))
    found = np.concatenate(list(engine.encode_rows(rows(TEXTS), on_bad_text="nan")))
    assert found.shape == (5, 32)
    assert np.flatnonzero(np.isnan(found).all(1)).tolist() == [1, 3]
    np.testing.assert_allclose(found[GOOD], alone, atol=1e-5)
    assert abs(found[GOOD][::-1] - alone).max() > 1e-2  # control: the order shows at this tolerance
    assert any(
        record.levelno == logging.WARNING and "row 1 (id 'r1')" in record.getMessage() for record in caplog.records
    )
    with pytest.raises(ValueError, match="on_bad_text='skip'"):
        list(engine.encode_rows(rows(TEXTS), on_bad_text="skip"))


def test_a_text_that_is_not_empty_may_have_none(model: MTLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some tokenizers drop what they do not know."""
    side = type(model.tokenizer).llm_side

    def dropping(self: Any, rows: list[TextRow], **options: Any) -> Any:
        made = side(self, rows, **options)
        return type(made)([ids[:0] if row.text == "?" else ids for ids, row in zip(made.ids, rows)], made.ends, 0)

    monkeypatch.setattr(type(model.tokenizer), "llm_side", dropping)
    engine = Engine(model)
    with pytest.raises(ValueError, match="row 1: its text has no token"):
        engine.encode([LINES[0], "?"])
    found = engine.classify(["", "?", LINES[0]], on_bad_text="nan")
    assert found.labels[:2] == [None, None] and found.labels[2] in ("a", "b")
    assert np.isnan(found.probabilities[:2]).all() and found.probabilities[2].sum() == pytest.approx(1)
    assert np.isnan(engine.encode(["?"], on_bad_text="nan")).all()


def test_mteb_goes_on(model: MTLLM, alone: np.ndarray) -> None:
    mteb = pytest.importorskip("mteb")
    from mtllm_fast.inference.mteb import MTEBEncoder
    from tests.inference.test_mteb import LocalClassification

    where = {"task_metadata": LocalClassification.metadata, "hf_split": "test", "hf_subset": "english"}
    found = MTEBEncoder(model).encode([{"text": TEXTS}, {"text": ["", ""]}], **where)
    np.testing.assert_allclose(found[GOOD], alone, atol=1e-5)
    assert not found[[1, 3, 5, 6]].any()
    assert mteb is not None


def test_sentence_transformers_goes_on(model: MTLLM, alone: np.ndarray) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from mtllm_fast.inference.sentence_transformer import MTLLMModule

    built = sentence_transformers.SentenceTransformer(modules=[MTLLMModule(model)], device="cpu")
    for size in (1, 2, 8):
        found = built.encode(TEXTS, batch_size=size)
        np.testing.assert_allclose(found[GOOD], alone, atol=1e-5)
        assert not found[[1, 3]].any()


def test_the_pipeline_names_it(model: MTLLM) -> None:
    from mtllm_fast.inference.pipeline import MTLLMTokenizer

    with pytest.raises(ValueError, match=r"text\[1\] has no token"):
        MTLLMTokenizer(model.tokenizer, "llm")([LINES[0], ""])
