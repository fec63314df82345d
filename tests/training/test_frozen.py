"""Quantised base weights and 8-bit AdamW, where their packages are installed (extra: quant)."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mtllm_fast import TextRow
from mtllm_fast.losses import DistillationLoss
from mtllm_fast.models.checkpointing import recompute_layers
from mtllm_fast.models.frozen import dequantised, quantize_frozen
from mtllm_fast.training import AdaptConfig, adapt
from mtllm_fast.training.stage import Stage
from mtllm_fast.training.switches import apply_switches
from tests.models.weights import saved_bytes
from tests.tiny import LINES
from tests.training.short_runs import logged, optim, same_weights, weights
from tests.training.test_switches import CPU, WEIGHTS, _batch, _gradient, _student

PACKAGE = {"int8": "torchao", "nf4": "bitsandbytes"}


def _flat(gradient: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.double().flatten() for value in gradient.values()])


def _distance(mine: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    return float((_flat(mine) - _flat(right)).norm() / _flat(right).norm())


def _bases(student) -> dict[str, nn.Module]:
    """The layers under the adapters, by name."""
    return {n: m for n, m in student.llm.layers_root.named_modules() if n.endswith(".base_layer")}


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_gradient_is_that_of_the_dequantised_weights(kind, encoder_folder, llm_folder) -> None:
    pytest.importorskip(PACKAGE[kind])
    student = _student(encoder_folder, llm_folder)
    batch = _batch(student)
    plain = _gradient(student, batch)
    reference = copy.deepcopy(student)
    head = student.llm.lm_head.weight
    count = quantize_frozen(student.llm.layers_root, kind, CPU)
    assert count == len(_bases(student)) == 7 * len(student.llm.layers_root.layers)
    assert student.llm.lm_head.weight is head
    for name, layer in _bases(reference).items():
        layer.weight.data = dequantised(_bases(student)[name]).float()
    got, right = _gradient(student, batch), _gradient(reference, batch)
    assert _distance(got, right) < 1e-5
    assert _distance(plain, right) > 1e-3  # control: the weights are other ones
    recompute_layers(student.llm)
    assert _distance(_gradient(student, batch), right) < 1e-5


def test_ddp_is_told_of_weights_that_cannot_be_sent(encoder_folder, llm_folder) -> None:
    pytest.importorskip("torchao")
    step = Stage(_student(encoder_folder, llm_folder), DistillationLoss(WEIGHTS))
    apply_switches(step.student, optim(base_weights="int8"), CPU, step)
    left_out = set(step._ddp_params_and_buffers_to_ignore)
    assert left_out == {f"student.llm.model.model.{name}.weight" for name in _bases(step.student)}
    assert not left_out & {name for name, p in step.named_parameters() if p.requires_grad}


def test_int8_keeps_no_dense_weight_until_backward(encoder_folder, llm_folder) -> None:
    pytest.importorskip("torchao")
    student = _student(encoder_folder, llm_folder)
    batch = _batch(student)

    def saved() -> int:
        plain = (p for p in student.parameters() if p.is_leaf and type(p) is nn.Parameter)
        return saved_bytes(lambda: student.states(batch.mt), plain)

    before = saved()
    quantize_frozen(student.llm.layers_root, "int8", CPU)
    dense = sum(4 * layer.weight.numel() for layer in _bases(student).values())
    assert saved() - before < dense / 10
    for layer in _bases(student).values():  # control: torchao's own product does keep them
        layer.forward = nn.Linear.forward.__get__(layer)
    assert saved() - before > dense / 2


def _run(folder: Path, encoder: str, llm: str, resume: bool = False, **changes) -> None:
    train = optim(**{"max_steps": 6, "save_steps": 3, "warmup": 0.0, **changes})
    rows = [TextRow(line) for line in LINES]
    adapt(AdaptConfig(encoder, llm, str(folder), train=train, resume=resume), rows)


@pytest.mark.parametrize(
    "changes", [{"base_weights": "nf4"}, {"base_weights": "int8"}, {"optim": "adamw_8bit"}], ids=str
)
def test_runs_learn_and_resume_bitwise(changes, encoder_folder, llm_folder, tmp_path) -> None:
    pytest.importorskip(PACKAGE[changes.get("base_weights", "nf4")])
    _run(tmp_path / "whole", encoder_folder, llm_folder, **changes)
    assert all(".lora_" in name or name.startswith("projection.") for name in weights(tmp_path / "whole"))
    log = logged(tmp_path / "whole")
    assert log[6]["loss"] < log[1]["loss"]
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    (tmp_path / "run" / "model.safetensors").unlink()
    _run(tmp_path / "run", encoder_folder, llm_folder, resume=True, **changes)
    assert same_weights(tmp_path / "run", tmp_path / "whole")
    _run(tmp_path / "other", encoder_folder, llm_folder)  # control: the switch is on
    assert not same_weights(tmp_path / "other", tmp_path / "whole")
