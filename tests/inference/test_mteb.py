"""A user's mteb run on tasks made of local data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtllm_fast import MTLLM, Engine, TextRow
from tests.tiny import LINES

pytest.importorskip("mteb")

import mteb
from datasets import Dataset, DatasetDict
from mteb import TaskMetadata
from mteb.abstasks import AbsTaskClassification
from mteb.abstasks.text.bitext_mining import AbsTaskBitextMining
from mteb.models.cache_wrappers import CachedEmbeddingWrapper

from mtllm_fast.inference.mteb import NLLB_CODES, MTEBEncoder, mt_code

ABOUT = {
    "description": "local",
    "dataset": {"path": "local", "revision": "1"},
    "eval_splits": ["test"],
    "reference": None,
}


class LocalClassification(AbsTaskClassification):
    metadata = TaskMetadata(
        type="Classification",
        name="LocalClassification",
        main_score="accuracy",
        eval_langs={"english": ["eng-Latn"], "swahili": ["swa-Latn"]},
        **ABOUT,
    )
    samples_per_label = 2
    n_experiments = 2

    def load_data(self, *args: Any, **kwargs: Any) -> None:
        rows = Dataset.from_dict({"text": list(LINES), "label": [0, 1] * (len(LINES) // 2)})
        self.dataset = {name: DatasetDict(train=rows, test=rows) for name in self.metadata.eval_langs}
        self.data_loaded = True


class LocalBitext(AbsTaskBitextMining):
    metadata = TaskMetadata(
        type="BitextMining",
        name="LocalBitext",
        main_score="accuracy",
        eval_langs={"fra-eng": ["fra-Latn", "eng-Latn"], "deu-eng": ["deu-Latn", "eng-Latn"]},
        **ABOUT,
    )

    def load_data(self, *args: Any, **kwargs: Any) -> None:
        rows = Dataset.from_dict({"sentence1": list(LINES), "sentence2": list(LINES)})
        self.dataset = {name: DatasetDict(test=rows) for name in self.metadata.eval_langs}
        self.data_loaded = True


class Mixed(LocalClassification):
    metadata = LocalClassification.metadata.model_copy(update={"name": "Mixed", "eval_langs": ["eng-Latn", "fra-Latn"]})

    def load_data(self, *args: Any, **kwargs: Any) -> None:
        rows = Dataset.from_dict({"text": list(LINES), "label": [0, 1] * (len(LINES) // 2)})
        self.dataset = DatasetDict(train=rows, test=rows)
        self.data_loaded = True


class Recorder(Engine):
    """An Engine that notes the language of what it encodes."""

    def encode_rows(self, rows: Any, **options: Any) -> Any:
        def noted() -> Any:
            for row in rows:
                self.seen.append(row.language)
                yield row

        return super().encode_rows(noted(), **options)


@pytest.fixture(scope="module")
def folder(encoder_folder: str, llm_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(2)
    path = tmp_path_factory.mktemp("mteb")
    MTLLM.stack(encoder_folder, llm_folder, dtype=torch.float32).save_pretrained(path)
    return path


@pytest.fixture
def engine(folder: Path) -> Recorder:
    engine = Recorder(MTLLM.from_pretrained(folder))
    engine.seen = []
    return engine


def _run(model: Any, task: Any) -> dict[str, float]:
    results = mteb.evaluate(model, task, cache=None, co2_tracker=False, show_progress_bar=False)
    return {scores["hf_subset"]: scores["main_score"] for scores in results.task_results[0].scores["test"]}


def test_a_users_run(folder: Path) -> None:
    scores = _run(MTEBEncoder(folder), LocalClassification())
    assert set(scores) == {"english", "swahili"}
    assert all(0 <= score <= 1 for score in scores.values())


def test_results_of_another_model_are_not_taken_for_its_own(folder: Path, tmp_path: Path) -> None:
    """mteb skips what its cache holds for a name and revision; the revision follows the weights."""
    cache = mteb.ResultCache(tmp_path)
    model = MTLLM.from_pretrained(folder)
    first = MTEBEncoder(model)
    assert MTEBEncoder(folder).mteb_model_meta.revision == first.mteb_model_meta.revision
    mteb.evaluate(first, LocalBitext(), cache=cache, co2_tracker=False, show_progress_bar=False)
    with torch.no_grad():
        model.projection.layers.bias.mul_(1.5)
    second = MTEBEncoder(Recorder(model))
    second.engine.seen = []
    assert second.mteb_model_meta.revision != first.mteb_model_meta.revision
    mteb.evaluate(second, LocalBitext(), cache=cache, co2_tracker=False, show_progress_bar=False)
    assert len(second.engine.seen) == 4 * len(LINES)
    mteb.evaluate(second, LocalBitext(), cache=cache, co2_tracker=False, show_progress_bar=False)
    assert len(second.engine.seen) == 4 * len(LINES)  # now it is there


def test_language_of_every_subset(engine: Recorder) -> None:
    _run(MTEBEncoder(engine), LocalClassification())
    half = len(engine.seen) // 2
    assert engine.seen[:half] == ["eng_Latn"] * half
    assert engine.seen[half:] == ["swh_Latn"] * half


def test_each_side_of_a_translation_in_its_language(engine: Recorder) -> None:
    """The same text on both sides: read in one language it would be found every time, in two it differs."""
    encoder = MTEBEncoder(engine)
    for _ in range(2):
        engine.seen.clear()
        assert set(_run(encoder, LocalBitext())) == {"fra-eng", "deu-eng"}
        n = len(LINES)
        assert engine.seen == ["fra_Latn"] * n + ["eng_Latn"] * n + ["deu_Latn"] * n + ["eng_Latn"] * n


def test_a_failed_side_does_not_count(engine: Recorder) -> None:
    encoder = MTEBEncoder(engine)
    where = {"task_metadata": LocalBitext.metadata, "hf_split": "test", "hf_subset": "fra-eng"}
    texts = [{"text": list(LINES)}]
    encoder.encode(texts, **where)

    def stopped() -> Any:
        yield texts[0]
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        encoder.encode(stopped(), **where)
    engine.seen.clear()
    encoder.encode(texts, **where)  # from the start again
    assert set(engine.seen) == {"fra_Latn"}


def test_mtebs_cache_hides_the_sides(engine: Recorder, tmp_path: Path) -> None:
    """It would take the second side, whose texts are those of the first, from the cache."""
    encoder = MTEBEncoder(engine)
    with pytest.raises(
        ValueError, match=r"LocalBitext, subset 'fra-eng': .*fra-Latn and eng-Latn cannot be told apart"
    ):
        _run(CachedEmbeddingWrapper(encoder, tmp_path), LocalBitext())
    assert not engine.seen
    _run(encoder, LocalBitext())
    assert set(_run(CachedEmbeddingWrapper(encoder, tmp_path), LocalClassification())) == {"english", "swahili"}


def test_a_folder_runs_on_the_gpu_where_there_is_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    devices: list[str | None] = []

    class Noted(Engine):
        def __init__(self, model: MTLLM, *, device: str | None = None) -> None:
            devices.append(device)
            super().__init__(model)

    monkeypatch.setattr("mtllm_fast.inference.mteb.Engine", Noted)
    MTEBEncoder(folder)
    model = MTLLM.from_pretrained(folder)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    MTEBEncoder(model)
    MTEBEncoder(str(folder))
    assert devices[1:] == [None, "cuda"]


def test_embeddings_are_the_engines(engine: Recorder) -> None:
    loader = [{"text": list(LINES[:4])}, {"text": list(LINES[4:])}]
    got = MTEBEncoder(engine).encode(
        loader, task_metadata=LocalClassification.metadata, hf_split="test", hf_subset="swahili"
    )
    assert np.array_equal(got, np.concatenate(list(engine.encode_rows([TextRow(t, "swh_Latn") for t in LINES]))))
    named = [{"text": list(LINES[:2]), "language": ["fra_Latn", "deu_Latn"]}]
    engine.seen.clear()
    MTEBEncoder(engine).encode(named, task_metadata=LocalClassification.metadata, hf_split="test", hf_subset="swahili")
    assert engine.seen == ["fra_Latn", "deu_Latn"]


def test_languages_that_mteb_does_not_tell_apart(engine: Recorder) -> None:
    with pytest.raises(ValueError, match=r"Mixed, subset 'default': texts in eng-Latn, fra-Latn.*language_of"):
        _run(MTEBEncoder(engine), Mixed())
    _run(MTEBEncoder(engine, language_of=lambda task, subset, prompt_type: "fra_Latn"), Mixed())
    assert set(engine.seen) == {"fra_Latn"}


def test_codes(engine: Recorder) -> None:
    tokenizer = engine.model.tokenizer
    assert mt_code("swh-Latn", tokenizer) == "swh_Latn"
    assert mt_code("swa-Latn", tokenizer) == "swh_Latn"
    assert mt_code("eng_Latn", tokenizer) == "eng_Latn"  # as parallel data names its columns
    with pytest.raises(ValueError, match="nearest valid codes"):
        mt_code("nij-Latn", tokenizer)
    assert set(NLLB_CODES.values()) <= set(tokenizer.languages)
    assert not {code.replace("-", "_") for code in NLLB_CODES} & set(tokenizer.languages)


def test_sentence_transformer_in_mteb(folder: Path, tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from mtllm_fast.inference.sentence_transformer import save_sentence_transformer

    save_sentence_transformer(MTLLM.from_pretrained(folder), tmp_path, language="swh_Latn")
    model = sentence_transformers.SentenceTransformer(str(tmp_path), trust_remote_code=True, device="cpu")
    assert set(_run(model, LocalClassification())) == {"english", "swahili"}
