"""The subcommands of `mtllm`: one dataclass each, its fields are the options and `run` does the work."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from .data.read import TextRow, read_rows
from .training import AdaptConfig, DistillConfig, FinetuneConfig, OptimSettings

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
            from .evaluation import get_task

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
        from .training import adapt

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
        from .training import finetune

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
        from .training import distill

        rows, _, valid = self.source.load()
        settings = base_settings(self, DistillConfig)
        finish("distill", self.output, distill(settings, rows, valid, dataclasses.asdict(self.source)))


def mapping(pairs: Sequence[str], option: str) -> dict[str, str]:
    """("arb_Latn=arb_Arab", ...) as a dictionary."""
    out = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not (key and sign and value):
            raise ValueError(f"{option} {pair!r}: expected CODE=MT_CODE, e.g. arb_Latn=arb_Arab")
        out[key] = value
    return out


@dataclass
class Evaluate:
    """Zero-shot accuracy and macro-F1 in every language of a task.

    A model without a task head is read by a linear probe fitted on the English training split, and the report says so.
    Example: mtllm evaluate --model runs/sib200 --task sib200 --data DIR --translator facebook/nllb-200-distilled-600M
    --teacher runs/teacher --output runs/sib200-scores
    """

    model: tuple[str, ...] = ()
    """One or more model folders."""
    task: str = ""
    """sib200, nusax, nli, or "folder" for a folder of <language>/<split>.tsv files."""
    data: str = ""
    """The task's folder in its published format, or its hub name."""
    languages: tuple[str, ...] = ("all",)
    """The data set's own codes, or "all"."""
    language_map: tuple[str, ...] = ()
    """CODE=MT_CODE for languages that the MT encoder has no code for, e.g. arb_Latn=arb_Arab."""
    split: str = "test"
    limit: int | None = None
    """Only the first rows of each language."""
    translator: str = ""
    """MT model for translate-test (folder or hub name); needs `teacher`."""
    teacher: str = ""
    """Task teacher that classifies the translations."""
    num_beams: int = 1
    probe_data: str = ""
    """Where a probe's English rows come from, if not from `data`."""
    max_tokens: int = 8192
    """Token budget of one forward pass."""
    output: str = ""
    """Folder for scores.json, scores.md and scores.png; "" puts them into `evaluation` inside the (first) model."""
    overwrite: bool = False
    """Replace a report that is already there."""
    progress: bool = True

    def run(self) -> None:
        from .evaluation import evaluate
        from .reporting import check_output, print_scores, write_report

        for name in ("task", "data"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is missing")
        if not self.model and not self.translator:
            raise ValueError("--model is missing: name at least one model folder")
        output = self.output or str(Path((*self.model, self.teacher)[0]) / "evaluation")
        check_output(output, overwrite=self.overwrite)
        scores = evaluate(
            list(self.model) if self.model else {},
            self.task,
            self.data,
            languages="all" if self.languages == ("all",) else list(self.languages),
            language_map=mapping(self.language_map, "--language-map"),
            split=self.split,
            limit=self.limit,
            translator=self.translator or None,
            teacher=self.teacher or None,
            num_beams=self.num_beams,
            probe_source=self.probe_data or None,
            max_tokens=self.max_tokens,
            progress=self.progress,
        )
        paths = write_report(scores, output, overwrite=self.overwrite)
        print_scores(scores)
        print("written:", ", ".join(str(path) for path in paths.values()))


@dataclass
class Translate:
    """Translate the texts of a file; the result is a .jsonl file with id, language, text and translation."""

    model: str = ""
    """MT model: folder or hub name."""
    input: str = ""
    """.txt, .jsonl, .csv, .tsv or .parquet (also .gz), a folder or glob of them, or a hub dataset."""
    output: str = ""
    """The .jsonl file to write."""
    text_column: str = "text"
    language: str = "eng_Latn"
    """MT code of the texts' language."""
    language_column: str | None = None
    target: str = "eng_Latn"
    num_beams: int = 1
    max_tokens: int = 8192
    overwrite: bool = False

    def run(self) -> None:
        from .evaluation import Translator

        output = output_file(self, (".jsonl",))
        rows = read_rows(
            self.input, text_column=self.text_column, language=self.language, language_column=self.language_column
        )
        translator = Translator.from_pretrained(self.model)
        temporary = output.with_name(f".{output.name}.{os.getpid()}")
        count = 0
        try:
            with temporary.open("w", encoding="utf-8") as handle:
                for window in windows(rows, 1024):
                    codes = [row.language for row in window]
                    settings = {"num_beams": self.num_beams, "max_tokens": self.max_tokens}
                    texts = translator.translate([row.text for row in window], codes, self.target, **settings)  # type: ignore[arg-type]
                    for row, text in zip(window, texts):
                        record = {"id": row.id, "language": row.language, "text": row.text, "translation": text}
                        handle.write(json.dumps(record, ensure_ascii=False) + "\n")
                    count += len(window)
            os.replace(temporary, output)
        finally:
            temporary.unlink(missing_ok=True)
        print(
            f"translate: {count} texts to {self.target} -> {output}; "
            f"{translator.truncated} truncated, {translator.unfinished} met the length limit"
        )


@dataclass
class Encode:
    """Embed the texts of a file: mean-pooled last hidden states, one float32 row per text, in the order of the file."""

    model: str = ""
    """MTLLM folder."""
    input: str = ""
    """.txt, .jsonl, .csv, .tsv or .parquet (also .gz), a folder or glob of them, or a hub dataset."""
    output: str = ""
    """The .npy file to write, (N, D) float32."""
    text_column: str = "text"
    language: str = "eng_Latn"
    """MT code of the texts' language."""
    language_column: str | None = None
    normalize: bool = False
    """Scale every embedding to length 1."""
    max_tokens: int = 8192
    overwrite: bool = False

    def run(self) -> None:
        import numpy as np

        from .inference import Engine
        from .models import MTLLM

        output = output_file(self, (".npy",))
        rows = read_rows(
            self.input, text_column=self.text_column, language=self.language, language_column=self.language_column
        )
        engine = Engine(MTLLM.from_pretrained(self.model), max_tokens=self.max_tokens)
        raw, temporary = (output.with_name(f".{output.name}.{os.getpid()}{end}") for end in (".raw", ""))
        count = 0
        try:
            with raw.open("wb") as handle:  # the number of rows is known only at the end, and .npy starts with it
                for part in engine.encode_rows(rows):
                    if self.normalize:
                        part /= np.maximum(np.linalg.norm(part, axis=1, keepdims=True), 1e-12)
                    handle.write(part.tobytes())
                    count += len(part)
            header = {"descr": "<f4", "fortran_order": False, "shape": (count, engine.model.hidden_size)}
            with temporary.open("wb") as handle, raw.open("rb") as source:
                np.lib.format.write_array_header_1_0(handle, header)
                while block := source.read(1 << 22):
                    handle.write(block)
            os.replace(temporary, output)
        finally:
            raw.unlink(missing_ok=True)
            temporary.unlink(missing_ok=True)
        skipped = rows.counts.empty + rows.counts.failed
        print(
            f"encode: {count} x {engine.model.hidden_size} -> {output}; "
            f"{engine.truncated} truncated, {skipped} rows skipped"
        )


def output_file(command: Any, endings: tuple[str, ...]) -> Path:
    """The checked output path of a command with `model`, `input` and `output`."""
    for name in ("model", "input", "output"):
        if not getattr(command, name):
            raise ValueError(f"--{name} is missing")
    path = Path(command.output)
    if path.suffix not in endings:
        raise ValueError(f"--output {command.output}: expected a name ending in {' or '.join(endings)}")
    if path.exists() and not command.overwrite:
        raise ValueError(f"--output {command.output}: exists; pass --overwrite to replace it")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def windows(rows: Iterable[TextRow], size: int) -> Iterable[list[TextRow]]:
    window: list[TextRow] = []
    for row in rows:
        window.append(row)
        if len(window) == size:
            yield window
            window = []
    if window:
        yield window


@dataclass
class Demo:
    """The whole method in a generated world: no download of models or data."""

    output: str = "runs/demo"
    seed: int = 0
    from_scratch: bool = False
    """Also train the world's MT model and LLM, instead of using the shipped ones."""

    def run(self) -> None:
        from .miniworld.demo import run_demo

        run_demo(output=self.output, seed=self.seed, from_scratch=self.from_scratch)


@dataclass
class Doctor:
    """Versions, devices, and which attention backends and kernels will run here, and why not."""

    def run(self) -> None:
        from .doctor import print_diagnosis

        print_diagnosis()


SETTINGS: dict[str, type] = {
    "demo": Demo,
    "adapt": Adapt,
    "finetune": Finetune,
    "distill": Distill,
    "evaluate": Evaluate,
    "translate": Translate,
    "encode": Encode,
    "doctor": Doctor,
}
