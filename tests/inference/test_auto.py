"""AutoModel and pipeline("feature-extraction") on an MTLLM folder, without remote code, after `import mtllm_fast`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer, pipeline
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mtllm_fast import MTLLM, Engine, LoraSettings
from mtllm_fast.auto import register_when_imported
from mtllm_fast.inference.pipeline import MTLLMModel
from tests.conftest import assert_matches
from tests.tiny import LINES


@pytest.fixture(scope="module")
def folder(encoder_folder: str, llm_folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(2)
    path = tmp_path_factory.mktemp("auto")
    MTLLM.stack(encoder_folder, llm_folder, lora=LoraSettings(r=4), dtype=torch.float32).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def alone(folder: str) -> Any:
    """Means of the states of one text at a time."""
    return torch.from_numpy(Engine(folder, window=1).encode(LINES, "swh_Latn"))


def test_auto_model(folder: str, alone: torch.Tensor, tmp_path: Path) -> None:
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert isinstance(model, MTLLMModel) and not model.training
    inputs = tokenizer(list(LINES), language="swh_Latn")
    with torch.no_grad():
        output = model(**inputs)
    mask = inputs["attention_mask"][..., None]
    assert not output.last_hidden_state.masked_select(mask == 0).any()
    assert_matches((output.last_hidden_state * mask).sum(1) / mask.sum(1), alone, 1e-5)
    assert_matches(output.pooler_output, alone, 1e-5)
    other = model(**tokenizer(list(LINES), language="fra_Latn")).pooler_output
    assert (other - alone).abs().max() > 1e-3  # control: the language is read
    assert AutoModel.from_pretrained(folder, dtype=torch.bfloat16).mtllm.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    assert MTLLM.from_pretrained(tmp_path).num_parameters() == model.mtllm.num_parameters()


@pytest.mark.parametrize("batch_size", [1, 4])
def test_feature_extraction(folder: str, alone: torch.Tensor, batch_size: int) -> None:
    extract = pipeline("feature-extraction", model=folder, device="cpu")
    found = extract(list(LINES), tokenize_kwargs={"language": "swh_Latn"}, return_tensors=True, batch_size=batch_size)
    for states, expected in zip(found, alone, strict=True):
        rows = states[0][states[0].abs().sum(-1) > 0]  # padding of the batch is zeros
        assert_matches(rows.mean(0), expected, 1e-5)
    assert len(extract(LINES[0], tokenize_kwargs={"language": "swh_Latn"})[0][0]) == alone.shape[1]


def test_imported_before_transformers(folder: str) -> None:
    code = (
        "import sys, mtllm_fast; assert 'transformers' not in sys.modules; from transformers import AutoModel; "
        f"print(type(AutoModel.from_pretrained({folder!r})).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["MTLLMModel"]


def test_imported_after_transformers(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(CONFIG_MAPPING._extra_content, "mtllm")
    monkeypatch.delitem(sys.modules, "mtllm_fast.auto_config")
    monkeypatch.delattr("mtllm_fast.auto_config")
    with pytest.raises(ValueError, match="mtllm"):  # control: it was forgotten
        AutoConfig.from_pretrained(folder)
    register_when_imported()
    assert AutoConfig.from_pretrained(folder).model_type == "mtllm"


def test_configs_of_others_are_left_alone(encoder_folder: str) -> None:
    assert AutoConfig.from_pretrained(encoder_folder).model_type == "m2m_100"
