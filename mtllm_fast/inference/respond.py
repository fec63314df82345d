"""A model's own answers to texts, into a file: what it writes after them, or how likely it is to write given words.

An answer is a function of the model, the text, the prompt and, where it is sampled, of the seed, the row's number in
the source and the number of the sample: not of batches, of processes, or of where a stopped run went on (up to the
rounding of a batch's shape, as everywhere). Training on an LLM's own answers is SDRRL's way (arXiv 2402.12204).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..data.prompt import Prompt
from ..data.read import TextRow
from ..models import MTLLM
from ..models.writing import Prompts, check_writer, ends_of, write
from .records import Kind, Made, RecordFile, RecordReport, write_records

if TYPE_CHECKING:
    from .likelihood import HeadLabeller, Labeller


@dataclass(frozen=True)
class Decoding:
    """How answers are written.

    Raises:
        ValueError: settings out of range.
    """

    max_new_tokens: int = 256
    """Most tokens of an answer, its end token with them."""
    temperature: float = 0.0
    """0 takes the likeliest token each time; above, tokens are sampled, logits divided by it."""
    samples: int = 1
    """Answers to each text; more than one need a temperature."""
    seed: int = 0
    """Of the sampling."""
    max_tokens: int = 8192
    """Most tokens of one batch: prompts, padding and new tokens."""

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("samples", 1), ("seed", 0), ("max_tokens", 1)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"{name}={value}: must be at least {least}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature}: must be at least 0; 0 takes the likeliest token")
        if self.samples > 1 and not self.temperature:
            raise ValueError(f"samples={self.samples}: greedy answers are all the same; give a temperature")
        if self.max_tokens <= self.max_new_tokens:
            raise ValueError(
                f"max_tokens={self.max_tokens}: a batch holds no prompt and answer of max_new_tokens="
                f"{self.max_new_tokens}; raise it"
            )


@dataclass(frozen=True)
class Answer:
    """A written answer: its text without the end token, the mean log probability of its tokens, and whether it ended by
    itself."""

    text: str
    score: float
    finished: bool


class Responder:
    """Answers of one model under one prompt.

    Args:
        model: an MTLLM with a causal LLM, reader "stack" or "llm".

    Attributes:
        truncated: texts cut so far.

    Raises:
        ValueError: a model that cannot write.
    """

    def __init__(self, model: MTLLM, prompt: Prompt, decoding: Decoding) -> None:
        self.model, self.prompt, self.decoding = model, prompt, decoding
        self.tokenizer = check_writer(model)
        ends_of(model)
        self.truncated = 0

    def answers(self, rows: Sequence[TextRow], first: int = 0) -> list[list[Answer]]:
        """Answers to each of N rows, one or `samples`, the number of the first of which in its source is `first`."""
        how = self.decoding
        uniforms = None
        if how.temperature:
            keys = [[(how.seed, first + row, copy) for copy in range(how.samples)] for row in range(len(rows))]
            uniforms = np.array([[_numbers(key, how.max_new_tokens) for key in some] for some in keys])
        prompts = Prompts.of(self.model, rows, self.prompt)
        self.truncated += prompts.truncated
        found = write(
            self.model,
            prompts,
            max_new_tokens=how.max_new_tokens,
            max_tokens=how.max_tokens,
            temperature=how.temperature,
            uniforms=uniforms,
        )
        texts = iter(
            self.tokenizer.llm.batch_decode(
                [one.ids[:-1] if one.finished else one.ids for some in found for one in some],
                skip_special_tokens=True,
                clean_up_tokenization_spaces=False,
            )
        )
        return [[Answer(next(texts), one.score, one.finished) for one in some] for some in found]


def _numbers(key: Sequence[int], count: int) -> NDArray[np.float64]:
    return np.random.default_rng(key).random(count)


@dataclass(frozen=True)
class Output:
    """Where answers go, and how the work is shared; see `write_records`.

    Fields:
        settings: plain data that tells the texts and the model apart from others; compared, with the prompt and how
            answers are made, before a stopped run goes on, and written to `<path>.run.json`.
        also: what else of a row is written: text_pair, teacher_text, teacher_pair, gold (its own label, by name).
    """

    path: str | Path
    settings: Mapping[str, object]
    also: tuple[str, ...] = ()
    window: int = 1024
    overwrite: bool = False
    rank: int = 0
    world_size: int = 1
    progress: bool = False


def respond_file(responder: Responder, rows: Iterable[TextRow], output: Output) -> RecordReport:
    """Write a record per answer: id, language, text, (text_pair, teacher_text, ...), sample, target, score, finished.

    `target` is the answer as it was written, without the end token; `score` the mean log probability of its tokens, end
    token included; `finished` says whether it ended before the limit. Of the report's counts, "unfinished" did not, and
    "empty" hold nothing but white space.

    Raises:
        ValueError: as `write_records`; a row that cannot be read. Interrupted: Ctrl-C.
    """

    def make(first: int, window: list[TextRow]) -> Made:
        before = responder.truncated
        records = [
            {**about, "sample": number, "target": one.text, "score": round(one.score, 6), "finished": one.finished}
            for about, answers in zip(_about(window, first), responder.answers(window, first), strict=True)
            for number, one in enumerate(answers)
        ]
        return Made(records, responder.truncated - before)

    columns: dict[str, Kind] = {"sample": "int64", "target": "string", "score": "float64", "finished": "bool"}
    counted = {
        "unfinished": lambda record: not record["finished"],
        "empty": lambda record: not record["target"].strip(),
    }
    settings = {"prompt": asdict(responder.prompt), **asdict(responder.decoding)}
    return _write(rows, output, columns, settings, make, counted)


def label_file(labeller: Labeller | HeadLabeller, rows: Iterable[TextRow], output: Output) -> RecordReport:
    """Write a record per row: id, language, text, (text_pair, teacher_text, ...), label, log_likelihoods.

    `log_likelihoods` are those of each label, in their order, written out with the end token, or a task head's
    log-probabilities; `label` is the likeliest.

    Raises:
        ValueError: as `write_records`; a row that cannot be read. Interrupted: Ctrl-C.
    """
    labels = labeller.labels

    def make(first: int, window: list[TextRow]) -> Made:
        before = labeller.truncated
        records = [
            {**about, "label": labels[int(np.argmax(values))], "log_likelihoods": [round(x, 6) for x in values]}
            for about, values in zip(_about(window, first, labels), labeller.log_likelihoods(window), strict=True)
        ]
        return Made(records, labeller.truncated - before)

    columns: dict[str, Kind] = {"label": "string", "log_likelihoods": "float64s"}
    prompt = None if labeller.prompt is None else asdict(labeller.prompt)
    settings = {"prompt": prompt, "labels": list(labels), "max_tokens": labeller.max_tokens}
    counted = {f"label {name!r}": partial(_has_label, name) for name in labels}
    return _write(rows, output, columns, settings, make, counted)


def _has_label(label: str, record: Mapping[str, object]) -> bool:
    return record["label"] == label


def _about(rows: Sequence[TextRow], first: int, labels: Sequence[str] = ()) -> list[dict[str, object]]:
    """What stands before an answer: the row's name (its number in the source where it has none), language and texts,
    and its own label."""
    return [
        {
            "id": str(first + place) if row.id is None else row.id,
            "language": row.language,
            "text": row.text,
            "text_pair": row.text_pair,
            "teacher_text": row.teacher_text,
            "teacher_pair": row.teacher_pair,
            "gold": labels[row.label] if labels and row.label is not None else None,
        }
        for place, row in enumerate(rows)
    ]


def _write(
    rows: Iterable[TextRow],
    output: Output,
    columns: Mapping[str, Kind],
    settings: Mapping[str, object],
    make: Callable[[int, list[TextRow]], Made],
    counted: Mapping[str, Callable[[Mapping[str, Any]], bool]],
) -> RecordReport:
    about: dict[str, Kind] = dict.fromkeys(("id", "language", "text", *output.also), "string")
    file = RecordFile(
        Path(output.path),
        "respond",
        {**about, **columns},
        {"format": 1, **output.settings, **settings, "window": output.window},
        source="text",
        counted=counted,
    )
    return write_records(
        file,
        rows,
        make,
        window=output.window,
        overwrite=output.overwrite,
        rank=output.rank,
        world_size=output.world_size,
        progress=output.progress,
    )
