"""From rows to logits of a task's labels: by the model's task head, by what it would write, by a linear probe, or
through translation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from ..data.prompt import Prompt
from ..data.read import TextRow
from ..data.text_tokens import of_readable
from .answers import EXTRACTION, is_right, number_of
from .probe import LinearProbe, fit_probe
from .tasks import Task, nearest

if TYPE_CHECKING:
    from ..data.tokenise import StackTokenizer
    from ..inference.engine import Engine
    from ..inference.respond import Decoding
    from ..inference.translator import Translator
    from ..models import MTLLM

Logits = npt.NDArray[np.float32]  # (N, C)
States = npt.NDArray[np.float32]  # (N, D)


class Scorer(Protocol):
    """Reads rows of a task.

    method: how, in words; notes: what a reader of its scores has to know; mt_languages: MT codes it can be told -> the
    code it then uses, None if it reads without any.
    """

    method: str
    notes: list[str]
    mt_languages: Mapping[str, str] | None

    def readable(self, rows: Sequence[TextRow]) -> list[int]:
        """Which of the rows no tokenizer fails on."""

    def logits(self, rows: Sequence[TextRow]) -> Logits:
        """One column per label of the task, in its order."""

    def counts(self) -> dict[str, int]:
        """Things counted since it was made, e.g. truncated texts."""


class EngineScorer:
    """A model that reads the rows itself. written: its answers to the rows of the last call, where it wrote them."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.written: tuple[str, ...] = ()
        self.notes: list[str] = []
        self.mt_languages = _mt_languages(engine.model)
        self._truncated_before = engine.truncated

    def readable(self, rows: Sequence[TextRow]) -> list[int]:
        return readable(self.engine.tokenizer, self.engine.model.side, rows)

    def states(self, rows: Sequence[TextRow]) -> States:
        """Pooled hidden states."""
        return np.concatenate(list(self.engine.encode_rows(rows)))

    def counts(self) -> dict[str, int]:
        return {"truncated": self.engine.truncated - self._truncated_before}


class HeadScorer(EngineScorer):
    """The class with the highest logit of the model's head, in the task's label order."""

    method = "task head"

    def __init__(self, engine: Engine, task: Task, name: str) -> None:
        super().__init__(engine)
        labels = engine.model.config.labels
        check_labels(labels, task, name)
        self.choice = task.kind == "choice"
        self.order = [list(labels).index(label) for label in task.labels] if labels else []

    def logits(self, rows: Sequence[TextRow]) -> Logits:
        if self.choice:
            return _finite(self.engine.score_choices(rows), len(rows))
        logits = self.engine.classify(rows)
        if logits.shape != (len(rows), len(self.order)):
            raise ValueError(f"model: logits of shape {logits.shape} for {len(rows)} rows and {len(self.order)} labels")
        return _finite(logits[:, self.order], len(rows))


class LikelihoodScorer(EngineScorer):
    """The label, or the choice of a row, that a model without a head is likeliest to write after its prompt."""

    def __init__(self, engine: Engine, task: Task, name: str, prompt: Prompt) -> None:
        super().__init__(engine)
        self.task, self.prompt, self.cut = task, prompt, 0
        what = "choices" if task.kind == "choice" else "labels"
        self.method = f"log-likelihood of the {what}"
        self.notes = [
            f"{name} has no task head: its answer is the likeliest of the {what}, written out after {_around(prompt)} "
            "(sum of log probabilities, end token included)."
        ]

    def logits(self, rows: Sequence[TextRow]) -> Logits:
        from ..inference.likelihood import log_likelihoods

        candidates = [row.choices or self.task.labels for row in rows]
        found, truncated = log_likelihoods(
            self.engine.model, rows, candidates, self.prompt, max_tokens=self.engine.max_tokens
        )
        self.cut += truncated
        logits = np.full((len(rows), max(map(len, candidates), default=0)), -np.inf, np.float32)
        for row, values in zip(logits, found, strict=True):
            row[: len(values)] = values
        return _finite(logits, len(rows))

    def counts(self) -> dict[str, int]:
        return {"truncated": self.cut}


class GenerationScorer(EngineScorer):
    """Whether what a model writes after its prompt, greedily, is the right answer: logits of wrong and right."""

    method = "generation"

    def __init__(self, engine: Engine, name: str, prompt: Prompt, decoding: Decoding) -> None:
        from ..inference.respond import Responder

        super().__init__(engine)
        self.responder = Responder(engine.model, prompt, decoding)
        self.unfinished = self.without_number = 0
        self.notes = [
            f"{name} writes its answers greedily after {_around(prompt)}, at most {decoding.max_new_tokens} tokens; "
            f"{EXTRACTION} has to be the right one."
        ]

    def logits(self, rows: Sequence[TextRow]) -> Logits:
        answers = [one for (one,) in self.responder.answers(rows)]
        self.written = tuple(answer.text for answer in answers)
        self.unfinished += sum(not answer.finished for answer in answers)
        self.without_number += sum(number_of(text) is None for text in self.written)
        right = [is_right(text, str(row.target)) for text, row in zip(self.written, rows, strict=True)]
        return np.array([[not hit, hit] for hit in right], np.float32).reshape(-1, 2)

    def counts(self) -> dict[str, int]:
        return {
            "truncated": self.responder.truncated,
            "unfinished_answers": self.unfinished,
            "answers_without_a_number": self.without_number,
        }


class ProbeScorer(EngineScorer):
    """A linear probe on pooled states, fitted on English training rows and applied as it is to every language."""

    method = "linear probe"

    def __init__(
        self,
        engine: Engine,
        task: Task,
        name: str,
        *,
        source: str | Path,
        max_rows: int,
        language_map: Mapping[str, str],
    ) -> None:
        super().__init__(engine)
        if task.kind == "choice":
            raise ValueError(
                f"model={name!r}: has no task head, and {task.name!r} is a multiple-choice task, for which there is no "
                "probe; train a head with `mtllm finetune` or `mtllm distill`"
            )
        train, dev, held_out = probe_rows_of(task, name, source, max_rows)
        code = language_map.get(task.english)
        if code is not None:
            train, dev = ([replace(row, language=code) for row in rows] for rows in (train, dev))
        train, dev = ([rows[i] for i in self.readable(rows)] for rows in (train, dev))
        self.probe: LinearProbe = fit_probe(
            self.states(train), _gold(train), self.states(dev), _gold(dev), len(task.labels)
        )
        self.notes = [
            f"{name} has no task head: a linear probe (multinomial logistic regression on its mean-pooled states) "
            f"was fitted on {len(train)} English rows of {source}; L2 penalty {self.probe.penalty:g} chosen on "
            f"{len(dev)} {held_out} rows (accuracy {100 * self.probe.dev_accuracy:.1f} %). "
            "Every language is read by this one probe, fitted without a row of that language."
        ]

    def logits(self, rows: Sequence[TextRow]) -> Logits:
        return _finite(self.probe.logits(self.states(rows)), len(rows))


class TranslateScorer:
    """Translate-test: rows go into the target language by the MT model, then to a classifier that reads that language.

    Rows that are already in the target language are not translated.
    """

    method = "translate-test"

    def __init__(
        self,
        translator: Translator,
        classifier: Scorer,
        *,
        target: str,
        keep: Sequence[str] = (),
        **decoding: int,
    ) -> None:
        self.translator, self.classifier, self.target, self.decoding = translator, classifier, target, decoding
        self.keep = keep  # endings of the rows that are in the target language already
        self.mt_languages: Mapping[str, str] | None = _known_codes(translator.languages)
        self._before = (translator.truncated, translator.unfinished)
        settings = ", ".join(f"{key} {value}" for key, value in decoding.items())
        self.notes = [
            f"translate-test: {translator.name} into {target} ({settings}), then the classifier",
            *classifier.notes,
        ]

    def readable(self, rows: Sequence[TextRow]) -> list[int]:
        return readable(self.translator.tokenizer, "mt", rows)

    def logits(self, rows: Sequence[TextRow]) -> Logits:
        foreign = [index for index, row in enumerate(rows) if row.language != self.target]
        translated = self.translator.translate_rows(
            [rows[index] for index in foreign], target=self.target, keep=self.keep, **self.decoding
        )
        english = list(rows)
        for index, row in zip(foreign, translated, strict=True):
            english[index] = row
        return self.classifier.logits(english)

    def counts(self) -> dict[str, int]:
        truncated, unfinished = self._before
        return {
            "truncated_before_translation": self.translator.truncated - truncated,
            "unfinished_translations": self.translator.unfinished - unfinished,
            **self.classifier.counts(),
        }


def _around(prompt: Prompt) -> str:
    """A prompt in words."""
    return f"the prompt {prompt.before + '<text>' + prompt.after!r}"


def check_labels(labels: Sequence[str] | None, task: Task, name: str) -> None:
    """ValueError unless a head with these labels (None: one that scores choices) can answer the task."""
    if task.kind == "choice":
        if labels is not None:
            raise ValueError(
                f"model={name!r}: its head has the labels {', '.join(labels)}, but {task.name!r} is multiple choice"
            )
        return
    if labels is None:
        raise ValueError(
            f"model={name!r}: its head scores choices, but {task.name!r} has the labels {', '.join(task.labels)}"
        )
    if sorted(labels) != sorted(task.labels):
        raise ValueError(
            f"model={name!r}: its head has the labels {', '.join(labels)}, "
            f"but {task.name!r} has {', '.join(task.labels)}"
        )


def _mt_languages(model: MTLLM) -> Mapping[str, str] | None:
    """MT codes a model can be told -> the code it then uses; None for a model that is told none (an LLM, XLM-R)."""
    tokenizer = model.tokenizer
    if tokenizer is None or model.side == "llm" or not tokenizer.languages:
        return None
    return _known_codes(tokenizer.languages) | tokenizer.fallbacks


def _known_codes(languages: Sequence[str]) -> dict[str, str]:
    # StackTokenizer takes "en" for M2M100's "__en__"
    return {code.strip("_"): code for code in languages} | {code: code for code in languages}


def probe_rows_of(task: Task, name: str, source: str | Path, max_rows: int) -> tuple[list[TextRow], list[TextRow], str]:
    """English training and dev rows for a probe; without a dev split every tenth training row is held out."""
    needs = f"model={name!r} has no task head, so a probe needs English training rows of the task {task.name!r}"
    remedy = "give a model with a head, or probe_source=<a source with an English train split>"
    if task.english not in task.languages(source):
        raise ValueError(f"{needs}, but {str(source)!r} has no {task.english!r}; {remedy}")
    splits = task.splits(source, task.english)
    if "train" not in splits:
        raise ValueError(f"{needs}, but {str(source)!r} has only {', '.join(splits)} for {task.english!r}; {remedy}")
    train = task.rows(source, task.english, "train")
    if "dev" in splits:
        dev, held_out = task.rows(source, task.english, "dev"), "English dev"
    else:
        dev, held_out = train[::10], "held-out English train"
        train = [row for index, row in enumerate(train) if index % 10]
    if len(train) < 2:
        raise ValueError(f"{needs}, but {str(source)!r} has only {len(train)} of them; {remedy}")
    step = max(1, -(-len(train) // max_rows))  # spread over the file: published sets are sometimes sorted by label
    return train[::step], dev, held_out


def readable(tokenizer: StackTokenizer, side: str, rows: Sequence[TextRow]) -> list[int]:
    """Which of the rows the tokenizer does not fail on."""
    _, bad = of_readable(rows, lambda some: tokenizer.side(side, some, ends=False))
    return [index for index in range(len(rows)) if index not in bad]


def _gold(rows: Sequence[TextRow]) -> list[int]:
    return [row.label for row in rows if row.label is not None]


def _finite(logits: Logits, rows: int) -> Logits:
    """The logits; -inf is how a row says that it has fewer choices than others."""
    if len(logits) != rows:
        raise ValueError(f"model: {len(logits)} rows of logits for {rows} rows")
    if np.isnan(logits).any() or not np.isfinite(logits.max(axis=1, initial=-np.inf)).all():
        raise ValueError("model: its logits are not finite; was the training stable, and is the dtype wide enough?")
    return logits


def check_codes(language_map: Mapping[str, str], languages: Sequence[str], known: Mapping[str, str] | None) -> None:
    """ValueError for a `language_map` whose keys are not languages of the task or whose values are not MT codes."""
    for language, code in language_map.items():
        if language not in languages:
            raise ValueError(
                f"language_map: {language!r} is not a language of the source; nearest: {nearest(language, languages)}"
            )
        if known is not None and code not in known:
            raise ValueError(
                f"language_map: {language!r} -> {code!r}: no such MT code; nearest are {nearest(code, known)}"
            )
