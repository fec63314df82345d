"""Stage 2, and the baselines: fine-tune a reader with a task head on English task data.

The LLM alone gives the task teacher; the MT encoder alone and an adapted stack give the baselines. The head has a row
per label, or, for rows with choices, one score per choice. Source of the settings: arXiv 2406.12739. An encoder may
read a text together with its English translation: FILTER, arXiv 2009.05166.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path

import torch
from transformers import set_seed

from ..data.read import RowStream, TextRow
from ..data.store import TokenStore
from ..models import MTLLM, HeadConfig
from ..models.encoder import check_encoder
from ..models.fusion import check_fusion
from ..models.names import is_path
from ..models.storage import read_config
from .automatic import settled, to_device
from .inputs import check_language, has_teacher_text
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
    if (fused := _fused(config)) is not None:
        check_partners(config, data, fused)
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


def _fused(config: FinetuneConfig) -> bool | None:
    """Whether a text is read with its translation; None of a hub model, which says it when it is loaded.

    Raises:
        ValueError: layers that the encoder lacks or cannot read two texts in, or a model that has its own.
    """
    asked = f"fusion.layers={config.fusion.layers}"
    if config.model and config.fusion.layers:
        raise ValueError(f"{asked}: model={config.model!r} reads texts as it was first trained to")
    if config.model:
        return read_config(Path(config.model)).fusion is not None if is_path(config.model) else None
    if config.fusion.layers and not config.encoder:
        raise ValueError(f"{asked}: is for an encoder alone (--encoder)")
    if config.fusion.layers:
        check_fusion(config.fusion, check_encoder(config.encoder, config.trust_remote_code), config.encoder)
    return config.fusion.layers > 0


def check_partners(config: FinetuneConfig, data: Data, fused: bool) -> None:
    """Raise ValueError unless there are translations where texts are read with them, and only there."""
    given = has_teacher_text(data.rows)
    if not isinstance(data.rows, RowStream | TokenStore):  # which must be read to know
        given = given or any(row.teacher_text is not None for row in islice(data.rows, 1000))
    if fused and not given:
        raise ValueError("fusion: a text is read with its translation, and the rows have no teacher_text")
    if given and not fused:
        raise ValueError("teacher_text: the rows have one, but fusion.layers=0 reads none")
    if config.loss.partner_task and not fused:
        raise ValueError(
            f"loss.partner_task={config.loss.partner_task}: is of the translations that texts are read with, but "
            "fusion.layers=0 reads none"
        )


def build(config: FinetuneConfig, data: Data, dtype: torch.dtype) -> Stage:
    head, rows, notes = head_for(data.texts, data.labels or ()), data.rows, Metrics()
    if config.teacher:
        rows, unread = _labelled(config, data, dtype)
        notes["teacher"] = {"folder": config.teacher, "rows": len(rows), "unread": unread}
        set_seed(config.train.seed)  # the student starts as without it
    student = starting(config, dtype, reader="llm" if config.llm else "encoder", head=head)
    if config.model:
        student.set_head(head)
    if config.fusion.layers:
        student.set_fusion(config.fusion)
    check_partners(config, data, student.config.fusion is not None)
    if student.config.fusion is not None:
        check_language(data.rows, student)
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
    to_device(teacher, optim)
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
