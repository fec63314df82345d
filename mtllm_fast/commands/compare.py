"""mtllm compare: systems by their recipes, trained and scored side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import tyro

from ..failures import RunFailed
from ..jobs.durable import write_json, write_text
from .compare_file import Comparison, Contestant, read_comparison
from .recipe_record import MODELS
from .recipe_run import Known, RecipeRun, Stopped

if TYPE_CHECKING:
    from ..evaluation.cells import CellStore
    from ..evaluation.results import Scores
    from ..evaluation.suite_file import Folders, TaskEntry
    from ..reporting.comparison import Facts


@dataclass
class Compare:
    """Train systems by their recipes under several seeds, score all of them on the same tasks, and compare them.

    Writes the report of `mtllm evaluate --suite`, and OUTPUT/compare.md and .json: per system what training cost,
    whether labels of the test language were used, and the difference to the system named by `against`, on the same
    rows, a mean over languages with its bootstrap interval. The same command goes on where it was stopped. A training
    that fails is named at the end; the others are compared.
    Example: mtllm compare compare.yaml
    """

    TOPICS: ClassVar = ("compare",)
    REQUIRED: ClassVar = {"file": "required", "output": "required, or in the file"}
    file: Annotated[str, tyro.conf.Positional] = ""
    """The comparison, a .yaml file."""
    output: str = ""
    """Folder for runs, cells and reports, instead of the file's own."""
    progress: bool = True
    """Show a progress bar of the evaluation."""

    def run(self) -> None:
        if not self.file:
            raise ValueError("FILE is missing: name a .yaml file (`mtllm help compare`)")
        comparison = read_comparison(self.file)
        comparison.suite.output = self.output or comparison.suite.output
        if not comparison.suite.output:
            raise ValueError(f"--output is missing, and {self.file} names no 'output' either")
        runs = Runs(comparison)
        try:
            runs.train()
        except Stopped as stopped:
            print(f"compare: {stopped}", flush=True)
            raise SystemExit(stopped.code) from None
        results = runs.evaluate(self.progress)
        if results:
            runs.report(results)
        if runs.failed:
            count = len(runs.failed)
            raise RunFailed(
                f"{count} of {len(runs.jobs)} trainings or readings failed: " + "; ".join(map(str, runs.failed))
            )


@dataclass(frozen=True)
class Failure:
    """What could not be had of a system. `seed`: None where it was trained, and cannot do a task."""

    system: str
    task: str | None
    seed: int | None
    reason: str

    def __str__(self) -> str:
        seed = None if self.seed is None else f"seed {self.seed}"
        return f"{', '.join(filter(None, (self.system, self.task, seed)))}: {self.reason}"


@dataclass
class Runs:
    """The trainings of a comparison and their scores.

    Attributes:
        jobs: (system, task or None, seed) -> its run; all are checked before the first one starts.
    """

    comparison: Comparison
    failed: list[Failure] = field(default_factory=list)
    stores: list[CellStore] = field(default_factory=list)

    def __post_init__(self) -> None:
        suite = self.comparison.suite
        self.jobs: dict[tuple[str, str | None, int], RecipeRun] = {}
        for seed in suite.seeds:
            for contestant in self.comparison.contestants:
                for task in [entry.name for entry in suite.tasks] if contestant.by_task else [None]:
                    self.jobs[contestant.name, task, seed] = self._job(contestant, task, seed)

    def _job(self, contestant: Contestant, task: str | None, seed: int) -> RecipeRun:
        inputs = contestant.inputs(task, seed)
        models = {role: inputs.pop(role) for role in MODELS if role in inputs}
        try:
            return RecipeRun(
                contestant.recipe,
                str(Path(self.comparison.suite.output) / contestant.folder(task, seed)),
                data=contestant.recipe.complete(inputs),
                seed=seed,
                processes=self.comparison.processes,
                logs=True,
                **models,
            )
        except ValueError as error:
            raise ValueError(f"recipes: {contestant.name}: {error}") from None

    def train(self) -> None:
        """Every run that is not finished; one that fails is noted, and the next one started.

        Raises:
            Stopped: a signal was received.
        """
        known: Known = {}
        for number, ((name, task, seed), job) in enumerate(self.jobs.items(), 1):
            of_task = f", {task}" if task else ""
            print(f"{number} of {len(self.jobs)}: {name}{of_task}, seed {seed} -> {job.output}", flush=True)
            try:
                job.run(known)
            except Stopped:
                raise
            except (RunFailed, ValueError) as error:
                print(f"    failed: {error}", flush=True)
                self.failed.append(Failure(name, task, seed, str(error)))

    def _trained(self, name: str, task: str) -> list[RecipeRun]:
        """The finished runs of a system that are scored on a task, by seed."""
        runs = (job for (system, of, _), job in self.jobs.items() if system == name and of in (None, task))
        return [job for job in runs if job.record.finished]

    def evaluate(self, progress: bool) -> list[Scores]:
        """The scores of each task of which there is something to score."""
        from ..evaluation.suite_file import run_suite

        found = []
        for entry in self.comparison.suite.tasks:
            models: dict[str, Folders] = dict(self._able(entry))
            suite = replace(self.comparison.suite, tasks=[entry], models=models, seeds=[])
            if suite.translate_test is not None and suite.translate_test.teacher in self._names():
                teacher = models.get(str(suite.translate_test.teacher))
                test = None if teacher is None else replace(suite.translate_test, teacher=teacher)
                suite = replace(suite, translate_test=test)
            names = [*models, *([] if suite.translate_test is None else ["translate-test"])]
            if suite.against not in names:
                suite = replace(suite, against=None)
            if names:
                try:
                    scores, store = run_suite(suite, progress=progress)
                except ValueError as error:  # such as a text that no tokenizer of a system reads
                    self.failed.append(Failure("all systems", entry.name, None, str(error)))
                    continue
                found += scores
                self.stores.append(store)
        return found

    def _able(self, entry: TaskEntry) -> Iterator[tuple[str, list[str]]]:
        """Systems that can do a task, with the folders of their seeds; the others are noted."""
        from ..data.prompt import prompt_of
        from ..evaluation.systems import System
        from ..evaluation.tasks import get_task

        task = get_task(entry.task, entry.data, quoted=entry.quoted)
        for name in self._names():
            folders = [str(job.model) for job in self._trained(name, entry.name)]
            if not folders:
                continue
            try:
                System(name, folders).check(task, prompt_of(entry.before, entry.after))
            except ValueError as error:
                self.failed.append(Failure(name, entry.name, None, str(error)))
                continue
            yield name, folders

    def _names(self) -> list[str]:
        return [contestant.name for contestant in self.comparison.contestants]

    def report(self, results: Sequence[Scores]) -> None:
        """Write and print the suite's report and the comparison."""
        from ..reporting import write_report
        from ..reporting.comparison import comparison_table
        from .evaluate import print_report

        output = Path(self.comparison.suite.output)
        paths = write_report(results, output, overwrite=True)
        tables = {scores.task: comparison_table(scores, self._facts(scores.task)) for scores in results}
        lines = [f"# {', '.join(scores.task for scores in results)}: {len(self._names())} systems", ""]
        lines += [self._about(results), ""]
        for title, table in tables.items():
            lines += [f"## {title}", "", *table.markdown(), "", table.note, ""]
        lines += ["## Systems", "", *self._systems()]
        lines += ["", "## Failed", "", *(f"- {failure}" for failure in self.failed)] if self.failed else []
        paths |= {"compare": output / "compare.md", "compare_json": output / "compare.json"}
        write_text(paths["compare"], "\n".join([*lines, ""]))
        write_json(paths["compare_json"], self._data(results))
        print_report(results, self.stores, paths)
        for title, table in tables.items():
            print("\n".join([f"\n{title}:", *table.markdown()]))

    def _about(self, results: Sequence[Scores]) -> str:
        seeds = ", ".join(map(str, self.comparison.suite.seeds))
        against = dict.fromkeys(scores.reference for scores in results if scores.reference)
        paired = f" Gaps are to {', '.join(against)}, on the same rows." if against else ""
        return f"Seeds {seeds}.{paired} Intervals are over rows, languages and seeds fixed. By language: scores.md."

    def _systems(self) -> list[str]:
        lines = []
        for contestant in self.comparison.contestants:
            recipe = contestant.recipe
            changed = f" Set: `{' '.join(recipe.overrides)}`" if recipe.overrides else ""
            differs = f" Not as there: {recipe.differs}" if recipe.differs else ""
            lines.append(
                f"- **{contestant.name}**: {recipe.system} ({recipe.source}). {recipe.about}{differs}{changed}"
            )
        return lines

    def _facts(self, task: str) -> dict[str, Facts]:
        from ..reporting.comparison import Facts

        found = {}
        for contestant in self.comparison.contestants:
            runs = self._trained(contestant.name, task)
            failures = [one for one in self.failed if one.system == contestant.name and one.task in (None, task)]
            if runs:
                found[contestant.name] = Facts(
                    contestant.recipe.name,
                    contestant.recipe.labels_in_test_language,
                    sum(run.record.cost.seconds for run in runs) / len(runs),
                    sum(run.record.cost.cpu_seconds for run in runs) / len(runs),
                    len([one for one in failures if one.seed is not None]),
                )
        return found

    def _data(self, results: Sequence[Scores]) -> dict[str, Any]:
        """What compare.md says, as plain data; shares from 0 to 1."""
        systems: dict[str, Any] = {}
        for contestant in self.comparison.contestants:
            recipe = contestant.recipe
            runs = {key: job for key, job in self.jobs.items() if key[0] == contestant.name}
            systems[contestant.name] = {
                "recipe": recipe.name,
                **recipe.about_it(),
                "overrides": list(recipe.overrides),
                "training": [
                    {
                        "task": task,
                        "seed": seed,
                        "finished": job.record.finished,
                        "model": str(job.model),
                        **asdict(job.record.cost),
                        "steps": {name: asdict(step.cost) for name, step in job.record.steps.items()},
                    }
                    for (_, task, seed), job in runs.items()
                ],
                "tasks": {scores.task: _scored(scores, contestant.name) for scores in results},
            }
        return {
            "format": 1,
            "seeds": self.comparison.suite.seeds,
            "against": {scores.task: scores.reference for scores in results},
            "systems": systems,
            "failed": [asdict(failure) for failure in self.failed],
            "versions": results[0].versions,
        }


def _scored(scores: Scores, name: str) -> dict[str, Any] | None:
    """Means of a system over the non-English languages that all were run in; None where it was not scored."""
    model = next((model for model in scores.models if model.name == name), None)
    mean = None if model is None else model.overall("shared")
    if model is None or mean is None:
        return None
    english = model.languages.get(scores.english)
    return {
        "method": model.method,
        "seeds": model.seeds,
        **asdict(mean),
        "seed_means": model.seed_means,
        "english": None if english is None else english.accuracy,
    }
