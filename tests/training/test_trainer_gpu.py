"""`PackedTrainer` on a GPU: autocast, pinned copies, resume, compiled layers; `pytest -m gpu`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mtllm_fast import TextRow
from mtllm_fast.data.batch import Batch
from mtllm_fast.losses import DistillationWeights
from mtllm_fast.models import LoraSettings
from mtllm_fast.training import AdaptConfig, OptimSettings, adapt
from mtllm_fast.training.stage import Stage
from tests.tiny import LINES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]

DEVICE = "cuda"
ROWS = [TextRow(f"{line} {i}", id=f"row-{i}") for i, line in enumerate(LINES * 4)]


def train(models: tuple[str, str], output: Path, resume: bool = False, **changes) -> list[float]:
    """Losses by step of a run of 6 steps."""
    settings = {
        "max_steps": 6,
        "save_steps": 3,
        "log_steps": 1,
        "tokens": 96,
        "max_length": 48,
        "lr": 2e-3,
        "warmup": 0.0,
    }
    settings |= {"progress": False, "report_to": "none", "device": DEVICE, "bf16": True}
    settings |= {"compile": False, "liger": False}
    config = AdaptConfig(
        encoder=models[0], llm=models[1], output=str(output), lora=LoraSettings(dropout=0.1), resume=resume,
        loss=DistillationWeights(pooled_mse=1.0, paired_mse=1.0, kl=0.5),
        train=OptimSettings(**{**settings, **changes}),
    )  # fmt: skip
    adapt(config, ROWS)
    log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in log if "loss" in entry]


@pytest.fixture
def models(encoder_folder: str, llm_folder: str) -> tuple[str, str]:
    return encoder_folder, llm_folder


def test_autocast_and_copies_from_pinned_memory(models, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, copies = [], []
    forward, to = Stage.forward, Batch.to

    def seen(self, batch):
        terms = forward(self, batch)
        dtypes = {trained: set() for trained in (True, False)}
        for parameter in self.student.parameters():
            dtypes[parameter.requires_grad].add(parameter.dtype)
        where = {x.device.type for x in (batch.mt.input_ids, batch.llm.cu_seqlens, batch.mt_rows)}
        autocast = torch.is_autocast_enabled(DEVICE), torch.get_autocast_dtype(DEVICE)
        steps.append((autocast, where, dtypes, [term.sum.dtype for term in terms.values()]))
        return terms

    def copied(self, device, non_blocking=False):
        tensors = (self.mt.input_ids, self.llm.input_ids, self.mt_rows)
        copies.append((non_blocking, all(x.is_pinned() for x in tensors)))
        return to(self, device, non_blocking)

    monkeypatch.setattr(Stage, "forward", seen)
    monkeypatch.setattr(Batch, "to", copied)
    losses = train(models, tmp_path / "run")
    assert len(losses) == len(steps) == 6
    assert all(0 < loss < float("inf") for loss in losses)
    for autocast, where, dtypes, sums in steps:
        assert autocast == (True, torch.bfloat16)
        assert where == {DEVICE}
        assert dtypes[True] == {torch.float32}
        assert torch.bfloat16 in dtypes[False]  # the frozen base; position tables stay fp32
        assert set(sums) == {torch.float32}
    assert set(copies) == {(True, True)}


def test_a_resumed_run_goes_the_way_of_the_whole_one(models, tmp_path) -> None:
    """Attention's backward adds in any order on a GPU, so weights agree to a share of what the last steps moved them."""
    losses = train(models, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoint-6")
    for name in ("model.safetensors", "result.json"):
        (tmp_path / "cut" / name).unlink()
    resumed = train(models, tmp_path / "cut", resume=True)
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    before = load_file(tmp_path / "whole" / "checkpoint-3" / "model.safetensors")
    assert whole.keys() == cut.keys() == before.keys()

    def distance(a: dict[str, torch.Tensor]) -> float:
        return float(sum((a[n].double() - whole[n].double()).square().sum() for n in whole)) ** 0.5

    assert distance(before) > 0
    assert distance(cut) <= 0.1 * distance(before)
    assert resumed == pytest.approx(losses, rel=1e-2)
    assert losses[3:] != pytest.approx(losses[:3], rel=1e-2)


def test_compiled_layers_train_as_plain_ones(models, tmp_path) -> None:
    plain = train(models, tmp_path / "plain")
    compiled = train(models, tmp_path / "compiled", compile=True)
    assert compiled == pytest.approx(plain, rel=5e-2)  # dropout is drawn elsewhere, all else is alike
    assert plain[-1] != pytest.approx(plain[0], rel=5e-2)
    torch.compiler.reset()
