"""Stage 1, general adaptation: the LLM learns from itself to read through the MT encoder. English text only.

Teacher: the LLM without adapters on its own tokens. Student: the same LLM with adapters on projected encoder states.
Source: arXiv 2406.12739.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, get_args

import torch
from torch import Tensor
from transformers import set_seed

from ..data.collate import Batch
from ..data.language import language_read
from ..data.read import RowStream, TextRow
from ..data.store import AT_ONCE, TokenStore
from ..losses import DistillationLoss, DistillationWeights, LossTerm
from ..models import MTLLM, LoraSettings, ProjectionConfig
from ..models.encoder import check_encoder
from ..models.storage import local_folder, read_config
from .automatic import settled
from .config import OptimSettings
from .inputs import adapted_base, model_inputs
from .live import Watch
from .projection_fit import InitKind, fit_projection
from .run_folder import RunFolder
from .switches import base_dtype, check_layers
from .teacher_cache import KeyedRows, TeacherCache, cached_states, check_cache
from .trainer import TrainStep, run_stage


@dataclass
class AdaptConfig:
    """General adaptation of an LLM to an MT encoder by self-distillation."""

    encoder: str = ""
    """Encoder: folder or hub name, of a family that is supported: m2m_100 (NLLB-200, M2M-100), bert
    (multilingual-E5-small, LaBSE, mBERT), xlm-roberta and roberta (XLM-R, multilingual-E5-base and -large, BGE-M3),
    modernbert (mmBERT), mbart (mBART-50), t5, mt5 and umt5 (mT5, uMT5, MADLAD-400)."""
    llm: str = ""
    """Causal LM: folder or hub name."""
    output: str = "runs/adapt"
    """Folder of the run; holds the model, its checkpoints and logs."""
    causal: bool = False
    """Keep the LLM's causal attention; the default lets every token see its whole text, as in the paper."""
    projection: ProjectionConfig = field(default_factory=ProjectionConfig)
    lora: LoraSettings = field(default_factory=LoraSettings)
    loss: DistillationWeights = field(default_factory=DistillationWeights)
    over_variance: bool = False
    """pooled_mse and paired_mse over the variance of the teacher's states, measured on the first texts: 1.0 explains
    nothing, and a weight means the same for every LLM."""
    init: InitKind = "none"
    """How the projection starts: none, at random; or fitted on pairs of tokens that end at the same character, ridge:
    regression onto the LLM's input embeddings; softmax: to pick out the LLM's own embedding among others."""
    init_rows: int = 2000
    """Texts that `init` is fitted on, the first ones."""
    teacher_cache: str = ""
    """Folder for the teacher's pooled states, 4 bytes per text and dimension, computed once per LLM, data and settings
    and shared by all runs, as in sweeps; without it the teacher runs in every step. For pooled_mse alone."""
    train_projection: bool = True
    """Train the projection too; without, it stays as it starts, for one that was fitted with `init`."""
    train: OptimSettings = field(default_factory=OptimSettings)
    resume: bool = False
    """Continue the run in `output` from its newest complete checkpoint."""
    include_base: bool = False
    """Store the base models' weights with the result, so that its folder needs nothing else."""
    trust_remote_code: bool = False
    """Run the code that a model on the hub brings with it."""
    model: str = ""
    """An adapted MTLLM folder, whose projection and adapter training goes on from (warm start, with a new optimizer and
    schedule); encoder and llm then say where its base models are, if not where they were. To go on with the same run,
    use `resume`, also with more steps."""

    def __post_init__(self) -> None:
        if self.init not in get_args(InitKind):
            raise ValueError(f"init={self.init!r}: expected one of {', '.join(get_args(InitKind))}")
        if self.model:
            own = AdaptConfig()
            for name in ("causal", "projection", "lora", "init"):
                if getattr(self, name) != getattr(own, name):
                    raise ValueError(f"{name}={getattr(self, name)!r}: model={self.model!r} has its own")
        if self.loss.head_kl:
            raise ValueError(f"loss.head_kl={self.loss.head_kl}: compares task heads, which stage 1 has none of")
        if self.init_rows < 1:
            raise ValueError(f"init_rows={self.init_rows}: must be > 0; init='none' fits nothing")
        if self.init != "none" and self.projection.kind != "linear":
            raise ValueError(
                f"init={self.init!r}: only a linear projection can be fitted, not projection.kind="
                f"{self.projection.kind!r}"
            )


def starting_model(config: AdaptConfig, dtype: torch.dtype) -> MTLLM:
    """The student as training starts: stacked anew, or the adapted model that `config.model` names.

    Raises:
        ValueError: a model cannot be loaded, or is not one that adaptation can go on from.
    """
    if not config.model:
        return MTLLM.stack(
            config.encoder,
            config.llm,
            causal=config.causal,
            projection=config.projection,
            lora=config.lora,
            dtype=dtype,
            trust_remote_code=config.trust_remote_code,
        )
    student = MTLLM.from_pretrained(
        config.model,
        dtype=dtype,
        trust_remote_code=config.trust_remote_code,
        encoder=config.encoder,
        llm=config.llm,
    )
    assert student.llm is not None
    student.llm.train_adapter("student")
    return student


def check_start(folder: str) -> None:
    """Refuse, before anything is loaded, a model that adaptation cannot go on from. Raises ValueError."""
    config = read_config(local_folder(folder))
    if config.reader != "stack" or "student" not in config.adapters:
        raise ValueError(f"model={folder!r}: not an adapted stack; make one with `mtllm adapt --encoder ... --llm ...`")
    if config.head is not None:
        raise ValueError(f"model={folder!r}: has a task head; adaptation goes on from what `mtllm adapt` made")


class AdaptStep(TrainStep):
    """Self-distillation terms of one pack: the student reads the MT side, the bare LLM the LLM side, or did into
    `cache`."""

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
        return batch, self.student.teacher_states(batch.llm)

    def forward(self, batch: Batch) -> dict[str, LossTerm]:
        assert self.student.llm is not None
        batch, teacher = self.taught(batch)
        assert batch.mt is not None
        student = self.student.states(batch.mt)
        head = self.student.llm.lm_head if self.loss.weights.kl else None
        return self.loss(student, teacher, batch, lm_head=head)


def adapt(
    config: AdaptConfig,
    rows: Iterable[TextRow] | TokenStore,
    source: dict[str, Any] | None = None,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Run stage 1 on `rows` (re-iterable, e.g. `read_rows(...)`, or a store); the model ends in `config.output`.

    Args:
        source: where the rows come from, recorded with the run and compared on resume.
        watch: scores to log while training; they choose nothing.

    Returns:
        The run's metrics: final losses, seconds, rows read, truncated texts.

    Raises:
        ValueError: an argument does not fit; the output folder holds another run.
    """
    for name in ("encoder", "llm"):
        if not (getattr(config, name) or config.model):
            raise ValueError(f"--{name} is missing: name a folder or a hub model, or --model to go on from")
    if config.model:
        check_start(config.model)
    if isinstance(rows, TokenStore):
        if config.init != "none":
            raise ValueError(f"init={config.init!r}: the projection is fitted on text, not on a token store")
        if config.teacher_cache:
            raise ValueError(f"teacher_cache={config.teacher_cache!r}: finds states by text, which a token store lacks")
        rows.verify(AT_ONCE)
    check_cache(config.teacher_cache, config.loss.needs_pairs)
    models = model_inputs(config.model, encoder=config.encoder, llm=config.llm)
    optim = settled(config.train, config.output, config.resume, models.get("llm", ""), config.trust_remote_code)
    config = replace(config, train=optim)
    dtype = base_dtype(optim, include_base=config.include_base)
    if config.encoder:
        check_encoder(config.encoder, config.trust_remote_code)
    lora = None if config.model else config.lora
    check_layers(optim, *adapted_base(config.model, models), lora, config.trust_remote_code)
    set_seed(config.train.seed)
    inputs = {"rows": rows, **models}
    run = RunFolder(config.output, {"stage": "adapt", "source": source or {}, **asdict(config)}, config.resume, inputs)
    if (done := run.finished()) is not None:
        return done
    student = starting_model(config, dtype)
    assert student.tokenizer is not None
    if isinstance(rows, RowStream) and (named := rows.language or rows.wanted.get("language_column")):
        language_read(student.tokenizer, "mt", named, "language")
    fit = None
    if config.init != "none":
        assert not isinstance(rows, TokenStore)
        fit = fit_projection(student, rows, config.init, config.init_rows)
    cache, report = None, None
    if config.teacher_cache:
        assert not isinstance(rows, TokenStore)
        cache, report = cached_states(config.teacher_cache, rows, student, optim)
        rows = KeyedRows(rows)
    assert student.projection is not None
    student.projection.requires_grad_(config.train_projection)
    step = AdaptStep(student, config.loss, cache)
    metrics = run_stage(
        step,
        rows,
        config.train,
        run,
        sides=("mt",) if cache else ("mt", "llm"),
        align=config.loss.needs_pairs,
        over_variance=config.over_variance,
        watch=watch,
    )
    if fit is not None:
        metrics["init"] = asdict(fit)
    if report is not None:
        metrics["teacher_cache"] = asdict(report)
    run.finish(student, metrics, include_base=config.include_base)
    return metrics
