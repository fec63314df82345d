"""`evaluate`: models x languages on one task, zero-shot."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..data.read import TextRow
from .metrics import accuracy, macro_f1
from .results import NO_MT_CODE, LanguageScore, ModelScores, Scores
from .scorers import Classes, Encoder, Scorer, TranslateScorer, check_codes, scorer
from .tasks import Task, canonical_split, get_task, nearest
from .translate_test import Translator

Model = Any  # MTLLM, an engine around one, or a folder or hub name of one


def evaluate(
    models: Model | Sequence[Model] | Mapping[str, Model],
    task: str | Task,
    source: str | Path,
    *,
    languages: str | Sequence[str] = "all",
    language_map: Mapping[str, str] | None = None,
    split: str = "test",
    limit: int | None = None,
    translator: Translator | str | Path | None = None,
    teacher: Model | None = None,
    target: str = "eng_Latn",
    num_beams: int = 1,
    probe_source: str | Path | None = None,
    probe_rows: int = 20_000,
    max_tokens: int = 8192,
    device: str | None = None,
    progress: bool = True,
) -> Scores:
    """Accuracy and macro-F1 of models in every language of a task, with nothing learned from the foreign languages.

    A model with a task head for the task's labels is read by it. A model without a head (one that was only adapted) is
    read by a linear probe fitted on the English training split, and the scores say so. A language that the MT model
    has no code for is named in `ModelScores.skipped` and runs only if `language_map` says what it is to be read as.

    Args:
        models: one model, a list, or name -> model; each an MTLLM, an Engine, or a folder or hub name. May be empty
            ({}) when only translate-test is wanted.
        task: a name of `tasks.TASKS`, "folder", or a Task.
        source: folder in the task's published format, or a hub name.
        languages: "all", or the set's codes as a list or a comma-separated string.
        language_map: the set's code -> MT code, overriding the task's table, e.g. {"arb_Latn": "arb_Arab"}.
        split: "test", "dev" or "train".
        limit: only the first rows of each language.
        translator, teacher: both or neither: an MT model (a Translator, folder or hub name) and a classifier of the
            target language; adds translate-test as one more model.
        target: MT code of the language that translate-test translates into.
        num_beams: 1 for greedy decoding.
        probe_source: where a probe's English rows come from, if not from `source` (XNLI's folder has no training
            split).
        probe_rows: at most this many training rows for a probe, spread over the file.
        max_tokens: token budget of one forward pass.
        device: where models given by name run; None: CUDA if there is one.
        progress: show a progress bar over languages.

    Raises:
        ValueError: an unknown task, language, split or map entry; labels that differ; a split without labels; nothing
            to run.
    """
    task, split = get_task(task, source), canonical_split(split)
    overrides = dict(language_map or {})
    available = task.languages(source)
    chosen, explicit = _choose(languages, available)
    if (translator is None) != (teacher is None):
        raise ValueError(
            "translator and teacher: translate-test needs both, an MT model and a classifier of its output"
        )
    if max_tokens < 1 or probe_rows < 2:
        raise ValueError(f"max_tokens={max_tokens}, probe_rows={probe_rows}: expected at least 1 and 2")
    if explicit:
        for language in chosen:  # before any model is loaded
            if split not in task.splits(source, language):
                found = ", ".join(task.splits(source, language)) or "nothing"
                raise ValueError(f"split={split!r}: {str(source)!r} has only {found} for {language!r}")

    def make(model: Model, name: str) -> Scorer:
        engine = _engine(model, max_tokens, device)
        return scorer(
            engine, task, name, probe_source=probe_source or source, probe_rows=probe_rows, language_map=overrides
        )  # fmt: skip

    scorers: dict[str, Scorer] = {name: make(model, name) for name, model in _named(models).items()}
    if translator is not None:
        if not isinstance(translator, Translator) and isinstance(translator, str | Path):
            translator = Translator.from_pretrained(translator, device=device)
        classifier: Any = make(teacher, "teacher")
        scorers["translate-test"] = TranslateScorer(
            translator, classifier, target=target, num_beams=num_beams, max_tokens=max_tokens
        )
    if not scorers:
        raise ValueError("models: none given, and no translator")
    for one in scorers.values():
        check_codes(overrides, available, one.mt_languages)

    results = {name: ModelScores(name, one.method, notes=list(one.notes)) for name, one in scorers.items()}
    with _bar(len(chosen), task.name, progress) as advance:
        for language in chosen:
            advance(language)
            if split not in task.splits(source, language):
                for result in results.values():
                    result.skipped[language] = f"no {split} split"
                continue
            rows = task.rows(source, language, split, limit=limit)
            for name, one in scorers.items():
                _run(one, results[name], task, language, rows, overrides)
    if not any(result.languages for result in results.values()):
        reasons = "; ".join(
            f"{language}: {reason}" for result in results.values() for language, reason in result.skipped.items()
        )
        raise ValueError(f"languages: none of them can be run ({reasons[:300]}); language_map can name MT codes")
    for name, one in scorers.items():
        results[name].counts = one.counts()
    return Scores(
        task=task.name,
        source=str(source),
        split=split,
        labels=task.labels,
        english=task.english,
        languages=tuple(chosen),
        language_map=overrides,
        models=list(results.values()),
        limit=limit,
        versions={package: version(package) for package in ("mtllm-fast", "torch", "transformers")},
    )


def _run(
    one: Scorer, result: ModelScores, task: Task, language: str, rows: Sequence[TextRow], overrides: Mapping[str, str]
) -> None:
    """Score one model in one language, or note why it is skipped."""
    code, mapped = task.mt_code(language), language in overrides
    if mapped:
        code = overrides[language]
    if one.mt_languages is not None:
        if (
            code is None and language in one.mt_languages
        ):  # the model's tokenizer was saved with an explicit fallback for it
            code = language
        if code is None:
            result.skipped[language] = NO_MT_CODE
            return
        if code not in one.mt_languages:
            result.skipped[language] = f"MT code {code} unknown to the model"
            return
        mapped = mapped or one.mt_languages[code] != code
        code = one.mt_languages[code]
        rows = [row if row.language == code else replace(row, language=code) for row in rows]
    start = time.perf_counter()
    predictions: Classes = one.predict(rows)
    time_s = time.perf_counter() - start
    gold = [row.label for row in rows if row.label is not None]
    result.languages[language] = LanguageScore(
        mt_code=code if one.mt_languages is not None else None,
        mapped=mapped and one.mt_languages is not None,
        rows=len(rows),
        accuracy=accuracy(predictions, gold),
        macro_f1=macro_f1(predictions, gold, len(task.labels)),
        blank=sum(not row.text.strip() or (row.text_pair is not None and not row.text_pair.strip()) for row in rows),
        time_s=time_s,
    )


def _choose(languages: str | Sequence[str], available: Sequence[str]) -> tuple[list[str], bool]:
    """The languages asked for, and whether they were named one by one."""
    if languages == "all":
        return list(available), False
    names = [name.strip() for name in languages.split(",")] if isinstance(languages, str) else list(languages)
    names = [name for name in dict.fromkeys(names) if name]
    if not names:
        raise ValueError("languages: none given; name some of the set's codes, or 'all'")
    for name in names:
        if name not in available:
            raise ValueError(f"languages: {name!r} is not in this source; nearest are {nearest(name, available)}")
    return names, True


def _named(models: Model | Sequence[Model] | Mapping[str, Model]) -> dict[str, Model]:
    if isinstance(models, Mapping):
        return {str(name): model for name, model in models.items()}
    listed = list(models) if isinstance(models, list | tuple) else [models]
    named: dict[str, Model] = {}
    for index, model in enumerate(listed):
        name = str(model) if isinstance(model, str | Path) else ("model" if len(listed) == 1 else f"model {index + 1}")
        if name in named:
            raise ValueError(f"models: {name!r} is given twice")
        named[name] = model
    return named


def _engine(model: Model, max_tokens: int, device: str | None) -> Encoder:
    if hasattr(model, "classify") and hasattr(model, "encode_rows"):
        return model
    from ..inference.engine import Engine

    if isinstance(model, str | Path):
        import torch

        from ..models import MTLLM

        model = MTLLM.from_pretrained(model)
        device = device or ("cuda" if torch.cuda.is_available() else None)
    return Engine(model, max_tokens=max_tokens, device=device)


class _bar:
    """A progress bar over languages; entering gives a function that is told the language that comes next."""

    def __init__(self, total: int, title: str, shown: bool) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, transient=True, disable=not shown)
        self.title, self.task = title, self.bar.add_task(title, total=total)
        self.started = False

    def __enter__(self) -> Any:
        self.bar.start()
        return self._next

    def _next(self, language: str) -> None:
        self.bar.update(self.task, description=f"{self.title} {language}", advance=1 if self.started else 0)
        self.started = True

    def __exit__(self, *error: Any) -> None:
        if error[0] is None:
            self.bar.update(self.task, advance=1)
        self.bar.stop()
