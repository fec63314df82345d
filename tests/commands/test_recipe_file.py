"""Recipes as files: what they may say, overrides of their options, and every recipe of the library."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtllm_fast import cli
from mtllm_fast.commands.recipe_file import RECIPES, fill, names, read_recipe, stated
from mtllm_fast.commands.table import settings_of
from tests.commands.recipe_steps import write_yaml

GOOD = {
    "system": "Two steps",
    "source": "nobody",
    "about": "learns\n  nothing",
    "labels_in_test_language": False,
    "data": {"lines": "English text", "folder": {"about": "a folder", "default": ""}},
    "steps": {
        "first": {"command": "adapt", "encoder": "{encoder}", "llm": "{llm}", "text": "{lines}", "loss": {"kl": 1}},
        "second": {"command": "finetune", "model": "{first}", "task": "nusax", "data": "{folder}", "lr": "1e-3"},
    },
    "result": "second",
}


def write(tmp_path: Path, content: object) -> str:
    return write_yaml(tmp_path / "mine.yaml", content)


def changed(**changes: object) -> dict[str, object]:
    return {key: value for key, value in {**GOOD, **changes}.items() if value is not None}


def step(name: str, **changes: object) -> dict[str, object]:
    """The good recipe with other options of a step; None takes one away."""
    options = {key: value for key, value in {**GOOD["steps"][name], **changes}.items() if value is not None}
    return changed(steps={**GOOD["steps"], name: options})


def test_a_recipe_is_read(tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path, GOOD))
    assert (recipe.system, recipe.about, recipe.labels_in_test_language) == ("Two steps", "learns nothing", False)
    assert [(one.command, one.output) for one in recipe.steps.values()] == [("adapt", "first"), ("finetune", "second")]
    assert recipe.uses == {"encoder", "llm", "lines", "folder", "first"}
    assert recipe.data["folder"].default == "" and recipe.data["lines"].default is None
    values = {"encoder": "E", "llm": "L", "lines": "F", "folder": "D", "first": "OUT/first", "seed": "3"}
    first, second = (recipe.settings(name, values) for name in recipe.steps)
    assert (first.encoder, first.llm, first.text, first.loss.kl) == ("E", "L", "F", 1.0)
    assert (second.model, second.source.data, second.train.lr) == ("OUT/first", "D", 1e-3)
    assert first.train.lr == settings_of("adapt")().train.lr  # what is left out is the command's default
    assert stated(recipe.steps["second"], 3)["train.lr"] == 1e-3


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[1, 2]", "expected a mapping with the keys of `mtllm help recipe`"),
        ("a: [", "not YAML"),
        ("system: a\nsystem: b", "'system' is given twice"),
        (changed(stepps={}), "unknown key 'stepps'; did you mean 'steps'?"),
        (changed(result=None), "'result' is missing"),
        (changed(system=3), "system: 3: expected text"),
        (changed(labels_in_test_language="maybe"), "labels_in_test_language: 'maybe': expected yes or no"),
        (changed(published=[1]), "published: expected a mapping"),
        (changed(result="third"), "result: 'third' is no step; there are first, second"),
        (changed(steps={}), "steps: expected a mapping with at least one step"),
        (changed(data=["lines"]), "data: expected a mapping of roles"),
        (changed(data={**GOOD["data"], "more": "x"}), "data: no step uses 'more'"),
        (changed(data={**GOOD["data"], "llm": "x"}), "data: 'llm' is what {llm} stands for already"),
        (changed(data={**GOOD["data"], "text": "x"}), "data: 'text' is what {text} stands for already"),
        (changed(data={**GOOD["data"], "first": "x"}), "steps: 'first' is that of a role"),
        (changed(data={"lines": "x", "folder": {"about": "a", "defaut": ""}}), "data: folder: expected what it is"),
        (changed(data={True: "x"}), "data: True: expected a name of letters"),
        (changed(steps={"a-b": {"command": "adapt"}}, result="a-b"), "'a-b': expected a name of letters"),
        (step("first", command="adopt"), "steps: first: command: 'adopt' is no command that a step can be; did you mean 'adapt'?"),
        (step("first", command="train"), "command: 'train' is no command that a step can be"),
        (step("first", command="doctor", encoder=None, llm=None, text=None, loss=None), "'doctor' has no output"),
        (step("first", command=None), "steps: first: expected a mapping with the step's 'command'"),
        (step("first", lrr=1), "steps: first: unknown option 'lrr'; did you mean 'lr'?"),
        (step("first", lr="fast"), "steps: first: lr: 'fast': expected a number"),
        (step("first", lr=-1), "steps: first: lr=-1.0: must be > 0"),
        (step("first", causal="yes!"), "steps: first: causal: 'yes!': expected true or false"),
        (step("first", loss={"kll": 1}), "steps: first: loss: unknown option 'kll'"),
        (step("first", model="{second}"), "steps: first: {second} is a step that comes later"),
        (step("first", model="{first}"), "steps: first: {first} is a step that comes later"),
        (step("second", model="{frist}"), "steps: second: nothing makes {frist}; did you mean 'first'?"),
        (step("second", labels=["a", "{nothing}"]), "steps: second: nothing makes {nothing}"),
        (step("second", seed=3), "steps: second: seed is not for a step: it is what --seed gives"),
        (step("second", seeds=[1]), "steps: second: seeds is not for a step"),
        (step("second", resume=True), "steps: second: resume is not for a step"),
        (step("second", output="../elsewhere"), "output: '../elsewhere': expected a plain name"),
        (step("second", output="first"), "steps: second: output: 'first' is that of another step"),
        (step("second", command="translate", model="{first}", task=None, lr=None, data="{folder}"), "result: step 'second' (translate) makes no model"),
    ],
)  # fmt: skip
def test_bad_recipes_are_refused_in_one_line(tmp_path: Path, content: object, said: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(ValueError) as caught:
        read_recipe(path)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"recipe={path!r}: ")


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        read_recipe(str(tmp_path / "none.yaml"))
    with pytest.raises(ValueError, match=r"neither a .yaml file nor one of the library's; did you mean 'mt_llm'"):
        read_recipe("mtllm")


def test_overrides_are_typed_as_in_yaml(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    texts = ["first.max-steps=200", "first.loss.kl=0.5", "first.loss.paired_mse=2", "*.lr=1e-5", "second.labels=[a, b]"]
    texts += ["first.causal=yes", "second.teacher=x"]
    recipe = read_recipe(path, texts[:-1])
    assert recipe.overrides == tuple(texts[:-1])
    values = {"encoder": "E", "llm": "L", "lines": "F", "folder": "D", "first": "OUT/first"}
    first, second = (recipe.settings(name, values) for name in recipe.steps)
    assert (first.train.max_steps, first.loss.kl, first.loss.paired_mse, first.causal) == (200, 0.5, 2.0, True)
    assert first.train.lr == second.train.lr == 1e-5
    assert second.source.labels == ("a", "b")
    assert read_recipe(path).steps["first"].options["loss"] == {"kl": 1}  # of a copy
    again = read_recipe(path, ["second.model={encoder}", "second.model={first}"])  # the last one holds
    assert again.settings("second", values).model == "OUT/first"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("first.lr", "--set first.lr: expected STEP.OPTION=VALUE, e.g. first.max_steps=200"),
        ("lr=1", "--set lr=1: expected STEP.OPTION=VALUE"),
        ("frist.lr=1", "has no step 'frist'; did you mean 'first'?; it has first, second"),
        ("first.lrr=1", "--set first.lrr=1: unknown option 'lrr'; did you mean 'lr'?"),
        ("first.lr=fast", "--set first.lr=fast: lr: 'fast': expected a number"),
        ("first.lr=-1", "steps: first: lr=-1.0: must be > 0"),
        ("first.loss.kll=1", "--set first.loss.kll=1: loss: unknown option 'kll'"),
        ("first.loss={kl: 1}", "name one option; that of a mapping has a dot"),
        ("first.text=[", "not YAML"),
        ("first.text=no", "text: False: expected text; put `no`, `yes`, `on` and `off` in quotes"),
        ("*.init_from=x", "no step of"),
        ("first.command=distill", "the command of a step is the recipe's"),
        ("first.output=x", "the output of a step is the recipe's"),
        ("*.seed=3", "seed is not for a step"),
        ("first.model={second}", "nothing makes {second} before step 'first'"),
        ("second.model={x}", "nothing makes {x} before step 'second'"),
    ],
)
def test_bad_overrides_are_refused_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = write(tmp_path, GOOD)
    with pytest.raises(ValueError) as caught:
        read_recipe(path, [text])
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_what_a_prompt_fills_is_left_to_it() -> None:
    assert fill("{text}\n{pair} {lines} {", {"lines": "F"}) == "{text}\n{pair} F {"
    assert fill({"a": ["{lines}", 1, None]}, {"lines": "F"}) == {"a": ["F", 1, None]}


def test_data_is_what_the_roles_ask_for(tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path, GOOD))
    assert recipe.given(["lines=a=b"]) == {"lines": "a=b", "folder": ""}
    for values, said in (
        ([], "--data lines=... is missing: English text"),
        (["lines="], "--data lines=... is missing"),
        (["lines"], "--data lines: expected ROLE=VALUE, with a role of lines, folder"),
        (["lines=a", "folders=b"], "no such role; did you mean 'folder'?; it has lines, folder"),
        (["lines=a", "lines=b"], "'lines' is given twice"),
    ):
        with pytest.raises(ValueError) as caught:
            recipe.given(values)
        assert said in str(caught.value)


def test_the_library_has_these_recipes() -> None:
    assert set(names()) >= {"mt_llm"}
    assert all(path.suffix == ".yaml" for path in RECIPES.iterdir())


@pytest.mark.parametrize("name", names())
def test_a_recipe_of_the_library_fits_its_commands(name: str) -> None:
    """Names and types of all options; a wrong one in any step is found."""
    recipe = read_recipe(name)
    for one in recipe.steps:
        with pytest.raises(ValueError, match=f"--set {one}.no_such_option=1: unknown option"):
            read_recipe(name, [f"{one}.no_such_option=1"])
    assert recipe.about and recipe.source
    text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
    assert all(len(line) <= 120 for line in text.splitlines())


def test_the_list_names_every_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["train", "--list"])
    out = capsys.readouterr().out
    for name in names():
        recipe = read_recipe(name)
        (at,) = [index for index, line in enumerate(out.splitlines()) if line.split()[:1] == [name]]
        about, steps, data = out.splitlines()[at : at + 3]
        assert recipe.system in about and recipe.source in about
        assert ("no labels in the test language" in about) is not recipe.labels_in_test_language
        assert all(one in steps for one in recipe.steps) and all(role in data for role in recipe.data)


def test_the_help_shows_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["help", "recipe"])
    out = capsys.readouterr().out
    for key in ("system:", "labels_in_test_language:", "published:", "steps:", "result:"):
        assert key in out
    assert list(read_recipe(write(tmp_path, out.split("\n\n")[2])).steps) == ["adapt", "teacher", "student"]


def test_a_role_may_name_several(tmp_path: Path) -> None:
    """`{role...}` in a list is all of them; anywhere else, and without the dots, a role is one text."""
    options = {"command": "respond", "llm": "{llm}", "text": "{lines}", "labels": ["x", "{names...}", "{names}"]}
    content = changed(data={"lines": "texts", "names": "labels"}, steps={**GOOD["steps"], "said": options})
    content["steps"]["second"]["data"] = ""
    recipe = read_recipe(write(tmp_path, content))
    values = {"llm": "L", "lines": "F", "names": "yes, no,maybe so"}
    assert recipe.settings("said", values).labels == ("x", "yes", "no", "maybe so", "yes, no,maybe so")
    assert recipe.steps["said"].uses == ["llm", "lines", "names"]
    wrong = changed(steps={"first": {**options, "labels": ["{nobody...}"]}}, result="first", data={"lines": "texts"})
    with pytest.raises(ValueError, match=r"steps: first: nothing makes \{nobody\}"):
        read_recipe(write(tmp_path, wrong))
