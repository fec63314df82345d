"""mtllm train: a system by its recipe."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import tyro

from .recipe_file import Recipe, names, read_recipe
from .recipe_run import RecipeRun, Stopped

Words = Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction]  # an option that may be given again


@dataclass
class TrainRecipe:
    """Train a system by its recipe: a sequence of `mtllm` commands with their options, one of the library's or a file.

    The same command goes on where it was stopped: a finished step is not run again, an unfinished one is resumed.
    OUTPUT/STEP.yaml holds the options of each step, OUTPUT/recipe.json what each cost.
    Example: mtllm train --list
    Example: mtllm train --recipe mt_llm --encoder models/e5-small --llm models/smollm2-135m --data english=english.txt
    task=sib200 folder=DIR --output runs/mt-llm --seed 42 --set adapt.max_steps=200
    """

    TOPICS: ClassVar = ("recipe",)
    REQUIRED: ClassVar = {
        "recipe": "required",
        "output": "required",
        "encoder": "required, where the recipe uses one",
        "llm": "required, where the recipe uses one",
        "data": "required, the roles that the recipe names",
    }
    recipe: str = ""
    """Name of one of the library's recipes (`list` shows them), or a .yaml file."""
    encoder: str = ""
    """Encoder: folder or hub name."""
    llm: str = ""
    """Causal LM: folder or hub name."""
    data: Words = ()
    """ROLE=VALUE for each role that the recipe names, e.g. english=FILE."""
    output: str = ""
    """Folder of the run; what a step makes is OUTPUT/STEP."""
    seed: int = 42
    """Of every step that takes one."""
    set: Words = ()
    """STEP.OPTION=VALUE, an option of a step in place of the recipe's, with VALUE as in YAML, e.g. adapt.lr=1e-4;
    *.OPTION is every step that has it."""
    processes: int = 1
    """Processes on this machine (GPUs) that share the work of a step, where its command can."""
    list: bool = False
    """Only show the library's recipes."""

    def run(self) -> None:
        if self.list:
            print("\n".join([*listing(map(read_recipe, names())), "", "data in [] may be left out"]))
            return
        if not self.recipe:
            raise ValueError(f"--recipe is missing: name a file, or one of {', '.join(names())}")
        recipe = read_recipe(self.recipe, [text for given in self.set for text in given])
        job = RecipeRun(
            recipe,
            self.output,
            encoder=self.encoder,
            llm=self.llm,
            data=recipe.given([text for given in self.data for text in given]),
            seed=self.seed,
            processes=self.processes,
        )
        try:
            model = job.run()
        except Stopped as stopped:
            print(f"train: {stopped}", flush=True)
            raise SystemExit(stopped.code) from None
        cost = job.record.cost
        print(
            f"train: {recipe.system}, seed {self.seed}: {cost.seconds:.0f} s, {cost.cpu_seconds:.0f} CPU-seconds -> "
            f"{model}"
        )


def listing(recipes: Iterable[Recipe]) -> list[str]:
    """Three lines for each recipe: its system and source, its steps, the data it takes."""
    lines = []
    for recipe in recipes:
        labels = "with" if recipe.labels_in_test_language else "no"
        steps = (name if step.command == name else f"{name} ({step.command})" for name, step in recipe.steps.items())
        roles = (role if about.default is None else f"[{role}]" for role, about in recipe.data.items())
        lines += [
            f"{recipe.name:<19} {recipe.system}; {recipe.source}; {labels} labels in the test language",
            f"{'':<19} steps: {', '.join(steps)}",
            f"{'':<19} data:  {' '.join(roles)}",
        ]
    return lines
