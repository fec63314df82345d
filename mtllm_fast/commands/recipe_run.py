"""A recipe's steps, run one after the other, each in a process of its own.

A process of its own: a step is then the very command that a user would type. Nothing that an earlier step left in
libraries or on a GPU reaches it, its time and memory are known, and one that is killed for its memory takes no other
with it. It costs some seconds of imports a step. Signals that ask to stop are passed on to the step. After a kill -9
of this process the step goes on by itself: the same command then finds its folder taken, and later finds the step
finished.

    OUTPUT/recipe.json      the recipe, what it was given, and what each step cost
    OUTPUT/STEP.yaml        the options of a step: `mtllm COMMAND --config OUTPUT/STEP.yaml` does it by hand
    OUTPUT/STEP             what it made
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..failures import RunFailed
from ..jobs.durable import FolderLock, check_folder_above, write_text
from ..jobs.fingerprint import sha256_of_json
from ..jobs.measured import Used, run_measured
from ..training.processes import INTERRUPTED
from ..training.provenance import provenance
from ..training.run_folder import FREE, RESULT
from .recipe_file import Recipe, Step, fill, stated
from .recipe_record import MODELS, RecipeRecord, StepRecord, identity, read_record
from .table import SHARED

Known = dict[str, tuple[Path, StepRecord]]  # what a step computes -> where a finished run of it lies, and its record


class Stopped(RunFailed):
    """The run was asked to stop, and what its step had is saved. `code`: what the process is to exit with."""

    def __init__(self, received: signal.Signals, step: str) -> None:
        super().__init__(f"{received.name}: stopped in step {step}; the same command goes on from there")
        self.code = INTERRUPTED if received == signal.SIGINT else 0


@dataclass
class RecipeRun:
    """A recipe, what it is given, and the folder it runs in. Making one checks all of that, and writes nothing.

    Fields:
        data: role -> value, as `Recipe.given` gives it.
        processes: of each step whose work several can share, on this machine.
        logs: what a step writes goes to OUTPUT/STEP.log, and not where this process writes.

    Raises:
        ValueError: something is missing, or given and not used; OUTPUT holds other files, or a run of another recipe,
            of other data or other models.
    """

    recipe: Recipe
    output: str
    encoder: str = ""
    llm: str = ""
    data: Mapping[str, str] = field(default_factory=dict)
    seed: int = 42
    processes: int = 1
    logs: bool = False

    def __post_init__(self) -> None:
        if not self.output:
            raise ValueError("--output is missing: name a folder")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed {self.seed}: must be in [0, 2**32)")
        if self.processes < 1:
            raise ValueError(f"--processes {self.processes}: must be at least 1")
        recipe, self.folder = self.recipe, Path(self.output)
        for role in MODELS:
            value = getattr(self, role)
            if role in recipe.uses and not value:
                raise ValueError(f"--{role} is missing: recipe {recipe.name} uses it")
            if value and role not in recipe.uses:
                raise ValueError(f"--{role} {value}: recipe {recipe.name} uses no {role}")
        self.given = {role: getattr(self, role) for role in MODELS if role in recipe.uses} | dict(self.data)
        check_folder_above("--output", self.folder)
        before = read_record(self.folder)
        self.record = RecipeRecord(
            recipe=recipe.name,
            about=recipe.about_it(),
            overrides=list(recipe.overrides),
            seed=self.seed,
            inputs={role: identity(role, value) for role, value in self.given.items()},
            steps={
                name: StepRecord(step.command, step.output, stated(step, self.seed))
                for name, step in recipe.steps.items()
            },
            result=recipe.result,
        )
        for name in recipe.steps:
            recipe.settings(name, self._values())
        if before is not None:
            self.record.go_on_from(before, self.folder)

    @property
    def model(self) -> Path:
        """Where the system's model is, once the steps have run."""
        return self._place(self.recipe.result)

    def run(self, known: Known | None = None) -> Path:
        """Run what is not finished; the folder of the system's model.

        Args:
            known: finished steps of other recipes, which serve where they compute the same; those of this run are
                added.

        Raises:
            Stopped: a signal was received. RunFailed: a step failed; what is finished is kept.
            ValueError: another process runs a recipe in the folder.
        """
        known = {} if known is None else known
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(self.folder)
        if not lock.take():
            raise ValueError(f"--output {self.output}: another process ({lock.holder()}) runs a recipe in it")
        try:
            self.record.starts.append(provenance())
            self.record.write(self.folder)
            due = self._due()
            self.record.finished = not due
            self.record.write(self.folder)
            for number, (name, step) in enumerate(self.recipe.steps.items(), 1):
                where = f"step {number} of {len(self.recipe.steps)}, {name}"
                if name not in due:
                    print(f"{where}: is there", flush=True)
                elif self._taken(name, known):
                    print(f"{where}: taken from {self._place(name)}", flush=True)
                else:
                    print(f"{where}: mtllm {step.command} --config {self._config(name)}", flush=True)
                    self._run_step(name, step)
                if self.record.steps[name].finished:
                    known.setdefault(self._computes(name), (self._place(name), self.record.steps[name]))
            self.record.finished = True
            self.record.write(self.folder)
        finally:
            lock.release()
        return self.model

    def _due(self) -> set[str]:
        """Steps that are not finished, and finished ones whose output is gone and which one of these reads."""
        due: set[str] = set()
        for name in reversed(self.recipe.steps):
            wanted = name == self.recipe.result or any(name in self.recipe.steps[later].uses for later in due)
            if not self.record.steps[name].finished or (wanted and not self._place(name).exists()):
                due.add(name)
        return due

    def _taken(self, name: str, known: Known) -> bool:
        """Whether another recipe's run of the same step serves, which is then noted."""
        record = self.record.steps[name]
        place, other = known.get(self._computes(name), (None, None))
        if place is None or other is None or record.starts or not place.exists():
            return False
        record.taken_from = os.path.relpath(place, self.folder)
        record.cost, record.finished = other.cost, True
        self.record.write(self.folder)
        return True

    def _run_step(self, name: str, step: Step) -> None:
        record, place = self.record.steps[name], self.folder / step.output
        record.finished, record.taken_from = False, ""
        options = {**fill(step.options, self._values()), "output": str(place)}
        if step.takes("seed"):
            options["seed"] = self.seed
        if self.logs and step.takes("progress"):
            options.setdefault("progress", False)
        write_text(self._config(name), yaml.safe_dump(options, sort_keys=False, allow_unicode=True))
        words = [*self._command(step), "--config", str(self._config(name))]
        if step.takes("resume") and place.is_dir() and any(place.iterdir()):
            words.append("--resume")
        if step.takes("overwrite") and place.exists():
            words.append("--overwrite")
        record.starts += 1
        before = record.cost

        def report(used: Used) -> None:
            record.cost = before.and_then(used)
            self.record.write(self.folder)

        report(Used())
        log = self.folder / f"{name}.log" if self.logs else None
        ended = run_measured(words, log, report)
        made = (place / RESULT).is_file() if step.takes("resume") else place.exists()
        record.finished = ended.code == 0 and made
        report(ended.used)
        if ended.received is not None:
            raise Stopped(ended.received, name)
        if not record.finished:
            how = f"ended with exit code {ended.code}" if ended.code >= 0 else f"was ended by signal {-ended.code}"
            said = f": {line}" if log is not None and (line := _last_line(log)) else ""
            raise RunFailed(f"step {name}: mtllm {step.command} {how}{said}; finished steps are kept in {self.output}")
        used = ended.used
        print(
            f"    {used.seconds:.1f} s, {used.cpu_seconds:.1f} CPU-seconds, {used.peak_memory_bytes / 2**20:.0f} MiB",
            flush=True,
        )

    def _command(self, step: Step) -> list[str]:
        """How the step's command is started."""
        words = [sys.executable, "-m"]
        if self.processes > 1 and step.command in SHARED:
            words += ["torch.distributed.run", "--standalone", f"--nproc-per-node={self.processes}", "-m"]
        return [*words, "mtllm_fast.cli", step.command]

    def _config(self, name: str) -> Path:
        return self.folder / f"{name}.yaml"

    def _place(self, name: str) -> Path:
        """Where the output of a step is, or will be."""
        record = self.record.steps[name]
        return Path(os.path.normpath(self.folder / (record.taken_from or record.output)))

    def _values(self) -> dict[str, str]:
        """What each placeholder stands for."""
        return {**{name: str(self._place(name)) for name in self.recipe.steps}, **self.given, "seed": str(self.seed)}

    def _computes(self, name: str) -> str:
        """A digest of all that the output of a step depends on."""
        step = self.recipe.steps[name]
        values = {"seed": str(self.seed)}
        for role, found in self.record.inputs.items():
            values[role] = sha256_of_json(found["content"] or found["value"])
        values |= {other: self._computes(other) for other in step.uses if other in self.recipe.steps}
        settings: dict[str, Any] = asdict(self.recipe.settings(name, values))
        seed = self.seed if step.takes("seed") else None
        return sha256_of_json({"command": step.command, "seed": seed, "settings": _without_free(settings)})


def _without_free(settings: Any) -> Any:
    """Plain settings but for those that change nothing of what is computed."""
    if isinstance(settings, dict):
        return {name: _without_free(value) for name, value in settings.items() if name not in FREE}
    return settings


def _last_line(log: Path) -> str:
    """The last line of a log that says something, "" where there is none."""
    if not log.is_file():
        return ""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")
