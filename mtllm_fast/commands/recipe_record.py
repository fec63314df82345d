"""recipe.json of a run of a recipe: what it is, what it was given, and what each of its steps cost."""

from __future__ import annotations

import glob
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..data.formats import kind_of
from ..data.read import resolve
from ..jobs.durable import write_json
from ..jobs.fingerprint import hub_config, of_file, of_model
from ..jobs.ledger import differing
from ..jobs.measured import Used
from ..training.inputs import changed
from ..training.run_folder import FREE, read_json

RECORD = "recipe.json"
FORMAT = 1
MODELS = ("encoder", "llm")  # the roles that are no data


@dataclass
class StepRecord:
    """One step.

    Fields:
        output: its name in the recipe's folder. settings: the options that the recipe states, typed.
        starts: how often it was started; seconds, cpu_seconds: of all starts; peak_memory_bytes: of the largest.
        taken_from: output of another recipe's run of the same step, relative to the recipe's folder, where that serves;
            the cost is then what it was there.
    """

    command: str
    output: str
    settings: dict[str, Any]
    finished: bool = False
    starts: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_memory_bytes: int = 0
    taken_from: str = ""

    @property
    def cost(self) -> Used:
        return Used(self.seconds, self.cpu_seconds, self.peak_memory_bytes)

    @cost.setter
    def cost(self, used: Used) -> None:
        self.seconds, self.cpu_seconds = round(used.seconds, 3), round(used.cpu_seconds, 3)
        self.peak_memory_bytes = used.peak_memory_bytes


@dataclass
class RecipeRecord:
    """The content of recipe.json.

    Fields:
        recipe: the name or file; about: what the file says besides its steps.
        inputs: role -> {"value": as it was given, "content": digests by file name, {} for what is no file}.
        starts: versions and machine of each start.
        finished: whether all steps are.
    """

    recipe: str
    about: dict[str, Any]
    overrides: list[str]
    seed: int
    inputs: dict[str, dict[str, Any]]
    steps: dict[str, StepRecord]
    result: str
    starts: list[object] = field(default_factory=list)
    finished: bool = False
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        write_json(folder / RECORD, asdict(self))

    @property
    def cost(self) -> Used:
        """Of all steps."""
        total = Used()
        for step in self.steps.values():
            total = total.and_then(step.cost)
        return total

    def go_on_from(self, before: RecipeRecord, folder: Path) -> None:
        """Take over what the steps of an earlier start have come to.

        Raises:
            ValueError: it was of another seed, of other data or models, or of other steps.
        """
        was = f"but the run in {folder} was started with"
        if self.seed != before.seed:
            raise ValueError(f"--seed {self.seed}, {was} {before.seed}; name a new folder")
        for role, now in self.inputs.items():
            option = f"--{role} {now['value']}" if role in MODELS else f"--data {role}={now['value']}"
            then = before.inputs.get(role, {"value": None, "content": {}})
            if (what := changed(then["content"], now["content"])) is not None:
                raise ValueError(f"{option}: has changed since the run in {folder} was started: {what}")
            if not now["content"] and then["value"] != now["value"]:
                raise ValueError(f"{option}, {was} {then['value']}; name a new folder")
        recipe = f"--recipe {self.recipe}"
        if list(self.steps) != list(before.steps):
            steps = ", ".join(self.steps)
            raise ValueError(f"{recipe}: its steps are {steps}, {was} {', '.join(before.steps)}; name a new folder")
        for name, step in self.steps.items():
            then_step = before.steps[name]
            now_says = {"command": step.command, "output": step.output, **json.loads(json.dumps(step.settings))}
            then_said = {"command": then_step.command, "output": then_step.output, **then_step.settings}
            for option in differing(then_said, now_says):
                short = option.rpartition(".")[2]
                if short not in FREE or option == "output":
                    values = f"{now_says.get(option)!r}, {was} {then_said.get(option)!r}"
                    raise ValueError(f"{recipe}: steps: {name}: {short} is {values}; name a new folder")
            then_step.settings = step.settings
        self.steps, self.starts, self.finished = before.steps, before.starts, before.finished


def read_record(folder: Path) -> RecipeRecord | None:
    """The record of a recipe's folder, None for a new one.

    Raises:
        ValueError: a file, or a folder of something else, or a record that is damaged.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output {folder}: is a file, not a folder")
    path = folder / RECORD
    if not path.is_file():
        if folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
            raise ValueError(f"--output {folder}: holds files but no {RECORD}; name a new folder")
        return None
    found = read_json(path)
    if found.get("format") != FORMAT:
        raise ValueError(f"{path}: format {found.get('format')!r}, but this version reads {FORMAT}; name a new folder")
    try:
        steps = {name: StepRecord(**step) for name, step in found.pop("steps").items()}
        return RecipeRecord(steps=steps, **found)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: is damaged ({error}), so the run cannot be continued; name a new folder") from None


def identity(role: str, value: str) -> dict[str, Any]:
    """What a role is given, known by content; see `RecipeRecord.inputs`.

    Raises:
        ValueError: a file, folder or model that is not there.
    """
    if role in MODELS:
        if (
            not Path(value).expanduser().exists()
            and not value.startswith((".", "/", "~"))
            and hub_config(value) is None
        ):
            raise ValueError(f"--{role} {value}: no such folder, and no model of the hub that can be had now")
        try:
            return {"value": value, "content": {"": of_model(value)}}
        except ValueError as error:
            raise ValueError(f"--{role} {value}: {str(error).partition(': ')[2]}") from None
    return {"value": value, "content": _digests(role, value)}


def _digests(role: str, value: str) -> Mapping[str, str]:
    path = Path(value).expanduser()
    if value and path.is_file():
        return {"": of_file(path)}
    if value and (path / "config.json").is_file():  # a model, whose folder may also get logs and reports
        return {"": of_model(path)}
    if value and path.is_dir():
        inside = sorted(one for one in path.rglob("*") if one.is_file())
        shown = {one.relative_to(path): one for one in inside}
        return {str(name): of_file(one) for name, one in shown.items() if not _hidden(name)}
    if glob.has_magic(value):
        try:
            return {one.name: of_file(one) for one in resolve(value)}
        except FileNotFoundError as error:
            raise ValueError(f"--data {role}={value}: {error}") from None
    local = value.startswith((".", "/", "~")) or path.suffix in (".yaml", ".yml") or kind_of(path) is not None
    if value and (local or (len(path.parts) > 1 and Path(path.parts[0]).is_dir())):
        raise ValueError(f"--data {role}={value}: no such file or folder")
    return {}


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
