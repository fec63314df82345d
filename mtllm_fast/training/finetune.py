"""Stage 2, and the baselines: fine-tune a reader with a task head on English task data.

The LLM alone gives the task teacher; the MT encoder alone and an adapted stack give the baselines. The head has a row
per label, or, for rows with choices, one score per choice. Source of the settings: arXiv 2406.12739.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from transformers import set_seed

from ..data.read import TextRow
from ..data.store import TokenStore
from ..models import MTLLM, HeadConfig
from ..models.storage import read_config
from .automatic import on_gpu, settled
from .live import Watch
from .record import Metrics
from .run import TASK_ROWS, Data, StageKind, run, starting
from .soft_labels import check_labeller, labelled
from .stage import Stage
from .stage_config import FinetuneConfig
from .validation import validation


def head_for(rows: Iterable[TextRow], labels: Sequence[str]) -> HeadConfig:
    """A choice head where the rows have choices, else one row per label.

    Raises:
        ValueError: there are no rows.
    """
    first = next(iter(rows), None)
    if first is None:
        raise ValueError("the training data holds no usable row")
    return HeadConfig("choice") if first.choices is not None else HeadConfig("classification", tuple(labels))


def check(config: FinetuneConfig, data: Data) -> None:
    sources = [name for name in ("llm", "encoder", "model") if getattr(config, name)]
    if len(sources) != 1 and not config.model:
        raise ValueError(f"name exactly one of --llm, --encoder and --model, got {', '.join(sources) or 'none'}")
    if config.train.max_steps == 0:
        raise ValueError("max_steps=0: the task head starts at random, so there is nothing to save; train it")
    first = None if isinstance(data.rows, TokenStore) else next(iter(data.rows), None)
    if config.teacher:
        check_labeller(config.teacher, read_config(Path(config.teacher), "teacher"), data.labels or ())
        if not config.loss.label_kl:
            raise ValueError(f"teacher={config.teacher!r}: is for loss.label_kl, whose weight is 0")
        if first is not None and first.soft_label is not None:
            raise ValueError(f"teacher={config.teacher!r}: the rows have soft labels of another; leave one of them out")
    elif first is not None and config.loss.label_kl and first.soft_label is None:
        raise ValueError(
            f"loss.label_kl={config.loss.label_kl}: learns from soft labels, which the rows do not have; name a teacher"
        )
    if first is not None and not config.loss.label_kl and first.soft_label is not None:
        raise ValueError("soft_label: the rows have some, but loss.label_kl=0 reads none; give it a weight")


def build(config: FinetuneConfig, data: Data, dtype: torch.dtype) -> Stage:
    head, rows, notes = head_for(data.texts, data.labels or ()), data.rows, Metrics()
    if config.teacher:
        rows, unread = _labelled(config, data, dtype)
        notes["teacher"] = {"folder": config.teacher, "rows": len(rows), "unread": unread}
        set_seed(config.train.seed)  # the student starts as without it
    student = starting(config, dtype, reader="llm" if config.llm else "encoder", head=head)
    if config.model:
        student.set_head(head)
    return Stage(
        student,
        config.loss.objective(),
        rows,
        train_projection=config.train_projection,
        validate=validation(student, data.valid_rows or (), config.train),
        notes=notes,
    )


def _labelled(config: FinetuneConfig, data: Data, dtype: torch.dtype) -> tuple[list[TextRow], int]:
    teacher = MTLLM.from_pretrained(config.teacher, dtype=dtype, trust_remote_code=config.trust_remote_code)
    optim, tokenizer = settled(config.train), teacher.require_tokenizer()
    tokenizer.max_mt_tokens = tokenizer.max_llm_tokens = optim.max_length
    if on_gpu(optim):
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        teacher.to("cuda")
    return labelled(teacher, list(data.texts), data.labels or (), max_tokens=optim.tokens, bf16=optim.bf16)


FINETUNE = StageKind(
    "finetune", FinetuneConfig, check, build, reads=("teacher",), records=("labels",), shuffle=TASK_ROWS
)


def finetune(
    config: FinetuneConfig,
    rows: Iterable[TextRow],
    labels: Sequence[str],
    valid_rows: Sequence[TextRow] | None = None,
    source: Mapping[str, object] | None = None,
    watch: Watch | None = None,
) -> Metrics:
    """Train on labelled English `rows` (re-iterable); the model ends in `config.output`; see `run.run`.

    Args:
        labels: label names in the order of the rows' label numbers; not used for rows with choices, whose label is the
            number of the right choice.
        valid_rows: labelled English rows; scored once per epoch, the best checkpoint is kept.
    """
    return run(FINETUNE, config, Data(rows, valid_rows or (), labels, source), watch)
