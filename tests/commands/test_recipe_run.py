"""Recipes that run: killed at any place and gone on with to the same bytes, refused where something has changed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from mtllm_fast import cli
from mtllm_fast.commands import recipe_run
from mtllm_fast.commands.recipe_file import read_recipe
from mtllm_fast.commands.recipe_record import identity, read_record
from mtllm_fast.commands.recipe_run import RecipeRun, Stopped
from mtllm_fast.failures import RunFailed
from mtllm_fast.jobs import measured
from mtllm_fast.jobs.durable import FolderLock
from mtllm_fast.jobs.measured import Ended, Used, run_measured
from mtllm_fast.models.storage import read_config
from tests.commands.recipe_steps import QUICK, inside, models, record, write_data

SHORT = {
    "system": "Encoder",
    "source": "here",
    "about": "an encoder, adapted to a task twice",
    "labels_in_test_language": False,
    "data": {"task": "a task", "folder": "its folder"},
    "steps": {
        "bare": {"command": "convert", "model": "{encoder}", "from": "encoder"},
        "first": {"command": "finetune", "encoder": "{encoder}", "task": "{task}", "data": "{folder}"},
        "second": {"command": "finetune", "model": "{first}", "task": "{task}", "data": "{folder}", "lr": 1e-3},
    },
    "result": "second",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory, encoder_folder, llm_folder):
    """Arguments of a run of MT-LLM but for its output, and of a short recipe of its own."""
    root = tmp_path_factory.mktemp("recipes")
    data = write_data(root)
    (root / "short.yaml").write_text(yaml.safe_dump(SHORT, sort_keys=False))
    return {"root": root, "data": data, "encoder": encoder_folder, "llm": llm_folder}


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(recipe_run, "run_measured", inside)


def short(world, output: Path, overrides: list[str] = [], **more) -> RecipeRun:  # noqa: B006
    recipe = read_recipe(str(world["root"] / "short.yaml"), [*QUICK, *overrides])
    data = {"task": "folder", "folder": world["data"]["folder"]}
    return RecipeRun(recipe, str(output), encoder=world["encoder"], **{"data": data, "seed": 3, **more})


def test_a_step_is_what_its_command_does_by_hand(world, quick, tmp_path) -> None:
    job = short(world, tmp_path / "run")
    assert job.run() == tmp_path / "run" / "second"
    by_hand = tmp_path / "hand"
    cli.main(["finetune", "--config", str(tmp_path / "run/first.yaml"), "--output", str(by_hand)])
    assert (by_hand / "model.safetensors").read_bytes() == (tmp_path / "run/first/model.safetensors").read_bytes()
    options = yaml.safe_load((tmp_path / "run/second.yaml").read_text())
    first, second = (str(tmp_path / "run" / name) for name in ("first", "second"))
    assert (options["model"], options["seed"], options["output"]) == (first, 3, second)
    assert "seed" not in yaml.safe_load((tmp_path / "run/bare.yaml").read_text())
    assert read_config(tmp_path / "run/bare").reader == "encoder"
    assert json.loads((tmp_path / "run/first/run.json").read_text())["train"]["seed"] == 3


def test_what_a_run_records(world, quick, tmp_path) -> None:
    job = short(world, tmp_path / "run", ["second.epochs=2"])
    job.run()
    found = record(tmp_path / "run")
    assert (found["seed"], found["result"], found["finished"], found["format"]) == (3, "second", True, 1)
    assert found["about"]["system"] == "Encoder" and found["about"]["labels_in_test_language"] is False
    assert found["overrides"][-1] == "second.epochs=2"
    assert found["steps"]["second"]["settings"]["train.epochs"] == 2
    assert found["steps"]["second"]["settings"]["model"] == "{first}"
    assert [one["seconds"] for one in found["steps"].values()] == [1.0] * 3
    assert (job.record.cost.seconds, job.record.cost.cpu_seconds) == (3.0, 1.5)
    assert job.record.cost.peak_memory_bytes == 2**20
    assert "torch" in found["starts"][0]["versions"]
    assert found["inputs"]["folder"]["content"].keys() >= {"eng_Latn/train.tsv"}
    assert read_record(tmp_path / "run") == job.record


def test_a_failed_step_is_named_and_the_finished_ones_are_kept(world, monkeypatch, tmp_path, capsys) -> None:
    calls: list[list[str]] = []

    def failing(words, log, report):
        calls.append(list(words))
        if words[3] == "finetune" and "--resume" not in words and len(calls) == 2:
            return Ended(3, Used(1.0, 0.5, 0), None)
        return inside(words, log, report)

    monkeypatch.setattr(recipe_run, "run_measured", failing)
    with pytest.raises(RunFailed, match="step first: mtllm finetune ended with exit code 3; finished steps are kept"):
        short(world, tmp_path / "run").run()
    assert [one["finished"] for one in record(tmp_path / "run")["steps"].values()] == [True, False, False]
    job = short(world, tmp_path / "run")
    job.run()
    assert [words[3] for words in calls] == ["convert", "finetune", "finetune", "finetune"]
    assert job.record.steps["first"].starts == 2 and job.record.steps["first"].cost.seconds == 2.0
    assert "step 1 of 3, bare: is there" in capsys.readouterr().out
    job = short(world, tmp_path / "run")
    job.run()
    assert len(calls) == 4, "a finished recipe runs nothing"
    # a command that says it is done, and has made nothing, is not
    monkeypatch.setattr(recipe_run, "run_measured", lambda *_: Ended(0, Used(), None))
    with pytest.raises(RunFailed, match="step bare: mtllm convert ended with exit code 0"):
        short(world, tmp_path / "empty").run()
    monkeypatch.setattr(recipe_run, "run_measured", lambda *_: Ended(-9, Used(), None))
    with pytest.raises(RunFailed, match="step bare: mtllm convert was ended by signal 9"):
        short(world, tmp_path / "ended").run()


def test_outputs_that_are_gone_are_made_again_only_where_they_are_read(world, quick, tmp_path, capsys) -> None:
    short(world, tmp_path / "run").run()
    expected = models(tmp_path / "run")
    shutil.rmtree(tmp_path / "run/first")
    short(world, tmp_path / "run").run()
    assert not (tmp_path / "run/first").exists()
    shutil.rmtree(tmp_path / "run/second")
    capsys.readouterr()
    short(world, tmp_path / "run").run()
    assert models(tmp_path / "run") == expected
    assert capsys.readouterr().out.count("mtllm finetune") == 2


def test_the_same_step_of_another_recipe_serves(world, quick, tmp_path, capsys) -> None:
    known: recipe_run.Known = {}
    first = short(world, tmp_path / "a")
    first.run(known)
    assert len(known) == 3
    capsys.readouterr()
    # the others' first steps are the same: what changes nothing of what is computed may differ
    second = short(world, tmp_path / "b", ["second.lr=1e-4", "*.save_steps=3"])
    second.run(known)
    out = capsys.readouterr().out
    assert out.count("taken from") == 2 and out.count("mtllm finetune") == 1
    assert second.record.steps["first"].taken_from == "../a/first" and not (tmp_path / "b/first").exists()
    assert second.record.cost.seconds == 3.0  # what it would cost alone
    config = yaml.safe_load((tmp_path / "b/second.yaml").read_text())
    assert config["model"] == str(tmp_path / "a/first")
    again = short(world, tmp_path / "b", ["second.lr=1e-4"])
    assert again.run({}) == tmp_path / "b/second" and again.record.steps["second"].starts == 1
    alone = short(world, tmp_path / "c", ["second.lr=1e-4"])
    alone.run()
    assert models(tmp_path / "c")["second/model.safetensors"] == models(tmp_path / "b")["second/model.safetensors"]
    # another seed is another training, and the same conversion; other data change both trainings
    third = short(world, tmp_path / "d", seed=4)
    third.run(known)
    assert [one.taken_from != "" for one in third.record.steps.values()] == [True, False, False]
    shutil.copytree(world["data"]["folder"], tmp_path / "task")
    with (tmp_path / "task/eng_Latn/train.tsv").open("a") as file:
        file.write("new\ta new line\ta\n")
    job = short(world, tmp_path / "e", data={"task": "folder", "folder": str(tmp_path / "task")})
    assert job._computes("bare") in known and job._computes("first") not in known


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: {"seed": 4}, "--seed 4, but the run in {run} was started with 3; name a new folder"),
        (lambda w: {"overrides": ["second.lr=1e-4"]}, "steps: second: lr is 0.0001, but the run in {run} was started with 0.001"),
        (lambda w: {"overrides": ["first.lora.r=4"]}, "steps: first: r is 4, but the run in {run} was started with None"),
        (lambda w: {"data": {"task": "nusax", "folder": w["data"]["folder"]}}, "--data task=nusax, but the run in {run} was started with folder"),
        (lambda w: {"data": {"task": "folder", "folder": w["data"]["english"]}}, "--data folder={english}: has changed since the run in {run} was started"),
        (lambda w: {"encoder": w["llm"]}, "--encoder {llm}: has changed since the run in {run} was started"),
    ],
)  # fmt: skip
def test_a_run_goes_on_only_as_it_was_started(world, started, change, said) -> None:
    changes = change(world)
    job = {"overrides": changes.pop("overrides", []), **changes}
    encoder = job.pop("encoder", world["encoder"])
    with pytest.raises(ValueError) as caught:
        short({**world, "encoder": encoder}, started, **job)
    assert said.format(run=started, **world["data"], llm=world["llm"]) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def started(world, tmp_path_factory) -> Path:
    """A run of the short recipe whose first step is done."""
    folder = tmp_path_factory.mktemp("started") / "run"

    def once(words, log, report):
        return inside(words, log, report) if words[3] == "convert" else Ended(1, Used(), None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe_run, "run_measured", once)
        job = short(world, folder)
        with pytest.raises(RunFailed):
            job.run()
    return folder


def test_what_may_differ_when_a_run_goes_on(world, started, tmp_path) -> None:
    shutil.copytree(world["data"]["folder"], tmp_path / "moved")
    data = {"task": "folder", "folder": str(tmp_path / "moved")}
    job = short(world, started, ["*.save_steps=7", "first.log_steps=3"], data=data)
    assert [one.finished for one in job.record.steps.values()] == [True, False, False]
    with (tmp_path / "moved/eng_Latn/train.tsv").open("a") as file:
        file.write("new\ta new line\ta\n")
    with pytest.raises(ValueError, match=r"has changed since the run in .*: eng_Latn/train.tsv: .* then, .* now"):
        short(world, started, data=data)


def test_data_are_known_by_content(world, tmp_path) -> None:
    """A file, a folder, a glob, a model, a name; what stands beside a model's files does not count."""
    (tmp_path / "a.txt").write_text("a\n")
    (tmp_path / "folder").mkdir()
    shutil.copy(tmp_path / "a.txt", tmp_path / "folder/b.txt")
    shutil.copytree(world["llm"], tmp_path / "model")

    def content(value: str) -> dict[str, str]:
        found = identity("role", value)
        assert found["value"] == value
        return found["content"]

    one, folder = content(f"{tmp_path}/a.txt"), content(f"{tmp_path}/folder")
    assert folder == {"b.txt": one[""]} == content(f"{tmp_path}/folder/*.txt")
    (tmp_path / "folder/.hidden").write_text("x")
    assert content(f"{tmp_path}/folder") == folder
    (tmp_path / "folder/c.txt").write_text("x")
    assert content(f"{tmp_path}/folder") != folder
    assert content("sib200") == content("org/name:config") == content("") == {}
    model = content(f"{tmp_path}/model")
    (tmp_path / "model/log.jsonl").write_text("x")
    assert content(f"{tmp_path}/model") == model == identity("llm", f"{tmp_path}/model")["content"]
    (tmp_path / "model/config.json").write_text("{}")
    assert content(f"{tmp_path}/model") != model


def test_another_recipe_or_a_damaged_record_is_refused(world, started, tmp_path) -> None:
    recipe = read_recipe(str(world["root"] / "short.yaml"), QUICK)
    data = {"task": "folder", "folder": world["data"]["folder"]}
    fewer = replace(recipe, steps={name: recipe.steps[name] for name in ("first", "second")})
    with pytest.raises(ValueError, match=r"its steps are first, second, but the run in .* bare, first, second"):
        RecipeRun(fewer, str(started), encoder=world["encoder"], data=data, seed=3)
    shutil.copytree(started, tmp_path / "run")
    path = tmp_path / "run/recipe.json"
    for content, said in (
        ("{", "is damaged"),
        ("[]", "no JSON object"),
        ("{}", "format None, but this version reads 1"),
        (json.dumps({**record(started), "steps": {"a": 3}}), "is damaged"),
        (json.dumps({**record(started), "more": 3}), "is damaged"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=said) as caught:
            short(world, tmp_path / "run")
        assert "\n" not in str(caught.value)


def test_two_runs_in_one_folder_are_refused(world, quick, tmp_path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom mtllm_fast.jobs.durable import FolderLock\n"
        "assert FolderLock(Path(sys.argv[1])).take()\nprint('taken', flush=True)\ntime.sleep(60)"
    )
    (tmp_path / "run").mkdir()
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "taken\n"
        with pytest.raises(ValueError, match=rf"another process \({other.pid} on .*\) runs a recipe in it"):
            short(world, tmp_path / "run").run()
    finally:
        other.kill()
        other.wait()
    short(world, tmp_path / "run").run()
    assert not FolderLock(tmp_path / "run").path.exists(), "it was not let go of"


def test_a_step_in_a_process_of_its_own(world, monkeypatch, tmp_path, capsys) -> None:
    """Nothing replaced: a real process, what it cost, and its log; and what is said of one that fails."""
    recipe = replace(read_recipe(str(world["root"] / "short.yaml")), result="bare")
    recipe = replace(recipe, steps={"bare": recipe.steps["bare"]}, data={})
    job = RecipeRun(recipe, str(tmp_path / "run"), encoder=world["encoder"], logs=True)
    model = job.run()
    assert read_config(model).reader == "encoder"
    cost = job.record.cost
    assert cost.cpu_seconds > 1 and cost.seconds > 1 and cost.peak_memory_bytes > 100 * 2**20
    assert "convert: " in (tmp_path / "run/bare.log").read_text()
    assert "convert: " not in capsys.readouterr().out
    said = "print('at work'); print('mtllm convert: error: no such folder\\n')\nraise SystemExit(2)"
    monkeypatch.setattr(recipe_run, "run_measured", lambda words, *more: run_measured([words[0], "-c", said], *more))
    job = RecipeRun(recipe, str(tmp_path / "bad"), encoder=world["encoder"], logs=True)
    with pytest.raises(RunFailed, match="ended with exit code 2: mtllm convert: error: no such folder; finished steps"):
        job.run()


PATIENT = """
import signal, sys, time
def stop(number, frame):
    print("saved", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
print("ready", flush=True)
deadline = time.monotonic() + 60
while time.monotonic() < deadline:
    sum(range(10000))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_is_passed_on_and_ends_the_recipe(world, monkeypatch, tmp_path, number, code) -> None:
    """The step saves what it has; a step that ends well by a signal is not finished, nor is another one begun."""
    monkeypatch.setattr(measured, "HEARTBEAT_S", 0.05)
    beats: list[Used] = []
    sent: list[int] = []

    def patient(words, log, report):
        def told(used: Used) -> None:
            beats.append(used)
            report(used)
            if not sent and len(beats) > 3 and "ready" in log.read_text():
                sent.append(number)
                os.kill(os.getpid(), number)

        return run_measured([sys.executable, "-c", PATIENT], log, told)

    monkeypatch.setattr(recipe_run, "run_measured", patient)
    before = signal.getsignal(number)
    job = short(world, tmp_path / "run", logs=True)
    with pytest.raises(Stopped, match=f"{number.name}: stopped in step bare; the same command goes on") as caught:
        job.run()
    assert caught.value.code == code and signal.getsignal(number) is before
    assert (tmp_path / "run/bare.log").read_text() == "ready\nsaved\n"
    step = record(tmp_path / "run")["steps"]["bare"]
    assert not step["finished"] and step["starts"] == 1 and step["cpu_seconds"] > 0
    assert record(tmp_path / "run")["steps"]["first"]["starts"] == 0
    # what is known while it runs: used time grows, so that a kill of this process loses little
    assert 0 < beats[0].seconds < beats[-1].seconds and beats[-1].cpu_seconds > 0
    assert max(beat.peak_memory_bytes for beat in beats) > 2**20


def test_the_command_line_of_a_stopped_recipe(world, monkeypatch, tmp_path, capsys) -> None:
    words = ["--recipe", "direct", "--llm", world["llm"], "--output", str(tmp_path / "run"), "--data", "task=folder"]
    for ended, code in ((Ended(130, Used(), signal.SIGINT), 130), (Ended(1, Used(), None), 1)):
        monkeypatch.setattr(recipe_run, "run_measured", lambda *_, ended=ended: ended)
        with pytest.raises(SystemExit) as caught:
            cli.main(["train", *words])
        assert caught.value.code == code
    said = capsys.readouterr()
    assert "train: SIGINT: stopped in step teacher; the same command goes on" in said.out
    assert "mtllm train: error: step teacher: mtllm finetune ended with exit code 1" in said.err


def test_several_processes_share_the_steps_that_can(world, monkeypatch, tmp_path) -> None:
    calls: list[list[str]] = []

    def noted(words, log, report):
        calls.append(list(words))
        return inside(words, log, report)

    monkeypatch.setattr(recipe_run, "run_measured", noted)
    short(world, tmp_path / "run", processes=2).run()
    assert calls[0][1:4] == ["-m", "mtllm_fast.cli", "convert"]  # runs in one process
    assert calls[1][1:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    assert calls[1][6:8] == ["mtllm_fast.cli", "finetune"]
