"""Stage 2, and the baselines: fine-tune a reader with a task head on English task data.

The LLM alone gives the task teacher; the MT encoder alone and an adapted stack give the baselines. The head has a row
per label, or, for rows with choices, one score per choice. Source of the settings: arXiv 2406.12739.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from transformers import set_seed

from ..data.collate import Batch
from ..data.language import ENGLISH_CODES
from ..data.read import TextRow
from ..inference import Engine
from ..losses import LossTerm
from ..models import MTLLM, HeadConfig, LoraSettings
from ..models.encoder import check_encoder
from ..models.mtllm import Reader
from .config import OptimSettings
from .inputs import adapted_base, model_inputs
from .live import Watch
from .run_folder import RunFolder
from .switches import base_dtype, check_layers
from .trainer import TASK_ROWS, TrainStep, run_stage


@dataclass
class FinetuneConfig:
    """Fine-tune one reader on an English task. Name exactly one of llm, encoder and model; beside model, the others
    say where its base models are, if not where they were when it was saved."""

    llm: str = ""
    """Causal LM that reads its own tokens: the task teacher."""
    encoder: str = ""
    """Encoder alone, of a family that `adapt` supports: the baseline without an LLM."""
    model: str = ""
    """An adapted MTLLM folder: direct fine-tuning of the stack."""
    output: str = "runs/finetune"
    """Folder of the run; holds the model, its checkpoints and logs."""
    causal: bool = False
    """Keep the LLM's causal attention (for `llm`)."""
    train_projection: bool = False
    """Train the projection too (for `model`); the paper freezes it in the task stages."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    train: OptimSettings = field(
        default_factory=lambda: OptimSettings(lr=1e-4, warmup=0.1, max_steps=-1, epochs=3, max_rows=32)
    )
    resume: bool = False
    """Continue the run in `output` from its newest complete checkpoint."""
    include_base: bool = False
    """Store the base models' weights with the result, so that its folder needs nothing else."""
    trust_remote_code: bool = False
    """Run the code that a model on the hub brings with it."""


class TaskStep(TrainStep):
    """Cross-entropy of the task head, summed over the texts of a pack."""

    def __init__(self, student: MTLLM) -> None:
        super().__init__()
        self.student = student
        self.weights = {"task": 1.0}

    def counts(self, batch: Batch) -> dict[str, float]:
        return {"task": batch.num_rows * batch.weight}

    def forward(self, batch: Batch) -> dict[str, LossTerm]:
        if batch.labels is None:
            raise ValueError("labels: the training rows have none")
        total = F.cross_entropy(self.student.logits(batch), batch.labels, reduction="sum")
        return {"task": LossTerm(total, total.new_tensor(batch.num_rows))}


def validation(
    student: MTLLM, rows: Sequence[TextRow], tokens: int, bf16: bool = False
) -> Callable[[], dict[str, float]]:
    """A function that scores the student on labelled English rows: accuracy, and mean cross-entropy to settle ties.

    `bf16`: under autocast, as it trains.

    Raises:
        ValueError: a row has no label or is not English: the best checkpoint is chosen in English alone.
    """
    for index, row in enumerate(rows):
        if row.label is None:
            raise ValueError(f"valid_rows[{index}] has no label: the best checkpoint is chosen by accuracy")
        if row.language is not None and row.language.strip("_") not in ENGLISH_CODES:
            raise ValueError(f"valid_rows[{index}] is {row.language}: the best checkpoint is chosen on English alone")

    def score() -> dict[str, float]:
        engine = Engine(student, max_tokens=tokens)
        with torch.autocast(engine.device.type, torch.bfloat16, enabled=bf16):
            logits = torch.from_numpy(engine.classify(rows))
        gold = torch.tensor([row.label for row in rows])
        right = (logits.argmax(-1) == gold).float().mean()
        return {"accuracy": float(right), "loss": float(F.cross_entropy(logits, gold))}

    return score


def head_for(rows: Iterable[TextRow], labels: Sequence[str]) -> HeadConfig:
    """A choice head where the rows have choices, else one row per label.

    Raises:
        ValueError: there are no rows.
    """
    first = next(iter(rows), None)
    if first is None:
        raise ValueError("the training data holds no usable row")
    return HeadConfig("choice") if first.choices is not None else HeadConfig("classification", tuple(labels))


def finetune(
    config: FinetuneConfig,
    rows: Iterable[TextRow],
    labels: Sequence[str],
    valid_rows: Sequence[TextRow] | None = None,
    source: dict[str, Any] | None = None,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Train on labelled English `rows` (re-iterable); the model ends in `config.output`.

    Args:
        labels: label names in the order of the rows' label numbers; not used for rows with choices, whose label is the
            number of the right choice.
        valid_rows: labelled English rows; scored once per epoch, the best checkpoint is kept.
        source: where the rows come from, recorded with the run and compared on resume.
        watch: scores to log while training, in any language; they choose nothing.

    Raises:
        ValueError: not exactly one reader named, labels missing, or the output folder holds another run.
    """
    sources = [name for name in ("llm", "encoder", "model") if getattr(config, name)]
    if len(sources) != 1 and not config.model:
        raise ValueError(f"name exactly one of --llm, --encoder and --model, got {', '.join(sources) or 'none'}")
    if config.train.max_steps == 0:
        raise ValueError("max_steps=0: the task head starts at random, so there is nothing to save; train it")
    dtype = base_dtype(config.train, include_base=config.include_base)
    if config.encoder:
        check_encoder(config.encoder, config.trust_remote_code)
    bases = model_inputs(config.model, encoder=config.encoder, llm=config.llm)
    lora = None if config.model else config.lora
    check_layers(config.train, *adapted_base(config.model, bases), lora, config.trust_remote_code)
    set_seed(config.train.seed)
    settings = {"stage": "finetune", "source": source or {}, "labels": list(labels), **asdict(config)}
    inputs = {
        "rows": rows,
        "valid_rows": valid_rows or [],
        **bases,
    }
    run = RunFolder(config.output, settings, config.resume, inputs)
    if (done := run.finished()) is not None:
        return done
    head = head_for(rows, labels)
    if config.model:
        student = MTLLM.from_pretrained(
            config.model,
            dtype=dtype,
            trust_remote_code=config.trust_remote_code,
            encoder=config.encoder,
            llm=config.llm,
        )
        student.set_head(head)
    else:
        reader: Reader = "llm" if config.llm else "encoder"
        student = MTLLM.stack(
            config.encoder or None,
            config.llm or None,
            reader=reader,
            causal=config.causal,
            lora=config.lora,
            head=head,
            dtype=dtype,
            trust_remote_code=config.trust_remote_code,
        )
    if student.projection is not None:
        student.projection.requires_grad_(config.train_projection)
    validate = validation(student, valid_rows, config.train.tokens, config.train.bf16) if valid_rows else None
    metrics = run_stage(
        TaskStep(student),
        rows,
        config.train,
        run,
        sides=(student.side,),
        validate=validate,
        watch=watch,
        shuffle=TASK_ROWS,
    )
    run.finish(student, metrics, include_base=config.include_base)
    return metrics
