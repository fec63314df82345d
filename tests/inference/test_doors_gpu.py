"""The familiar doors on a GPU give what they give on the CPU; `pytest -m gpu`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import pipeline

import mtllm_fast.inference.pipeline  # noqa: F401  (registers the model)
from mtllm_fast import MTLLM, HeadConfig, LoraSettings
from mtllm_fast.models.generate import generate_ids
from tests.conftest import assert_matches
from tests.tiny import LINES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]

TEXTS = list(LINES)
LANGUAGES = ["eng_Latn", "fra_Latn", "swh_Latn", "eng_Latn", "deu_Latn", "zho_Hans"]


def test_generate(encoder_folder: str, llm_folder: str) -> None:
    torch.manual_seed(2)
    model = MTLLM.stack(encoder_folder, llm_folder, causal=True, lora=LoraSettings(r=4), dtype=torch.float32)
    options = {"before": "Text: ", "after": "\nSummary:", "max_new_tokens": 8, "do_sample": False}
    expected = generate_ids(model, TEXTS, LANGUAGES, **options)
    assert generate_ids(model.to("cuda"), TEXTS, LANGUAGES, batch_size=4, **options) == expected


def test_pipeline(encoder_folder: str, llm_folder: str, tmp_path: Path) -> None:
    head = HeadConfig(labels=("sport", "politics", "weather"))
    MTLLM.stack(encoder_folder, llm_folder, head=head, dtype=torch.float32).save_pretrained(tmp_path)
    rows = [{"text": text, "language": language} for text, language in zip(TEXTS, LANGUAGES)]
    scores = {}
    for device in ("cpu", "cuda"):
        classify = pipeline("text-classification", model=str(tmp_path), device=device)
        results = classify(rows, batch_size=4, function_to_apply="none")
        scores[device] = torch.tensor([result["score"] for result in results])
    assert_matches(scores["cuda"], scores["cpu"], 1e-4)


def test_sentence_transformer(encoder_folder: str, llm_folder: str, tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from mtllm_fast.inference.sentence_transformer import save_sentence_transformer

    save_sentence_transformer(MTLLM.stack(encoder_folder, llm_folder, dtype=torch.float32), tmp_path)
    rows = [{"text": text, "language": language} for text, language in zip(TEXTS, LANGUAGES)]
    on_cpu, on_gpu = (
        sentence_transformers.SentenceTransformer(str(tmp_path), trust_remote_code=True, device=device).encode(
            rows, convert_to_tensor=True
        )
        for device in ("cpu", "cuda")
    )
    assert on_gpu.is_cuda
    assert_matches(on_gpu.cpu(), on_cpu, 1e-4)
