"""`mtllm compare`: its file, and recipes x seeds x tasks at tiny size, resumed, with failures and differences by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from mtllm_fast import cli
from mtllm_fast.commands import recipe_run
from mtllm_fast.commands.compare_file import read_comparison
from mtllm_fast.evaluation.statistics import interval, mean_samples
from mtllm_fast.jobs.measured import Ended, Used
from mtllm_fast.reporting.scores import read_scores
from tests.commands.recipe_steps import QUICK, inside, write_data, write_pairs, write_yaml

OVERRIDES = dict(text.split("=", 1) for text in [*QUICK, "*.max_steps=3", "*.lr=1e-2"])


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("compare")


@pytest.fixture(scope="module")
def given(root) -> dict[str, str]:
    return {**write_data(root), **write_pairs(root)}


@pytest.fixture(scope="module")
def content(root, given, encoder_folder, llm_folder) -> dict:
    """Three systems, two of which share a step, two seeds."""
    return {
        "output": str(root / "out"),
        "encoder": encoder_folder,
        "llm": llm_folder,
        "seeds": [1, 2],
        "against": "alone",
        "recipes": {
            "alone": "direct",
            "stack": "mt_llm",
            "answers": {"recipe": "xcot", "set": {"chain.max_target_tokens": 16}},
        },
        "data": {"english": given["english"], "task": "folder", "folder": given["folder"], "chains": given["chains"]},
        "set": {name: yaml.safe_load(value) for name, value in OVERRIDES.items()},
        "tasks": [{"task": "folder", "name": "mini", "data": given["folder"]}],
        "resamples": 200,
    }


def of(content: dict, *names: str, **changes: object) -> dict:
    """A comparison of some of the systems, with the data that they read."""
    roles = {"alone": "task folder", "stack": "task folder english", "answers": "chains"}
    wanted = {role for name in names for role in roles[name].split()}
    found = {**content, "recipes": {name: content["recipes"][name] for name in names}, "against": names[0]}
    found["data"] = {role: value for role, value in content["data"].items() if role in wanted}
    if "stack" not in names:
        del found["encoder"]
    return {**found, **changes}


def compare(path: str, *more: str) -> int:
    try:
        cli.main(["compare", path, "--no-progress", *more])
    except SystemExit as ending:
        return int(ending.code or 0)
    return 0


def read(folder: Path) -> dict:
    return json.loads((folder / "compare.json").read_text())


@pytest.fixture
def calls(monkeypatch) -> list[list[str]]:
    """The commands of steps, which run in this process."""
    found: list[list[str]] = []

    def run(words, log, report):
        found.append([words[3], words[-1]])
        return inside(words, log, report)

    monkeypatch.setattr(recipe_run, "run_measured", run)
    return found


def test_systems_are_trained_scored_and_compared(root, content, calls, capsys) -> None:
    path = write_yaml(root / "compare.yaml", content)
    assert compare(path) == 0
    out = capsys.readouterr().out
    # two seeds of: finetune; adapt, distill with that teacher; sft
    assert [words[0] for words in calls] == ["finetune", "adapt", "distill", "sft"] * 2
    output = root / "out"
    found = read(output)
    assert (found["seeds"], found["against"], found["failed"]) == ([1, 2], {"mini": "alone"}, [])
    systems = found["systems"]
    assert {name: one["labels_in_test_language"] for name, one in systems.items()} == {
        "alone": False,
        "stack": False,
        "answers": True,
    }
    assert systems["stack"]["recipe"] == "mt_llm" and systems["stack"]["source"] == "arXiv 2406.12739"
    assert "*.max_steps=3" in systems["stack"]["overrides"]
    assert [one["seed"] for one in systems["stack"]["training"]] == [1, 2]
    assert [one["cpu_seconds"] for one in systems["stack"]["training"]] == [1.5, 1.5]  # the shared step is counted
    assert [one["cpu_seconds"] for one in systems["alone"]["training"]] == [0.5, 0.5]
    assert systems["answers"]["tasks"]["mini"]["method"] == "log-likelihood of the labels"
    assert systems["stack"]["tasks"]["mini"]["method"] == "task head"

    (scores,) = read_scores(output / "scores.json")
    assert scores.reference == "alone" and [model.seeds for model in scores.models] == [2, 2, 2]
    for name in ("stack", "answers"):
        own, other = ([rows(output, one, code) for code in ("fra_Latn", "swh_Latn")] for one in (name, "alone"))
        differences = [a - b for a, b in zip(own, other)]
        samples = np.mean([mean_samples(values, 200) for values in differences], axis=0)
        gap = systems[name]["tasks"]["mini"]["gap"]
        assert gap["accuracy"] == pytest.approx(np.mean([values.mean() for values in differences]))
        assert (gap["low"], gap["high"]) == pytest.approx(interval(samples), abs=1e-6)
        assert gap["low"] < gap["high"], "the systems answer alike: nothing is compared"
    assert systems["alone"]["tasks"]["mini"]["gap"] is None

    text = (output / "compare.md").read_text()
    assert "| model | recipe | labels in test language |" in text and "gap to alone" in text
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    assert "| direct | no |" in lines["alone"] and "| xcot | yes |" in lines["answers"]
    assert lines["stack"].rstrip().endswith("| 3 | 2 |")  # seconds and CPU-seconds of its three steps
    assert "Not as there: The paper adapts an LLM that LLM2Vec prepared" in text and "## Failed" not in text
    assert lines["stack"] in out and "written:" in out

    # the same again trains and scores nothing, and says the same
    calls.clear()
    before = {name: (output / name).read_bytes() for name in ("scores.json", "compare.md", "compare.json")}
    assert compare(path) == 0
    assert calls == [] and "finished parts found" in capsys.readouterr().out
    assert {name: (output / name).read_bytes() for name in before} == before


def rows(output: Path, system: str, code: str) -> np.ndarray:
    """The share of seeds in which each row came out right."""
    cells = [load_file(output / f"cells/mini/{system}/seed {seed}/{code}.safetensors") for seed in (1, 2)]
    return np.mean([cell["predictions"] == cell["gold"] for cell in cells], axis=0)


def test_a_training_that_fails_is_named_and_the_others_are_compared(root, content, monkeypatch, capsys) -> None:
    def failing(words, log, report):
        if words[3] == "adapt" and "seed-2" in words[-1]:
            log.write_text("adapt: at work\nmtllm adapt: error: out of memory\n")
            return Ended(1, Used(1.0, 0.5, 2**20), None)
        return inside(words, log, report)

    monkeypatch.setattr(recipe_run, "run_measured", failing)
    path = write_yaml(root / "failing.yaml", of(content, "alone", "stack", output=str(root / "failing")))
    assert compare(path) == 1
    said = capsys.readouterr()
    reason = "stack, seed 2: step adapt: mtllm adapt ended with exit code 1: mtllm adapt: error: out of memory"
    assert f"1 of 4 trainings or readings failed: {reason}" in said.err and said.err.count("\n") == 1
    found = read(root / "failing")
    assert [(one["system"], one["seed"]) for one in found["failed"]] == [("stack", 2)]
    assert found["systems"]["stack"]["tasks"]["mini"]["seeds"] == 1
    assert found["systems"]["alone"]["tasks"]["mini"]["seeds"] == 2
    assert found["systems"]["stack"]["tasks"]["mini"]["gap"] is not None
    text = (root / "failing/compare.md").read_text()
    assert "| stack (1 failed) |" in text and f"## Failed\n\n- {reason}" in text
    # the reference fails wholly: the rest is scored, without differences
    monkeypatch.setattr(
        recipe_run, "run_measured", lambda *a: Ended(1, Used(), None) if a[0][3] == "finetune" else inside(*a)
    )
    path = write_yaml(root / "none.yaml", of(content, "alone", "answers", seeds=[1], output=str(root / "none")))
    assert compare(path) == 1
    found = read(root / "none")
    assert found["against"] == {"mini": None} and found["systems"]["alone"]["tasks"]["mini"] is None
    assert found["systems"]["answers"]["tasks"]["mini"]["gap"] is None
    # what failed is tried again, and what was finished is not
    monkeypatch.setattr(recipe_run, "run_measured", inside)
    assert compare(path) == 0
    assert read(root / "none")["against"] == {"mini": "alone"} and read(root / "none")["failed"] == []


def test_a_task_that_cannot_be_read_is_named(root, content, calls, monkeypatch, tmp_path, capsys) -> None:
    def unreadable(suite, *, progress):
        raise ValueError("text 'x' holds a lone surrogate")

    monkeypatch.setattr("mtllm_fast.evaluation.suite_file.run_suite", unreadable)
    assert compare(write_yaml(tmp_path / "compare.yaml", of(content, "alone", output=str(tmp_path / "out")))) == 1
    assert "readings failed: all systems, mini: text 'x' holds a lone surrogate" in capsys.readouterr().err
    assert (tmp_path / "out/runs/alone").is_dir(), "what was trained is kept"


def test_trained_for_each_task_where_the_data_say_so(root, given, content, calls, tmp_path) -> None:
    """A step that does not read the task is shared by the tasks; translate-test's teacher is a system."""
    data = {"english": given["english"], "task": "{task}", "folder": {"folder": given["folder"], "nusax": "NUSAX"}}
    tasks = [{"task": "folder", "name": "folder", "data": given["folder"]}]
    (tmp_path / "T.jsonl").write_text(
        "".join(
            json.dumps({"id": f"test{i}", "language": "fra_Latn", "translation": f"river {i}"}) + "\n"
            for i in range(12)
        )
    )
    changes = {"data": data, "tasks": tasks, "output": str(tmp_path / "out"), "seeds": [1]}
    changes |= {"against": "translate-test"}
    changes["translate_test"] = {"teacher": "alone", "translations": str(tmp_path / "T.jsonl")}
    assert compare(write_yaml(tmp_path / "c.yaml", of(content, "alone", "stack", **changes))) == 0
    assert [words[0] for words in calls] == ["finetune", "adapt", "distill"]
    assert (tmp_path / "out/runs/stack/folder/seed-1/student/model.safetensors").is_file()
    (scores,) = read_scores(tmp_path / "out/scores.json")
    assert [model.name for model in scores.models] == ["alone", "stack", "translate-test"]
    assert scores.reference == "translate-test"
    assert "| translate-test | - | - |" in (tmp_path / "out/compare.md").read_text()
    # two tasks of other rows: stage 1 is run once for both, stages 2 and 3 for each
    (tmp_path / "other").mkdir()
    other = write_data(tmp_path / "other")["folder"]
    with open(f"{other}/eng_Latn/train.tsv", "a") as file:
        file.write("new\ta new line\ta\n")
    calls.clear()
    data["folder"] = {"folder": given["folder"], "again": other}
    data["task"] = "folder"
    tasks.append({"task": "folder", "name": "again", "data": given["folder"]})
    changes |= {"against": "alone", "output": str(tmp_path / "two")}
    del changes["translate_test"]
    assert compare(write_yaml(tmp_path / "two.yaml", of(content, "alone", "stack", **changes))) == 0
    assert [words[0] for words in calls] == ["finetune", "finetune", "adapt", "distill", "distill"]
    assert len(read(tmp_path / "two")["systems"]["stack"]["training"]) == 2


def test_a_system_that_cannot_do_a_task_is_named(root, given, content, calls, tmp_path, capsys) -> None:
    """A bidirectional LLM writes no answers; the one that writes is scored all the same."""
    for code in ("eng_Latn", "fra_Latn"):
        (tmp_path / "sums" / code).mkdir(parents=True)
        for split in ("train", "test"):
            lines = [f"{i}\tHow much is {i} and 1?\t{i + 1}\n" for i in range(4)]
            (tmp_path / "sums" / code / f"{split}.tsv").write_text("id\tquestion\tanswer\n" + "".join(lines))
    sums = {
        "name": "sums",
        "kind": "generated",
        "columns": {"text": "question", "label": "answer", "id": "id"},
        "english": "eng_Latn",
        "languages": {"eng_Latn": "eng_Latn", "fra_Latn": "fra_Latn"},
        "files": "{language}/{split}.tsv",
    }
    task = {"task": write_yaml(tmp_path / "sums.yaml", sums), "data": str(tmp_path / "sums"), "max_new_tokens": 4}
    changes = {"tasks": [*content["tasks"], task], "seeds": [1], "output": str(tmp_path / "out")}
    assert compare(write_yaml(tmp_path / "c.yaml", of(content, "alone", "answers", **changes))) == 1
    assert "alone, sums: model=" in capsys.readouterr().err
    found = read(tmp_path / "out")
    assert found["systems"]["alone"]["tasks"]["sums"] is None
    assert found["systems"]["answers"]["tasks"]["sums"]["method"] == "generation"
    assert found["systems"]["alone"]["tasks"]["mini"] is not None
    assert found["against"] == {"mini": "alone", "sums": None}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("[1]", "expected a mapping with the keys of `mtllm help compare`"),
        ("a: [", "not YAML"),
        ({"recpies": {}}, "unknown key 'recpies'; did you mean 'recipes'?"),
        ({"models": {"a": "b"}}, "unknown key 'models'"),
        ({"recipes": {}}, "recipes: expected a mapping with at least one recipe"),
        ({"recipes": {"a": "mtllm"}}, "recipes: a: recipe='mtllm': neither a .yaml file nor one of the library's"),
        ({"recipes": {"a": {"llm": "x"}}}, "recipes: a: 'recipe' is missing"),
        ({"recipes": {"a": {"recipe": "direct", "sets": {}}}}, "recipes: a: unknown key 'sets'; did you mean 'set'?"),
        ({"recipes": {"a": 3}}, "recipes: a: expected a mapping, got int"),
        ({"recipes": {"a": {"recipe": "direct", "encoder": "x"}}}, "recipes: a: encoder: recipe direct uses none"),
        ({"recipes": {"translate-test": "direct"}, "against": None}, "'translate-test' is the name of the baseline"),
        ({"recipes": {"a": {"recipe": "direct", "data": {"pairs": "x"}}}}, "recipes: a: data: pairs: direct has no such role"),
        ({"recipes": {"a": "mindmerger"}}, "recipes: a: data: pairs=... is missing: texts in many languages"),
        ({"recipes": {"a": {"recipe": "direct", "set": {"teacher.lr": "x"}}}}, "recipes: a: --set teacher.lr=\"x\": lr: 'x': expected a number"),
        ({"recipes": {"a": {"recipe": "direct", "set": {"adapt.lr": 1}}}}, "recipes: a: --set adapt.lr=1: direct has no step 'adapt'"),
        ({"set": {"nothing.lr": 1}}, "set: no recipe has a step for 'nothing.lr'"),
        ({"set": {"*.init_from": 1}, "recipes": {"alone": "direct"}, "data": {"task": "folder", "folder": "x"}, "encoder": None}, "set: no recipe has a step for '*.init_from'"),
        ({"data": {"task": "folder", "folder": "x", "chains": "x", "english": "x", "dictionary": "x"}}, "data: 'dictionary' is a role of no recipe"),
        ({"llm": ""}, "recipes: alone: llm is missing: recipe direct uses it"),
        ({"recipes": {"alone": "direct"}}, "data: 'english' is a role of no recipe"),
        ({"recipes": {"alone": "direct"}, "data": {"task": "folder", "folder": "x"}}, "encoder: no recipe uses one"),
        ({"seeds": []}, "seeds: []: expected different numbers >= 0, at least one"),
        ({"seeds": [1, 1]}, "seeds: [1, 1]: expected different numbers"),
        ({"seeds": "x"}, "seeds: 'x': expected a list, each a whole number"),
        ({"tasks": []}, "tasks: expected a list with at least one task"),
        ({"tasks": [{"tusk": "x"}]}, "tasks[0]: unknown key 'tusk'; did you mean 'task'?"),
        ({"against": "none"}, "against: 'none' is none of the systems; they are alone, stack, answers"),
        ({"against": "translate-test"}, "against: 'translate-test' is none of the systems"),
        ({"data": {"task": "folder", "folder": {"other": "x"}, "chains": "x", "english": "x"}}, "folder: names other, but not 'mini'"),
        ({"processes": "many"}, "processes: 'many': expected a whole number"),
    ],
)  # fmt: skip
def test_bad_files_are_refused_in_one_line(content, tmp_path, change, said) -> None:
    whole = change if isinstance(change, str) else {key: v for key, v in {**content, **change}.items() if v is not None}
    path = write_yaml(tmp_path / "c.yaml", whole)
    with pytest.raises(ValueError) as caught:
        read_comparison(path)
    assert str(caught.value).startswith(f"compare={path!r}: ") and said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_wrong_is_said_before_anything_is_trained(content, calls, tmp_path, capsys) -> None:
    """Of the last system and seed, before the first one starts."""
    assert compare(str(tmp_path / "none.yaml")) == 2
    assert "no such file" in capsys.readouterr().err
    for stack, said in (
        ({"data": {"english": "./none.txt"}}, "recipes: stack: --data english=./none.txt: no such file or folder"),
        ({"llm": str(tmp_path / "llm-{seed}")}, f"recipes: stack: --llm {tmp_path}/llm-1: no such folder"),
    ):
        whole = of(content, "alone", "stack", output=str(tmp_path / "out"))
        whole["recipes"] = {"alone": "direct", "stack": {"recipe": "mt_llm", **stack}}
        assert compare(write_yaml(tmp_path / "c.yaml", whole)) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1
    assert calls == [] and not (tmp_path / "out").exists()
    without = {key: value for key, value in of(content, "alone").items() if key != "output"}
    assert compare(write_yaml(tmp_path / "c.yaml", without)) == 2
    assert "names no 'output' either" in capsys.readouterr().err


def test_a_stopped_comparison_goes_on(content, monkeypatch, tmp_path, capsys) -> None:
    import signal

    path = write_yaml(tmp_path / "c.yaml", of(content, "alone", output=str(tmp_path / "out")))
    monkeypatch.setattr(recipe_run, "run_measured", lambda *_: Ended(130, Used(), signal.SIGINT))
    assert compare(path) == 130
    assert "compare: SIGINT: stopped in step teacher; the same command goes on" in capsys.readouterr().out
    assert not (tmp_path / "out/compare.json").exists()
    monkeypatch.setattr(recipe_run, "run_measured", inside)
    assert compare(path) == 0
    assert read(tmp_path / "out")["systems"]["alone"]["tasks"]["mini"]["seeds"] == 2


def test_the_help_shows_a_comparison(tmp_path, capsys) -> None:
    from mtllm_fast.commands.help import page

    example = page("compare").split("\n\n")[2]
    found = yaml.safe_load(example)
    assert set(found) >= {"recipes", "against", "tasks", "translate_test", "set"}
    comparison = read_comparison(write_yaml(tmp_path / "c.yaml", example))
    assert [contestant.by_task for contestant in comparison.contestants] == [True] * 3
    stack = comparison.contestants[1].inputs("nusax", 2)
    assert (stack["task"], stack["folder"]) == ("nusax", "data/nusax_senti")
    assert comparison.contestants[2].inputs("sib200", 2)["llm"] == "runs/llm/seed-2"
    with pytest.raises(SystemExit):
        cli.main(["help", "compare"])
    assert "translate_test:" in capsys.readouterr().out
