"""mtllm evaluate."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from ..evaluation import Scores
    from ..evaluation.cells import CellStore


def mapping(pairs: Sequence[str], option: str) -> dict[str, str]:
    """("arb_Latn=arb_Arab", ...) as a dictionary."""
    codes = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not (key and sign and value):
            raise ValueError(f"{option} {pair!r}: expected CODE=MT_CODE, e.g. arb_Latn=arb_Arab")
        codes[key] = value
    return codes


@dataclass
class Evaluate:
    """Zero-shot accuracy and macro-F1 in every language of a task, or of all tasks, models and seeds of a suite.

    A model without a task head that was taught to write (`mtllm sft`) is read by the log-likelihood of the labels or
    choices, and writes its answers where the task wants them (mgsm). Another one is read by a linear probe fitted on
    the English training split. The report says which.
    A suite can be interrupted at any time: the same command goes on where it stopped and gives the same tables.
    Example: mtllm evaluate --suite suite.yaml
    Example: mtllm evaluate --model runs/sib200 --task sib200 --data DIR --translations runs/translations.parquet
    --teacher runs/teacher --output runs/sib200-scores
    """

    TOPICS: ClassVar = ("suite", "task")
    REQUIRED: ClassVar = {
        "suite": "required, or `model` and `task`",
        "model": "required without `suite`",
        "task": "required without `suite`",
    }
    suite: str = ""
    """A YAML file of models, seeds, tasks and languages (its keys: below, or `mtllm help suite`); of the
    other options only `output`, `overwrite` and `progress` go with it."""
    model: tuple[str, ...] = ()
    """One or more model folders."""
    task: str = ""
    """A task by name (sib200, nusax, nli, belebele, mgsm, ...), a .yaml file that describes one (its keys: below, or
    `mtllm help task`), or "folder" for a folder of <language>/<split>.tsv files."""
    data: str = ""
    """The task's folder in its published format, or its hub name; "" for the one that the task names."""
    quoted: bool = True
    """Quote marks in .csv and .tsv files of the task "folder" stand around fields; without, they are text."""
    languages: tuple[str, ...] = ("all",)
    """The data set's own codes, or "all"."""
    language_map: tuple[str, ...] = ()
    """CODE=MT_CODE for languages that the MT encoder has no code for, e.g. arb_Latn=arb_Arab."""
    split: str = "test"
    """Split that is scored: train, dev or test."""
    limit: int | None = None
    """Only so many rows of each language: a random sample with a fixed seed, by id, the same in every language."""
    translator: str = ""
    """MT model for translate-test (folder or hub name); needs `teacher`."""
    translations: str = ""
    """Instead of `translator`, translations that exist: a file or folder, e.g. from `mtllm translate`; needs
    `teacher`, or a model that was trained to read texts with their translations (`finetune --fusion.layers`)."""
    teacher: str = ""
    """Task teacher that classifies the translations."""
    num_beams: int = 1
    """Beams of `translator`; 1 for greedy decoding."""
    probe_data: str = ""
    """Where a probe's English rows come from, if not from `data`."""
    alignment: bool = False
    """Also compare hidden states with those of the English rows of the same id (for sets with parallel rows)."""
    centre: int = 0
    """So many unlabelled texts of each language's training split, and of English's, say by how much its encoder states
    are moved, so that their means agree; 0: not."""
    before: str | None = None
    """The prompt before a text, for models that have no prompt of their own (`mtllm sft` gives them one): they are then
    read by what they write."""
    after: str | None = None
    """Likewise the prompt between the text and what is written; by default a line break where `before` is given."""
    max_new_tokens: int = 256
    """Most tokens of a written answer (mgsm)."""
    resamples: int = 2000
    """Of the bootstrap behind the intervals."""
    max_tokens: int | None = None
    """Token budget of one forward pass; by default 8192 on a GPU, and on a CPU 2**19 over the hidden size, at least 512
    and at most 8192."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the models' weights, except those of `translator`; by default as they are stored."""
    cells: str = ""
    """Folder that keeps each finished language, so that an interrupted run goes on there."""
    output: str = ""
    """Folder for scores.html, .json, .csv, .tex, .md and .png; "" puts them into `evaluation` inside the (first) model,
    and for a suite into its own `output`."""
    overwrite: bool = False
    """Replace a report that is already there; a suite always does."""
    progress: bool = True
    """Show a progress bar; a line now and then where stderr is no terminal."""

    def run(self) -> None:
        if self.suite:
            self._run_suite()
            return
        from ..data.prompt import prompt_of
        from ..evaluation import evaluate
        from ..evaluation.cells import CellStore
        from ..evaluation.tasks import get_task
        from ..reporting import check_output, write_report
        from .files import check_given, check_least

        check_given(self, "task")
        check_least(self, limit=1, num_beams=1, resamples=1, max_tokens=1, max_new_tokens=1)
        if not self.model and not (self.translator or self.translations):
            raise ValueError("--model is missing: name at least one model folder")
        output = self.output or str(Path((*self.model, self.teacher)[0]) / "evaluation")
        check_output(output, overwrite=self.overwrite)
        store = CellStore(self.cells) if self.cells else None
        scores = evaluate(
            list(self.model) if self.model else {},
            get_task(self.task, self.data or None, quoted=self.quoted),
            self.data or None,
            languages="all" if self.languages == ("all",) else list(self.languages),
            language_map=mapping(self.language_map, "--language-map"),
            split=self.split,
            limit=self.limit,
            translator=self.translator or None,
            translations=self.translations or None,
            teacher=self.teacher or None,
            num_beams=self.num_beams,
            probe_source=self.probe_data or None,
            alignment=self.alignment,
            centre=self.centre,
            prompt=prompt_of(self.before, self.after),
            max_new_tokens=self.max_new_tokens,
            cells=store,
            resamples=self.resamples,
            max_tokens=self.max_tokens,
            dtype=self.dtype,
            progress=self.progress,
        )
        print_report([scores], [store] if store else [], write_report(scores, output, overwrite=self.overwrite))

    def _run_suite(self) -> None:
        from ..evaluation.suite_file import read_suite, run_suite
        from ..reporting import check_output, write_report

        for option in dataclasses.fields(self):
            given = getattr(self, option.name) != option.default
            if given and option.name not in ("suite", "output", "overwrite", "progress"):
                name = "no-quoted" if option.name == "quoted" else option.name.replace("_", "-")
                raise ValueError(f"--{name}: does not go with --suite; write it into the file")
        suite = read_suite(self.suite)
        suite.output = self.output or suite.output
        if not suite.output:
            raise ValueError(f"--output is missing, and {self.suite} names no 'output' either")
        check_output(suite.output, overwrite=True)
        results, store = run_suite(suite, progress=self.progress)
        print_report(results, [store], write_report(results, suite.output, overwrite=True))


def print_report(results: Sequence[Scores], stores: Sequence[CellStore], paths: Mapping[str, Path]) -> None:
    """Scores on the console, what was found finished, and where the files are."""
    from ..reporting import print_scores

    for scores in results:
        print_scores(scores)
    for store in stores:
        for note in store.notes():
            print(note)
    print("written:", ", ".join(map(str, paths.values())))
