"""A suite: models x seeds x tasks x languages, described in one YAML file.

    output: runs/suite                      # cells and reports; go on there after an interruption
    seeds: [42, 43, 44]                     # what {seed} stands for; may be left out
    models:                                 # name in the report: folder or hub name
      MT-LLM: runs/{task}/mt-llm/seed-{seed}
      MT encoder: {sib200: runs/encoder, nusax: [runs/a, runs/b]}      # by task; a list: one entry per seed
    tasks:                                  # a name, or a mapping with any of the options below
      - sib200
      - {task: nusax, data: DIR, name: sentiment, split: test, languages: [acehnese], language_map: {ngaju: ind_Latn},
         limit: 100, centre: 200, probe_data: DIR}
      - {task: mgsm, data: DIR, before: "", after: "\\nAnswer:", max_new_tokens: 256}   # of models without own prompt
      - {task: folder, data: DIR, name: mine, quoted: false}             # quote marks in .csv and .tsv are text
    translate_test:                         # may be left out
      teacher: runs/{task}/teacher/seed-{seed}               # may be left out, see below
      translations: runs/{task}/translations.parquet         # or translator: an MT model, with num_beams: 1
      target: eng_Latn
    against: MT encoder                     # whom the others are compared with; by default translate-test
    alignment: true                         # compare hidden states with English (tasks whose rows are parallel)
    resamples: 2000                         # of the bootstrap
    max_tokens: 8192                        # token budget of one forward pass
    dtype: bfloat16                         # of the weights; may be left out: as stored

Models that were trained to read a text together with its translation (`finetune --fusion.layers`) read the translations
of translate_test beside the texts; if only they are to, `teacher` is left out.

`{task}` stands for the name of a task's entry. Paths are relative to the working directory, as on the command line.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar, get_type_hints

from ..data.prompt import prompt_of
from ..inference.respond import Decoding
from ..yaml_file import converted, read_yaml, wrong_type
from .cells import CellStore
from .results import Scores
from .statistics import RESAMPLES
from .suite import evaluate
from .systems import TRANSLATE_TEST, Dtype
from .tasks import get_task

Folders = str | list[str] | dict[str, str | list[str]]  # for every task, one per seed, or by task
_BY_HAND = ("models", "tasks", "translate_test", "teacher", "translator", "translations")  # checked where they are read


@dataclass
class TaskEntry:
    """One task of a suite; `name` in the report and for {task}, by default the task's own."""

    task: str = ""
    name: str = ""
    data: str | None = None
    quoted: bool = True
    split: str = "test"
    languages: str | list[str] = "all"
    language_map: dict[str, str] = field(default_factory=dict)
    limit: int | None = None
    centre: int = 0
    probe_data: str | None = None
    before: str | None = None
    after: str | None = None
    max_new_tokens: int = Decoding.max_new_tokens


@dataclass
class TranslateTest:
    """The baseline: `teacher` reads translations, made by `translator` or existing."""

    teacher: Folders = ""
    translator: Folders | None = None
    translations: Folders | None = None
    target: str = "eng_Latn"
    num_beams: int = 1


@dataclass
class Suite:
    """See the module's docstring."""

    output: str = ""
    models: dict[str, Folders] = field(default_factory=dict)
    tasks: list[TaskEntry] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    translate_test: TranslateTest | None = None
    against: str | None = None
    alignment: bool = False
    resamples: int = RESAMPLES
    max_tokens: int | None = None
    device: str | None = None
    dtype: Dtype | None = None


def read_suite(path: str | Path) -> Suite:
    """Raises ValueError for a file that is missing, no YAML, or describes no suite; it names the entry."""
    where = f"suite={str(path)!r}"
    content = read_yaml(path, where)
    suite = suite_of(content, where)
    if not suite.models and suite.translate_test is None:
        raise ValueError(f"{where}: models: none given, and no translate_test")
    names = [*suite.models, *([] if suite.translate_test is None else [TRANSLATE_TEST])]
    if suite.against is not None and suite.against not in names:
        raise ValueError(f"{where}: against: {suite.against!r} is none of the models; they are {', '.join(names)}")
    for entry in suite.tasks:  # a folder that is missing or has no {seed} is an error of the file
        for name, folders in suite.models.items():
            _folders(folders, entry.name, suite.seeds, f"{where}: models: {name}")
        if suite.translate_test is not None:
            _translations(suite.translate_test, entry.name, suite.seeds, f"{where}: translate_test")
    return suite


def suite_of(content: object, where: str) -> Suite:
    """A suite from a mapping, whose models need not be there yet. Errors start with `where`."""
    suite = instance(Suite, content, where)
    if not isinstance(suite.tasks, list) or not suite.tasks:
        raise ValueError(f"{where}: tasks: expected a list with at least one task")
    entries = [
        TaskEntry(task=entry) if isinstance(entry, str) else instance(TaskEntry, entry, f"{where}: tasks[{index}]")
        for index, entry in enumerate(suite.tasks)
    ]
    for index, entry in enumerate(entries):
        if not entry.task:
            raise ValueError(f"{where}: tasks[{index}]: 'task' is missing")
        entry.name = entry.name or Path(entry.task).stem
    names = [entry.name for entry in entries]
    if len(set(names)) != len(names):
        raise ValueError(f"{where}: tasks: {', '.join(names)}: two have the same name; give one a 'name'")
    suite.tasks = entries
    if not isinstance(suite.models, dict):
        raise ValueError(f"{where}: models: expected a mapping of names to folders")
    if suite.translate_test is not None:
        suite.translate_test = instance(TranslateTest, suite.translate_test, f"{where}: translate_test")
    return suite


def run_suite(suite: Suite, *, progress: bool = True) -> tuple[list[Scores], CellStore]:
    """Evaluate every task of a suite, going on where an earlier run stopped.

    Returns:
        the scores of each task, and the store of cells, which says what was reused.

    Raises:
        ValueError: as `evaluate`. OSError: a cell cannot be written; those before it are kept.
    """
    if not suite.output:
        raise ValueError("output is missing: the suite needs a folder for its cells")
    results, total = [], CellStore(Path(suite.output) / "cells")
    for entry in suite.tasks:
        store = CellStore(total.folder / entry.name)
        where = f"task {entry.name!r}"
        test, teacher, given = suite.translate_test or TranslateTest(), None, dict[str, str]()
        if suite.translate_test is not None:
            if test.teacher:
                teacher = _folders(test.teacher, entry.name, suite.seeds, f"{where}: teacher")
            given = _translations(test, entry.name, suite.seeds, where)
        scores = evaluate(
            {
                name: _folders(folders, entry.name, suite.seeds, f"{where}: {name}")
                for name, folders in suite.models.items()
            },
            get_task(entry.task, entry.data, quoted=entry.quoted),
            entry.data,
            languages=entry.languages,
            language_map=entry.language_map,
            split=entry.split,
            limit=entry.limit,
            translator=given.get("translator"),
            translations=given.get("translations"),
            teacher=teacher,
            target=test.target,
            num_beams=test.num_beams,
            against=suite.against,
            probe_source=entry.probe_data,
            alignment=suite.alignment,
            centre=entry.centre,
            prompt=prompt_of(entry.before, entry.after),
            max_new_tokens=entry.max_new_tokens,
            cells=store,
            resamples=suite.resamples,
            max_tokens=suite.max_tokens,
            device=suite.device,
            dtype=suite.dtype,
            progress=progress,
        )
        scores.task = entry.name
        results.append(scores)
        total.reused, total.written = total.reused + store.reused, total.written + store.written
        total.stale.update(store.stale)
    return results, total


def _folders(given: Folders, task: str, seeds: list[int], where: str) -> list[str]:
    """The folders that an entry names for a task, one per seed."""
    if isinstance(given, Mapping):
        if task not in given:
            raise ValueError(f"{where}: names {', '.join(map(str, given))}, but not {task!r}")
        given = given[task]
    if isinstance(given, list):
        listed = [str(folder).replace("{task}", task) for folder in given]
        if not listed:
            raise ValueError(f"{where}: the list of seeds is empty")
        return listed
    if not isinstance(given, str) or not given:
        raise ValueError(f"{where}: {given!r}: expected a folder, a list of them, or a mapping by task")
    folder = given.replace("{task}", task)
    if "{seed}" not in folder:
        return [folder]
    if not seeds:
        raise ValueError(f"{where}: {given!r} has {{seed}}, but 'seeds' is not given")
    return [folder.replace("{seed}", str(seed)) for seed in seeds]


def _translations(test: TranslateTest, task: str, seeds: list[int], where: str) -> dict[str, str]:
    """The translator or the translations of a task, which the teacher's seeds share."""
    chosen = {}
    for name in ("translator", "translations"):
        given: Folders | None = getattr(test, name)
        if given is not None:
            folders = _folders(given, task, seeds, f"{where}: {name}")
            if len(folders) > 1:
                raise ValueError(f"{where}: {name}: {', '.join(folders)}: expected one, which all seeds share")
            chosen[name] = folders[0]
    return chosen


Kind = TypeVar("Kind")


def instance(kind: type[Kind], content: object, where: str) -> Kind:
    """An instance of a dataclass from a mapping, whose keys must be its fields, of their types.

    Raises:
        ValueError: another key or type. What `_BY_HAND` names is not checked.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{where}: expected a mapping, got {type(content).__name__}")
    hints = get_type_hints(kind)
    values = {str(key).replace("-", "_"): value for key, value in content.items()}
    for key in values:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, 1)
            raise ValueError(f"{where}: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        if key not in _BY_HAND:
            try:
                values[key] = converted(hints[key], values[key])
            except ValueError:
                raise ValueError(f"{where}: {key}: {wrong_type(values[key], hints[key])}") from None
    return kind(**values)
