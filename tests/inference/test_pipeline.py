"""`transformers.pipeline("text-classification")` as users call it, on a folder of `MTLLM.save_pretrained`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from transformers import pipeline

import mtllm_fast.inference.pipeline as door
from mtllm_fast import MTLLM, Engine, HeadConfig, LoraSettings, TextRow
from tests.tiny import LINES

TEXTS = list(LINES)
LANGUAGES = ["eng_Latn", "fra_Latn", "swh_Latn", "eng_Latn", "deu_Latn", "zho_Hans"]
LABELS = ("sport", "politics", "weather")


@pytest.fixture(scope="module", params=["stack", "llm"])
def folder(request: Any, encoder_folder: str, llm_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(2)
    model = MTLLM.stack(
        encoder_folder if request.param == "stack" else None,
        llm_folder,
        reader=request.param,
        lora=LoraSettings(r=4),
        head=HeadConfig(labels=LABELS),
        dtype=torch.float32,
    )
    path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def classify(folder: Path) -> Any:
    return pipeline("text-classification", model=str(folder), device="cpu")


def _probabilities(folder: Path, languages: list[str], pair: str | None = None) -> torch.Tensor:
    rows = [TextRow(text, language, pair) for text, language in zip(TEXTS, languages)]
    return torch.softmax(torch.from_numpy(Engine(MTLLM.from_pretrained(folder)).classify(rows)), -1)


def _check(results: list[dict[str, Any]], expected: torch.Tensor) -> None:
    assert [result["label"] for result in results] == [LABELS[i] for i in expected.argmax(-1).tolist()]
    assert [result["score"] for result in results] == pytest.approx(expected.amax(-1).tolist(), abs=1e-6)
    # the tolerance tells neighbouring texts apart
    assert [result["score"] for result in results] != pytest.approx(expected.amax(-1).flip(0).tolist(), abs=1e-6)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_plain_code_of_a_user(classify: Any, folder: Path, batch_size: int) -> None:
    _check(classify(TEXTS, batch_size=batch_size), _probabilities(folder, ["eng_Latn"] * 6))


def test_language_per_call_per_text_and_per_pipeline(classify: Any, folder: Path) -> None:
    swahili = _probabilities(folder, ["swh_Latn"] * 6)
    _check(classify(TEXTS, language="swh_Latn", batch_size=3), swahili)
    _check(pipeline("text-classification", model=str(folder), language="swh_Latn", device="cpu")(TEXTS), swahili)
    rows = [{"text": text, "language": language} for text, language in zip(TEXTS, LANGUAGES)]
    _check(classify(rows, batch_size=4), _probabilities(folder, LANGUAGES))
    _check(list(classify(row for row in rows)), _probabilities(folder, LANGUAGES))


def test_top_k_and_single_texts(classify: Any, folder: Path) -> None:
    expected = _probabilities(folder, ["eng_Latn"] * 6)
    every = classify(TEXTS[0], top_k=None)
    assert {entry["label"]: entry["score"] for entry in every} == pytest.approx(
        dict(zip(LABELS, expected[0].tolist())), abs=1e-6
    )
    assert [entry["score"] for entry in every] == sorted((entry["score"] for entry in every), reverse=True)
    assert [len(entries) for entries in classify(TEXTS, top_k=2)] == [2] * 6
    assert classify(TEXTS[0])[0]["label"] == every[0]["label"]


def test_pairs(classify: Any, folder: Path) -> None:
    rows = [{"text": text, "text_pair": "Trains", "language": "fra_Latn"} for text in TEXTS]
    _check(classify(rows, batch_size=2), _probabilities(folder, ["fra_Latn"] * 6, "Trains"))


def test_usual_tokenizer_options_and_saving(classify: Any, folder: Path, tmp_path: Path) -> None:
    expected = _probabilities(folder, ["eng_Latn"] * 6)
    _check(classify(TEXTS, truncation=True, padding=True), expected)
    classify.save_pretrained(str(tmp_path))
    _check(pipeline("text-classification", model=str(tmp_path), device="cpu")(TEXTS), expected)


def test_a_hub_name(
    folder: Path, hub_cache: Callable[[Path, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="'me/sib200': neither a folder nor reachable"):
        door.MTLLMTokenizer.from_pretrained("me/sib200")
    cached = hub_cache(folder, "me/sib200")
    _check(
        pipeline("text-classification", model="me/sib200", device="cpu")(TEXTS),
        _probabilities(folder, ["eng_Latn"] * 6),
    )
    asked: list[Any] = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **given: asked.append(given) or str(cached))
    door.MTLLMTokenizer.from_pretrained("me/sib200")
    stored = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    stored.append("llm_tokenizer/chat_template.jinja")
    assert list(filter_repo_objects(stored, **asked[0])) == stored


def test_errors_say_what_would_be_right(classify: Any, folder: Path, encoder_folder: str, llm_folder: str) -> None:
    with pytest.raises(ValueError, match="for a language per text pass dicts"):
        classify(TEXTS, language=LANGUAGES)
    if MTLLM.from_pretrained(folder).side == "mt":
        with pytest.raises(ValueError, match="nearest valid codes"):
            classify(TEXTS, language="xx")
    with pytest.raises(ValueError, match=r"no head.*needs a classification head"):
        door.MTLLMForSequenceClassification(MTLLM.stack(encoder_folder, llm_folder))
    with pytest.raises(ValueError, match="a choice head"):
        door.MTLLMForSequenceClassification(MTLLM.stack(encoder_folder, llm_folder, head=HeadConfig("choice")))
    with pytest.raises(ValueError, match="device_map"):
        door.MTLLMForSequenceClassification.from_pretrained(folder, device_map="auto")
