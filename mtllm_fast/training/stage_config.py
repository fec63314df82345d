"""Settings of the stages, as typed dataclasses that the command line is made from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

from ..data.prompt import prompt_of
from ..losses import DistillationWeights, LabelWeights, TargetWeights
from ..models import FusionSettings, LoraSettings, ProjectionConfig
from ..models.config import TrainEncoder
from .config import OptimSettings
from .projection_fit import InitKind

InitFrom = Literal["adapted", "teacher"]


def _check_train_encoder(how: str) -> None:
    if how not in get_args(TrainEncoder):
        raise ValueError(f"train_encoder={how!r}: expected one of {', '.join(get_args(TrainEncoder))}")


def _task_training() -> OptimSettings:
    return OptimSettings(lr=1e-4, warmup=0.1, max_steps=-1, epochs=3, max_rows=32)


def _check_inner(config: AdaptConfig | DistillConfig) -> None:
    if config.teacher_cache and (layer := config.loss.contrast_layer) is not None:
        raise ValueError(
            f"loss.contrast_layer={layer}: teacher_cache={config.teacher_cache!r} holds the last states alone"
        )


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
    """Folder for what the losses need of the teacher, computed once per LLM, data and settings and shared by all runs;
    without it the LLM runs as teacher in every step. 4 bytes per text and dimension; with paired_mse or kl per token
    and dimension. A forward KL with a cache and without paired_mse needs no logits of the teacher at all."""
    code_switch: str = ""
    """A bilingual dictionary, `word translation` lines of any languages: the student reads the text with words replaced
    by their translations, the teacher reads it as it is. For pooled_mse and contrast."""
    code_switch_share: float = 0.5
    """Of the words that the dictionary has, how many are replaced."""
    train_projection: bool = True
    """Train the projection too; without, it stays as it starts, for one that was fitted with `init`."""
    train_encoder: TrainEncoder = "no"
    """no: the encoder stays as it is; lora: a LoRA in it is trained too, with the settings of `lora` where it is new
    (LUSIFER); all: all of its weights, which are held in fp32 (LangBridge, for LLMs that were only pretrained)."""
    train: OptimSettings = field(default_factory=OptimSettings)
    resume: bool = False
    """Continue the run in `output` from its newest complete checkpoint."""
    include_base: bool = False
    """Store the base models' weights with the result, so that its folder needs nothing else."""
    trust_remote_code: bool = False
    """Run the code that a model on the hub brings with it."""
    model: str = ""
    """An MTLLM folder, of `adapt` or `sft`, whose projection and adapters training goes on from (warm start, with a new
    optimizer and schedule; an adapter that it lacks is added, with the settings of `lora`); encoder and llm then say
    where its base models are, if not where they were. To go on with the same run, use `resume`, also with more
    steps."""

    def __post_init__(self) -> None:
        if self.init not in get_args(InitKind):
            raise ValueError(f"init={self.init!r}: expected one of {', '.join(get_args(InitKind))}")
        if self.model:
            own = AdaptConfig()
            for name in ("causal", "projection", "init"):
                if getattr(self, name) != getattr(own, name):
                    raise ValueError(f"{name}={getattr(self, name)!r}: model={self.model!r} has its own")
        _check_train_encoder(self.train_encoder)
        for name in ("head_kl", "task"):
            if weight := getattr(self.loss, name):
                raise ValueError(f"loss.{name}={weight}: needs a task head, which stage 1 has none of")
        _check_inner(self)
        if not 0 < self.code_switch_share <= 1:
            raise ValueError(f"code_switch_share={self.code_switch_share}: must be a share in (0, 1]")
        if self.projection.boundary:
            raise ValueError(
                "projection.boundary=True: stands before the LLM's own tokens, which stage 1 has none of; it is for "
                "`mtllm sft`"
            )
        if self.init_rows < 1:
            raise ValueError(f"init_rows={self.init_rows}: must be > 0; init='none' fits nothing")
        if self.init != "none" and self.projection.kind != "linear":
            raise ValueError(
                f"init={self.init!r}: only a linear projection can be fitted, not projection.kind="
                f"{self.projection.kind!r}"
            )


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
    teacher: str = ""
    """Model folder with a task head of the same labels, of any reader: the log-probabilities that it gives the labels
    of each row are the soft labels of loss.label_kl."""
    fusion: FusionSettings = field(default_factory=FusionSettings)
    loss: LabelWeights = field(default_factory=LabelWeights)
    train: OptimSettings = field(default_factory=_task_training)
    resume: bool = False
    """Continue the run in `output` from its newest complete checkpoint."""
    include_base: bool = False
    """Store the base models' weights with the result, so that its folder needs nothing else."""
    trust_remote_code: bool = False
    """Run the code that a model on the hub brings with it."""


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
    """Folder for what the losses need of the teacher, computed once per teacher, data and settings and shared by all
    runs; without it the teacher runs in every step."""
    train_projection: bool = False
    """Train the projection too; the paper freezes it in this stage."""
    init_from: InitFrom = "adapted"
    """The adapter that training starts from: adapted, the model's own; teacher, the sum of that and the task teacher's,
    as one adapter of both ranks together."""
    loss: DistillationWeights = field(default_factory=DistillationWeights)
    over_variance: bool = False
    """pooled_mse and paired_mse over the variance of the teacher's states, measured on the first texts: 1.0 explains
    nothing, and a weight means the same for every LLM."""
    train: OptimSettings = field(default_factory=_task_training)
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
        _check_inner(self)
        if self.init_from not in get_args(InitFrom):
            raise ValueError(f"init_from={self.init_from!r}: expected one of {', '.join(get_args(InitFrom))}")


@dataclass
class CompressConfig:
    """Distil a whole encoder into the smaller one that `mtllm shrink` made of it, on unlabelled text of the languages
    that it is for."""

    llm: ClassVar[str] = ""
    model: ClassVar[str] = ""
    lora: ClassVar[None] = None

    encoder: str = ""
    """Smaller encoder (from `mtllm shrink`): its layer i is layer i f of the whole one, and each of its tokens is one
    of the whole one's."""
    teacher: str = ""
    """Whole encoder: folder or hub name."""
    output: str = "runs/compress"
    """Folder of the run; holds the model, its checkpoints and logs."""
    over_variance: bool = False
    """The loss over the variance of the teacher's states, measured on the first texts: 1.0 explains nothing."""
    train: OptimSettings = field(default_factory=lambda: OptimSettings(lr=1e-4, weight_decay=0.0))
    resume: bool = False
    """Continue the run in `output` from its newest complete checkpoint."""
    include_base: bool = False
    """Store the whole model with the result, so that its folder needs nothing else."""
    trust_remote_code: bool = False
    """Run the code that a model on the hub brings with it."""


@dataclass
class SftConfig:
    """Supervised fine-tuning of a stack, or of an LLM alone, on targets that it is to write: translations, answers to a
    task, an LLM's own answers. The LLM keeps its causal attention."""

    causal: ClassVar[bool] = True

    encoder: str = ""
    """Encoder: folder or hub name, of a family that `adapt` supports."""
    llm: str = ""
    """Causal LM: folder or hub name."""
    model: str = ""
    """An MTLLM folder with a causal LLM that training goes on from; encoder and llm then say where its base models are,
    if not where they were."""
    reader: Literal["stack", "llm"] = "stack"
    """Who reads the texts of a new model: stack, the encoder before the LLM; llm, the LLM itself (for `llm` alone)."""
    output: str = "runs/sft"
    """Folder of the run; holds the model, its checkpoints and logs."""
    before: str | None = None
    """Prompt before the text, in the LLM's tokens, in which {text} and {pair} stand for the row's own texts; by default
    that of `model`, or none."""
    after: str | None = None
    """Prompt between the text and the target, likewise; by default that of `model`, or a line break."""
    max_target_tokens: int = 256
    """Longer targets are cut to this many tokens, and counted."""
    projection: ProjectionConfig = field(default_factory=ProjectionConfig)
    train_projection: bool = True
    """Train the projection of a stack."""
    train_llm: bool = True
    """Train a LoRA in the LLM; without, the LLM stays as it is (MindMerger, LangBridge)."""
    train_encoder: TrainEncoder = "no"
    """no: the encoder stays as it is; lora: a LoRA in it is trained too, with the settings of `lora` where it is new
    (LUSIFER); all: all of its weights, which are held in fp32 (LangBridge, for LLMs that were only pretrained)."""
    mask_targets: float = 0.0
    """Share of the target's tokens that the LLM does not see while it writes the next ones, so that it has to read the
    text (LUSIFER); chosen by seed and row. In their place it reads its tokenizer's mask token, or the one for unknown
    words; zeros where there is neither."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    loss: TargetWeights = field(default_factory=TargetWeights)
    train: OptimSettings = field(default_factory=_task_training)
    resume: bool = False
    """Continue the run in `output` from its newest complete checkpoint."""
    include_base: bool = False
    """Store the base models' weights with the result, so that its folder needs nothing else."""
    trust_remote_code: bool = False
    """Run the code that a model on the hub brings with it."""

    def __post_init__(self) -> None:
        if self.reader not in ("stack", "llm"):
            raise ValueError(f"reader={self.reader!r}: expected stack or llm")
        prompt_of(self.before, self.after)  # refuses what stands for nothing
        _check_train_encoder(self.train_encoder)
        if not 0 <= self.mask_targets <= 1:
            raise ValueError(f"mask_targets={self.mask_targets}: must be a share in [0, 1]")
        if self.max_target_tokens < 1:
            raise ValueError(f"max_target_tokens={self.max_target_tokens}: must be > 0")
        if self.model and self.reader != "stack":
            raise ValueError(f"reader={self.reader!r}: model={self.model!r} has its own")
        if (self.model or self.reader == "llm") and self.projection != ProjectionConfig():
            why = f"model={self.model!r} has its own" if self.model else "reader='llm' has none"
            raise ValueError(f"projection={self.projection!r}: {why}")
        if self.reader == "llm" and not (self.model or self.train_llm):
            raise ValueError("train_llm=False: with reader='llm' there is nothing else to train")
