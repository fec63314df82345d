"""mtllm adapt | finetune | distill: the three training stages."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro

from ..data.read import TextRow, read_rows
from ..training import AdaptConfig, DistillConfig, FinetuneConfig, OptimSettings

Flat = tyro.conf.arg(name="")  # its fields are options without a prefix


def base_settings(command: Any, config_type: type) -> Any:
    """The part of a command's settings that its stage takes."""
    return config_type(**{f.name: getattr(command, f.name) for f in dataclasses.fields(config_type)})


def finish(stage: str, output: str, metrics: dict[str, Any]) -> None:
    """Say what a training run did."""
    if int(os.environ.get("RANK", "0")):
        return
    data = metrics.get("data", {})
    print(
        f"{stage}: {metrics.get('train_runtime', 0):.1f} s, "
        f"mean loss {metrics.get('train_loss', float('nan')):.4f} -> {output}"
    )
    truncated = {side: count for side, count in data.get("truncated", {}).items() if count}
    notes = [f"{count} texts truncated on the {side} side" for side, count in truncated.items()]
    if data.get("skipped_rows"):
        notes.append(f"{data['skipped_rows']} rows skipped as unusable")
    for code, count in data.get("fallbacks", {}).items():
        notes.append(f"{count} rows of {code} read as another language")
    for note in notes:
        print(f"{stage}: {note}")


@dataclass
class TextSource:
    """Where English task text comes from: a known task's folder, or a file with named columns."""

    task: str = ""
    """sib200, nusax, nli, or "folder"; its English train and dev splits are read from `data`."""
    data: str = ""
    """The task's folder in its published format, or its hub name."""
    text: str = ""
    """Instead of task and data: a .csv/.tsv/.jsonl/.parquet file of labelled English text."""
    text_column: str = "text"
    pair_column: str | None = None
    label_column: str = "label"
    labels: tuple[str, ...] = ()
    """Label names in order, for `text`."""
    valid: str = ""
    """Labelled English validation file, for `text`; the best checkpoint on it is kept."""

    def load(self) -> tuple[Iterable[TextRow], list[str], list[TextRow] | None]:
        """Training rows, label names, validation rows or None."""
        if bool(self.task) == bool(self.text):
            raise ValueError("name either --task with --data, or --text with --labels")
        if self.task:
            from ..evaluation import get_task

            if not self.data:
                raise ValueError(f"--data is missing: the folder or hub name of task {self.task!r}")
            task = get_task(self.task, self.data)
            splits = task.splits(self.data, task.english)
            if "train" not in splits:
                raise ValueError(
                    f"--data {self.data}: has no English train split (it has {', '.join(splits) or 'none'})"
                )
            rows: Iterable[TextRow] = task.rows(self.data, task.english, "train")
            valid = task.rows(self.data, task.english, "dev") if "dev" in splits else None
            return rows, list(task.labels), valid
        if len(self.labels) < 2:
            raise ValueError("--labels is missing: name the labels of --text in order, at least two")
        options = {
            "text_column": self.text_column,
            "pair_column": self.pair_column,
            "label_column": self.label_column,
            "labels": self.labels,
        }
        rows = read_rows(self.text, **options)  # type: ignore[arg-type]
        valid = list(read_rows(self.valid, **options)) if self.valid else None  # type: ignore[arg-type]
        return rows, list(self.labels), valid


@dataclass
class Adapt(AdaptConfig):
    """Stage 1: self-distillation of an LLM behind an MT encoder, on English text.

    Example: mtllm adapt --encoder facebook/nllb-200-distilled-600M --llm meta-llama/Meta-Llama-3-8B-Instruct
    --text HuggingFaceFW/fineweb:sample-10BT --output runs/fineweb --max-steps 10000 --bf16
    """

    text: str = ""
    """English text: .txt, .jsonl, .csv, .tsv or .parquet (also .gz), a folder or glob of them, or a hub dataset
    "org/name" or "org/name:config"."""
    text_column: str = "text"
    language: str = "eng_Latn"
    """MT code of the text's language."""
    language_column: str | None = None
    """Column with a code per row, instead of `language`."""
    split: str = "train"
    limit: int | None = None
    """Read at most this many rows."""
    train: Annotated[OptimSettings, Flat] = field(default_factory=OptimSettings)

    def run(self) -> None:
        from ..training import adapt

        if not self.text:
            raise ValueError("--text is missing: name a file, folder, glob or hub dataset")
        rows = read_rows(
            self.text,
            text_column=self.text_column,
            language=self.language,
            language_column=self.language_column,
            split=self.split,
            limit=self.limit,
        )
        source = {
            name: getattr(self, name)
            for name in ("text", "text_column", "language", "language_column", "split", "limit")
        }
        finish("adapt", self.output, adapt(base_settings(self, AdaptConfig), rows, source))


@dataclass
class Finetune(FinetuneConfig):
    """Stage 2: the task teacher (--llm), the encoder alone (--encoder), or a stack directly (--model).

    Example: mtllm finetune --llm meta-llama/Meta-Llama-3-8B-Instruct --source.task sib200 --source.data DIR
    """

    source: Annotated[TextSource, Flat] = field(default_factory=TextSource)
    train: Annotated[OptimSettings, Flat] = field(default_factory=lambda: FinetuneConfig().train)

    def run(self) -> None:
        from ..training import finetune

        rows, labels, valid = self.source.load()
        settings = base_settings(self, FinetuneConfig)
        finish("finetune", self.output, finetune(settings, rows, labels, valid, dataclasses.asdict(self.source)))


@dataclass
class Distill(DistillConfig):
    """Stage 3: distil the task teacher into an adapted stack, on English task text.

    Example: mtllm distill --model runs/fineweb --teacher runs/teacher --task sib200 --data DIR --output runs/sib200
    """

    source: Annotated[TextSource, Flat] = field(default_factory=TextSource)
    train: Annotated[OptimSettings, Flat] = field(default_factory=lambda: DistillConfig().train)

    def run(self) -> None:
        from ..training import distill

        rows, _, valid = self.source.load()
        settings = base_settings(self, DistillConfig)
        finish("distill", self.output, distill(settings, rows, valid, dataclasses.asdict(self.source)))
