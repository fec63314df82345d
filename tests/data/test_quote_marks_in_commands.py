"""Quote marks that are text, through every command that reads a table: refused by default, read with --no-quoted."""

import csv
import json
import shlex

import numpy as np
import pandas
import pytest

from mtllm_fast import MTLLM, HeadConfig, LoraSettings
from mtllm_fast.cli import main
from mtllm_fast.commands.watch import WatchSettings
from mtllm_fast.data.store import TokenStore

BODY = 'text\tlabel\n"a\tpos\nb"\tneg\nc\tpos\n'
QUICK = " --max-steps 1 --tokens 128 --max-length 64 --device cpu --no-progress --report-to none"
COMMANDS = {
    "tokenize": "tokenize --encoder {encoder} --llm {llm} --text rows.tsv --output out",
    "encode": "encode --model stack --input rows.tsv --language eng_Latn --output out.npy --no-progress",
    "adapt": "adapt --encoder {encoder} --llm {llm} --text rows.tsv --output out" + QUICK,
    "finetune": "finetune --llm {llm} --text rows.tsv --labels neg pos --output out" + QUICK,
    "finetune by folder": "finetune --llm {llm} --task folder --data task --output out" + QUICK,
    "valid": "finetune --llm {llm} --text plain.tsv --valid rows.tsv --labels neg pos --output out" + QUICK,
    "distill": "distill --model stack --teacher teacher --text rows.tsv --labels neg pos --output out" + QUICK,
    "evaluate": "evaluate --model teacher --task folder --data task --languages eng_Latn --output out --no-progress",
    "translate": "translate --model {encoder} --input rows.tsv --language fra_Latn --output out.jsonl --no-progress",
    "translate a task": "translate --model {encoder} --task folder --data task --language-map eng_Latn=fra_Latn "
    "--output out.jsonl --no-progress",
    "profile": "profile --encoder {encoder} --llm {llm} --text rows.tsv --json out.json --steps 1 --device cpu",
}


@pytest.fixture(scope="module")
def world(encoder_folder, llm_folder, tmp_path_factory):
    """Files with quote marks, and the same rows as pandas reads them."""
    root = tmp_path_factory.mktemp("world")
    for name in ("task", "same"):
        (root / name / "eng_Latn").mkdir(parents=True)
    for path in ("rows.tsv", "task/eng_Latn/train.tsv", "task/eng_Latn/test.tsv"):
        (root / path).write_text(BODY)
    (root / "plain.tsv").write_text("text\tlabel\nx\tpos\ny\tneg\n")
    (root / "task" / "labels.txt").write_text("neg\npos\n")
    (root / "same" / "labels.txt").write_text("neg\npos\n")
    read = pandas.read_csv(root / "rows.tsv", sep="\t", quoting=csv.QUOTE_NONE)
    for path in ("rows.jsonl", "same/eng_Latn/train.jsonl", "same/eng_Latn/test.jsonl"):
        read.to_json(root / path, orient="records", lines=True)
    pandas.read_csv(root / "rows.tsv", sep="\t").to_json(root / "merged.jsonl", orient="records", lines=True)
    MTLLM.stack(encoder_folder, llm_folder, lora=LoraSettings(r=2)).save_pretrained(root / "stack")
    teacher = MTLLM.stack(llm=llm_folder, reader="llm", lora=LoraSettings(r=2))
    teacher.set_head(HeadConfig(labels=("neg", "pos")))
    teacher.save_pretrained(root / "teacher")
    return root


@pytest.fixture
def command(world, encoder_folder, llm_folder, monkeypatch, tmp_path):
    """`command(name, more)` runs one of COMMANDS; its output goes to `tmp_path`."""
    monkeypatch.chdir(world)

    def run(name, more="", old="", new=""):
        words = shlex.split(COMMANDS[name].format(encoder=encoder_folder, llm=llm_folder) + more)
        words = [new if word == old else word for word in words]
        main([str(tmp_path / word) if word.partition(".")[0] == "out" else word for word in words])

    return run


def _want(world):
    read = pandas.read_csv(world / "rows.tsv", sep="\t", quoting=csv.QUOTE_NONE)
    return read["text"].tolist(), read["label"].tolist()


@pytest.mark.parametrize("name", COMMANDS)
def test_one_line_names_the_line_and_nothing_is_written(command, name, capsys, tmp_path):
    with pytest.raises(SystemExit) as caught:
        command(name)
    printed = capsys.readouterr()
    said = [line for line in printed.err.splitlines() if line.startswith("mtllm")]
    assert caught.value.code == 2
    assert len(said) == 1 and "line 2: a quote mark joins" in said[0] and "--no-quoted" in said[0], printed.err
    assert "Traceback" not in printed.err and printed.out == ""
    assert list(tmp_path.iterdir()) == []


def _seen(rows, labels):
    return [row.text for row in rows], [labels[row.label] for row in rows]


@pytest.mark.parametrize("name", ["adapt", "finetune", "finetune by folder", "valid", "distill"])
def test_training_reads_what_pandas_reads(command, name, world, monkeypatch, tmp_path):
    stage, seen = COMMANDS[name].split()[0], {}

    def trained(kind, config, data, watch):
        seen["texts"] = [row.text for row in data.rows]
        if stage != "adapt":
            seen["labels"] = [data.labels[row.label] for row in data.rows]
            seen["valid"] = _seen(data.valid_rows, data.labels)
        return {}

    monkeypatch.setattr("mtllm_fast.commands.train.run", trained)
    command(name, " --no-quoted")
    texts, labels = _want(world)
    if name == "valid":
        assert seen["valid"] == (texts, labels) and seen["texts"] == ["x", "y"]
        return
    assert seen["texts"] == texts
    assert seen.get("labels", labels) == labels


def test_the_trained_weights_are_those_of_the_same_rows(command, tmp_path):
    """Control: those of the merged rows are others."""
    weights = {}
    for name, source in (("tsv", "rows.tsv"), ("jsonl", "rows.jsonl"), ("merged", "merged.jsonl")):
        command("finetune", " --no-quoted", "rows.tsv", source)
        (tmp_path / "out").rename(tmp_path / name)
        weights[name] = (tmp_path / name / "model.safetensors").read_bytes()
    assert weights["tsv"] == weights["jsonl"] != weights["merged"]


def test_tokens_are_those_of_the_texts_pandas_reads(command, world, tmp_path):
    from transformers import AutoTokenizer

    command("tokenize", " --no-quoted")
    store = TokenStore(tmp_path / "out")
    ids = store.take(np.arange(len(store)), ("llm",)).sides["llm"].ids
    tokenizer = AutoTokenizer.from_pretrained(json.loads((world / "stack/config.json").read_text())["llm"])
    assert [tokenizer.decode(row, skip_special_tokens=True) for row in ids] == _want(world)[0]


def test_embeddings_and_scores_are_those_of_the_same_rows(command, tmp_path):
    made = {}
    for name in ("rows.tsv", "rows.jsonl"):
        command("encode", " --no-quoted", "rows.tsv", name)
        made[name] = np.load(tmp_path / "out.npy")
        (tmp_path / "out.npy").unlink()
    assert made["rows.tsv"].shape[0] == 3
    np.testing.assert_array_equal(*made.values())
    assert (made["rows.tsv"][0] != made["rows.tsv"][1]).any()  # control
    scores = {}
    for name in ("task", "same"):
        command("evaluate", " --no-quoted", "task", name)
        (found,) = json.loads((tmp_path / "out/scores.json").read_text())["tasks"]
        scores[name] = found["models"][0]["languages"]["eng_Latn"]
        (tmp_path / "out").rename(tmp_path / name)
    assert scores["task"] == scores["same"] and scores["task"]["rows"] == 3


@pytest.mark.parametrize("name", ["finetune by folder", "evaluate", "translate a task"])
def test_a_task_that_says_itself_how_its_files_are_written(command, name, capsys, tmp_path):
    with pytest.raises(SystemExit):
        command(name, " --no-quoted", "folder", "sib200")
    said = capsys.readouterr().err.strip()
    assert "--no-quoted" in said and "'sib200' says itself" in said and said.count("\n") == 0
    assert list(tmp_path.iterdir()) == []


def test_a_store_of_tokens_says_it_too(command, capsys, tmp_path):
    command("tokenize", " --no-quoted")
    with pytest.raises(SystemExit):
        command("adapt", " --no-quoted", "rows.tsv", str(tmp_path / "out"))
    assert "--no-quoted: is for text" in capsys.readouterr().err


def test_watched_rows_are_read_alike(world):
    """With the option of the run whose task is watched, and with its own for another."""
    folder = {"languages": ("eng_Latn",), "split": "test"}
    own = WatchSettings(**folder).watch("folder", str(world / "task"), quoted=False)
    named = WatchSettings(**folder, task="folder", data=str(world / "task"), quoted=False).watch()
    teacher = MTLLM.from_pretrained(world / "teacher")
    want = WatchSettings(**folder).watch("folder", str(world / "same")).score(teacher)
    assert own.score(teacher) == named.score(teacher) == want and "eng_Latn_accuracy" in want
    with pytest.raises(ValueError, match="line 2: a quote mark joins"):
        WatchSettings(**folder).watch("folder", str(world / "task")).score(teacher)
    with pytest.raises(ValueError, match=r"--watch\.languages is missing"):
        WatchSettings(quoted=False).watch()


def test_a_suite_reads_alike(world, tmp_path, monkeypatch):
    monkeypatch.chdir(world)
    rows = {}
    for name, task in {"tsv": "task, quoted: false", "jsonl": "same"}.items():
        file = tmp_path / f"{name}.yaml"
        file.write_text(f"models: {{a: teacher}}\ntasks: [{{task: folder, data: {task}}}]\noutput: {tmp_path / name}\n")
        main(["evaluate", "--suite", str(file), "--no-progress"])
        (found,) = json.loads((tmp_path / name / "scores.json").read_text())["tasks"]
        rows[name] = found["models"][0]["languages"]["eng_Latn"]
    assert rows["tsv"] == rows["jsonl"] and rows["tsv"]["rows"] == 3


def test_a_run_that_was_started_without_the_option_is_resumed(command, tmp_path, monkeypatch, capsys):
    command("finetune", "", "rows.tsv", "plain.tsv")
    assert "quoted" not in json.loads((tmp_path / "out/run.json").read_text())["source"]
    command("finetune", " --resume", "rows.tsv", "plain.tsv")
    with pytest.raises(SystemExit):
        command("finetune", " --resume --no-quoted", "rows.tsv", "plain.tsv")
    assert "--resume: source.quoted=False" in capsys.readouterr().err
