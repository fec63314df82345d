"""The code that users of sentence-transformers write, on an MTLLM folder."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from mtllm_fast import MTLLM, Engine, LoraSettings
from tests.conftest import assert_matches
from tests.tiny import LINES

pytest.importorskip("sentence_transformers")

from sentence_transformers import SentenceTransformer

from mtllm_fast.inference.sentence_transformer import MTLLMModule, save_sentence_transformer

TEXTS = [*LINES, "Trains"]
LANGUAGES = ["eng_Latn", "fra_Latn", "swh_Latn", "eng_Latn", "deu_Latn", "zho_Hans", "fra_Latn"]


@pytest.fixture(scope="module")
def model(encoder_folder: str, llm_folder: str) -> MTLLM:
    torch.manual_seed(2)
    model = MTLLM.stack(encoder_folder, llm_folder, lora=LoraSettings(r=4), dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(0, 0.1)
    return model


@pytest.fixture(scope="module")
def folder(model: MTLLM, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("sentence")
    save_sentence_transformer(model, path, language="fra_Latn")
    return str(path)


@pytest.fixture(scope="module")
def sentences(folder: str) -> SentenceTransformer:
    return SentenceTransformer(folder, trust_remote_code=True, device="cpu")


def _same(actual: np.ndarray | torch.Tensor, expected: np.ndarray) -> None:
    assert_matches(torch.as_tensor(actual), torch.as_tensor(expected), 1e-5)


def test_plain_code_of_a_user(sentences: SentenceTransformer, model: MTLLM) -> None:
    """Without a language the folder's default is read; one text, numpy, tensors, normalised, in any batch size."""
    expected = Engine(model).encode(TEXTS, "fra_Latn")
    embeddings = sentences.encode(TEXTS)
    assert isinstance(embeddings, np.ndarray) and embeddings.dtype == np.float32
    _same(embeddings, expected)
    _same(sentences.encode(TEXTS, batch_size=2), expected)
    _same(sentences.encode(TEXTS[3]), expected[3])
    unit = sentences.encode(TEXTS, convert_to_tensor=True, normalize_embeddings=True)
    _same(unit, expected / np.linalg.norm(expected, axis=1, keepdims=True))
    assert sentences.similarity(unit, unit).diagonal().tolist() == pytest.approx([1.0] * len(TEXTS), abs=1e-5)
    assert sentences.get_embedding_dimension() == model.hidden_size


def test_language_per_call_and_per_text(sentences: SentenceTransformer, model: MTLLM) -> None:
    swahili = Engine(model).encode(TEXTS, "swh_Latn")
    _same(sentences.encode(TEXTS, language="swh_Latn"), swahili)
    mixed = Engine(model).encode(TEXTS, LANGUAGES)
    rows = [{"text": text, "language": language} for text, language in zip(TEXTS, LANGUAGES)]
    _same(sentences.encode(rows, batch_size=3), mixed)
    assert np.abs(mixed - swahili).max() > 1e-3  # the language matters
    _same(sentences.encode([rows[0], TEXTS[1]], language="swh_Latn"), np.stack([mixed[0], swahili[1]]))


def test_prompt_and_pairs(sentences: SentenceTransformer, model: MTLLM) -> None:
    _same(sentences.encode(TEXTS, prompt="Query: "), Engine(model).encode([f"Query: {t}" for t in TEXTS], "fra_Latn"))
    pair = sentences.encode([(TEXTS[0], TEXTS[1])])
    _same(pair, sentences.encode([{"text": TEXTS[0], "text_pair": TEXTS[1]}]))
    assert np.abs(pair[0] - sentences.encode(TEXTS[0])).max() > 1e-3


def test_token_embeddings_average_to_the_sentence(sentences: SentenceTransformer) -> None:
    tokens = sentences.encode(TEXTS, output_value="token_embeddings")
    assert len({len(states) for states in tokens}) > 1
    _same(torch.stack([states.mean(0) for states in tokens]), sentences.encode(TEXTS))


def test_built_from_modules_and_saved_again(model: MTLLM, tmp_path: Path) -> None:
    built = SentenceTransformer(modules=[MTLLMModule(model, "deu_Latn")], device="cpu")
    expected = built.encode(TEXTS)
    _same(expected, Engine(model).encode(TEXTS, "deu_Latn"))
    built.save(str(tmp_path / "again"))
    again = SentenceTransformer(str(tmp_path / "again"), trust_remote_code=True, device="cpu")
    _same(again.encode(TEXTS), expected)
    _same(Engine(MTLLM.from_pretrained(tmp_path / "again")).encode(TEXTS, "deu_Latn"), expected)  # still an MTLLM


def test_other_processes_can_have_it(sentences: SentenceTransformer) -> None:
    """`encode(device=[...])` sends the model to its workers by pickle."""
    _same(pickle.loads(pickle.dumps(sentences)).encode(TEXTS), sentences.encode(TEXTS))


def test_gradients_reach_the_adapters(sentences: SentenceTransformer) -> None:
    trained = [p for p in sentences.parameters() if p.requires_grad]
    sentences(sentences.preprocess(TEXTS[:3]))["sentence_embedding"].sum().backward()
    assert trained and all(p.grad is not None for p in trained)
    sentences.zero_grad()


def test_limit_and_dtype(folder: str) -> None:
    loaded = SentenceTransformer(
        folder, trust_remote_code=True, device="cpu", model_kwargs={"torch_dtype": torch.bfloat16}
    )
    assert loaded[0].model.llm.model.dtype == torch.bfloat16
    loaded.max_seq_length = 6
    assert loaded.preprocess(TEXTS)["input_ids"].shape == (len(TEXTS), 6)


def test_errors_say_what_would_be_right(sentences: SentenceTransformer, model: MTLLM) -> None:
    with pytest.raises(ValueError, match="nearest valid codes"):
        sentences.encode(TEXTS, language="swa_Latn")
    with pytest.raises(ValueError, match="for a language per text pass dicts"):
        sentences.encode(TEXTS, language=LANGUAGES)
    with pytest.raises(ValueError, match="'language'"):  # sentence-transformers' own
        sentences.encode(TEXTS, languages=LANGUAGES)
    with pytest.raises(ValueError, match="text_pair and language"):
        sentences.encode([{"text": "A", "lang": "fra_Latn"}])
    with pytest.raises(ValueError, match="xx_Latn"):
        MTLLMModule(model, "xx_Latn")
