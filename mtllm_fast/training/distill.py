"""Stage 3, task distillation: the adapted stack learns the task from the task teacher, on English task text.

Student: MTLLM reading through the MT encoder. Teacher: the same LLM with the task teacher's adapter, on its own tokens.
Both live on one copy of the LLM, or the teacher's pooled states come from a cache on disk. The student's targets are
the teacher's sequence (or choice) embeddings, the distributions of its head, or both, and where it is asked for the
rows' own labels; the head is copied and frozen.
Source: arXiv 2406.12739.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import set_seed

from ..data.read import TextRow
from ..losses import DistillationLoss
from ..models import MTLLM
from ..models.adapter_sum import add_to_adapter, sum_settings
from ..models.storage import based_on, read_config, read_safetensors
from .inputs import check_language, check_teacher_text
from .live import Watch
from .record import Metrics
from .run import TASK_ROWS, Data, StageKind, run, starting
from .stage import Stage
from .stage_config import DistillConfig
from .task_teacher import TEACHER, TaughtLabels, add_teacher, check_teacher, in_teachers_order, teacher_config
from .teacher_cache import KeyedRows, cached_states, check_cache
from .validation import validation


def check(config: DistillConfig, data: Data) -> None:
    for name in ("model", "teacher"):
        if not getattr(config, name):
            raise ValueError(f"--{name} is missing: name a folder")
    check_cache(config.teacher_cache)
    check_teacher_text(data.rows, config.loss.needs_pairs)


def build(config: DistillConfig, data: Data, dtype: torch.dtype) -> Stage:
    adapted = based_on(read_config(Path(config.model)), config.model, config.encoder, config.llm)
    taught = teacher_config(config.teacher, config.llm)
    if adapted.reader != "stack" or "student" not in adapted.adapters:
        raise ValueError(f"model={config.model!r}: not an adapted stack; make one with `mtllm adapt`")
    head = check_teacher(adapted, taught, config.teacher)
    if config.init_from == "teacher":
        sum_settings(adapted.adapters["student"], taught.adapters["student"])
    first = next(iter(data.texts), None)
    if first is not None and (first.choices is not None) != (head.kind == "choice"):
        has = "choices" if first.choices is not None else "no choices"
        raise ValueError(f"teacher={config.teacher!r}: has a {head.kind} head, but the rows have {has}")
    valid_rows = in_teachers_order(head, data.labels, data.valid_rows or (), config.teacher)
    rows, cache = data.texts, None
    if "labels" in config.loss.needs:
        reader = f"loss.task={config.loss.task}" if config.loss.task else "loss.rank_weights=True"
        rows = TaughtLabels(rows, head, data.labels, config.teacher, reader)
    notes: Metrics = {}
    if config.teacher_cache:
        teacher = MTLLM.from_pretrained(
            config.teacher, dtype=dtype, trust_remote_code=config.trust_remote_code, llm=config.llm
        )
        cache, report = cached_states(config.teacher_cache, rows, teacher, config.train, config.loss)
        del teacher
        rows, notes["teacher_cache"] = KeyedRows(rows), asdict(report)
        set_seed(config.train.seed)  # the same run, whether the states were there or not
    student = starting(config, dtype)
    check_language(data.rows, student)
    if config.init_from == "teacher":
        weights = read_safetensors(Path(config.teacher), "model")
        add_to_adapter(student, taught.adapters["student"], weights)
    add_teacher(student, config.teacher, adapter=cache is None, llm=config.llm)
    return Stage(
        student,
        DistillationLoss(config.loss),
        rows,
        teacher=cache,
        adapter=TEACHER if cache is None else None,
        train_projection=config.train_projection,
        over_variance=config.over_variance,
        notes=notes,
        validate=validation(student, valid_rows, config.train),
    )


DISTILL = StageKind("distill", DistillConfig, check, build, reads=("teacher",), records=("labels",), shuffle=TASK_ROWS)


def distill(
    config: DistillConfig,
    rows: Iterable[TextRow],
    valid_rows: Sequence[TextRow] | None = None,
    source: Mapping[str, object] | None = None,
    watch: Watch | None = None,
    labels: Sequence[str] | None = None,
) -> Metrics:
    """Run stage 3 on English task `rows`; the model ends in `config.output`; see `run.run`.

    Args:
        rows: their labels are read for `loss.task` and `loss.rank_weights` alone.
        labels: names that the labels of rows are indices into; None: they are the teacher's, in its order.
    """
    return run(DISTILL, config, Data(rows, valid_rows or (), labels, source), watch)
