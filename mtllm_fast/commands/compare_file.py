"""A comparison: recipes x seeds x tasks x languages, in one YAML file.

    output: runs/compare                    # runs, cells and reports; go on there after an interruption
    encoder: models/e5-small
    llm: models/smollm2-135m
    seeds: [0, 1, 2]
    recipes:                                # name in the tables: a recipe's name or file, or a mapping
      direct: direct
      MT-LLM: mt_llm
      MindMerger: {recipe: mindmerger, llm: "runs/llm/seed-{seed}", data: {pairs: P.jsonl}, set: {mapping.lr: 1e-4}}
    against: direct                         # whom the others are compared with; translate-test is one, too
    data:                                   # role: what `mtllm train --data` gives, for the recipes that have it
      english: english.txt
      task: "{task}"
      folder: {sib200: data/sib200, nusax: data/nusax_senti}
    set: {"*.tokens": 1024, adapt.max_steps: 500}     # as `mtllm train --set`, for the recipes that have such a step
    processes: 1                            # of each step that several can share
    tasks:                                  # as in a suite: what the systems are scored on
      - {task: sib200, data: data/sib200, limit: 100}
      - {task: nusax, data: data/nusax_senti}
    translate_test: {teacher: direct, translations: "runs/{task}/translations.parquet"}    # may be left out

A system is trained once for each seed and scored on every task, unless its data say `{task}`, or name a value by task:
then it is trained for each. A step that several systems have in common is run once, and counted as a cost of each.
`{seed}` stands for the seed. The teacher of translate_test is a system, or folders. The other keys of a suite (`mtllm
help suite`) go here, too: alignment, resamples, max_tokens, device, dtype.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from urllib.parse import quote

from ..evaluation.suite_file import Suite, instance, suite_of
from ..evaluation.systems import TRANSLATE_TEST
from ..yaml_file import did_you_mean, read_yaml
from .recipe_file import ANY, Recipe, read_recipe
from .recipe_record import MODELS

Given = str | dict[str, str]  # for every task, or by the name of one
SEED, TASK = "{seed}", "{task}"


@dataclass
class System:
    """A row of the tables: a recipe, and what it is given."""

    recipe: str = ""
    encoder: Given = ""
    llm: Given = ""
    data: dict[str, Given] = field(default_factory=dict)
    set: dict[str, object] = field(default_factory=dict)


@dataclass
class Own:
    """The keys of a comparison that a suite does not have."""

    recipes: dict[str, object] = field(default_factory=dict)
    encoder: Given = ""
    llm: Given = ""
    data: dict[str, Given] = field(default_factory=dict)
    set: dict[str, object] = field(default_factory=dict)
    processes: int = 1


@dataclass(frozen=True)
class Contestant:
    """A system, ready to be trained.

    Fields:
        given: encoder, llm and roles, as far as the recipe has them.
        by_task: whether what it is given depends on the task.
    """

    name: str
    recipe: Recipe
    given: dict[str, Given]

    @property
    def by_task(self) -> bool:
        return any(isinstance(value, dict) or TASK in value for value in self.given.values())

    def inputs(self, task: str | None, seed: int) -> dict[str, str]:
        """What stands for each of `given` under a seed, and for a task where it depends on one."""
        found = {}
        for name, value in self.given.items():
            chosen = value[str(task)] if isinstance(value, dict) else value
            found[name] = chosen.replace(TASK, str(task)).replace(SEED, str(seed))
        return found

    def folder(self, task: str | None, seed: int) -> Path:
        """Of a run, within the comparison's."""
        parts = [self.name] if task is None else [self.name, task]
        return Path("runs", *(quote(part, safe=" ") for part in parts), f"seed-{seed}")


@dataclass(frozen=True)
class Comparison:
    """`suite`: all but its models, which the contestants' runs are."""

    contestants: list[Contestant]
    suite: Suite
    processes: int = 1


def read_comparison(path: str | Path) -> Comparison:
    """Raises ValueError for a file that is missing, no YAML, or describes no comparison; it names the entry."""
    where = f"compare={str(path)!r}"
    content = read_yaml(path, where)
    if not isinstance(content, dict):
        raise ValueError(f"{where}: expected a mapping with the keys of `mtllm help compare`")
    own_keys = [part.name for part in fields(Own)]
    suite_keys = [part.name for part in fields(Suite) if part.name != "models"]
    for key in content:
        if key not in (*own_keys, *suite_keys):
            raise ValueError(f"{where}: unknown key {key!r}{did_you_mean(str(key), (*own_keys, *suite_keys))}")
    own = instance(Own, {key: value for key, value in content.items() if key in own_keys}, where)
    suite = suite_of({key: value for key, value in content.items() if key in suite_keys}, where)
    if not own.recipes:
        raise ValueError(f"{where}: recipes: expected a mapping with at least one recipe")
    if TRANSLATE_TEST in own.recipes:
        raise ValueError(f"{where}: recipes: {TRANSLATE_TEST!r} is the name of the baseline; choose another")
    if not suite.seeds or len(set(suite.seeds)) != len(suite.seeds) or min(suite.seeds) < 0:
        raise ValueError(f"{where}: seeds: {suite.seeds}: expected different numbers >= 0, at least one")
    tasks = [entry.name for entry in suite.tasks]
    contestants = [_contestant(str(name), system, own, tasks, where) for name, system in own.recipes.items()]
    _check_shared(own, contestants, where)
    names = [*own.recipes, *([] if suite.translate_test is None else [TRANSLATE_TEST])]
    if suite.against is not None and suite.against not in names:
        raise ValueError(f"{where}: against: {suite.against!r} is none of the systems; they are {', '.join(names)}")
    return Comparison(contestants, suite, own.processes)


def _contestant(name: str, content: object, own: Own, tasks: list[str], where: str) -> Contestant:
    where = f"{where}: recipes: {name}"
    system = instance(System, {"recipe": content} if isinstance(content, str) else content, where)
    if not system.recipe:
        raise ValueError(f"{where}: 'recipe' is missing")
    try:
        plain = read_recipe(system.recipe)
        shared = {place: value for place, value in own.set.items() if _applies(place, plain)}
        recipe = read_recipe(system.recipe, [_written(*item) for item in {**shared, **system.set}.items()])
        data = {role: value for role, value in own.data.items() if role in recipe.data} | system.data
        recipe.complete({role: str(value) for role, value in data.items()}, "data:")
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    given = dict(data)
    for role in MODELS:
        value = getattr(system, role) or getattr(own, role)
        if role in recipe.uses and not value:
            raise ValueError(f"{where}: {role} is missing: recipe {recipe.name} uses it")
        if role in recipe.uses:
            given[role] = value
        elif getattr(system, role):
            raise ValueError(f"{where}: {role}: recipe {recipe.name} uses none")
    for role, value in given.items():
        if isinstance(value, dict) and (lacking := [task for task in tasks if task not in value]):
            raise ValueError(f"{where}: {role}: names {', '.join(value)}, but not {lacking[0]!r}")
    return Contestant(name, recipe, given)


def _check_shared(own: Own, contestants: Iterable[Contestant], where: str) -> None:
    """Refuse what is given for all and used by none."""
    recipes = [contestant.recipe for contestant in contestants]
    for role in own.data:
        if not any(role in recipe.data for recipe in recipes):
            known = dict.fromkeys(known for recipe in recipes for known in recipe.data)
            raise ValueError(f"{where}: data: {role!r} is a role of no recipe{did_you_mean(role, known)}")
    for place in own.set:
        if not any(_applies(place, recipe) for recipe in recipes):
            raise ValueError(f"{where}: set: no recipe has a step for {place!r}")
    for role in MODELS:
        if getattr(own, role) and not any(role in recipe.uses for recipe in recipes):
            raise ValueError(f"{where}: {role}: no recipe uses one")


def _applies(place: str, recipe: Recipe) -> bool:
    """Whether a recipe has the step that STEP.OPTION names, or for *.OPTION one with the option."""
    step, _, option = place.partition(".")
    if step != ANY:
        return step in recipe.steps
    first = option.partition(".")[0].replace("-", "_")
    return any(one.takes(first) for one in recipe.steps.values())


def _written(place: str, value: object) -> str:
    """As `mtllm train --set` takes it; JSON is YAML."""
    return f"{place}={json.dumps(value, ensure_ascii=False)}"
