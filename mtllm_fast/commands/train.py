"""mtllm adapt | finetune | distill | sft | compress: the training stages."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro

from ..data.language import ENGLISH_CODES
from ..data.read import TextRow, read_rows
from ..data.store import STORE_FILE, TokenStore
from ..models.hub import check_push, push
from ..training import (
    STAGES,
    AdaptConfig,
    CompressConfig,
    DistillConfig,
    FinetuneConfig,
    OptimSettings,
    SftConfig,
    run_seeds,
)
from ..training.live import Watch
from ..training.processes import ends_process
from ..training.record import Metrics
from ..training.run import Data, run
from .files import ranks
from .options import TextOptions, without_quoted
from .watch import WatchSettings

Flat = tyro.conf.arg(name="")  # its fields are options without a prefix


def finish(stage: str, output: str, metrics: Metrics) -> None:
    """Say what a training run did, in the first process."""
    if ranks()[0]:
        return
    data = metrics.get("data", {})
    if "train_loss" in metrics:
        print(f"{stage}: {metrics.get('train_runtime', 0):.1f} s, mean loss {metrics['train_loss']:.4f} -> {output}")
    else:
        print(f"{stage}: not trained -> {output}")
    truncated = {side: count for side, count in data.get("truncated", {}).items() if count}
    notes = [f"{count} texts truncated on the {side} side" for side, count in truncated.items()]
    if data.get("skipped_rows"):
        notes.append(f"{data['skipped_rows']} rows skipped as unusable")
    for code, count in data.get("fallbacks", {}).items():
        notes.append(f"{count} rows of {code} read as another language")
    if fit := metrics.get("init"):
        score = {"ridge": "R² {:.3f} on held-out pairs", "softmax": "{:.3f} of the tokens picked out"}[fit["kind"]]
        notes.append(f"projection started by {fit['kind']} on {fit['pairs']} pairs: {score.format(fit['score'])}")
    if cache := metrics.get("teacher_cache"):
        notes.append(
            f"teacher's states of {cache['texts']} texts in {cache['folder']}, {cache['computed']} computed now"
        )
        if cache["truncated"]:
            notes.append(f"{cache['truncated']} texts truncated for the teacher")
    if (accuracy := metrics.get("best_eval_accuracy")) is not None:
        notes.append(
            f"English validation accuracy {100 * accuracy:.1f} % at step {metrics['best_step']}, which is kept"
        )
    for note in notes:
        print(f"{stage}: {note}")


def train(stage: str, command: Any, data: Data, watch: Watch | None = None) -> None:
    """One run of a stage, or one per seed, and what to say of each."""
    hub, seeds, first = command.push_to_hub, getattr(command, "seeds", ()), ranks()[0] == 0
    kind = STAGES[stage]
    config = kind.config(**{one.name: getattr(command, one.name) for one in dataclasses.fields(kind.config)})
    if hub and seeds:
        raise ValueError(f"--push-to-hub {hub}: takes one model; push a seed with `mtllm convert --push-to-hub`")
    if hub and first:  # what could not be pushed after the run is refused before it
        bases = {role: getattr(config, role, "") for role in ("encoder", "llm")}
        check_push(hub, bases={} if config.include_base else bases)
    if not seeds:
        finish(stage, config.output, run(kind, config, data, watch))
        if hub and first:
            print(f"{stage}: {config.output} -> {push(config.output, hub)}")
        return

    def one(settings: Any) -> Metrics:
        metrics = run(kind, settings, data, watch)
        finish(f"{stage}, seed {settings.train.seed}", settings.output, metrics)
        return metrics

    summary = run_seeds(config, seeds, one)
    if summary["mean"] is not None and first:
        spread = f" (sample standard deviation {100 * summary['sample_std']:.1f})" if len(seeds) > 1 else ""
        print(
            f"{stage}: {len(seeds)} seeds, English validation accuracy {100 * summary['mean']:.1f} %{spread} "
            f"-> {config.output}/summary.json"
        )


def train_on_task(stage: str, command: Any) -> None:
    """`train` on the labelled rows that the command's `source` names."""
    source = command.source
    if stage == "finetune" and source.teacher_text_column is not None and not (command.fusion.layers or command.model):
        raise ValueError(
            f"--teacher-text-column {source.teacher_text_column}: nothing here reads it; it is for distill, and for "
            "--fusion.layers, where an encoder reads it beside the text"
        )
    if stage == "distill" and source.soft_label_column is not None:
        raise ValueError(
            f"--soft-label-column {source.soft_label_column}: stage 3 has a teacher of its own; it is for finetune"
        )
    rows, labels, valid = source.load()
    if not labels:
        raise ValueError(f"--task {source.task}: its answers are written, not chosen by a head; train with `mtllm sft`")
    watch = command.watch.watch(source.task, source.data, source.quoted)
    train(stage, command, Data(rows, valid or (), labels, source.record()), watch)


@dataclass
class TextSource:
    """Where English task text comes from: a known task's folder, or a file with named columns."""

    REQUIRED: ClassVar = {
        "task": "required, or `text` and `labels`",
        "text": "required without `task`",
        "labels": "required with `text`",
    }
    TRAINING_COLUMNS: ClassVar = ("language_column", "teacher_text_column", "teacher_pair_column", "soft_label_column")
    task: str = ""
    """A task by name (mnli, nusax, sib200, belebele, ...), a .yaml file that describes one, or "folder"; its English
    train and dev splits are read."""
    data: str = ""
    """The task's folder in its published format, or its hub name; by default its own."""
    text: str = ""
    """Instead of task and data: a .csv/.tsv/.jsonl/.parquet file of labelled English text."""
    text_column: str = "text"
    """Column of the text."""
    pair_column: str | None = None
    """Column of the second text, where rows are pairs."""
    label_column: str = "label"
    """Column of the label: a name, or its number in `labels`."""
    language_column: str | None = None
    """Column with an MT code per row of `text`, for labelled rows in other languages (translate-train); without, they
    are English."""
    teacher_text_column: str | None = None
    """Column of the English of `text`, which the teacher of `distill` reads, and in `finetune` an encoder with `fusion`
    beside the text."""
    teacher_pair_column: str | None = None
    """Likewise of the second text of a pair."""
    soft_label_column: str | None = None
    """Column with the log-probability of each of `labels` in a list, as `mtllm respond --labels` writes it
    (log_likelihoods), for loss.label_kl of `finetune`."""
    labels: tuple[str, ...] = ()
    """Label names in order, for `text`."""
    valid: str = ""
    """Labelled English validation file, for `text`; the best checkpoint on it is kept."""
    quoted: bool = True
    """Quote marks in .csv and .tsv files of `text`, `valid` and the task "folder" stand around fields; without, they
    are text."""

    def record(self) -> dict[str, object]:
        """The options as plain data for the run's record, which is compared on resume."""
        fields = dataclasses.asdict(self)
        for name in self.TRAINING_COLUMNS:  # as earlier runs have it
            if fields[name] is None:
                del fields[name]
        return without_quoted(fields)

    def load(self) -> tuple[Iterable[TextRow], list[str], list[TextRow] | None]:
        """Training rows, label names, validation rows or None."""
        if bool(self.task) == bool(self.text):
            raise ValueError("name either --task with --data, or --text with --labels")
        for name in self.TRAINING_COLUMNS:
            if self.task and (column := getattr(self, name)) is not None:
                raise ValueError(f"--{name.replace('_', '-')} {column}: is for --text; a task's own English is read")
        if self.task:
            from ..evaluation import get_task

            task = get_task(self.task, self.data or None, quoted=self.quoted)
            data = self.data or task.default_source
            if data is None:
                raise ValueError(f"--data is missing: the folder or hub name of task {self.task!r}")
            splits = task.splits(data, task.english)
            if "train" not in splits:
                raise ValueError(f"--data {data}: has no English train split (it has {', '.join(splits) or 'none'})")
            rows: Iterable[TextRow] = task.rows(data, task.english, "train")
            valid = task.rows(data, task.english, "dev") if "dev" in splits else None
            return rows, list(task.labels), valid
        if len(self.labels) < 2:
            raise ValueError("--labels is missing: name the labels of --text in order, at least two")
        options: dict[str, Any] = {name: getattr(self, name) for name in ("text_column", "pair_column", "label_column")}
        options |= {"labels": self.labels, "quoting": self.quoted}
        rows = read_rows(self.text, **options, **{name: getattr(self, name) for name in self.TRAINING_COLUMNS})
        valid = list(read_rows(self.valid, **options)) if self.valid else None
        return rows, list(self.labels), valid


@dataclass
class Pushed:
    """A command whose model may go to the hub."""

    push_to_hub: str = ""
    """NAME or ORGANISATION/NAME: where the finished model goes on the Hugging Face hub (private, if it is new)."""


@dataclass
class Seeded(Pushed):
    """A command that can be run under several seeds."""

    seeds: tuple[int, ...] = ()
    """One run per seed, into OUTPUT/seed-N, and OUTPUT/summary.json. The same command goes on where it stopped.
    {seed} in --model stands for the seed."""


@dataclass
class OnTask(Seeded):
    """A command that learns from the labelled rows of a task."""

    source: Annotated[TextSource, Flat] = field(default_factory=TextSource)
    watch: WatchSettings = field(default_factory=WatchSettings)


@dataclass
class Adapt(Pushed, TextOptions, AdaptConfig):
    """Stage 1: self-distillation of an LLM behind an MT encoder, on English text.

    Example: mtllm adapt --encoder facebook/nllb-200-distilled-600M --llm meta-llama/Meta-Llama-3-8B-Instruct
    --text HuggingFaceFW/fineweb:sample-10BT --output runs/fineweb --max-steps 10000 --bf16
    """

    COLUMNS: ClassVar = ("teacher_text_column",)
    REQUIRED: ClassVar = {"text": "required", "encoder": "required without `model`", "llm": "required without `model`"}
    text: str = ""
    """English text, or with `teacher_text_column` text of any language: .txt, .jsonl, .csv, .tsv or .parquet (also
    .gz), a folder or glob of them, a hub dataset "org/name" or "org/name:config". Or the folder that `mtllm tokenize`
    wrote: columns, language, split and limit are those it was written with, and may not be given again."""
    teacher_text_column: str | None = None
    """Column with another text for the teacher, such as the English of a translation; name the language of `text`. For
    losses of pooled states (pooled_mse, contrast)."""
    train: Annotated[OptimSettings, Flat] = field(default_factory=OptimSettings)
    watch: WatchSettings = field(default_factory=WatchSettings)

    @ends_process()
    def run(self) -> None:
        if not self.text:
            raise ValueError("--text is missing: name a file, folder, glob or hub dataset")
        watch = self.watch.watch()
        source = self.record("text", "text_column", "teacher_text_column", *self.READING)
        source["language"] = self.language or ENGLISH_CODES[0]
        if (Path(self.text) / STORE_FILE).is_file():
            for name in ("text_column", "teacher_text_column", *self.READING):
                if getattr(self, name) != getattr(type(self), name):
                    option = "no-quoted" if name == "quoted" else name.replace("_", "-")
                    raise ValueError(
                        f"--{option}: is for text, but --text {self.text} holds tokens, made by "
                        "`mtllm tokenize` with its own"
                    )
            rows: Iterable[TextRow] | TokenStore = TokenStore(self.text)
            source |= TokenStore(self.text).identity()
        else:
            rows = self.rows(self.text)
        train("adapt", self, Data(rows, source=source), watch)


@dataclass
class Finetune(OnTask, FinetuneConfig):
    """Stage 2: the task teacher (--llm), the encoder alone (--encoder), or a stack directly (--model).

    Example: mtllm finetune --llm meta-llama/Meta-Llama-3-8B-Instruct --task sib200 --data DIR --output runs/teacher
    --seeds 42 43 44
    """

    REQUIRED: ClassVar = {
        "llm": "required, or `encoder` or `model`",
        "encoder": "required, or `llm` or `model`",
        "model": "required, or `llm` or `encoder`",
    }
    train: Annotated[OptimSettings, Flat] = field(default_factory=lambda: FinetuneConfig().train)

    @ends_process()
    def run(self) -> None:
        train_on_task("finetune", self)


@dataclass
class Distill(OnTask, DistillConfig):
    """Stage 3: distil the task teacher into an adapted stack, on English task text.

    Example: mtllm distill --model runs/fineweb --teacher runs/teacher/seed-{seed} --task sib200 --data DIR
    --output runs/sib200 --loss.head-kl 1 --loss.temperature 2 --teacher-cache runs/states --seeds 42 43 44
    """

    REQUIRED: ClassVar = {"model": "required", "teacher": "required"}
    train: Annotated[OptimSettings, Flat] = field(default_factory=lambda: DistillConfig().train)
    seeds: tuple[int, ...] = ()
    """One run per seed, into OUTPUT/seed-N, and OUTPUT/summary.json. The same command goes on where it stopped.
    {seed} in --model and --teacher stands for the seed."""

    @ends_process()
    def run(self) -> None:
        train_on_task("distill", self)


@dataclass
class Sft(Seeded, TextOptions, SftConfig):
    """Supervised fine-tuning on targets: [BOS] before <text> after target [EOS], the text read by the encoder.

    Example: mtllm sft --encoder facebook/nllb-200-distilled-600M --llm meta-llama/Meta-Llama-3-8B-Instruct
    --text pairs.jsonl --language-column language --no-train-llm --projection.kind mlp --projection.boundary
    --output runs/mapping
    """

    COLUMNS: ClassVar = ("pair_column", "target_column", "teacher_text_column", "finished_column")
    REQUIRED: ClassVar = {
        "text": "required, or `task`",
        "llm": "required without `model`",
        "encoder": "required without `model`, or `reader` llm",
    }
    text: str = ""
    """Texts with their targets: a .jsonl, .csv, .tsv or .parquet file (also .gz), a folder or glob of them, or a hub
    dataset "org/name" or "org/name:config"."""
    pair_column: str | None = None
    """Column of a second text, where rows are pairs."""
    target_column: str = "target"
    """Column of what is to be written."""
    teacher_text_column: str | None = None
    """Column of the same text in a language that the LLM reads well, for the teacher of `loss.kl`."""
    finished_column: str | None = None
    """Column that says whether a target has its end, true or false, as `mtllm respond` writes it: after one that was
    cut no end is learned."""
    task: str = ""
    """Instead of text: a task by name (mnli, sib200, ...), a .yaml file that describes one, or "folder"; its English
    train split is read, and the names of its labels, the right choices or the answers are the targets; with labels, the
    checkpoint that is best on its English dev split, by the likelihood of the labels, is kept."""
    data: str = ""
    """The task's folder in its published format, or its hub name; by default its own."""
    train: Annotated[OptimSettings, Flat] = field(default_factory=lambda: SftConfig().train)

    @ends_process()
    def run(self) -> None:
        if bool(self.task) == bool(self.text):
            raise ValueError("name either --task with --data, or --text")
        columns = ("text_column", *self.COLUMNS, "language_column")
        for name in (*columns, "language", "split", "limit") if self.task else ("data",):
            if (value := getattr(self, name)) != getattr(type(self), name):
                other = "text" if self.task else "task"
                raise ValueError(f"--{name.replace('_', '-')} {value}: goes with --{other} alone")
        if not self.task:
            record = self.record("text", *columns, "language", "split", "limit", "quoted")
            train("sft", self, Data(self.rows(self.text), source=record))
            return
        source = TextSource(task=self.task, data=self.data, quoted=self.quoted)
        rows, labels, valid = source.load()
        if labels:
            train("sft", self, Data(rows, valid or (), labels, source.record()))
        else:  # a generated task's answers are targets already, and nothing chooses among them
            train("sft", self, Data(rows, source=source.record()))


@dataclass
class Compress(Pushed, TextOptions, CompressConfig):
    """Distil a whole encoder into the smaller one that `mtllm shrink` made of it: its states at every kept layer, on
    unlabelled text.

    Text is needed in every language that the smaller encoder is for, in one file, folder or glob. `mtllm convert --to
    encoder` makes of the result a plain encoder for the other commands. Source: arXiv 2306.01709.
    Example: mtllm compress --encoder e5-en-sw --teacher models/e5-small --text eng_swh.txt --output runs/e5-en-sw
    --max-steps 20000 --bf16
    """

    REQUIRED: ClassVar = {"text": "required", "encoder": "required", "teacher": "required"}
    text: str = ""
    """Text: .txt, .jsonl, .csv, .tsv or .parquet (also .gz), a folder or glob of them, or a hub dataset "org/name" or
    "org/name:config"."""
    train: Annotated[OptimSettings, Flat] = field(default_factory=lambda: CompressConfig().train)

    @ends_process()
    def run(self) -> None:
        if not self.text:
            raise ValueError("--text is missing: name a file, folder, glob or hub dataset")
        if (Path(self.text) / STORE_FILE).is_file():
            raise ValueError(f"--text {self.text}: holds tokens, made by `mtllm tokenize`; name the text itself")
        source = self.record("text", "text_column", *self.READING)
        train("compress", self, Data(self.rows(self.text), source=source))
