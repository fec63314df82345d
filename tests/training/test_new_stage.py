"""A stage from outside, as one would be added: settings, a term, `build`, and a line in each of the two tables.

Alignment by pull: the student's pooled states are to point where the bare LLM's of the same text do.
"""

from __future__ import annotations

import ast
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import mtllm_fast
from mtllm_fast import MTLLM, TextRow
from mtllm_fast.data import PackedDataset
from mtllm_fast.data.batch import Batch
from mtllm_fast.losses import TERMS, LossTerm, Objective
from mtllm_fast.losses.term import Given, Term, required
from mtllm_fast.models import LoraSettings
from mtllm_fast.training import STAGES, OptimSettings
from mtllm_fast.training.run import Data, StageKind, run
from mtllm_fast.training.stage import Stage
from tests.tiny import LINES
from tests.training.short_runs import logged, optim, weights

ROWS = [TextRow(f"{line} {i}") for i, line in enumerate(LINES * 16)]
STEPS = 4


@dataclass(frozen=True)
class Pull(Term):
    """`-sum_b log sigmoid(cos(s_b, t_b) / tau)` over texts."""

    temperature: float = 1.0

    name = "pull"
    needs = frozenset({"teacher"})

    def forward(self, given: Given) -> LossTerm:
        student, teacher = given.student.pooled(), required(given.teacher).pooled()
        scores = F.cosine_similarity(student, teacher, dim=-1) / self.temperature
        return LossTerm(-F.logsigmoid(scores).sum(), scores.new_tensor(len(scores)))


@dataclass
class AlignConfig:
    encoder: str = ""
    llm: str = ""
    output: str = "runs/align"
    temperature: float = 0.1
    lora: LoraSettings = field(default_factory=LoraSettings)
    train: OptimSettings = field(default_factory=OptimSettings)
    model: str = ""
    resume: bool = False
    include_base: bool = False
    trust_remote_code: bool = False


def check(config: AlignConfig, data: Data) -> None:
    if not config.temperature > 0:
        raise ValueError(f"temperature={config.temperature}: must be > 0")


def build(config: AlignConfig, data: Data, dtype: torch.dtype) -> Stage:
    student = MTLLM.stack(config.encoder, config.llm, lora=config.lora, dtype=dtype)
    return Stage(student, Objective({"pull": 1.0}, temperature=config.temperature), data.rows)


@pytest.fixture
def align(monkeypatch) -> StageKind:
    monkeypatch.setitem(TERMS, "pull", Pull)
    monkeypatch.setitem(STAGES, "align", StageKind("align", AlignConfig, check, build))
    return STAGES["align"]


def _config(encoder: str, llm: str, output: Path, **changes) -> AlignConfig:
    train = optim(max_steps=STEPS, gradient_accumulation=2, tokens=160, save_steps=1, keep=STEPS + 1, lr=5e-3)
    return AlignConfig(encoder, llm, str(output), lora=LoraSettings(dropout=0.0), train=train, **changes)


def _mean(student: MTLLM, batches: list[Batch], temperature: float) -> float:
    """The loss of a step by hand: every text against its teacher, over all texts."""
    losses = []
    with torch.no_grad():
        for batch in batches:
            own, taught = (
                [part.double().mean(0) for part in states.split(packed.lengths)]
                for states, packed in (
                    (student.states(batch.mt), batch.mt),
                    (student.teacher_states(batch.llm), batch.llm),
                )
            )
            for state, right in zip(own, taught):
                losses.append(math.log1p(math.exp(-float(torch.cosine_similarity(state, right, dim=0)) / temperature)))
    return sum(losses) / len(losses)


def test_a_stage_from_outside_trains_logs_and_resumes(align, encoder_folder, llm_folder, tmp_path) -> None:
    config = _config(encoder_folder, llm_folder, tmp_path / "run")
    metrics = run(align, config, Data(ROWS, source={"text": "lines"}))
    log = logged(tmp_path / "run")
    assert sorted(log) == list(range(1, STEPS + 1))
    student = MTLLM.from_pretrained(tmp_path / "run", dtype=torch.float32)
    student.tokenizer.max_mt_tokens = student.tokenizer.max_llm_tokens = 48
    packs = iter(PackedDataset(ROWS, student.tokenizer, max_tokens=160, seed=config.train.seed, align=False))
    for step in range(1, STEPS + 1):
        batches = [next(packs) for _ in range(2)]
        if step > 1:  # as it was before the step
            student.load_state_dict(weights(tmp_path / f"run/checkpoint-{step - 1}"), strict=False)
            expected = _mean(student, batches, config.temperature)
            assert log[step]["loss"] == log[step]["pull"] == pytest.approx(expected, rel=1e-4)
            assert _mean(student, batches, 2 * config.temperature) != pytest.approx(expected, rel=1e-2), "the control"
    assert metrics["train_loss"] == pytest.approx(sum(entry["loss"] for entry in log.values()) / STEPS, rel=1e-5)
    assert log[STEPS]["loss"] < log[1]["loss"]

    record = json.loads((tmp_path / "run/run.json").read_text())
    assert (record["stage"], record["temperature"], record["source"]) == ("align", 0.1, {"text": "lines"})
    again = _config(encoder_folder, llm_folder, tmp_path / "run", resume=True)
    assert run(align, again, Data(ROWS, source={"text": "lines"}))["train_loss"] == metrics["train_loss"]
    other = _config(encoder_folder, llm_folder, tmp_path / "run", resume=True, temperature=0.2)
    with pytest.raises(ValueError, match=r"--resume: temperature=0\.2"):
        run(align, other, Data(ROWS, source={"text": "lines"}))


def test_what_it_refuses_is_said_before_anything_is_loaded(align, tmp_path) -> None:
    with pytest.raises(ValueError, match="temperature=0"):
        run(align, _config("no", "no", tmp_path / "run", temperature=0.0), Data(ROWS))


def test_training_imports_nothing_to_its_right() -> None:
    """But for `validation`, which scores rows with the engine that the finished model is used through."""
    right = {"inference", "evaluation", "planning", "reporting", "commands"}
    found = set()
    for path in sorted(Path(mtllm_fast.__file__).parent.joinpath("training").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 2:
                found |= {(path.stem, room) for room in right & {(node.module or "").split(".")[0]}}
    assert found == {("validation", "inference")}
