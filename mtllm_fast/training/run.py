"""A run of a stage: checked before anything is loaded, recorded, trained on packs of its rows, saved."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import set_seed

from ..data.collate import PackedDataset
from ..data.loader import PackedLoader
from ..data.read import TextRow
from ..data.store import TokenStore
from ..jobs.durable import write_json
from ..models import MTLLM, LoraSettings, PackedEncoder
from ..models.config import MTLLMConfig
from ..models.encoder import check_encoder
from ..models.storage import local_folder, own_encoder_dtype, read_config
from .automatic import Settled, settled, to_device
from .inputs import adapted_base, model_inputs
from .live import Watch
from .processes import processes
from .record import Metrics
from .run_folder import RunFolder, as_by_default
from .stage import Rows, Stage
from .switches import base_dtype, check_encoder_lora, check_layers
from .teacher_variance import VARIANCE_FILE, measure_variance, recorded_variance
from .trainer import PackedTrainer

TASK_ROWS = 2**20  # shuffled together: all rows of a task, but for the largest, which would not fit into memory


@dataclass(frozen=True)
class Data:
    """What a stage reads.

    Fields:
        rows: re-iterable, e.g. `read_rows(...)`, or a store.
        valid_rows: labelled English rows; None for a stage that has none.
        labels: label names in the order of the rows' label numbers.
        source: where the rows come from, recorded with the run and compared on resume.
    """

    rows: Rows
    valid_rows: Sequence[TextRow] | None = None
    labels: Sequence[str] | None = None
    source: Mapping[str, object] | None = None

    @property
    def texts(self) -> Iterable[TextRow]:
        """The rows, for a stage that reads text. Raises ValueError where they are a token store."""
        if isinstance(self.rows, TokenStore):
            raise ValueError("rows: this stage reads text, not a token store")
        return self.rows


@dataclass(frozen=True)
class StageKind:
    """How a stage is made from its settings; `stages.STAGES` lists them.

    Fields:
        config: its settings, a dataclass of fields with defaults, at least encoder, llm, model, output, train, resume,
            include_base and trust_remote_code; lora where it need not name a model, causal where it uses `starting`. A
            field that is added later is to do by default what was done without it: old runs are resumed so.
        check: refuses, before anything is loaded, what does not fit.
        build: the stage, from settings, data and the dtype of its base models.
        reads: settings that name what the run reads besides rows and models. records: fields of `Data` that go into
            the run's record.
        shuffle: rows of the shuffle buffer where the settings name none.
    """

    name: str
    config: type[Any]
    check: Callable[[Any, Data], None]
    build: Callable[[Any, Data, torch.dtype], Stage]
    reads: tuple[str, ...] = ()
    records: tuple[str, ...] = ()
    shuffle: int = 0


def run(kind: StageKind, config: Any, data: Data, watch: Watch | None = None) -> Metrics:
    """Train a stage; the model ends in `config.output`.

    Args:
        watch: scores to log while training, in any language; they choose nothing.

    Returns:
        The run's metrics: final losses, seconds, rows read, truncated texts.

    Raises:
        ValueError: settings and data do not fit each other, or the output folder holds another run.
    """
    kind.check(config, data)
    by_default = as_by_default(asdict(config), asdict(kind.config()))  # before this machine chooses the open ones
    models = model_inputs(config.model, encoder=config.encoder, llm=config.llm)
    optim = settled(config.train, config.output, config.resume, models.get("llm", ""), config.trust_remote_code)
    config = replace(config, train=optim)
    dtype = base_dtype(optim, include_base=config.include_base)
    if config.encoder:
        check_encoder(config.encoder, config.trust_remote_code)
    lora = config.lora if not config.model and getattr(config, "train_llm", True) else None
    check_layers(optim, *adapted_base(config.model, models), lora, config.trust_remote_code)
    if getattr(config, "train_encoder", "no") == "lora":
        start = read_config(local_folder(config.model)) if config.model else None
        if start is None or start.encoder_adapter is None:
            place = models.get("encoder") or str(local_folder(config.model) / "encoder")
            check_encoder_lora(place, config.lora, config.trust_remote_code)
    set_seed(optim.seed)
    recorded = {name: list(found) for name in kind.records if (found := getattr(data, name)) is not None}
    settings = {"stage": kind.name, "source": data.source or {}, **recorded, **asdict(config)}
    inputs: dict[str, object] = {"rows": data.rows}
    if data.valid_rows is not None:
        inputs["valid_rows"] = data.valid_rows
    inputs |= {name: value for name in kind.reads if (value := getattr(config, name))} | models
    folder = RunFolder(config.output, settings, config.resume, inputs, by_default)
    if (done := folder.finished()) is not None:
        return done
    stage = kind.build(config, data, dtype)
    metrics = train(stage, optim, folder, watch=watch, shuffle=kind.shuffle) | stage.notes
    if stage.adapter is not None and stage.student.llm is not None:
        stage.student.llm.remove_adapter(stage.adapter)
    folder.finish(stage.student, metrics, include_base=config.include_base)
    return metrics


def starting(config: Any, dtype: torch.dtype, **options: Any) -> MTLLM:
    """The model that `config.model` names, or one that is stacked anew. Raises ValueError where it cannot be loaded.

    Args:
        options: of `MTLLM.stack`, besides those that every stage has.
    """
    trust = config.trust_remote_code
    # in fewer bits small updates would be lost, and what training has changed would be rounded and saved so
    whole = getattr(config, "train_encoder", "no") == "all"
    if config.model:
        bases = {"encoder": config.encoder, "llm": config.llm}
        encoder_dtype = torch.float32 if whole else own_encoder_dtype(local_folder(config.model))
        return MTLLM.from_pretrained(
            config.model, dtype=dtype, trust_remote_code=trust, encoder_dtype=encoder_dtype, **bases
        )
    encoder: str | PackedEncoder | None = config.encoder or None
    if whole and encoder:
        encoder = PackedEncoder.from_pretrained(config.encoder, torch.float32, trust_remote_code=trust)
    options = {"causal": config.causal, "lora": config.lora, **options}
    return MTLLM.stack(encoder, config.llm or None, dtype=dtype, trust_remote_code=trust, **options)


def train_adapter(student: MTLLM, lora: LoraSettings) -> None:
    """Let the LLM's LoRA be trained; a model that has none gets one, with the settings `lora`."""
    llm = student.require_llm()
    if "student" not in student.config.adapters:
        llm.add_adapter(lora, "student")
        student.config.adapters["student"] = lora
    llm.train_adapter("student")


def check_trained_encoder(config: Any, start: MTLLMConfig) -> None:
    """Refuse, before anything is loaded, `train_encoder` and `lora` that the model which training goes on from cannot
    have; `start` is that model's config.

    Raises:
        ValueError: naming the setting.
    """
    if config.train_encoder == "all" and start.encoder_adapter is not None:
        raise ValueError(
            f"train_encoder='all': model={config.model!r} has a LoRA in its encoder; merge it before, by "
            "`mtllm convert --to merged`"
        )
    in_llm = "student" not in start.adapters and getattr(config, "train_llm", True)
    in_encoder = start.encoder_adapter is None and config.train_encoder == "lora"
    own = "student" in start.adapters or start.encoder_adapter is not None
    if config.lora != LoraSettings() and own and not (in_llm or in_encoder):
        raise ValueError(f"lora={config.lora!r}: model={config.model!r} has its own")


def train(stage: Stage, optim: Settled, folder: RunFolder, *, watch: Watch | None = None, shuffle: int = 0) -> Metrics:
    """Pack the rows of `stage`, train it on them, and return the run's metrics with what the data held.

    Where the stage has terms over their variance, it is measured on the first packs before the first step, kept in the
    run's folder and read from there when the run is continued. Validation is once per epoch (in a shorter run, at its
    end).
    """
    tokenizer = stage.student.require_tokenizer()
    tokenizer.max_mt_tokens = tokenizer.max_llm_tokens = optim.max_length
    if folder.packs_per_process is not None:
        optim = replace(optim, gradient_accumulation=folder.packs_per_process)
    dataset = PackedDataset(
        stage.rows,
        tokenizer,
        max_tokens=optim.tokens,
        max_rows=optim.max_rows,
        sides=stage.sides,
        align=stage.align,
        writing=stage.writing,
        lookahead=optim.lookahead,
        shuffle_buffer=shuffle if optim.shuffle_buffer is None else optim.shuffle_buffer,
        seed=optim.seed,
    )
    # what is wrong with the first rows is said before anything is written
    if next(iter(dataset), None) is None:
        raise ValueError("the training data holds no usable row")
    if optim.max_steps == 0:
        folder.start()
        return untrained(stage, optim)
    steps, per_epoch = optim.max_steps, None
    rows_per_epoch = length(stage.rows)
    if steps == -1 or stage.validate is not None:
        loader = PackedLoader(dataset, num_workers=optim.workers)
        packs = loader.count()  # shuffling moves it little
        rows_per_epoch = loader.counted_rows
        per_epoch = max(math.ceil(packs / (optim.gradient_accumulation * processes())), 1)
        steps = per_epoch * optim.epochs if steps == -1 else steps
        per_epoch = min(per_epoch, steps)  # a run of less than an epoch is validated too
    trainer = PackedTrainer(
        stage,
        dataset,
        optim,
        folder.folder,
        steps=steps,
        validate_steps=per_epoch,
        rows_per_epoch=rows_per_epoch,
        watch=watch,
    )
    variance = recorded_variance(folder.folder) if stage.over_variance else None
    if stage.over_variance and variance is None:
        variance = measure_variance(stage, dataset, bf16=optim.bf16)
    folder.start()
    trainer.extended = bool(folder.extended)
    try:
        if variance is None:
            return trainer.run(folder.resume)
        if trainer.args.should_save:
            write_json(folder.folder / VARIANCE_FILE, variance)
        stage.loss.variance = variance
        return {**trainer.run(folder.resume), "teacher_variance": variance}
    except BaseException:
        folder.release()
        raise


def length(rows: Any) -> int | None:
    """How many rows there are, None for a stream."""
    try:
        return len(rows)
    except TypeError:
        return None


def untrained(stage: Stage, optim: Settled) -> Metrics:
    """Metrics of a run of 0 steps, whose model is saved as it starts: its English validation score, if there is one."""
    if stage.validate is None:
        return {"train_runtime": 0.0}
    to_device(stage.student, optim)
    stage.eval()
    return {"train_runtime": 0.0, "best_step": 0, "best_eval_accuracy": stage.validate()["accuracy"]}
