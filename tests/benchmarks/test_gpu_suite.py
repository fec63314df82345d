"""The GPU suite on the CPU, with steps of its own: order, shares, time-outs, kills, one archive, a package that is not installed."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest

from benchmarks import gpu_suite
from benchmarks.common import Record, device_name, folder_name, write
from benchmarks.gpu_suite import Step, shared, steps
from tests.conftest import REPO

WRITES = "import sys, pathlib, time; pathlib.Path(sys.argv[1]).write_text(sys.argv[2]); print('written', flush=True); "


@pytest.fixture(autouse=True)
def quick_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_suite, "machine", lambda device: {"device": "NVIDIA H200", "missing": []})


def writing(out: Path, name: str, part: int = 1, share: float = 0.5, then: str = "") -> Step:
    """A step that writes one record, and goes on with `then`."""
    path = out / "nvidia-h200" / f"{name}.json"
    write(path, [Record("c", {"T": 1}, "bf16", "NVIDIA H200", "ours", "pass", time_ms=1.0, size=name)])
    text = path.read_text()
    path.unlink()
    return Step(name, {name: (sys.executable, "-S", "-c", WRITES + then, str(path), text)}, share, part)


def in_archive(path: Path) -> set[str]:
    with tarfile.open(path) as tar:
        return {Path(*Path(name).parts[1:]).as_posix() for name in tar.getnames()}


def test_tests_come_first_and_the_ladder_has_the_most_of_its_part(tmp_path) -> None:
    every = steps(tmp_path)
    assert [step.part for step in every] == sorted(step.part for step in every)
    assert sum(step.share for step in every) == pytest.approx(1.0)
    assert every[0].name == "kernel tests" and "test_linear_kl_gpu" in every[0].commands
    assert all("pytest" in command for command in every[0].commands.values())
    other = next(step for step in every if step.name == "other tests")
    assert {"test_trainer_gpu", "test_attention_gpu"} <= set(other.commands)
    assert not set(other.commands) & set(every[0].commands)
    second = {step.name: step.share for step in shared([step for step in every if step.part == 2])}
    assert second == {"ladder": pytest.approx(2 / 3), "training steps": pytest.approx(1 / 3)}
    linear_kl = next(step for step in every if step.name == "linear kl").commands["linear_kl"]
    assert "8192x4096x128256" in linear_kl and "--quick" not in linear_kl


def test_every_command_has_options_that_its_program_knows(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """On a GPU and in the trial on the CPU: what a program does not know would cost a step."""
    import argparse

    read = []

    class Parsed(Exception):
        pass

    parse = argparse.ArgumentParser.parse_args

    def only_parse(self, arguments=None, namespace=None):
        read.append(parse(self, arguments, namespace))
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
    for device, quick in (("cuda", False), ("cpu", True)):
        for step in steps(tmp_path, device, quick, "nvidia-h200"):
            for command in step.commands.values():
                module = command[2]
                if module == "pytest":
                    assert Path(command[-1]).is_file()
                    continue
                main = importlib.import_module(module)
                with pytest.raises(Parsed):
                    main.main(list(command[3:]))
                assert read[-1].device == device and read[-1].quick is quick
                assert read[-1].json == tmp_path / "nvidia-h200" / f"{step.name.replace(' ', '_')}.json"
                if quick:
                    continue
                for size in getattr(read[-1], "sizes", []):
                    assert size in {s["label"] for case in registered(module) for s in case.sizes["cuda"]}


def registered(module: str):
    from benchmarks.registry import MODULES, get, module_of

    return [get(name) for name in MODULES if module_of(name) == module]


def test_a_step_out_of_time_keeps_what_it_wrote_and_the_next_one_runs(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, archive = tmp_path / "out", tmp_path / "sub" / "a.tar.gz"
    plan = [
        writing(out, "slow", share=0.1, then="time.sleep(600)"),
        writing(out, "fails", share=0.45, then="sys.exit(3)"),
        writing(out, "good", share=0.45),
        Step("other tests", {}, 0.0, 3),
    ]
    monkeypatch.setattr(gpu_suite, "steps", lambda *_: plan)
    monkeypatch.setattr(gpu_suite, "BEAT", 0.5)
    assert gpu_suite.main([str(out), "--device", "cpu", "--budget", "60", "--archive", str(archive)]) == 1
    found = json.loads((out / "summary.json").read_text())
    assert {name: row["status"] for name, row in found.items()} == {
        "slow: slow": "out of time", "fails: fails": "failed (3)", "good: good": "ok", "other tests": "packages missing",
    }  # fmt: skip
    assert 5 < found["slow: slow"]["seconds"] < 30
    records = {f"nvidia-h200/{name}.json" for name in ("slow", "fails", "good")}
    assert records | {"report.md", "summary.json", "slow.log", "machine.txt"} <= in_archive(archive)


@pytest.mark.parametrize("kill", ["the suite is told to end", "the suite is gone"])
def test_a_suite_that_is_killed_leaves_an_archive_of_what_there_is(tmp_path, monkeypatch, kill: str) -> None:
    out, archive = tmp_path / "out", tmp_path / "a.tar.gz"
    plan = [writing(out, "slow", then="time.sleep(600)"), writing(out, "never")]
    monkeypatch.setattr(gpu_suite, "steps", lambda *_: plan)
    monkeypatch.setattr(gpu_suite, "BEAT", 0.2)
    arguments = [str(out), "--device", "cpu", "--budget", "100", "--archive", str(archive)]
    if kill == "the suite is gone":  # SIGKILL runs nothing more: what was packed while the step ran is there
        packed = gpu_suite.pack

        def gone(*options):
            packed(*options)
            if "nvidia-h200/slow.json" in in_archive(archive):
                monkeypatch.setattr(gpu_suite, "pack", lambda *_: None)
                raise KeyboardInterrupt

        monkeypatch.setattr(gpu_suite, "pack", gone)
        with pytest.raises(KeyboardInterrupt):
            gpu_suite.main(arguments)
    else:
        monkeypatch.setattr(gpu_suite, "BEAT", 60.0)
        written = out / "nvidia-h200" / "slow.json"

        def when_written() -> None:
            while not written.is_file():
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=when_written, daemon=True).start()
        with pytest.raises(SystemExit) as ended:
            gpu_suite.main(arguments)
        assert ended.value.code == 143
    assert "nvidia-h200/slow.json" in in_archive(archive)
    assert "nvidia-h200/never.json" not in in_archive(archive)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_part_shares_the_whole_budget(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    out, limits = tmp_path / "out", {}
    plan = [writing(out, "a", 1, 0.5), writing(out, "b", 2, 0.3), writing(out, "c", 2, 0.1)]
    monkeypatch.setattr(gpu_suite, "steps", lambda *_: plan)

    def run_step(step, out, limit, *_):
        limits[step.name] = limit
        return [gpu_suite.Outcome(step.name, "ok", limit, "")]

    monkeypatch.setattr(gpu_suite, "run_step", run_step)
    gpu_suite.main([str(out), "--device", "cpu", "--budget", "400", "--part", "2"])
    assert limits == {"b": pytest.approx(300, abs=2), "c": pytest.approx(100, abs=2)}
    with pytest.raises(SystemExit):
        gpu_suite.main([str(out), "--device", "cpu", "--only", "leader"])
    assert "'leader'" in capsys.readouterr().err


def test_folders_are_named_after_the_device() -> None:
    assert folder_name("NVIDIA H200") == "nvidia-h200"
    assert folder_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert folder_name(device_name("cpu")) == "cpu"


def test_no_gpu_is_said_and_nothing_is_written(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu_suite.main([str(tmp_path / "out")]) == 2
    assert "no GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_folders_are_found_where_nothing_is_installed(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_suite.importable(tmp_path) == {}
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "mtllm_fast.kernels" else found(n))
    before = list(sys.meta_path)
    monkeypatch.setattr(sys, "meta_path", list(before))
    environment = gpu_suite.importable(tmp_path)
    (own_finder,) = sys.meta_path[len(before) :]
    assert own_finder.find_spec("mtllm_fast.kernels").origin == str(REPO / "kernels" / "__init__.py")
    assert own_finder.find_spec("mtllm_fast.models") is None
    monkeypatch.undo()
    # -S: no site-packages, where the package is installed here, and nobody who reads sitecustomize.py
    look = "import importlib.util as u; print(getattr(u.find_spec('mtllm_fast.kernels'), 'origin', None))"
    said = {}
    for first in ("", "import sitecustomize; "):
        done = subprocess.run(
            [sys.executable, "-S", "-c", first + look], env={**os.environ, **environment}, cwd=tmp_path,
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        said[first] = done.stdout.strip()
    assert said[""] == "None"
    assert said["import sitecustomize; "] == str(REPO / "kernels" / "__init__.py")


def test_make_gpu_installs_and_fetches_nothing() -> None:
    """A machine without pip's build packages, or without a network, runs the suite all the same."""
    rule = re.search(r"^gpu:\n((?:\t.*\n)+)", (REPO / "Makefile").read_text(), re.MULTILINE)
    assert rule and "benchmarks.gpu_suite" in rule.group(1)
    assert "pip" not in rule.group(1)


def run_code(code: str, folder: Path, limit: float = 60.0) -> gpu_suite.Outcome:
    step = Step("a step", {"log": (sys.executable, "-c", code)}, 1.0, 1)
    (outcome,) = gpu_suite.run_step(step, folder, limit, dict(os.environ))
    return outcome


def test_a_step_is_ok_fails_or_runs_out_of_time(tmp_path) -> None:
    ok = run_code("print('first'); print('last')", tmp_path)
    assert (ok.status, ok.last_line) == ("ok", "last")
    assert run_code("raise SystemExit(3)", tmp_path).status == "failed (3)"
    late = run_code("import time; print('began', flush=True); time.sleep(60)", tmp_path, 2)
    assert (late.status, late.last_line) == ("out of time", "KeyboardInterrupt")
    assert "began" in (tmp_path / "log.log").read_text()
    assert late.seconds < 10


def test_a_test_step_that_runs_out_of_time_keeps_what_it_found(tmp_path) -> None:
    """Its whole group is interrupted first, children too."""
    report = tmp_path / "x.xml"
    command = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-c", os.devnull, f"--junitxml={report}",
               str(tmp_path / "test_it.py"))  # fmt: skip
    for seconds in (5, 20, 80):  # pytest alone takes seconds to start, on a machine that is busy many
        child = f"import time, pathlib; time.sleep({seconds + 3}); pathlib.Path('late').touch()"
        (tmp_path / "test_it.py").write_text(
            f"import subprocess, sys, time\ndef test_fails(): assert 1 == 2\n"
            f"def test_hangs():\n    subprocess.Popen([sys.executable, '-c', {child!r}], cwd={str(tmp_path)!r})\n"
            "    time.sleep(600)\n"
        )
        began = time.monotonic()
        (outcome,) = gpu_suite.run_step(Step("tests", {"log": command}, 1.0, 1), tmp_path, seconds, dict(os.environ))
        assert outcome.status == "out of time"
        if report.is_file():
            break
    assert "assert 1 == 2" in report.read_text()
    time.sleep(max(0.0, seconds + 5 - (time.monotonic() - began)))
    assert not (tmp_path / "late").exists()


def test_report(tmp_path) -> None:
    assert "hold no records" in gpu_suite.write_report(tmp_path)
    pytest.importorskip("matplotlib")
    record = {
        "case": "c",
        "shape": {"T": 1},
        "dtype": "bf16",
        "device": "d",
        "variant": "ours",
        "gate": "pass",
        "time_ms": 2.0,
    }
    rows = [{**record, "ours": True}, {**record, "variant": "other", "time_ms": 3.0}]
    (tmp_path / "nvidia-h200").mkdir()
    (tmp_path / "nvidia-h200" / "results.json").write_text(json.dumps(rows))
    gpu_suite.write_summary(tmp_path, [])
    assert gpu_suite.write_report(tmp_path) is None
    assert "1.50" in (tmp_path / "report.md").read_text()
    assert "1.50" in (tmp_path / "report.html").read_text()
