"""The command line: one-line errors with exit code 2, YAML, and the commands on tiny models."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtllm_fast import cli
from mtllm_fast.commands.from_yaml import read_settings
from mtllm_fast.commands.help import parse
from mtllm_fast.inference.progress import progress_bar
from tests.tiny import LINES, write_task


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(LINES) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    write_task(folder, ("eng_Latn", "fra_Latn", "xxx_Latn"))
    return folder


@pytest.fixture(scope="module")
def adapted(tmp_path_factory, encoder_folder, llm_folder, text_file) -> Path:
    output = tmp_path_factory.mktemp("cli") / "run"
    settings = output.parent / "adapt.yaml"
    settings.write_text(
        f"encoder: {encoder_folder}\nllm: {llm_folder}\nmax-steps: 3\ntokens: 128\nmax_length: 64\nloss:\n  paired_mse: 0.5\n"
    )
    mtllm(f"adapt --config {settings} --text {text_file} --output {output} --no-progress --report-to none")
    assert json.loads((output / "run.json").read_text())["loss"]["paired_mse"] == 0.5
    assert json.loads((output / "run.json").read_text())["train"]["max_steps"] == 3
    return output


def mtllm(line: str) -> None:
    cli.main(line.split())


def _fails(capsys: pytest.CaptureFixture[str], line: str) -> str:
    with pytest.raises(SystemExit) as caught:
        mtllm(line)
    assert caught.value.code == 2
    message = capsys.readouterr().err.strip()
    assert "Traceback" not in message
    return message


def test_stages_evaluate_and_report(capsys, adapted, encoder_folder, llm_folder, task_folder, tmp_path) -> None:
    source = f"--task folder --data {task_folder}"
    quick = "--no-progress --report-to none --epochs 1 --tokens 128 --max-length 64"
    teacher, student, report = (tmp_path / name for name in ("teacher", "student", "scores"))
    mtllm(f"finetune --llm {llm_folder} {source} --output {teacher} {quick}")
    mtllm(f"distill --model {adapted} --teacher {teacher} {source} --output {student} {quick}")
    evaluate = f"evaluate --model {student} {source} --output {report} --no-progress"
    mtllm(f"{evaluate} --translator {encoder_folder} --teacher {teacher}")
    (scores,) = json.loads((report / "scores.json").read_text())["tasks"]
    assert [m["name"] for m in scores["models"]][-1] == "translate-test"
    assert len(scores["models"]) == 2
    out = capsys.readouterr().out
    assert "xxx_Latn" in out and "not run" in out and "scores.png" in out
    assert str(report) in _fails(capsys, evaluate)
    mtllm(f"{evaluate} --overwrite --language-map xxx_Latn=deu_Latn --languages xxx_Latn")
    assert "mapped" in capsys.readouterr().out


def test_translate_and_encode(capsys, adapted, encoder_folder, text_file, tmp_path) -> None:
    out = tmp_path / "t.jsonl"
    mtllm(f"translate --model {encoder_folder} --input {text_file} --output {out} --language fra_Latn")
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["source"] for row in rows] == list(LINES)
    assert all(isinstance(row["translation"], str) for row in rows)
    vectors = tmp_path / "e.npy"
    command = f"encode --model {adapted} --input {text_file} --output {vectors} --normalize"
    mtllm(command)
    loaded = np.load(vectors)
    assert loaded.shape == (len(LINES), 48)
    assert loaded.dtype == np.float32
    assert np.allclose(np.linalg.norm(loaded, axis=1), 1, atol=1e-5)
    assert "exists" in _fails(capsys, command)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["e.npy", "t.jsonl"]


def test_truncation_is_counted(capsys, encoder_folder, llm_folder, tmp_path) -> None:
    (tmp_path / "long.txt").write_text(" ".join(LINES) + "\nshort line\n")
    mtllm(
        f"adapt --encoder {encoder_folder} --llm {llm_folder} --text {tmp_path}/long.txt --output {tmp_path}/run "
        "--max-steps 1 --tokens 32 --max-length 16 --no-progress --report-to none"
    )
    out = capsys.readouterr().out
    assert "1 texts truncated on the mt side" in out
    assert "1 texts truncated on the llm side" in out


def test_doctor_names_every_backend_and_kernel(capsys) -> None:
    cli.main(["doctor"])
    out = capsys.readouterr().out
    for name in ("torch", "varlen", "sdpa", "linear_kl", "cuda", "flash-attn"):
        assert name in out
    if not torch.cuda.is_available():
        assert re.search(r"linear_kl\s+│ CPU path │ no GPU for Triton", out)


def test_progress_where_stderr_is_no_terminal(capsys, monkeypatch) -> None:
    """Whole lines and no bar, and only now and then."""
    for seconds, lines in ((-1.0, 2), (1000.0, 0)):
        monkeypatch.setattr("mtllm_fast.inference.progress.SECONDS_BETWEEN_LINES", seconds)
        with progress_bar("encode", 1000, True, done=2) as advance:
            advance(3)
            advance(900)
        said = capsys.readouterr().err
        assert len(re.findall(r"^encode: (5|905) of 1,000 rows, [\d,]+ rows/s\n", said, re.MULTILINE)) == lines
        assert said.count("\n") == lines and "\r" not in said and "\x1b" not in said


def test_import_is_lazy() -> None:
    """`import mtllm_fast` loads neither torch nor transformers, so it costs less than `import torch` does."""
    code = "import sys, mtllm_fast; bad = {'torch', 'transformers', 'datasets', 'triton'} & set(sys.modules); assert not bad, bad; mtllm_fast.PackedBatch"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ}, check=False)
    assert done.returncode == 0, done.stderr


def test_help_of_every_command(capsys) -> None:
    cli.main(["--version"])
    for name in cli.COMMANDS:
        with pytest.raises(SystemExit) as caught:
            cli.main([name, "--help"])
        assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "--gradient-accumulation" in out
    assert "--loss.temperature" in out


def _read(tmp_path: Path, command: str, text: str) -> Any:
    module, _, name = cli.COMMANDS[command][0].partition(":")
    file = tmp_path / "options.yaml"
    file.write_text(text)
    return read_settings(getattr(importlib.import_module(f"mtllm_fast.commands.{module}"), name), str(file))


def test_yaml_keys_are_the_options(tmp_path) -> None:
    """What has no prefix on the command line needs none, options have the command line's names, nested keys work too."""
    flat = _read(tmp_path, "distill", "task: sib200\ndata: d\ntext-column: t\nlabels: [a, b]\nvalid: v\nmax_rows: 16\n")
    nested = (
        "source:\n  task: sib200\n  data: d\n  text_column: t\n  labels: [a, b]\n  valid: v\ntrain:\n  max_rows: 16\n"
    )
    assert flat == _read(tmp_path, "distill", nested)
    assert (flat.source.task, flat.source.labels, flat.train.max_rows) == ("sib200", ("a", "b"), 16)
    assert flat.train.lr == 1e-4  # of this stage, not of stage 1
    assert _read(tmp_path, "finetune", "label-column: y\ntext: t.csv\n").source.label_column == "y"
    convert = _read(tmp_path, "convert", "to: merged\n")
    assert convert == _read(tmp_path, "convert", "target: merged\n")
    assert convert.target == "merged"
    assert _read(tmp_path, "convert", "from: nllb-llm2vec\n").source == "nllb-llm2vec"
    budget = _read(tmp_path, "adapt", "checkpointing: budget\nwatch: {languages: [swh_Latn], limit: null}\ntrain: {activation_memory_gib: 2}\n")  # fmt: skip
    assert (budget.train.checkpointing, budget.train.activation_memory_gib) == ("budget", 2.0)
    assert (budget.watch.languages, budget.watch.limit) == (("swh_Latn",), None)
    assert _read(tmp_path, "finetune", 'labels: ["no", "yes"]\n').source.labels == ("no", "yes")
    for names, read in (
        ("[no, yes]", r"\[False, True\]"),
        ("[on, b]", r"\[True, 'b'\]"),
        ("[a, off]", r"\['a', False\]"),
    ):
        with pytest.raises(ValueError, match=f"labels: {read}: expected a list, each text; put `no`.* in quotes"):
            _read(tmp_path, "finetune", f"labels: {names}\n")
    with pytest.raises(ValueError, match=r"max-rows: True: expected a whole number or null$"):
        _read(tmp_path, "finetune", "max-rows: yes\n")


def test_yaml_values_have_the_type_of_their_option(tmp_path) -> None:
    right = _read(
        tmp_path, "adapt", "lr: 1e-4\nmax_steps: '7'\nclip: 2\nlora: {dropout: 1e-1, target_modules: [q, v]}\n"
    )
    assert (right.train.lr, right.train.max_steps, right.train.clip) == (1e-4, 7, 2.0)
    assert (right.lora.dropout, right.lora.target_modules) == (0.1, ("q", "v"))
    for text, message in {
        "lr: fast": "lr: 'fast': expected a number",
        "lr: true": "lr: True: expected a number",
        "max_steps: 1.5": "max_steps: 1.5: expected a whole number",
        "bf16: 1": "bf16: 1: expected true or false or null",
        "text: 3": "text: 3: expected text",
        "limit: many": "limit: 'many': expected a whole number or null",
        "parallel: off": "parallel: False: expected one of auto, ddp, fsdp2, deepspeed",
        "watch: {languages: swh_Latn}": "watch: languages: 'swh_Latn': expected a list, each text",
        "lora: 3": "lora must be a mapping",
        "lr: 1\ntrain: {lr: 2}": "train: lr is given twice",
        "losss: {}": "unknown option 'losss'; did you mean 'loss'?",
    }.items():
        with pytest.raises(ValueError, match=r"options\.yaml: ") as caught:
            _read(tmp_path, "adapt", text)
        assert str(caught.value).endswith(message), text


def test_one_process_unless_the_work_is_shared(capsys, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in cli.COMMANDS:
        if name not in cli.SHARED:
            assert f"{name} runs in one process, but WORLD_SIZE=2" in _fails(capsys, name)
    assert "--text is missing" in _fails(capsys, "adapt")
    assert "--model is missing" in _fails(capsys, "encode")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert "--task is missing" in _fails(capsys, "evaluate")


def test_tokens_in_place_of_text(capsys, encoder_folder, llm_folder, tmp_path) -> None:
    (tmp_path / "store.json").write_text("{}")
    models = f"--encoder {encoder_folder} --llm {llm_folder} --text {tmp_path}"
    for option in ("limit 3", "split dev", "language fra_Latn", "text-column t", "language-column l"):
        assert f"--{option.split()[0]}: is for text" in _fails(capsys, f"adapt {models} --{option}")
    assert "holds tokens that" in _fails(capsys, f"tokenize {models} --output {tmp_path}/out")
    assert "holds tokens that" in _fails(capsys, f"profile {models}")


@pytest.mark.parametrize(("gpu", "chosen"), [(True, "cuda"), (False, "cpu")])
def test_bench_takes_the_gpu_where_there_is_one(monkeypatch, gpu: bool, chosen: str) -> None:
    from benchmarks import run as benchmark

    devices = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr(benchmark, "run", lambda *_, device, **__: devices.append(device) or [])
    for arguments in ([], ["--device", "cpu"]):
        cli.main(["bench", "lora", *arguments])
    assert devices == [chosen, "cpu"]


def _words(capsys, *arguments: str) -> str:
    """Help in one line, without its boxes."""
    with pytest.raises(SystemExit):
        cli.main([*arguments, "--help"])
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out).split())


def test_help_of_every_option(capsys) -> None:
    """Every option has a text; true or false are shown as both, and what is required is marked and comes first."""
    switches = 0
    for name in cli.COMMANDS:
        words = _words(capsys, name)
        assert "(default: True)" not in words and "(default: False)" not in words and "(default: '')" not in words
        for default in ("on", "off"):
            for text in re.findall(rf"(--[\w.-]+(?:, --[\w.-]+)?) (?:(?! --)[^()])*\(default: {default}\)", words):
                assert re.fullmatch(r"--(\S*\.|)(\S+), --\1no-\2", text), text
                switches += 1
        for flag, text in re.findall(
            r"(--[a-z.-]+) (?:STR|INT|FLOAT|\{None\}\S+) (\S+)", words.partition(" options ")[2]
        ):
            assert text[0] not in "-(", (name, flag)
    assert switches > 40
    words = _words(capsys, "encode")
    assert re.search(r"--progress, --no-progress Show a progress bar[^(]*\(default: on\)", words)
    assert len(re.findall(r"\(required\)", words)) == 3
    assert re.search(r"--help .*--model .*--input .*--output .*--text-column", words)
    words = _words(capsys, "adapt")
    assert re.search(r"1\.0 explains nothing, and a weight", words)  # no line of the source ends there


def test_keys_of_files_in_the_help(capsys) -> None:
    words = _words(capsys, "evaluate")
    for topic, keys in (("suite", ("translate_test:", "alignment:", "probe_data:")), ("task", ("kind:", "label_base", "header:"))):  # fmt: skip
        cli.main(["help", topic])
        page = capsys.readouterr().out
        assert all(key in page and key in words for key in keys)


def test_both_ways_of_a_switch(tmp_path) -> None:
    """A switch that a YAML file sets can be set back."""
    (tmp_path / "o.yaml").write_text("bf16: true\nprogress: false\n")
    settings_type = importlib.import_module("mtllm_fast.commands.train").Adapt
    default = read_settings(settings_type, str(tmp_path / "o.yaml"))
    read = parse("adapt", settings_type, ["--no-bf16", "--progress"], default)
    assert (default.train.bf16, default.train.progress) == (True, False)
    assert (read.train.bf16, read.train.progress) == (False, True)
    assert parse("adapt", settings_type, [], default) == default
