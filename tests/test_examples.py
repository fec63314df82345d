"""The scripts of examples/ and the commands of the README, run on tiny models."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mtllm_fast import cli
from mtllm_fast.commands import recipe_run
from mtllm_fast.commands.recipe_file import names
from tests.commands.recipe_steps import inside
from tests.conftest import REPO
from tests.forked import Forked
from tests.tiny import LINES, write_task

SCRIPTS = sorted(path.name for path in (REPO / "examples").glob("*.py"))


@pytest.fixture
def inputs(tmp_path: Path, encoder_folder: str, llm_folder: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with models/, english.txt, swahili.txt, train.tsv, valid.tsv and task/."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models/e5-small").symlink_to(encoder_folder)
    (tmp_path / "models/smollm2-135m").symlink_to(llm_folder)
    (tmp_path / "english.txt").write_text("\n".join(LINES * 12) + "\n", encoding="utf-8")
    (tmp_path / "swahili.txt").write_text("\n".join(LINES[1:4]) + "\n", encoding="utf-8")
    write_task(tmp_path / "task", ("eng_Latn", "swh_Latn"), "a b", repeats=2)
    for name, split in (("train.tsv", "train"), ("valid.tsv", "dev")):
        (tmp_path / name).symlink_to(tmp_path / "task/eng_Latn" / f"{split}.tsv")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def script(inputs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(REPO / "examples" / name), run_name="__main__")
        return capsys.readouterr().out

    return run


MODELS = ("--encoder", "models/e5-small", "--llm", "models/smollm2-135m", "--text", "english.txt")


def test_own_loop_and_retrieve(script: Callable[..., str]) -> None:
    lines = script("own_loop.py", *MODELS, "--output", "runs/own", "--steps", "8").splitlines()
    losses = [float(line.split(": ")[1]) for line in lines if line.startswith("step")]
    assert len(losses) == 8
    assert losses[-1] < losses[0]
    files = ("--english", "english.txt", "--other", "swahili.txt", "--language", "eng_Latn")
    out = script("retrieve.py", "--model", "runs/own", *files)
    # in the same language every text finds itself
    assert [line.split("\t") for line in out.splitlines()] == [[line, line] for line in LINES[1:4]]


def test_three_stages(script: Callable[..., str]) -> None:
    files = ("--train", "train.tsv", "--valid", "valid.tsv", "--output", "runs/stages")
    asked = ("--ask", LINES[0], "--language", "swh_Latn", "--steps", "3")
    label, shares = script("three_stages.py", *MODELS, *files, *asked).splitlines()[-1].split(" ", 1)
    found = eval(shares)
    assert label in ("a", "b")
    assert sorted(found) == ["a", "b"]
    assert label == max(found, key=found.get)
    assert sum(found.values()) == pytest.approx(1.0, abs=2e-3)


def test_packed_llm(script: Callable[..., str]) -> None:
    out = script("packed_llm.py", "--llm", "models/smollm2-135m")
    found = re.search(r"(\d+) tokens instead of (\d+) padded ones; largest difference (\S+)$", out.strip())
    assert found is not None
    assert int(found[1]) < int(found[2])
    assert float(found[3]) < 1e-5


def test_fused_losses(script: Callable[..., str]) -> None:
    losses = [float(line.split(": ")[1]) for line in script("fused_losses.py").splitlines()]
    assert losses[-1] < 0.2 * losses[0]


def test_every_script_is_run_here() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    assert len(SCRIPTS) == 5
    for name in SCRIPTS:
        assert f'"{name}"' in text, name
        assert len((REPO / "examples" / name).read_text(encoding="utf-8").splitlines()) <= 60, name


def of_the_readme(block: int) -> list[list[str]]:
    """Words of the commands in a block of "Five minutes to your own data"."""
    readme = (REPO / "README.md").read_text(encoding="utf-8")
    lines = readme.split("## Five minutes to your own data")[1].split("```")[block].replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def test_the_commands_of_the_readme(inputs: Path, forked: Forked) -> None:
    """ "Five minutes to your own data": as written, with fewer steps."""
    commands = of_the_readme(1)
    assert [words[1] for words in commands] == ["adapt", "finetune", "distill", "evaluate"]
    code = "import os, sys; os.chdir(sys.argv[1]); from mtllm_fast import cli; cli.main(sys.argv[2:])"
    for words in commands:
        few = ["--max-steps", "2"] if words[1] in ("finetune", "distill") else []
        words = ["2" if word == "200" else word for word in words]
        out = forked.run(inputs, *words[1:], *few, code=code)
    assert "swh_Latn" in out


def test_the_recipe_of_the_readme(inputs: Path, monkeypatch, capsys) -> None:
    """The three stages in one call, as written, with fewer steps."""
    commands = of_the_readme(3)
    assert [words[:2] for words in commands] == [["mtllm", "train"], ["mtllm", "train"], ["mtllm", "compare"]]
    monkeypatch.chdir(inputs)
    monkeypatch.setattr(recipe_run, "run_measured", inside)
    cli.main(commands[0][1:])
    listed = capsys.readouterr().out
    assert sum(name in listed for name in names()) == len(names()) == 20  # as the README says
    words = [word.replace("max_steps=200", "max_steps=2") for word in commands[1][1:]]
    cli.main([*words, "teacher.max_steps=2", "student.max_steps=2", "*.device=cpu", "*.report_to=none"])
    assert (inputs / "runs/mt-llm/student/model.safetensors").is_file()
