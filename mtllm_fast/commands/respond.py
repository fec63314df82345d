"""mtllm respond."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from ..data.prompt import Prompt, prompt_of
from .files import check_given, check_least, device_of, in_language, output_file, print_skipped, ranks, stoppable
from .options import TextOptions, check_text

if TYPE_CHECKING:
    from ..models import MTLLM


@dataclass
class Respond(TextOptions):
    """Write a model's own answers to the texts of a file, or the log-likelihood of given labels.

    Of a model with a task head, these are the head's log-probabilities, and it needs no causal LLM.

    The output has a record per answer: id, language, text, sample, target (the answer), score (mean log probability per
    token), finished; with --labels a record per text: id, language, text, label (the likeliest), log_likelihoods.
    OUTPUT.run.json says what made it. `mtllm sft --text OUTPUT --target-column target` trains on it. A stopped run goes
    on where it was when the same command is given again.
    Example: mtllm respond --llm meta-llama/Meta-Llama-3-8B-Instruct --text questions.jsonl --after $'\\nAnswer:'
    --output answers.jsonl
    """

    COLUMNS: ClassVar = ("pair_column", "teacher_text_column", "teacher_pair_column", "label_column", "id_column")
    REQUIRED: ClassVar = {
        "text": "required",
        "output": "required",
        "llm": "required, or `model`",
        "model": "required, or `llm`",
    }
    llm: str = ""
    """The LLM alone, reading its own tokens: folder or hub name."""
    model: str = ""
    """Instead of it a model folder of ours with a causal LLM, or with `labels` any that has a task head: a stack reads
    the texts through its encoder."""
    text: str = ""
    """.txt, .jsonl, .csv, .tsv or .parquet (also .gz), a folder or glob of them, or a hub dataset."""
    output: str = ""
    """The .jsonl or .parquet file to write."""
    pair_column: str | None = None
    """Column of a second text, where rows are pairs; it is written to the output, too."""
    teacher_text_column: str | None = None
    """Column of the same text in another language, which is written to the output, for a teacher that is to read it
    (`mtllm sft --teacher-text-column teacher_text`). A model that was trained to read a text with its translation
    (`mtllm finetune --fusion.layers`) reads it here, too; others do not."""
    teacher_pair_column: str | None = None
    """Likewise of the second text of a pair."""
    label_column: str | None = None
    """With `labels`, column of the label that a text has already: a name, or its number in `labels`. It is not read and
    written to the output as gold (`mtllm finetune --label-column gold`)."""
    id_column: str | None = None
    """Column with a name per row; by default their numbers, rows without text not counted."""
    language: str | None = None
    """MT code of the texts' language, which an encoder with languages needs, or else `language_column`."""
    limit: int | None = None
    """Only the first rows."""
    before: str | None = None
    """The prompt before the text, in which special tokens and {text} and {pair} count; by default the model's own."""
    after: str | None = None
    """The prompt between the text and the answer; by default the model's own, or a line break."""
    labels: tuple[str, ...] = ()
    """Write the log-likelihoods of these instead of answers; `mtllm finetune --soft-label-column log_likelihoods` of
    the same labels learns from them."""
    max_new_tokens: int = 256
    """Most tokens of an answer, its end token with them."""
    temperature: float = 0.0
    """0 takes the likeliest token each time; above, tokens are sampled, logits divided by it."""
    samples: int = 1
    """Answers to each text; more than one need a `temperature`."""
    seed: int = 0
    """Of the sampling, which depends on it and the row's number alone."""
    max_length: int | None = None
    """Most tokens of a text, which is cut there; by default 512 with `llm`, and what the model was saved with else."""
    max_tokens: int = 8192
    """Most tokens of one batch: prompts, padding and new tokens."""
    window: int = 1024
    """Texts that are sorted by length and saved together."""
    device: str | None = None
    """"cpu", "cuda", "cuda:1", ...; by default a GPU where there is one."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the weights; by default as they are stored."""
    overwrite: bool = False
    """Begin anew even where there is the output or a stopped run."""
    progress: bool = True
    """Show a progress bar; a line now and then where stderr is no terminal."""

    def run(self) -> None:
        from ..inference.device import check_device
        from ..inference.likelihood import HeadLabeller, Labeller, check_labels
        from ..inference.records import FORMATS
        from ..inference.respond import Decoding, Output, Responder, label_file, respond_file
        from ..jobs.fingerprint import of_model

        if bool(self.llm) == bool(self.model):
            raise ValueError("name either --llm LLM or --model FOLDER")
        check_given(self, "text")
        name = self.llm or self.model
        check_device(self.device)
        check_least(self, window=1, limit=1, max_length=4, max_tokens=1)
        check_text(self.text)
        decoding = Decoding()
        if self.labels:
            check_labels(self.labels)
            for setting in _WRITING[:-1]:  # a seed decides nothing here, as it decides nothing of greedy answers
                if getattr(self, setting) != getattr(decoding, setting):
                    raise ValueError(
                        f"--{setting.replace('_', '-')}: does not go with --labels, which writes no answers"
                    )
        elif self.label_column is not None:
            raise ValueError(f"--label-column {self.label_column}: goes with --labels, which it names one of")
        else:
            decoding = Decoding(**{setting: getattr(self, setting) for setting in _WRITING}, max_tokens=self.max_tokens)
        output = output_file(self, FORMATS)
        given = prompt_of(self.before, self.after)
        if given is not None and self.pair_column is None and "{pair}" in given.before + given.after:
            raise ValueError("--pair-column is missing: the prompt has {pair} in it")
        rows = self.rows(self.text, None if self.label_column is None else self.labels)
        rank, world_size, _ = ranks()
        device = device_of(self)
        model = self._loaded().to(device)
        tokenizer = model.require_tokenizer()
        if self.max_length is not None:
            tokenizer.max_mt_tokens = tokenizer.max_llm_tokens = self.max_length
        rows = in_language(rows, tokenizer, model.side, "respond")
        texts = {"text_pair": self.pair_column, "teacher_text": self.teacher_text_column}
        texts |= {"teacher_pair": self.teacher_pair_column, "gold": self.label_column}
        goes = Output(
            output,
            {
                "model": name,
                "weights": of_model(name),
                "reader": model.config.reader,
                "dtype": self.dtype,
                "device": device[:4],
                "max_length": tokenizer.mt_limit if model.side == "mt" else tokenizer.max_llm_tokens,
                **rows.identity(),
            },
            also=tuple(name for name, column in texts.items() if column is not None),
            window=self.window,
            overwrite=self.overwrite,
            rank=rank,
            world_size=world_size,
            progress=self.progress and rank == 0,
        )
        prompt = prompt_of(self.before, self.after, model.config.prompt) or Prompt()
        with stoppable("respond"):
            if self.labels:
                labeller: Labeller | HeadLabeller
                if model.head is not None:
                    labeller = HeadLabeller(model, self.labels, max_tokens=self.max_tokens)
                else:
                    labeller = Labeller(model, prompt, self.labels, max_tokens=self.max_tokens)
                report = label_file(labeller, rows, goes)
            else:
                report = respond_file(Responder(model, prompt, decoding), rows, goes)
        if not report.complete:
            print(f"respond: process {rank} of {world_size} is done; the last one to finish writes {output}")
            return
        before = f" ({report.resumed} of them by an earlier run)" if report.resumed else ""
        each = f" x {self.samples} answers" if self.samples > 1 else ""
        counted = "".join(f", {count} {_COUNTED.get(what, what)}" for what, count in report.counts.items())
        print(f"respond: {report.rows} texts{each} -> {output}{before}; {report.truncated} truncated{counted}")
        print_skipped(rows, "respond")

    def _loaded(self) -> MTLLM:
        import torch

        from ..models import MTLLM
        from ..models.names import is_path
        from ..models.storage import read_config

        dtype = getattr(torch, self.dtype) if self.dtype else None
        if self.llm:
            return MTLLM.stack(llm=self.llm, reader="llm", causal=True, dtype=dtype)
        if is_path(self.model):
            config = read_config(Path(self.model))
            if self.labels and config.head is not None:
                if self.before is not None or self.after is not None:
                    raise ValueError(f"--before, --after: --model {self.model} has a task head, which reads no prompt")
            elif config.reader == "encoder" or not config.causal:
                lacks = "no LLM" if config.reader == "encoder" else "a bidirectional LLM"
                raise ValueError(f"--model {self.model}: has {lacks}, and answers are written by a causal one")
        return MTLLM.from_pretrained(self.model, dtype=dtype)


_WRITING = ("max_new_tokens", "temperature", "samples", "seed")
_COUNTED = {"unfinished": "met the length limit"}  # as it is said of a count
