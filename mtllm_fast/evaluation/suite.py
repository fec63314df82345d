"""`evaluate`: models x seeds x languages on one task, zero-shot, resumable language by language."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

from ..inference.progress import SECONDS_BETWEEN_LINES
from .aggregate import ModelCells, summarise
from .cells import CellStore
from .languages import describe
from .results import Scores
from .rows import SAMPLE_SEED, TaskRows
from .runs import (
    NOT_RUN,
    TRANSLATE_TEST,
    Contestant,
    Dtype,
    Lazy,
    Model,
    Options,
    Run,
    check_folder,
    check_seeds,
)
from .scorers import check_codes
from .statistics import RESAMPLES
from .tasks import Task, canonical_split, get_task, nearest
from .translate_test import Translator

CENTRED = (
    "centred: encoder states of every language but English were moved by the difference of two means, that of {count} "
    "unlabelled English texts and that of {count} of its own, from the training splits"
)

Models = Model | Sequence[Model] | Mapping[str, Model | Sequence[Model]]


def evaluate(
    models: Models,
    task: str | Task,
    source: str | Path | None = None,
    *,
    languages: str | Sequence[str] = "all",
    language_map: Mapping[str, str] | None = None,
    split: str = "test",
    limit: int | None = None,
    translator: Translator | str | Path | None = None,
    translations: str | Path | None = None,
    teacher: Model | Sequence[Model] | None = None,
    target: str = "eng_Latn",
    num_beams: int = 1,
    probe_source: str | Path | None = None,
    probe_rows: int = 20_000,
    alignment: bool = False,
    centre: int = 0,
    cells: str | Path | CellStore | None = None,
    resamples: int = RESAMPLES,
    max_tokens: int | None = None,
    device: str | None = None,
    dtype: Dtype | None = None,
    progress: bool = True,
) -> Scores:
    """Accuracy and macro-F1 of models in every language of a task, with nothing learned from the foreign languages.

    A model with a task head for the task's labels is read by it. A model without a head (one that was only adapted) is
    read by a linear probe fitted on the English training split, and the scores say so. A language that the MT model
    has no code for is named in `ModelScores.skipped` and runs only if `language_map` says what it is to be read as.
    Scores carry bootstrap intervals, and with translate-test an exact paired test against it (see `statistics`). Where
    one model lacks rows of a language (translations that are missing), all are scored on the rows that every one has,
    and the scores say how many.

    Args:
        models: one model, a list, or name -> model; each an MTLLM, an Engine, or a folder or hub name. In a mapping a
            list stands for the seeds of one model, whose scores are averaged. May be empty ({}) when only
            translate-test is wanted.
        task: a name of `tasks.TASKS`, "folder", a .yaml file that describes one, or a Task.
        source: folder in the task's published format, or a hub name; None for the one the task names.
        languages: "all", or the set's codes as a list or a comma-separated string.
        language_map: the set's code -> MT code, overriding the task's table, e.g. {"arb_Latn": "arb_Arab"}.
        split: "test", "dev" or "train".
        limit: only this many rows of each language: a random sample with a fixed seed, by id, so the same rows in every
            language (see `rows.sample`).
        translator: an MT model (a Translator, folder or hub name) for translate-test, which becomes one more model.
        translations: instead of it, translations that exist (see `translations.join_translations`).
        teacher: the classifier of the target language that reads the translations; a list for several seeds.
        target: MT code of the language that translate-test translates into.
        num_beams: 1 for greedy decoding.
        probe_source: where a probe's English rows come from, if not from `source` (XNLI's folder has no training
            split).
        probe_rows: at most this many training rows for a probe, spread over the file.
        alignment: also compare the pooled states of every language with those of the English rows of the same id (for
            sets whose rows with one id are translations of each other).
        centre: so many unlabelled texts of every language's training split, and of English's, say by how much the
            encoder states of the language are moved, so that their means agree (`Engine.encoder_mean`); 0: not.
        cells: folder for finished cells (or a CellStore). A run that is killed goes on there: each language of each
            model is kept as soon as it is done, and computed again only where model, data or settings have changed.
            Models must then be given by folder or hub name.
        resamples: of the bootstrap.
        max_tokens: token budget of one forward pass; None chooses it by device.
        device: where models given by name run; None: CUDA if there is one.
        dtype: of the weights of models given by name, except the translator's; None for the one they are stored in.
        progress: show a progress bar over languages.

    Raises:
        ValueError: an unknown task, language, split or map entry; labels that differ; nothing to run. Languages that
            were named one by one must be readable; with "all", one that is not is left out and named. Translations
            that join no row of their language, or none of any.
        OSError: a cell cannot be written; those before it are kept.
    """
    task, split = get_task(task, source), canonical_split(split)
    source = source or task.default_source
    if source is None:
        raise ValueError(f"source is missing: the folder or hub name of the task {task.name!r}")
    available = task.languages(source)
    chosen, explicit = _choose(languages, available)
    if (translator is None and translations is None) != (teacher is None):
        raise ValueError(
            "translator and teacher: translate-test needs both, an MT model (or translations) and a classifier of its "
            "output"
        )
    if translator is not None and translations is not None:
        raise ValueError("translator and translations: give one of them")
    if (max_tokens is not None and max_tokens < 1) or probe_rows < 2 or resamples < 1:
        raise ValueError(
            f"max_tokens={max_tokens}, probe_rows={probe_rows}, resamples={resamples}: expected at least 1, 2 and 1"
        )
    if dtype not in (None, *get_args(Dtype)):
        raise ValueError(f"dtype={dtype!r}: expected one of {', '.join(get_args(Dtype))}")
    if centre < 0:
        raise ValueError(f"centre={centre}: expected a number of texts, 0 for none")
    data = TaskRows(task, source, split, limit)
    if centre:
        data.unlabelled(task.english, centre)
    options = Options(
        task=task,
        data=data,
        languages=chosen,
        language_map=dict(language_map or {}),
        probe_source=probe_source or source,
        probe_rows=probe_rows,
        max_tokens=max_tokens,
        device=device,
        dtype=dtype,
        alignment=alignment,
        centre=centre,
        store=cells if isinstance(cells, CellStore) or cells is None else CellStore(cells),
    )
    contestants = [Contestant(name, seeds) for name, seeds in _named(models).items()]
    if teacher is not None:
        seeds = list(teacher) if isinstance(teacher, list | tuple) else [teacher]
        shared = Lazy(translator, device) if isinstance(translator, str | Path) else translator
        contestants.append(Contestant(TRANSLATE_TEST, seeds, shared, translations, target, num_beams))
    if not contestants:
        raise ValueError("models: none given, and no translator")
    check_codes(options.language_map, available, None)
    for contestant in contestants:  # before hours of evaluation
        for model in contestant.models:
            check_folder(model, task, contestant.name)
        check_seeds(contestant)
    for language in chosen if explicit else ():
        splits = task.splits(source, language)
        if split not in splits:
            found = ", ".join(splits) or "nothing"
            raise ValueError(f"split={split!r}: {str(source)!r} has only {found} for {language!r}")
        if problem := data.problem(language):
            raise ValueError(problem)
    if translations is not None:
        data.check_translations(chosen, translations, target)

    with _bar(len(chosen) * sum(len(one.models) for one in contestants), task.name, progress) as advance:
        ran = [_run(one, options, advance) for one in contestants]
    if all(cell.skipped for one in ran for seed in one.seeds for cell in seed.values()):
        reasons = "; ".join(f"{language}: {cell.skipped}" for language, cell in ran[0].seeds[0].items())
        raise ValueError(f"languages: none of them can be run ({reasons[:300]}); language_map can name MT codes")
    described = {code: describe(code, task.mt_code(code)) for code in chosen}
    reference = TRANSLATE_TEST if teacher is not None else None
    return Scores(
        task=task.name,
        source=str(source),
        split=split,
        labels=task.labels,
        english=task.english,
        languages=tuple(chosen),
        language_map=options.language_map,
        models=summarise(
            ran,
            described,
            english=task.english,
            num_classes=len(task.labels),
            reference=reference,
            resamples=resamples,
            available={code: data.available_rows(code) for code in chosen},
        ),
        limit=limit,
        limit_seed=None if limit is None else SAMPLE_SEED,
        versions={package: version(package) for package in ("mtllm-fast", "torch", "transformers")},
        reference=reference,
        resamples=resamples,
        issues=[*data.issues(chosen), *([CENTRED.format(count=centre)] if centre else [])],
        described={
            code: {"name": one.name, "family": one.family, "script": one.script, "resource": one.resource}
            for code, one in described.items()
        },
    )


def _run(one: Contestant, options: Options, advance: Callable[[str], None]) -> ModelCells:
    """All seeds of one contestant."""
    runs = []
    for index in range(len(one.models)):
        run = Run(one, index, options)
        runs.append(run)
        for language in options.languages:
            advance(f"{one.name} {language}")
            run.do(language)
        run.finish()
    methods = dict.fromkeys(run.method for run in runs if run.method != NOT_RUN)
    if len(methods) > 1:
        raise ValueError(
            f"model={one.name!r}: its seeds are read by {' and by '.join(methods)}; compare like with like"
        )
    notes = list(dict.fromkeys(note for run in runs for note in run.notes))
    return ModelCells(
        name=one.name,
        method=next(iter(methods), NOT_RUN),
        notes=notes,
        seeds=[run.cells for run in runs],
        alignment=[run.alignment for run in runs],
        pairs=runs[0].pairs,
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


def _named(models: Models) -> dict[str, list[Model]]:
    """Name -> its seeds."""
    if isinstance(models, Mapping):
        named = {
            str(name): list(found) if isinstance(found, list | tuple) else [found] for name, found in models.items()
        }
        for name, seeds in named.items():
            if not seeds:
                raise ValueError(f"models: {name!r} has no seeds")
            if name == TRANSLATE_TEST:
                raise ValueError(f"models: {name!r} is the name of the baseline; choose another")
        return named
    listed = list(models) if isinstance(models, list | tuple) else [models]
    named = {}
    for index, model in enumerate(listed):
        name = str(model) if isinstance(model, str | Path) else ("model" if len(listed) == 1 else f"model {index + 1}")
        if name in named:
            raise ValueError(f"models: {name!r} is given twice")
        named[name] = [model]
    return named


class _bar:
    """A progress bar on stderr, a line now and then where that is no terminal; entering gives a function that is told
    what comes next."""

    def __init__(self, total: int, title: str, shown: bool) -> None:
        from rich.console import Console
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
        terminal = sys.stderr.isatty()
        self.bar = Progress(*columns, console=Console(stderr=True), transient=True, disable=not (shown and terminal))
        self.plain, self.done, self.total, self.last = shown and not terminal, 0, total, time.monotonic()
        self.title, self.task = title, self.bar.add_task(title, total=total)
        self.started = False

    def __enter__(self) -> Any:
        self.bar.start()
        return self._next

    def _next(self, title: str) -> None:
        if self.plain and time.monotonic() - self.last >= SECONDS_BETWEEN_LINES:
            self.last = time.monotonic()
            print(f"{self.title}: {self.done} of {self.total}, now {title}", file=sys.stderr, flush=True)
        self.done += 1
        self.bar.update(self.task, description=f"{self.title} {title}", advance=1 if self.started else 0)
        self.started = True

    def __exit__(self, *error: Any) -> None:
        if error[0] is None:
            self.bar.update(self.task, advance=1)
        self.bar.stop()
