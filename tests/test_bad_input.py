"""Input that is wrong in ways of its own: one line that names it, nothing written."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mtllm_fast.cli import main
from mtllm_fast.yaml_file import read_yaml


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lr: 1\nseed: 2\nlr: 3\n", "'lr' is given twice, in lines 1 and 3"),
        ("train:\n  lr: 1\n  lr: 1\n", "'lr' is given twice, in lines 2 and 3"),
        ("- {a: 1, a: 2}\n", "'a' is given twice"),
        ("1: x\n1: y\n", "1 is given twice"),
        ("a: [\n", "not YAML"),
    ],
)
def test_a_key_that_is_given_twice(text, said, tmp_path) -> None:
    (tmp_path / "f.yaml").write_text(text)
    with pytest.raises(ValueError, match=said):
        read_yaml(tmp_path / "f.yaml")


def test_what_is_no_key_given_twice(tmp_path) -> None:
    (tmp_path / "f.yaml").write_text("base: &base {lr: 1}\nmore:\n  <<: *base\n  lr: 2\n'1': a\n1: b\n")
    assert read_yaml(tmp_path / "f.yaml") == {"base": {"lr": 1}, "more": {"lr": 2}, "1": "a", 1: "b"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["encode", "--device", "cuda"], "--device cuda: no CUDA device"),
        (["encode", "--device", "tpu9"], "--device tpu9: expected cpu, cuda or cuda:N"),
        (["encode", "--device", "cuda:x"], "--device cuda:x: expected"),
        (["translate", "--device", "cuda:3"], "--device cuda:3: no CUDA device"),
        (["translate", "--device", "tpu9"], "--device tpu9"),
        (["adapt", "--seed", "-1"], "seed=-1"),
        (["adapt", "--workers", "-2"], "workers=-2"),
        (["adapt", "--clip", "-1"], "clip=-1"),
    ],
)
def test_one_line_before_anything_is_written(arguments, said, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.txt").write_text("A river.\n")
    files = ["--model", "model", "--input", "in.txt", "--output", "deep/out.npy"]
    if arguments[0] == "adapt":
        files = ["--encoder", "e", "--llm", "l", "--text", "in.txt", "--output", "deep/run"]
    if arguments[0] == "translate":
        files = ["--model", "model", "--input", "in.txt", "--output", "deep/out.jsonl", "--target", "eng_Latn"]
        files += ["--language", "deu_Latn"]
    with pytest.raises(SystemExit) as caught:
        main([*arguments, *files])
    out = capsys.readouterr().err
    assert caught.value.code == 2
    assert said in out and "Traceback" not in out
    assert [path.name for path in tmp_path.iterdir()] == ["in.txt"]


def test_a_reader_that_has_enough_is_no_error() -> None:
    command = [sys.executable, "-m", "mtllm_fast.cli", "doctor"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()  # as `head` does
    error = process.stderr.read()
    assert process.wait() == 0, error
    assert "Traceback" not in error and "Broken pipe" not in error
