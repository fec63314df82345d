"""Translation into a file: formats, killing and resuming, and what stands in the way of it."""

import errno
import json
import os
import signal
import time
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
import torch

from mtllm_fast import cli
from mtllm_fast.evaluation.tasks import TASKS
from mtllm_fast.evaluation.translations import join_translations
from mtllm_fast.inference.translate import Manner, Source, translate_file
from mtllm_fast.inference.translator import Translator
from mtllm_fast.jobs.parts import Parts

WORDS = ["river", "bread", "cheese", "light", "stone", "train", "night", "teacher", "apple", "bridge"]
SOURCES = [
    Source(" ".join(WORDS[(i + k) % 10] for k in range(1 + i % 7)), ("fra_Latn", "deu_Latn")[i % 2], str(i), "xx")
    for i in range(50)
]
HOW = Manner(window=8, decoding={"max_new_tokens": 5})
SETTINGS = {"settings": {"model": "tiny"}}


@pytest.fixture(scope="module")
def translator(encoder_folder):
    made = Translator.from_pretrained(encoder_folder, device="cpu")
    with torch.no_grad():  # as initialised it says the same to everything
        for weight in made.model.parameters():
            weight.mul_(8.0 if weight.ndim > 1 else 1.0)
    return made


class Killed(BaseException):
    pass


def stop_after(monkeypatch, windows, error=Killed):
    """Fail in the middle of storing the next window, as a kill would."""
    append, seen = Parts.append, []

    def failing(self, index, *rest):
        if len(seen) == windows:
            os.write(self._data, b"half a window")
            raise error
        seen.append(index)
        return append(self, index, *rest)

    monkeypatch.setattr(Parts, "append", failing)


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_stopped_and_resumed_gives_the_same_bytes(translator, tmp_path, monkeypatch, ending):
    whole, output = tmp_path / f"whole{ending}", tmp_path / f"t{ending}"
    report = translate_file(translator, SOURCES, whole, HOW, **SETTINGS)
    assert (report.rows, report.resumed) == (50, 0)
    for windows in (0, 3, 1):
        with monkeypatch.context() as patch:
            stop_after(patch, windows)
            with pytest.raises(Killed):
                translate_file(translator, SOURCES, output, HOW, **SETTINGS)
        assert not output.exists()
    calls = []
    translate = translator.translate_scored
    monkeypatch.setattr(translator, "translate_scored", lambda *a, **k: calls.append(a) or translate(*a, **k))
    report = translate_file(translator, SOURCES, output, HOW, **SETTINGS)
    assert (report.rows, report.resumed, len(calls)) == (50, 32, 3)
    assert output.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted((whole.name, output.name))


def test_records(translator, tmp_path):
    output = tmp_path / "t.parquet"
    translate_file(translator, SOURCES, output, HOW, **SETTINGS)
    table = pq.read_table(output)
    assert table.column_names == ["id", "language", "split", "field", "source", "translation", "score"]
    rows = table.to_pylist()
    assert [row["id"] for row in rows] == [str(i) for i in range(50)]
    direct = translator.translate([one.text for one in SOURCES], [one.mt_code for one in SOURCES], max_new_tokens=5)
    assert [row["translation"] for row in rows] == direct
    assert len(set(direct)) > 3 and all(row["score"] < 0 for row in rows)
    assert json.loads(table.schema.metadata[b"mtllm_translate"])["target"] == "eng_Latn"
    translate_file(translator, SOURCES[:3], tmp_path / "t.jsonl", replace(HOW, scores=False), **SETTINGS)
    records = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert [record["translation"] for record in records] == direct[:3]
    assert records[0] == {
        "id": "0", "language": "xx", "split": None, "field": "text",
        "source": "river", "translation": direct[0], "score": None,
    }  # fmt: skip


def test_several_processes_share_the_work(translator, tmp_path):
    alone = tmp_path / "alone.jsonl"
    translate_file(translator, SOURCES, alone, HOW, **SETTINGS)
    output = tmp_path / "t.jsonl"
    reports = [
        translate_file(translator, SOURCES, output, HOW, rank=rank, world_size=3, **SETTINGS) for rank in range(3)
    ]
    assert [report.complete for report in reports] == [False, False, True]
    assert output.read_bytes() == alone.read_bytes()


def test_other_settings_and_finished_outputs_are_refused(translator, tmp_path, monkeypatch):
    output = tmp_path / "t.jsonl"
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Killed):
            translate_file(translator, SOURCES, output, HOW, **SETTINGS)
    with pytest.raises(ValueError, match=r"had other settings .*max_new_tokens was 5 and is 6"):
        translate_file(translator, SOURCES, output, replace(HOW, decoding={"max_new_tokens": 6}), **SETTINGS)
    translate_file(translator, SOURCES, output, HOW, **SETTINGS)
    with pytest.raises(ValueError, match="exists; pass --overwrite"):
        translate_file(translator, SOURCES, output, HOW, **SETTINGS)
    translate_file(translator, SOURCES[:8], output, HOW, overwrite=True, **SETTINGS)
    assert len(output.read_text().splitlines()) == 8
    with pytest.raises(ValueError, match="no text to translate"):
        translate_file(translator, [], tmp_path / "none.jsonl", HOW, **SETTINGS)
    with pytest.raises(ValueError, match="expected a name ending in"):
        translate_file(translator, SOURCES, tmp_path / "t.txt", HOW, **SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["t.jsonl"]


def test_a_full_disk_loses_nothing(translator, tmp_path, monkeypatch):
    output = tmp_path / "t.jsonl"
    with monkeypatch.context() as patch:
        stop_after(patch, 2, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(ValueError, match=r"cannot be written \(No space left on device\); 16 texts are saved"):
            translate_file(translator, SOURCES, output, HOW, **SETTINGS)
    assert translate_file(translator, SOURCES, output, HOW, **SETTINGS).resumed == 16


def write_task(folder):
    for language, count in (("english", 3), ("acehnese", 9), ("ngaju", 3), ("balinese", 0)):
        rows = [f'{i},"{WORDS[i]}\n{WORDS[i - 1]}",neutral' for i in range(count)]
        (folder / language).mkdir(parents=True)
        name = "test" if count else "train"
        (folder / language / f"{name}.csv").write_text("id,text,label\n" + "\n".join([*rows, "77, ,neutral"]) + "\n")
    return folder


def test_command_on_a_task(capsys, encoder_folder, tmp_path):
    data, output = write_task(tmp_path / "data"), tmp_path / "t.parquet"
    command = ["translate", "--model", encoder_folder, "--task", "nusax", "--data", str(data), "--output", str(output)]
    cli.main([*command, "--max-new-tokens", "4", "--device", "cpu"])
    out = capsys.readouterr().out
    assert "10 texts to eng_Latn" in out
    for line in ("no MT code: ngaju", "already in eng_Latn: english", "no test split: balinese"):
        assert f"not translated, {line}" in out
    task = TASKS["nusax"]
    rows = task.rows(data, "acehnese")
    joined = join_translations(output, task, rows, language="acehnese")
    assert joined.counts() == {"joined": 10, "missing": 0, "unused": 0, "duplicates": 0}
    assert joined.rows[-1].text == " "
    more = ["--languages", "ngaju", "--language-map", "ngaju=ban_Latn", "--overwrite", "--device", "cpu"]
    cli.main([*command, *more, "--max-new-tokens", "4"])
    assert "4 texts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--task", "nusax", "--input", "x.txt"], "either --input FILE or --task TASK"),
        ([], "either --input FILE or --task TASK"),
        (["--task", "nusax", "--languages", "acehnesse"], "--languages: 'acehnesse' is not in"),
        (["--task", "nusax", "--languages", "ngaju"], "none to translate (no MT code)"),
        (["--task", "nusax", "--language-map", "ngaju=nij_Latn"], "nij_Latn"),
        (["--task", "nusax", "--output", "t.txt"], "ending in .parquet or .jsonl"),
        (["--task", "nusax", "--num-beams", "0"], "--num-beams 0: must be at least 1"),
    ],
)
def test_bad_commands(capsys, encoder_folder, tmp_path, options, match):
    data = write_task(tmp_path / "data")
    command = ["translate", "--model", encoder_folder, "--device", "cpu", "--data", str(data)]
    with pytest.raises(SystemExit) as caught:
        cli.main([*command, "--output", str(tmp_path / "t.parquet"), *options])
    assert caught.value.code == 2
    message = capsys.readouterr().err.strip()
    assert match in message and message.count("\n") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def killed_and_resumed(forked, command, whole, output):
    """Run `command(output)` and kill it with signal 9 behind its second window; then again, in this process."""
    cli.main(command(whole))
    pid = forked.start(*command(output))
    log = output.with_name(f"{output.name}.part") / "0.log"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.stat().st_size >= 80) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    forked.wait()
    assert not output.exists(), "it was done before it could be killed"
    cli.main(command(output))
    assert output.read_bytes() == whole.read_bytes()


def test_killed_with_signal_9(forked, capsys, encoder_folder, tmp_path):
    (tmp_path / "in.txt").write_text("\n".join(one.text for one in SOURCES * 2) + "\n")

    def command(output):
        files = ["--input", str(tmp_path / "in.txt"), "--output", str(output), "--language", "fra_Latn"]
        size = ["--window", "10", "--max-new-tokens", "12", "--device", "cpu"]
        return ["translate", "--model", encoder_folder, *files, *size]

    killed_and_resumed(forked, command, tmp_path / "whole.parquet", tmp_path / "t.parquet")
    out = capsys.readouterr().out
    assert out.count("translate: 100 texts") == 2 and out.count("by an earlier run") == 1
