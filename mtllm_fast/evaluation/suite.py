"""`evaluate`: models x seeds x languages on one task, zero-shot, resumable language by language."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.prompt import Prompt
from ..inference.progress import Advance, progress_bar
from ..inference.respond import Decoding
from .aggregate import ModelCells, summarise
from .cells import CellStore
from .languages import describe
from .results import Scores
from .rows import SAMPLE_SEED
from .runs import NOT_RUN, Run
from .settings import PROBE_ROWS, Settings
from .statistics import RESAMPLES
from .systems import Dtype, System, named_systems, translate_test
from .tasks import Task, canonical_split, get_task

if TYPE_CHECKING:
    from ..inference.translator import Translator
    from .systems import Model, Models

CENTRED = (
    "centred: encoder states of every language but English were moved by the difference of two means, that of {count} "
    "unlabelled English texts and that of {count} of its own, from the training splits"
)


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
    against: str | None = None,
    probe_source: str | Path | None = None,
    probe_rows: int = PROBE_ROWS,
    alignment: bool = False,
    centre: int = 0,
    prompt: Prompt | None = None,
    max_new_tokens: int = Decoding.max_new_tokens,
    cells: str | Path | CellStore | None = None,
    resamples: int = RESAMPLES,
    max_tokens: int | None = None,
    device: str | None = None,
    dtype: Dtype | None = None,
    progress: bool = True,
) -> Scores:
    """Accuracy and macro-F1 of models in every language of a task, with nothing learned from the foreign languages.

    A model with a task head for the task's labels is read by it. A model without a head that was taught to write is
    read by the log-likelihood of the labels, or of a row's choices, after its prompt. Others (that were only adapted)
    are read by a linear probe fitted on the English training split, and the scores say so. Where the answer is to be
    written (MGSM), it is, greedily, and accuracy is the exact match of `answers`. A language that the MT model
    has no code for is named in `ModelScores.skipped` and runs only if `language_map` says what it is to be read as.
    Scores carry bootstrap intervals, and with translate-test, or another model to compare `against`, an exact paired
    test against it (see `statistics`). Where one model lacks rows of a language (translations that are missing), all
    are scored on the rows that every one has, and the scores say how many.

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
        translations: instead of it, translations that exist (see `translations.join_translations`). Models that were
            trained to read a text together with its translation read them, too, and need no `teacher` for it.
        teacher: the classifier of the target language that reads the translations; a list for several seeds.
        target: MT code of the language that translate-test translates into.
        num_beams: 1 for greedy decoding.
        against: name of the model that the others are compared with; by default translate-test, where there is one.
        probe_source: where a probe's English rows come from, if not from `source` (XNLI's folder has no training
            split).
        probe_rows: at most this many training rows for a probe, spread over the file.
        alignment: also compare the pooled states of every language with those of the English rows of the same id (for
            sets whose rows with one id are translations of each other).
        centre: so many unlabelled texts of every language's training split, and of English's, say by how much the
            encoder states of the language are moved, so that their means agree (`Engine.encoder_mean`); 0: not.
        prompt: what models without a prompt of their own answer: then they are read by what they write.
        max_new_tokens: most tokens of a written answer.
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
    task = get_task(task, source)
    source = source or task.default_source
    if source is None:
        raise ValueError(f"source is missing: the folder or hub name of the task {task.name!r}")
    settings = Settings(
        task=task,
        source=source,
        split=canonical_split(split),
        limit=limit,
        language_map=dict(language_map or {}),
        probe_source=probe_source,
        probe_rows=probe_rows,
        alignment=alignment,
        centre=centre,
        prompt=prompt,
        max_new_tokens=max_new_tokens,
        resamples=resamples,
        max_tokens=max_tokens,
        device=device,
        dtype=dtype,
        store=cells if isinstance(cells, CellStore) or cells is None else CellStore(cells),
    )
    systems = named_systems(models)
    if translations is not None:
        systems = [replace(one, partners=translations, target=target) if one.fused else one for one in systems]
    beside = any(system.partners is not None for system in systems)
    if beside and centre:
        raise ValueError(f"centre={centre}: is of texts that are read alone, not with their translations")
    given = None if beside and teacher is None else translations
    baseline = translate_test(translator, given, teacher, target=target, num_beams=num_beams, device=device)
    if baseline is not None:
        systems.append(baseline)
    if not systems:
        raise ValueError("models: none given, and no translator")
    reference = against or (None if baseline is None else baseline.name)
    if reference is not None and reference not in (names := [system.name for system in systems]):
        raise ValueError(f"against={against!r}: is none of the models; they are {', '.join(names)}")
    chosen = settings.choose(languages)
    for system in systems:  # before hours of evaluation
        system.check(task, prompt)
    if translations is not None:
        settings.data.check_translations(chosen, translations, target)
    total = len(chosen) * sum(len(system.models) for system in systems)
    with progress_bar(task.name, total, progress, unit="languages") as advance:
        results = [_run(system, settings, chosen, advance) for system in systems]
    return _scores(settings, chosen, results, reference)


def _run(system: System, settings: Settings, languages: Sequence[str], advance: Advance) -> ModelCells:
    """All seeds of one system."""
    runs = []
    for index in range(len(system.models)):
        run = Run(system, index, settings)
        runs.append(run)
        for language in languages:
            advance(0, f"{system.name} {language}")
            run.evaluate(language)
            advance(1)
        run.finish()
    methods = dict.fromkeys(run.method for run in runs if run.method != NOT_RUN)
    if len(methods) > 1:
        raise ValueError(
            f"model={system.name!r}: its seeds are read by {' and by '.join(methods)}; compare like with like"
        )
    return ModelCells(
        name=system.name,
        method=next(iter(methods), NOT_RUN),
        notes=list(dict.fromkeys(note for run in runs for note in run.notes)),
        seeds=[run.cells for run in runs],
        alignment=[run.alignment for run in runs],
        pairs=runs[0].pairs,
    )


def _scores(settings: Settings, languages: Sequence[str], results: list[ModelCells], reference: str | None) -> Scores:
    """Raises ValueError where no language was run."""
    if all(cell.skipped for result in results for seed in result.seeds for cell in seed.values()):
        reasons = "; ".join(f"{language}: {cell.skipped}" for language, cell in results[0].seeds[0].items())
        raise ValueError(f"languages: none of them can be run ({reasons[:300]}); language_map can name MT codes")
    task, data = settings.task, settings.data
    described = {code: describe(code, task.mt_code(code)) for code in languages}
    return Scores(
        task=task.name,
        source=str(settings.source),
        split=settings.split,
        labels=task.labels,
        english=task.english,
        languages=tuple(languages),
        language_map=dict(settings.language_map),
        models=summarise(
            results,
            described,
            english=task.english,
            num_classes=len(task.labels),
            reference=reference,
            resamples=settings.resamples,
            available={code: data.available_rows(code) for code in languages},
        ),
        limit=settings.limit,
        limit_seed=None if settings.limit is None else SAMPLE_SEED,
        versions={package: version(package) for package in ("mtllm-fast", "torch", "transformers")},
        reference=reference,
        resamples=settings.resamples,
        issues=[*data.issues(languages), *([CENTRED.format(count=settings.centre)] if settings.centre else [])],
        described=described,
    )
