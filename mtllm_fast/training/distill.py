"""Stage 3, task distillation: the adapted stack learns the task from the task teacher, on English task text.

Student: MTLLM reading through the MT encoder. Teacher: the same LLM with the task teacher's adapter, on its own tokens.
Both live on one copy of the LLM, or the teacher's pooled states come from a cache on disk. The student's targets are
the teacher's sequence (or choice) embeddings, the distributions of its head, or both; the head is copied and frozen.
Source: arXiv 2406.12739.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor
from transformers import set_seed

from ..data.collate import Batch
from ..data.read import TextRow
from ..losses import DistillationLoss, DistillationWeights, LossTerm
from ..models import MTLLM
from ..models.adapter_sum import add_to_adapter, sum_settings
from ..models.fingerprint import same_model
from ..models.heads import HeadConfig
from ..models.mtllm import MTLLMConfig
from ..models.names import is_path
from ..models.storage import based_on, read_config, read_safetensors
from .automatic import settled
from .config import OptimSettings
from .finetune import validation
from .inputs import adapted_base, model_inputs
from .live import Watch
from .run_folder import RunFolder
from .switches import base_dtype, check_layers
from .teacher_cache import KeyedRows, TeacherCache, cached_states, check_cache
from .trainer import TASK_ROWS, TrainStep, run_stage

TEACHER = "teacher"
InitFrom = Literal["adapted", "teacher"]


@dataclass
class DistillConfig:
    """Distil a task teacher into an adapted MTLLM."""

    model: str = ""
    """Adapted MTLLM folder (from `mtllm adapt`)."""
    teacher: str = ""
    """Task teacher folder (from `mtllm finetune --llm`)."""
    output: str = "runs/distill"
    """Folder of the run; holds the model, its checkpoints and logs."""
    teacher_cache: str = ""
    """Folder for the teacher's pooled states, computed once per teacher, data and settings and shared by all runs;
    without it the teacher runs in every step. For pooled_mse and head_kl."""
    train_projection: bool = False
    """Train the projection too; the paper freezes it in this stage."""
    init_from: InitFrom = "adapted"
    """The adapter that training starts from: adapted, the model's own; teacher, the sum of that and the task teacher's,
    as one adapter of both ranks together."""
    loss: DistillationWeights = field(default_factory=DistillationWeights)
    over_variance: bool = False
    """pooled_mse and paired_mse over the variance of the teacher's states, measured on the first texts: 1.0 explains
    nothing, and a weight means the same for every LLM."""
    train: OptimSettings = field(
        default_factory=lambda: OptimSettings(lr=1e-4, warmup=0.1, max_steps=-1, epochs=3, max_rows=32)
    )
    resume: bool = False
    """Continue the run in `output` from its newest complete checkpoint."""
    include_base: bool = False
    """Store the base models' weights with the result, so that its folder needs nothing else."""
    trust_remote_code: bool = False
    """Run the code that a model on the hub brings with it."""
    encoder: str = ""
    """Where the model's encoder is, if not where it was when the model was saved."""
    llm: str = ""
    """Where the LLM of model and teacher is, likewise."""

    def __post_init__(self) -> None:
        if self.init_from not in get_args(InitFrom):
            raise ValueError(f"init_from={self.init_from!r}: expected one of {', '.join(get_args(InitFrom))}")


class DistillStep(TrainStep):
    """Distillation terms of one pack of task texts; the teacher is read from `cache` where one is given."""

    def __init__(self, student: MTLLM, weights: DistillationWeights, cache: TeacherCache | None = None) -> None:
        super().__init__()
        self.student, self.cache = student, cache
        self.loss = DistillationLoss(weights)
        self.weights = asdict(weights)

    def counts(self, batch: Batch) -> dict[str, float]:
        return self.loss.weights.counts(batch)

    def taught(self, batch: Batch) -> tuple[Batch, Tensor]:
        if self.cache is not None:
            return self.cache.teach(batch)
        assert batch.llm is not None
        return batch, self.student.teacher_states(batch.llm, TEACHER)

    def forward(self, batch: Batch) -> dict[str, LossTerm]:
        assert batch.mt is not None and self.student.llm is not None
        batch, teacher = self.taught(batch)
        student = self.student.states(batch.mt)  # type: ignore[arg-type]
        lm_head = self.student.llm.lm_head if self.loss.weights.kl else None
        return self.loss(student, teacher, batch, lm_head=lm_head, task_head=self.student.head)


def check_teacher(student: MTLLMConfig, teacher: MTLLMConfig, folder: str) -> None:
    """Refuse a teacher that is no LLM reader with a head, or sits on another LLM or attention mode than the student.

    Raises:
        ValueError: naming what does not fit.
    """
    if teacher.reader != "llm" or teacher.head is None or "student" not in teacher.adapters:
        raise ValueError(f"teacher={folder!r}: not a task teacher; make one with `mtllm finetune --llm ...`")
    if teacher.causal != student.causal:
        raise ValueError(
            f"teacher={folder!r}: causal={teacher.causal}, but the student was adapted with causal={student.causal}"
        )
    mine, theirs = student.llm, teacher.llm
    if mine and theirs and not same_model(mine, theirs):
        raise ValueError(f"teacher={folder!r}: sits on the LLM {theirs!r}, the student on {mine!r}, which is another")


def in_teachers_order(
    head: HeadConfig, labels: Sequence[str] | None, rows: Sequence[TextRow], folder: str
) -> list[TextRow]:
    """Labelled rows with their labels as classes of the teacher's head, by name.

    Args:
        labels: names that the rows' labels are indices into; None: they are the teacher's, in its order.

    Raises:
        ValueError: the teacher has other labels, or fewer than the rows.
    """
    if head.kind == "choice":  # the label is the number of a choice, of which rows have as many as they like
        return list(rows)
    if labels is not None and sorted(labels) != sorted(head.labels):
        raise ValueError(
            f"teacher={folder!r}: its head has the labels {', '.join(head.labels)}, "
            f"but the task has {', '.join(labels)}"
        )
    order = range(len(head.labels)) if labels is None else [head.labels.index(name) for name in labels]
    wrong = next((row.label for row in rows if row.label is not None and not 0 <= row.label < len(order)), None)
    if wrong is not None:
        raise ValueError(f"teacher={folder!r}: has {len(order)} labels, but a row has the label {wrong}")
    return [row if row.label is None else replace(row, label=order[row.label]) for row in rows]


def teacher_config(folder: str, llm: str = "") -> MTLLMConfig:
    """The config of a task teacher; its LLM is `llm` where that is named and the one it was saved with has moved."""
    config = read_config(Path(folder), "teacher")
    if llm and config.llm and is_path(config.llm) and not Path(config.llm).exists():
        return based_on(config, folder, None, llm)
    return config


def add_teacher(student: MTLLM, folder: str, *, adapter: bool = True, llm: str = "") -> None:
    """Put the task teacher's head and, unless its states are cached, its adapter into the student, both frozen.

    Raises:
        ValueError: the teacher does not fit the student.
    """
    config = teacher_config(folder, llm)
    check_teacher(student.config, config, folder)
    assert student.llm is not None and config.head is not None
    student.set_head(config.head)
    assert student.head is not None
    if adapter:
        student.llm.add_adapter(config.adapters["student"], TEACHER)
    state = {
        name.replace(".student.", f".{TEACHER}."): value
        for name, value in read_safetensors(Path(folder), "model").items()
        if adapter or name.startswith("head.")
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
    watch: Watch | None = None,
    labels: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Run stage 3 on English task `rows` (labels are not used); the model ends in `config.output`.

    Args:
        labels: names that the labels of `valid_rows` are indices into; None: they are the teacher's, in its order.

    Raises:
        ValueError: model, teacher, rows and losses do not fit each other, the teacher's cache is stale or damaged, or
            the output folder holds another run.
    """
    for name in ("model", "teacher"):
        if not getattr(config, name):
            raise ValueError(f"--{name} is missing: name a folder")
    check_cache(config.teacher_cache, config.loss.needs_pairs)
    models = model_inputs(config.model, encoder=config.encoder, llm=config.llm)
    optim = settled(config.train, config.output, config.resume, models.get("llm", ""), config.trust_remote_code)
    config = replace(config, train=optim)
    dtype = base_dtype(optim, include_base=config.include_base)
    check_layers(optim, *adapted_base(config.model, models), None, config.trust_remote_code)
    set_seed(config.train.seed)
    settings = {"stage": "distill", "source": source or {}, **asdict(config)}
    inputs = {
        "rows": rows,
        "valid_rows": valid_rows or [],
        "teacher": config.teacher,
        **models,
    }
    run = RunFolder(config.output, settings, config.resume, inputs)
    if (done := run.finished()) is not None:
        return done
    adapted = based_on(read_config(Path(config.model)), config.model, config.encoder, config.llm)
    taught = teacher_config(config.teacher, config.llm)
    if adapted.reader != "stack" or "student" not in adapted.adapters:
        raise ValueError(f"model={config.model!r}: not an adapted stack; make one with `mtllm adapt`")
    check_teacher(adapted, taught, config.teacher)
    if config.init_from == "teacher":
        sum_settings(adapted.adapters["student"], taught.adapters["student"])
    assert taught.head is not None
    first = next(iter(rows), None)
    if first is not None and (first.choices is not None) != (taught.head.kind == "choice"):
        has = "choices" if first.choices is not None else "no choices"
        raise ValueError(f"teacher={config.teacher!r}: has a {taught.head.kind} head, but the rows have {has}")
    valid_rows = in_teachers_order(taught.head, labels, valid_rows or (), config.teacher)
    cache, report = None, None
    if config.teacher_cache:
        teacher = MTLLM.from_pretrained(
            config.teacher, dtype=dtype, trust_remote_code=config.trust_remote_code, llm=config.llm
        )
        cache, report = cached_states(config.teacher_cache, rows, teacher, optim)
        del teacher
        rows = KeyedRows(rows)
        set_seed(config.train.seed)  # the same run, whether the states were there or not
    student = MTLLM.from_pretrained(
        config.model,
        dtype=dtype,
        trust_remote_code=config.trust_remote_code,
        encoder=config.encoder,
        llm=config.llm,
    )
    if config.init_from == "teacher":
        weights = read_safetensors(Path(config.teacher), "model")
        add_to_adapter(student, taught.adapters["student"], weights)
    add_teacher(student, config.teacher, adapter=cache is None, llm=config.llm)
    assert student.llm is not None and student.projection is not None
    student.projection.requires_grad_(config.train_projection)
    validate = validation(student, valid_rows, optim.tokens, optim.bf16) if valid_rows else None
    metrics = run_stage(
        DistillStep(student, config.loss, cache),
        rows,
        config.train,
        run,
        sides=("mt",) if cache else ("mt", "llm"),
        align=config.loss.needs_pairs,
        over_variance=config.over_variance,
        validate=validate,
        watch=watch,
        shuffle=TASK_ROWS,
    )
    if cache is None:
        student.llm.remove_adapter(TEACHER)
    if report is not None:
        metrics["teacher_cache"] = asdict(report)
    run.finish(student, metrics, include_base=config.include_base)
    return metrics
