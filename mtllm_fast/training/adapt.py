"""Stage 1, general adaptation: the LLM learns from itself to read through the MT encoder. English text is enough.

Teacher: the LLM without adapters on its own tokens. Student: the same LLM with adapters on projected encoder states.
Where rows have a `teacher_text`, the teacher reads that: a parallel corpus, whose other language the student reads.
Source: arXiv 2406.12739.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

import torch

from ..data.code_switch import CodeSwitched, read_dictionary
from ..data.store import AT_ONCE, TokenStore
from ..losses import DistillationLoss
from ..models import MTLLM
from ..models.storage import local_folder, read_config
from .inputs import check_language, check_teacher_text, has_teacher_text
from .live import Watch
from .projection_fit import fit_projection
from .record import Metrics
from .run import Data, StageKind, check_trained_encoder, run, starting, train_adapter
from .stage import Rows, Stage
from .stage_config import AdaptConfig
from .teacher_cache import KeyedRows, cached_states, check_cache


def starting_model(config: AdaptConfig, dtype: torch.dtype) -> MTLLM:
    """The student as training starts: stacked anew, or the adapted model that `config.model` names.

    Raises:
        ValueError: a model cannot be loaded, or is not one that adaptation can go on from.
    """
    student = starting(config, dtype, projection=config.projection)
    train_adapter(student, config.lora)  # `mtllm sft` may have left the LLM as it was
    student.train_encoder(config.train_encoder, config.lora)
    return student


def check(config: AdaptConfig, data: Data) -> None:
    for name in ("encoder", "llm"):
        if not (getattr(config, name) or config.model):
            raise ValueError(f"--{name} is missing: name a folder or a hub model, or --model to go on from")
    if config.model:
        start = read_config(local_folder(config.model))
        if start.reader != "stack" or (start.adapters and "student" not in start.adapters):
            raise ValueError(
                f"model={config.model!r}: not an adapted stack; make one with `mtllm adapt --encoder ... --llm ...`"
            )
        if start.head is not None:
            raise ValueError(
                f"model={config.model!r}: has a task head; adaptation goes on from what `mtllm adapt` made"
            )
        check_trained_encoder(config, start)
    if isinstance(data.rows, TokenStore):
        if config.init != "none":
            raise ValueError(f"init={config.init!r}: the projection is fitted on text, not on a token store")
        if config.teacher_cache:
            raise ValueError(f"teacher_cache={config.teacher_cache!r}: finds states by text, which a token store lacks")
        data.rows.verify(AT_ONCE)
    if config.code_switch:
        if isinstance(data.rows, TokenStore):
            raise ValueError(f"code_switch={config.code_switch!r}: changes words of text, which a token store lacks")
        if config.loss.needs_pairs:
            raise ValueError(
                f"code_switch={config.code_switch!r}: paired_mse and kl compare tokens that end at the same character, "
                "and the teacher reads another text; use pooled_mse and contrast"
            )
        read_dictionary(config.code_switch)
    check_cache(config.teacher_cache)
    check_teacher_text(data.rows, config.loss.needs_pairs)
    if config.init != "none" and has_teacher_text(data.rows):
        raise ValueError(
            f"init={config.init!r}: the projection is fitted on one text, and the rows have a teacher_text"
        )


def build(config: AdaptConfig, data: Data, dtype: torch.dtype) -> Stage:
    student, rows, cache = starting_model(config, dtype), data.rows, None
    notes: Metrics = {}
    check_language(rows, student)
    if not isinstance(rows, TokenStore):
        if config.init != "none":
            notes["init"] = asdict(fit_projection(student, rows, config.init, config.init_rows))
        if config.code_switch:
            dictionary = read_dictionary(config.code_switch)
            rows = CodeSwitched(rows, dictionary, config.code_switch_share, config.train.seed)
            notes["code_switch"] = rows.report()
        if config.teacher_cache:
            cache, report = cached_states(config.teacher_cache, rows, student, config.train, config.loss)
            rows, notes["teacher_cache"] = KeyedRows(rows), asdict(report)
    return Stage(
        student,
        DistillationLoss(config.loss),
        rows,
        teacher=cache,
        notes=notes,
        train_projection=config.train_projection,
        over_variance=config.over_variance,
    )


ADAPT = StageKind("adapt", AdaptConfig, check, build, reads=("code_switch",))


def adapt(
    config: AdaptConfig, rows: Rows, source: Mapping[str, object] | None = None, watch: Watch | None = None
) -> Metrics:
    """Run stage 1 on `rows` (re-iterable, e.g. `read_rows(...)`, or a store); see `run.run` and `run.Data`."""
    return run(ADAPT, config, Data(rows, source=source), watch)
