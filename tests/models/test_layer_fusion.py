"""The projection of a trained mean of all encoder layers."""

from __future__ import annotations

import pytest
import torch
from transformers import M2M100Model

from mtllm_fast import MTLLM, TextRow
from mtllm_fast.data.collate import collate
from mtllm_fast.models import LoraSettings, Projection, ProjectionConfig
from mtllm_fast.models.projection import LAST_LAYER
from mtllm_fast.training import AdaptConfig, adapt
from tests.tiny import LINES
from tests.training.short_runs import optim

FUSED = ProjectionConfig(fuse_layers=True)
ROWS = [TextRow(line) for line in LINES]


@pytest.fixture
def student(encoder_folder: str, llm_folder: str) -> MTLLM:
    return MTLLM.stack(encoder_folder, llm_folder, projection=FUSED, lora=LoraSettings()).eval()


def by_transformers(student: MTLLM, encoder_folder: str, weights: torch.Tensor) -> torch.Tensor:
    """The fused and projected states (T, D), each text on its own through Hugging Face's encoder."""
    encoder = M2M100Model.from_pretrained(encoder_folder).get_encoder().eval()
    found: list[torch.Tensor] = []
    for layer in encoder.layers:
        layer.register_forward_hook(lambda module, inputs, output: found.append(output.reshape(-1, 32)))
    rows = []
    for ids in student.tokenizer.mt_side(ROWS).ids:
        found.clear()
        encoder(torch.tensor([list(ids)]))
        rows.append(sum(w * state for w, state in zip(weights, found, strict=True)))
    return student.projection.layers(encoder.layer_norm(torch.cat(rows)))


def test_states_of_all_layers_are_fused_before_the_norm(student: MTLLM, encoder_folder: str, matches) -> None:
    batch = collate(ROWS, student.tokenizer, sides=("mt",), align=False)
    start = student.projection.layer_weights().detach()
    assert float(start[-1]) == pytest.approx(LAST_LAYER) and float(start.sum()) == pytest.approx(1.0)
    with torch.no_grad():
        student.projection.fusion.copy_(torch.tensor([0.01, -0.02]))
        weights = torch.tensor([0.5, -1.0]).softmax(0)
        got, right = student.projected(batch.mt), by_transformers(student, encoder_folder, weights)
        matches(got, right, 1e-5)
        other = by_transformers(student, encoder_folder, weights.flip(0))
    assert (got - other).abs().max() > 0.01 * right.abs().max(), "the control: other weights are seen"


def test_the_weights_are_trained_saved_and_loaded(encoder_folder, llm_folder, tmp_path) -> None:
    def run(output: str) -> bytes:
        settings = {"projection": FUSED, "train": optim(max_steps=6), "init": "ridge"}
        adapt(AdaptConfig(encoder_folder, llm_folder, str(tmp_path / output), **settings), ROWS)
        return (tmp_path / output / "model.safetensors").read_bytes()

    assert run("run") == run("again")
    model = MTLLM.from_pretrained(tmp_path / "run")
    assert model.config.projection == FUSED
    weights = model.projection.layer_weights().detach()
    assert abs(float(weights[-1]) - LAST_LAYER) > 1e-3, "training moves them"


def test_one_layer_cannot_be_fused() -> None:
    with pytest.raises(ValueError, match=r"projection.fuse_layers: needs an encoder of 2 layers or more, got 1"):
        Projection(8, 16, FUSED, 1)
