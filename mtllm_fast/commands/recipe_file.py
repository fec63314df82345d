"""A recipe: a system as a sequence of steps, each of them one `mtllm` command, in one YAML file.

    system: MT-LLM                           # its name in tables
    source: arXiv 2406.12739
    about: An LLM learns from itself, on English text, to read through an MT encoder; then from a task teacher.
    differs: the paper adapts on web pages   # what of the source this is not; may be left out
    labels_in_test_language: no              # whether labelled rows in the languages it is tested in are learned from
    data:                                    # role: what `--data ROLE=...` is to name
      english: unlabelled English text
      folder: {about: "folder of the task's rows", default: ""}          # with a default it may be left out
    published: {documents: 2560000, hardware: 8 A100}    # the source's own settings and results; stated, not run
    steps:                                   # run in this order; keys as in the command's own --config file
      adapt: {command: adapt, encoder: "{encoder}", llm: "{llm}", text: "{english}", loss: {paired_mse: 1}}
      teacher: {command: finetune, llm: "{llm}", task: sib200, data: "{folder}"}
      student: {command: distill, model: "{adapt}", teacher: "{teacher}", task: sib200, data: "{folder}"}
    result: student                          # the step whose model is the system

Options that a step leaves out are those of its command. In the text of an option `{encoder}`, `{llm}` and `{seed}`
stand for what the command line gives, a role for its data, and the name of an earlier step for its output, which is
OUTPUT/STEP. A command that writes a file is given its name there: `output: answers.jsonl`. `--seed` goes to every step
that takes one. In the list of an option that takes several, `{role...}` stands for all that a role names, with commas
between them: `labels: ["{labels...}"]` with `--data labels=no,yes`. `{text}` and `{pair}` stay as they are: they are
those of a prompt.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from ..data.prompt import FIELDS
from ..yaml_file import QUOTES, did_you_mean, read_yaml
from .from_yaml import options_of, settings_from, values_of
from .table import COMMANDS, settings_of

GIVEN = ("encoder", "llm", "seed")  # placeholders that the command line fills
RECIPES = Path(str(files("mtllm_fast"))) / "recipes"
ANY = "*"  # in an override: every step that has the option

_PLACE = re.compile(r"\{(\w+)(\.\.\.)?\}")
_TEXTS = ("system", "source", "about", "differs")
_KEYS = (*_TEXTS, "labels_in_test_language", "data", "published", "steps", "result")
_REQUIRED = ("system", "source", "about", "labels_in_test_language", "steps", "result")
# Options that are the recipe's own: why a step may not give them.
_OWN = {
    "resume": "a recipe goes on by itself",
    "overwrite": "a recipe goes on by itself",
    "seed": "it is what --seed gives",
    "seeds": "a recipe runs with one seed, which --seed gives",
    "push_to_hub": "push the finished model, by `mtllm convert --push-to-hub`",
}
_NO_STEPS = ("train", "compare")

Options = dict[str, Any]


@dataclass(frozen=True)
class Role:
    """What a user gives. `default`: what stands for it where it is left out; None where it may not be."""

    about: str
    default: str | None = None


@dataclass(frozen=True)
class Step:
    """One command. `options`: as in its --config file, placeholders not filled; `output`: its name in OUTPUT."""

    name: str
    command: str
    options: Options
    output: str

    @property
    def uses(self) -> list[str]:
        """The placeholders in its options, each once."""
        return list(dict.fromkeys(_places(self.options)))

    def takes(self, option: str) -> bool:
        """Whether the command has an option of that name."""
        return option in options_of(settings_of(self.command))


@dataclass(frozen=True)
class Recipe:
    """See the module's docstring. `name`: by which it was asked for; `overrides`: STEP.OPTION=VALUE."""

    name: str
    system: str
    source: str
    about: str
    labels_in_test_language: bool
    steps: dict[str, Step]
    result: str
    data: dict[str, Role] = field(default_factory=dict)
    differs: str = ""
    published: dict[str, Any] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()

    @property
    def uses(self) -> set[str]:
        """The placeholders of all steps."""
        return {name for step in self.steps.values() for name in step.uses}

    def about_it(self) -> dict[str, Any]:
        """What the file says besides its steps, as plain data."""
        said = {name: getattr(self, name) for name in (*_TEXTS, "labels_in_test_language", "published")}
        return {**said, "data": {role: about.about for role, about in self.data.items()}}

    def given(self, values: Sequence[str], option: str = "--data") -> dict[str, str]:
        """Role -> value of ROLE=VALUE, with defaults.

        Raises:
            ValueError: a role that is missing, unknown, or given twice.
        """
        found: dict[str, str] = {}
        for text in values:
            role, sign, value = text.partition("=")
            if not sign:
                raise ValueError(f"{option} {text}: expected ROLE=VALUE, with a role of {self._named_roles}")
            if role in found:
                raise ValueError(f"{option} {text}: {role!r} is given twice")
            found[role] = value
        return self.complete(found, option)

    def complete(self, found: Mapping[str, str], option: str = "--data") -> dict[str, str]:
        """`given` of a mapping."""
        for role in found:
            if role not in self.data:
                near = did_you_mean(role, self.data)
                raise ValueError(f"{option} {role}: {self.name} has no such role{near}; it has {self._named_roles}")
        for role, about in self.data.items():
            if not found.get(role) and about.default is None:
                raise ValueError(f"{option} {role}=... is missing: {about.about}")
        return {role: found.get(role) or about.default or "" for role, about in self.data.items()}

    def settings(self, step: str, values: Mapping[str, str]) -> Any:
        """An instance of the step's settings with its placeholders filled: placeholder -> what stands for it."""
        one = self.steps[step]
        where = f"{self.name}: steps: {step}"
        return settings_from(settings_of(one.command), fill(one.options, values), where)

    @property
    def _named_roles(self) -> str:
        return ", ".join(self.data) or "no roles"


def names() -> list[str]:
    """The library's own recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def read_recipe(name: str, overrides: Iterable[str] = ()) -> Recipe:
    """A recipe of a .yaml file or of the library, checked with all its options.

    Args:
        overrides: STEP.OPTION=VALUE, with VALUE as in YAML; step * is every step that has the option.

    Raises:
        ValueError: no such file or name, no recipe, or an override of what is not there; names the place.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        if name not in names():
            raise ValueError(
                f"recipe={name!r}: neither a .yaml file nor one of the library's{did_you_mean(name, names())}; "
                f"it has {', '.join(names())}"
            )
        path = RECIPES / f"{name}.yaml"
    where = f"recipe={name!r}"
    content = read_yaml(path, where)
    recipe = _recipe(content, name, where)
    for text in overrides:
        recipe = _overridden(recipe, text)
    for step in recipe.steps.values():
        _check_options(step, f"{where}: steps: {step.name}")
    return recipe


def fill(value: Any, values: Mapping[str, str]) -> Any:
    """A value of YAML with its placeholders replaced; those that `values` does not name stay."""
    if isinstance(value, str):
        return _PLACE.sub(lambda match: values.get(match[1], match[0]), value)
    if isinstance(value, dict):
        return {key: fill(one, values) for key, one in value.items()}
    if isinstance(value, list):
        return [filled for one in value for filled in _several(one, values)]
    return value


def _several(item: Any, values: Mapping[str, str]) -> list[Any]:
    """What stands in a list for one of its items."""
    place = _PLACE.fullmatch(item) if isinstance(item, str) else None
    if place is None or not place[2] or place[1] not in values:
        return [fill(item, values)]
    return [one.strip() for one in values[place[1]].split(",")]


def stated(step: Step, seed: int) -> dict[str, Any]:
    """What the recipe says of a step: option -> typed value; places but the seed's are not filled."""
    found = values_of(settings_of(step.command), fill(step.options, {"seed": str(seed)}), step.name)
    return {".".join(path): value for path, value in found.items()}


def _places(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield from (name for name, _ in _PLACE.findall(value) if name not in FIELDS)
    elif isinstance(value, (dict, list)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _places(one)


def _recipe(content: object, name: str, where: str) -> Recipe:
    if not isinstance(content, dict):
        raise ValueError(f"{where}: expected a mapping with the keys of `mtllm help recipe`")
    for key in content:
        if key not in _KEYS:
            raise ValueError(f"{where}: unknown key {key!r}{did_you_mean(str(key), _KEYS)}")
    for key in _REQUIRED:
        if key not in content:
            raise ValueError(f"{where}: {key!r} is missing")
    for key in _TEXTS:
        if key in content and (not isinstance(content[key], str) or not content[key].strip()):
            raise ValueError(f"{where}: {key}: {content[key]!r}: expected text")
    labels = content["labels_in_test_language"]
    if not isinstance(labels, bool):
        raise ValueError(f"{where}: labels_in_test_language: {labels!r}: expected yes or no")
    published = content.get("published", {})
    if not isinstance(published, dict):
        raise ValueError(f"{where}: published: expected a mapping")
    roles = _roles(content.get("data", {}), where)
    steps = _steps(content["steps"], roles, where)
    if content["result"] not in steps:
        raise ValueError(f"{where}: result: {content['result']!r} is no step; there are {', '.join(steps)}")
    texts = {key: " ".join(content.get(key, "").split()) for key in _TEXTS}
    recipe = Recipe(
        name,
        system=texts["system"],
        source=texts["source"],
        about=texts["about"],
        differs=texts["differs"],
        labels_in_test_language=labels,
        steps=steps,
        result=content["result"],
        data=roles,
        published=published,
    )
    if unused := [role for role in roles if role not in recipe.uses]:
        raise ValueError(f"{where}: data: no step uses {unused[0]!r}")
    if not steps[recipe.result].takes("resume") and steps[recipe.result].command != "convert":
        raise ValueError(f"{where}: result: step {recipe.result!r} ({steps[recipe.result].command}) makes no model")
    return recipe


def _roles(content: object, where: str) -> dict[str, Role]:
    if not isinstance(content, dict):
        raise ValueError(f"{where}: data: expected a mapping of roles to what they are")
    found = {}
    for role, about in content.items():
        _check_name(role, (), f"{where}: data")
        default = None
        if isinstance(about, dict) and about.keys() == {"about", "default"}:
            about, default = about["about"], about["default"]
        if not isinstance(about, str) or not (default is None or isinstance(default, str)):
            raise ValueError(f"{where}: data: {role}: expected what it is, or {{about: what it is, default: text}}")
        found[role] = Role(" ".join(about.split()), default)
    return found


def _steps(content: object, roles: Mapping[str, Role], where: str) -> dict[str, Step]:
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{where}: steps: expected a mapping with at least one step")
    later, found, outputs = [str(name) for name in content], dict[str, Step](), set[str]()
    for name, options in content.items():
        _check_name(name, roles, f"{where}: steps")
        later.remove(name)
        step = _step(name, options, f"{where}: steps: {name}")
        for place in step.uses:
            if place == name or place in later:
                raise ValueError(f"{where}: steps: {name}: {{{place}}} is a step that comes later")
            if place not in (*GIVEN, *roles, *found):
                known = (*GIVEN, *roles, *found)
                raise ValueError(f"{where}: steps: {name}: nothing makes {{{place}}}{did_you_mean(place, known)}")
        if step.output in outputs:
            raise ValueError(f"{where}: steps: {name}: output: {step.output!r} is that of another step")
        outputs.add(step.output)
        found[name] = step
    return found


def _step(name: str, content: object, where: str) -> Step:
    if not isinstance(content, dict) or not isinstance(content.get("command"), str):
        raise ValueError(f"{where}: expected a mapping with the step's 'command' and its options")
    options = _plain(content)
    command, output = options.pop("command"), options.pop("output", name)
    if command not in COMMANDS or command in _NO_STEPS:
        known = [one for one in COMMANDS if one not in _NO_STEPS]
        raise ValueError(
            f"{where}: command: {command!r} is no command that a step can be{did_you_mean(command, known)}"
        )
    if "output" not in options_of(settings_of(command)):
        raise ValueError(f"{where}: command: {command!r} has no output that another step could use")
    if not {"resume", "overwrite"} & set(options_of(settings_of(command))):
        raise ValueError(f"{where}: command: {command!r} cannot be gone on with, so it is no step")
    if not isinstance(output, str) or not re.fullmatch(r"\w[\w.-]*", output) or output == "recipe.json":
        raise ValueError(f"{where}: output: {output!r}: expected a plain name, which lies in the recipe's --output")
    return Step(name, command, options, output)


def _plain(value: Any) -> Any:
    """With `_` for `-` in keys, as options are named in Python."""
    if isinstance(value, dict):
        return {str(key).replace("-", "_"): _plain(one) for key, one in value.items()}
    return value


def _check_name(name: object, others: Iterable[str], where: str) -> None:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z]\w*", name):
        raise ValueError(f"{where}: {name!r}: expected a name of letters, digits and _; {QUOTES}")
    if name in GIVEN or name in FIELDS or name in others:
        taken = "that of a role" if name in others else f"what {{{name}}} stands for already"
        raise ValueError(f"{where}: {name!r} is {taken}; choose another name")


def _check_options(step: Step, where: str) -> None:
    """What a step says, as the command would: names, types, and what its settings refuse."""
    for option, why in _OWN.items():
        if option in step.options:
            raise ValueError(f"{where}: {option} is not for a step: {why}")
    settings_from(settings_of(step.command), fill(step.options, {"seed": "0"}), where)


def _overridden(recipe: Recipe, text: str) -> Recipe:
    """With one option of a step, or of all that have it, set to another value."""
    where = f"--set {text}"
    place, sign, written = text.partition("=")
    name, dot, option = place.partition(".")
    if not (sign and dot and option):
        raise ValueError(f"{where}: expected STEP.OPTION=VALUE, e.g. {next(iter(recipe.steps))}.max_steps=200")
    path = option.replace("-", "_").split(".")
    if name == ANY:
        chosen = [step for step in recipe.steps.values() if step.takes(path[0])]
        if not chosen:
            raise ValueError(f"{where}: no step of {recipe.name} has an option {option!r}")
    elif name in recipe.steps:
        chosen = [recipe.steps[name]]
    else:
        near = did_you_mean(name, recipe.steps)
        raise ValueError(f"{where}: {recipe.name} has no step {name!r}{near}; it has {', '.join(recipe.steps)}")
    if path[0] in ("command", "output"):
        raise ValueError(f"{where}: the {path[0]} of a step is the recipe's")
    try:
        value = written if _PLACE.fullmatch(written) else yaml.safe_load(written)
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: not YAML: {' '.join(str(error).split())}") from None
    if isinstance(value, dict):
        raise ValueError(f"{where}: name one option; that of a mapping has a dot, e.g. {place}.NAME=VALUE")
    steps = dict(recipe.steps)
    for step in chosen:
        single: Any = value
        for key in reversed(path):
            single = {key: single}
        values_of(settings_of(step.command), fill(single, {"seed": "0"}), where)
        options = _merged(step.options, path, value)
        changed = replace(step, options=options)
        before = list(recipe.steps)[: list(recipe.steps).index(step.name)]
        if wrong := [one for one in changed.uses if one not in (*GIVEN, *recipe.data, *before)]:
            raise ValueError(f"{where}: nothing makes {{{wrong[0]}}} before step {step.name!r}")
        steps[step.name] = changed
    return replace(recipe, steps=steps, overrides=(*recipe.overrides, text))


def _merged(options: Options, path: Sequence[str], value: Any) -> Options:
    """A copy in which the option at `path` is `value`."""
    first, *rest = path
    if not rest:
        return {**options, first: value}
    inner = options.get(first)
    return {**options, first: _merged(inner if isinstance(inner, dict) else {}, rest, value)}
