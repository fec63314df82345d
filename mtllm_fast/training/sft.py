"""Supervised fine-tuning on targets: an LLM behind an encoder, or alone, learns what to write after a text.

    [BOS] before <text> after target [EOS]

What is trained is the projection, a LoRA in the LLM, the encoder, or several of them. The loss is the cross-entropy of
the target's tokens (MindMerger, arXiv 2405.17386; LangBridge, arXiv 2401.10695), and the KL to the bare LLM that reads
the text as its own tokens and the same target after it: with targets that it wrote itself, self-distillation on the
same answer rows (after SDRRL, arXiv 2402.12204). With `mask_targets` the LLM writes without seeing all of what stands
before (after LUSIFER, arXiv 2501.00874).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..data.prompt import Prompt, Writing, prompt_of
from ..data.read import MappedRows, TextRow
from ..models import MTLLM
from ..models.storage import read_config
from .inputs import check_language, has_teacher_text
from .live import Watch
from .record import Metrics
from .run import TASK_ROWS, Data, StageKind, check_trained_encoder, run, starting, train_adapter
from .stage import Stage
from .stage_config import SftConfig
from .validation import validation


class LabelTargets(MappedRows):
    """Labelled rows whose targets are the names of their labels, or their right choices."""

    def __init__(self, rows: Iterable[TextRow], labels: Sequence[str]) -> None:
        super().__init__(rows)
        self.labels = labels

    def change(self, row: TextRow) -> TextRow:
        if row.label is None:
            raise ValueError("target: a row has neither a target nor a label")
        return replace(row, target=(row.choices or self.labels)[row.label], label=None)


def check(config: SftConfig, data: Data) -> None:
    named = "model" if config.model else "llm"
    if not getattr(config, named):
        raise ValueError("--llm is missing: name a folder or a hub model, or --model to go on from")
    if config.model:
        start = read_config(Path(config.model))
        if not start.causal or start.reader == "encoder" or start.head is not None:
            what = "a task head" if start.head else "no causal LLM"
            raise ValueError(f"model={config.model!r}: has {what}; make one with `mtllm sft` or `mtllm adapt --causal`")
        alone = start.reader == "llm"
        check_trained_encoder(config, start)
    else:
        alone = config.reader == "llm"
        if not alone and not config.encoder:
            raise ValueError("--encoder is missing: name a folder or a hub model, or --reader llm for the LLM alone")
        if alone and config.encoder:
            raise ValueError(f"encoder={config.encoder!r}: reader='llm' reads without one")
    if alone and config.loss.kl:
        raise ValueError(f"loss.kl={config.loss.kl}: the teacher reads what the LLM alone reads; it needs an encoder")
    if has_teacher_text(data.rows) and not config.loss.kl:
        raise ValueError("teacher_text: is for the teacher of loss.kl, whose weight is 0")
    if alone and config.train_encoder != "no":
        raise ValueError(f"train_encoder={config.train_encoder!r}: the LLM alone reads without an encoder")
    if alone and config.mask_targets:
        raise ValueError(
            f"mask_targets={config.mask_targets}: makes an LLM read what an encoder gives it; the LLM alone has none"
        )
    if alone and not config.train_llm:
        raise ValueError("train_llm=False: the LLM alone has nothing else to train")
    if data.valid_rows and data.labels is None:
        raise ValueError("valid_rows: are scored by the likelihood of their labels; name the labels")
    if not (config.train_llm or config.train_projection or config.train_encoder != "no"):
        raise ValueError("train_llm=False, train_projection=False, train_encoder='no': nothing is trained")


def starting_model(config: SftConfig, dtype: torch.dtype) -> MTLLM:
    """The student as training starts."""
    lora = config.lora if config.train_llm else None
    student = starting(config, dtype, projection=config.projection, reader=config.reader, lora=lora)
    if config.train_llm:
        train_adapter(student, config.lora)
    else:
        student.require_llm().requires_grad_(False)
    student.train_encoder(config.train_encoder, config.lora)
    student.config.prompt = prompt_of(config.before, config.after, student.config.prompt) or Prompt()
    return student


def build(config: SftConfig, data: Data, dtype: torch.dtype) -> Stage:
    rows = data.texts
    if data.labels is not None:
        rows = LabelTargets(rows, data.labels)
    student = starting_model(config, dtype)
    check_language(data.rows, student)
    prompt = student.config.prompt
    assert prompt is not None
    return Stage(
        student,
        config.loss.objective(),
        rows,
        writing=Writing(prompt, config.max_target_tokens, config.mask_targets, config.train.seed),
        train_projection=config.train_projection,
        validate=validation(student, data.valid_rows or (), config.train, data.labels),
    )


SFT = StageKind("sft", SftConfig, check, build, records=("labels",), shuffle=TASK_ROWS)


def sft(
    config: SftConfig,
    rows: Iterable[TextRow],
    valid_rows: Sequence[TextRow] | None = None,
    source: Mapping[str, object] | None = None,
    watch: Watch | None = None,
    labels: Sequence[str] | None = None,
) -> Metrics:
    """Train on `rows` with targets, or on labelled ones, whose targets are the names of their `labels`; the model ends
    in `config.output`. With labels, the best checkpoint on labelled English `valid_rows` is kept; see `run.run`.
    """
    return run(SFT, config, Data(rows, valid_rows, labels, source), watch)
