"""Stage 1, general adaptation: the LLM learns from itself to read through the MT encoder. English text only.

Teacher: the LLM without adapters on its own tokens. Student: the same LLM with adapters on projected encoder states.
Source: arXiv 2406.12739.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from transformers import set_seed

from ..data.collate import Batch
from ..data.read import TextRow
from ..data.store import TokenStore
from ..losses import DistillationLoss, DistillationWeights, LossTerm
from ..models import MTLLM, LoraSettings, ProjectionConfig
from .config import OptimSettings
from .live import Watch
from .projection_fit import fit_projection
from .run_folder import RunFolder
from .switches import base_dtype
from .trainer import TrainStep, run_stage


@dataclass
class AdaptConfig:
    """General adaptation of an LLM to an MT encoder by self-distillation."""

    encoder: str = ""
    """MT encoder: folder or hub name (NLLB-200, M2M-100)."""
    llm: str = ""
    """Causal LM: folder or hub name."""
    output: str = "runs/adapt"
    """Folder of the run; holds the model, its checkpoints and logs."""
    causal: bool = False
    """Keep the LLM's causal attention; the default lets every token see its whole text, as in the paper."""
    projection: ProjectionConfig = field(default_factory=ProjectionConfig)
    lora: LoraSettings = field(default_factory=LoraSettings)
    loss: DistillationWeights = field(default_factory=DistillationWeights)
    init_rows: int = 0
    """Texts that the projection is first fitted on, to pick out the LLM's own embeddings; 0 starts at random."""
    train_projection: bool = True
    """Off: the projection stays as it starts, for one that was fitted with `init_rows`."""
    train: OptimSettings = field(default_factory=OptimSettings)
    resume: bool = False
    """Continue the run in `output` from its newest complete checkpoint."""
    include_base: bool = False
    """Store the base models' weights with the result, so that its folder needs nothing else."""
    trust_remote_code: bool = False


class AdaptStep(TrainStep):
    """Self-distillation terms of one pack: the student reads the MT side, the bare LLM the LLM side."""

    def __init__(self, student: MTLLM, weights: DistillationWeights) -> None:
        super().__init__()
        self.student = student
        self.loss = DistillationLoss(weights)
        self.weights = asdict(weights)

    def counts(self, batch: Batch) -> dict[str, float]:
        return self.loss.weights.counts(batch)

    def forward(self, batch: Batch) -> dict[str, LossTerm]:
        assert batch.mt is not None and batch.llm is not None and self.student.llm is not None
        teacher = self.student.teacher_states(batch.llm)
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
        if not getattr(config, name):
            raise ValueError(f"--{name} is missing: name a folder or a hub model")
    dtype = base_dtype(config.train, include_base=config.include_base)
    set_seed(config.train.seed)
    run = RunFolder(config.output, {"stage": "adapt", "source": source or {}, **asdict(config)}, config.resume)
    student = MTLLM.stack(
        config.encoder,
        config.llm,
        causal=config.causal,
        projection=config.projection,
        lora=config.lora,
        dtype=dtype,
        trust_remote_code=config.trust_remote_code,
    )
    assert student.tokenizer is not None
    if config.init_rows:
        if isinstance(rows, TokenStore):
            raise ValueError(f"init_rows={config.init_rows}: the projection is fitted on text, not on a token store")
        fit_projection(student, rows, config.init_rows)
    assert student.projection is not None
    student.projection.requires_grad_(config.train_projection)
    step = AdaptStep(student, config.loss)
    metrics = run_stage(step, rows, config.train, run, sides=("mt", "llm"), align=config.loss.needs_pairs, watch=watch)
    run.save(student, include_base=config.include_base)
    return metrics
