"""Stage 3, task distillation: the adapted stack learns the task from the task teacher, on English task text.

Student: MTLLM reading through the MT encoder. Teacher: the same LLM with the task teacher's adapter, on its own tokens.
Both live on one copy of the LLM. The teacher's head is copied and frozen. Source: arXiv 2406.12739.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import set_seed

from ..data.collate import Batch
from ..data.read import TextRow
from ..losses import DistillationLoss, DistillationWeights, LossTerm
from ..models import MTLLM
from ..models.storage import read_config, read_safetensors
from .config import OptimSettings
from .finetune import validation
from .run_folder import RunFolder
from .trainer import TrainStep, run_stage

TEACHER = "teacher"


@dataclass
class DistillConfig:
    """Distil a task teacher into an adapted MTLLM."""

    model: str = ""
    """Adapted MTLLM folder (from `mtllm adapt`)."""
    teacher: str = ""
    """Task teacher folder (from `mtllm finetune --llm`)."""
    output: str = "runs/distill"
    train_projection: bool = False
    """Train the projection too; the paper freezes it in this stage."""
    loss: DistillationWeights = field(default_factory=DistillationWeights)
    train: OptimSettings = field(
        default_factory=lambda: OptimSettings(lr=1e-4, warmup=0.1, max_steps=-1, epochs=3, max_rows=32)
    )
    resume: bool = False
    include_base: bool = False
    trust_remote_code: bool = False


class DistillStep(TrainStep):
    """Distillation terms of one pack of task texts."""

    def __init__(self, student: MTLLM, weights: DistillationWeights) -> None:
        super().__init__()
        self.student = student
        self.loss = DistillationLoss(weights)
        self.weights = asdict(weights)

    def counts(self, batch: Batch) -> dict[str, float]:
        return self.loss.weights.counts(batch)

    def forward(self, batch: Batch) -> dict[str, LossTerm]:
        assert batch.mt is not None and batch.llm is not None and self.student.llm is not None
        teacher = self.student.teacher_states(batch.llm, TEACHER)
        student = self.student.states(batch.mt)
        lm_head = self.student.llm.lm_head if self.loss.weights.kl else None
        return self.loss(student, teacher, batch, lm_head=lm_head, task_head=self.student.head)


def add_teacher(student: MTLLM, folder: str) -> None:
    """Put the task teacher's adapter and head, both frozen, into the student.

    Raises:
        ValueError: the teacher is not an LLM reader with a head, or sits on another LLM or attention mode.
    """
    path = Path(folder)
    config = read_config(path)
    if config.reader != "llm" or config.head is None or "student" not in config.adapters:
        raise ValueError(f"teacher={folder!r}: not a task teacher; make one with `mtllm finetune --llm ...`")
    assert student.llm is not None
    if config.causal != student.llm.causal:
        raise ValueError(
            f"teacher={folder!r}: causal={config.causal}, but the student was adapted with causal={student.llm.causal}"
        )
    mine, theirs = student.config.llm, config.llm
    if mine and theirs and Path(mine).resolve() != Path(theirs).resolve() and mine != theirs:
        raise ValueError(f"teacher={folder!r}: sits on the LLM {theirs!r}, the student on {mine!r}")
    student.set_head(config.head)
    assert student.head is not None
    student.llm.add_adapter(config.adapters["student"], TEACHER)
    state = {
        name.replace(".student.", f".{TEACHER}."): value for name, value in read_safetensors(path, "model").items()
    }
    expected = {n for n in student.state_dict() if f".{TEACHER}." in n or n.startswith("head.")}
    if set(state) != expected:
        raise ValueError(f"teacher={folder!r}: its weights do not fit the student's LLM")
    student.load_state_dict(state, strict=False)
    student.llm.train_adapter("student")
    student.head.requires_grad_(False)


def distill(
    config: DistillConfig,
    rows: Iterable[TextRow],
    valid_rows: Sequence[TextRow] | None = None,
    source: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Run stage 3 on English task `rows` (labels are not used); the model ends in `config.output`.

    Raises:
        ValueError: model or teacher do not fit each other, or the output folder holds another run.
    """
    for name in ("model", "teacher"):
        if not getattr(config, name):
            raise ValueError(f"--{name} is missing: name a folder")
    set_seed(config.train.seed)
    run = RunFolder(config.output, {"stage": "distill", "source": source or {}, **asdict(config)}, config.resume)
    student = MTLLM.from_pretrained(config.model, trust_remote_code=config.trust_remote_code)
    if student.config.reader != "stack" or "student" not in student.config.adapters:
        raise ValueError(f"model={config.model!r}: not an adapted stack; make one with `mtllm adapt`")
    add_teacher(student, config.teacher)
    assert student.llm is not None and student.projection is not None
    student.projection.requires_grad_(config.train_projection)
    validate = validation(student, valid_rows, config.train.tokens) if valid_rows else None
    metrics = run_stage(
        DistillStep(student, config.loss),
        rows,
        config.train,
        run,
        sides=("mt", "llm"),
        align=config.loss.needs_pairs,
        validate=validate,
    )
    student.llm.remove_adapter(TEACHER)
    run.save(student, include_base=config.include_base)
    return metrics
