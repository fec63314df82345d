"""Input that is wrong in ways of its own: one line that names it, nothing written."""

from __future__ import annotations

import gzip
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mtllm_fast.kernels import linear_kl, packed_projection, paired_mse, pooled_mse, segment_mean

from mtllm_fast import (
    MTLLM,
    DistillationLoss,
    DistillationWeights,
    Engine,
    HeadConfig,
    LoraSettings,
    PackedBatch,
    TextRow,
    read_rows,
)
from mtllm_fast.cli import main
from mtllm_fast.data.collate import collate
from mtllm_fast.yaml_file import read_yaml
from tests.bad_inputs import COMMANDS, MORE, SUITES, TASKS
from tests.conftest import REPO
from tests.tiny import LINES, write_task


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
        read_yaml(tmp_path / "f.yaml", "f")


def test_what_is_no_key_given_twice(tmp_path) -> None:
    (tmp_path / "f.yaml").write_text("base: &base {lr: 1}\nmore:\n  <<: *base\n  lr: 2\n'1': a\n1: b\n")
    assert read_yaml(tmp_path / "f.yaml", "f") == {"base": {"lr": 1}, "more": {"lr": 2}, "1": "a", 1: "b"}


@pytest.fixture(scope="module")
def world(encoder_folder: str, llm_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the command lines of `bad_inputs` name."""
    root = tmp_path_factory.mktemp("world")
    for name, folder in (
        ("encoder", encoder_folder),
        ("llm", llm_folder),
        ("pickled", llm_folder),
        ("torn", llm_folder),
    ):
        shutil.copytree(folder, root / name)
    (root / "pickled" / "model.safetensors").rename(root / "pickled" / "pytorch_model.bin")
    whole = (root / "torn" / "model.safetensors").read_bytes()
    (root / "torn" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    before = Path.cwd()
    os.chdir(root)
    MTLLM.stack("encoder", "llm", lora=LoraSettings(r=2)).save_pretrained("stack")
    teacher = MTLLM.stack(llm="llm", reader="llm", lora=LoraSettings(r=2))
    teacher.set_head(HeadConfig(labels=("good", "bad")))
    teacher.save_pretrained("teacher")
    os.chdir(before)
    for name in ("void", "folder.npy"):
        (root / name).mkdir()
    rows = [(line, ("good", "bad")[i % 2]) for i, line in enumerate(LINES)]
    write_task(root / "task", ("eng_Latn", "fra_Latn"))
    files = {
        "text.txt": "\n".join(LINES) + "\n",
        "rows.csv": "text,label\n" + "".join(f'"{line}",{label}\n' for line, label in rows),
        "blank.txt": " \n\n",
        "model.docx": "text",
        "broken.jsonl": '{"text": "a"\n',
        "inf.txt": "40\ninf\n",
        "list.yaml": "- lr\n",
        "empty.yaml": "",
        "empty.txt": "",
        "typo.yaml": "max-step: 3\n",
        "nested.yaml": "loss: {k1: 1}\n",
        "nan.yaml": "lr: .nan\n",
        "seeds.yaml": "seeds: [a]\n",
        "suite.yaml": "models: {a: teacher}\ntasks: [{task: folder, data: task}]\noutput: scores\n",
        "list.json": "[1, 2]",
    }
    for name, text in files.items():
        (root / name).write_text(text)
    shutil.copy(REPO / "benchmarks" / "results" / "cpu" / "bench.json", root)
    (root / "bytes.yaml").write_bytes(b"lr: \xff\xfe\n")
    (root / "cut.parquet").write_bytes(b"PAR1\x00\x01")
    (root / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 500)[:40])
    return root


def _tree(root: Path) -> dict[str, tuple[int, int]]:
    found = {str(path): path.stat() for path in root.rglob("*")}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in found.items()}


@pytest.fixture
def refused(world: Path, monkeypatch, capsys) -> Callable[[str, str], None]:
    """`refused(command line, said)`: one line that holds `said`, exit code 2, and nothing written."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(world)

    def check(line: str, said: str) -> None:
        before = _tree(world)
        with pytest.raises(SystemExit) as caught:
            main(shlex.split(line))
        printed = capsys.readouterr()
        message = printed.err.strip()
        assert caught.value.code == 2, message
        assert message.count("\n") == 0 and message.startswith("mtllm"), message
        assert said in message.partition("error: ")[2], message
        assert "Traceback" not in message and printed.out == ""
        assert _tree(world) == before

    return check


@pytest.mark.parametrize(("line", "said"), COMMANDS + MORE)
def test_command_lines(line: str, said: str, refused) -> None:
    refused(line, said)


@pytest.mark.parametrize(("text", "said"), SUITES)
def test_suite_files(text: str, said: str, refused, tmp_path) -> None:
    (tmp_path / "suite.yaml").write_text(text)
    refused(f"evaluate --suite {tmp_path / 'suite.yaml'} --output scores", said)


@pytest.mark.parametrize(("text", "said"), TASKS)
def test_task_files(text: str, said: str, refused, world, tmp_path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    refused(f"evaluate --model teacher --task {tmp_path / 'mine.yaml'} --data {world} --output scores", said)


def test_a_right_command_is_not_refused(refused) -> None:
    """What `refused` says of the others is said of their fault alone."""
    with pytest.raises(BaseException, match="DID NOT RAISE"):
        refused("doctor --llm llm", "llm")


STATES = torch.randn(6, 8)
BOUNDS = torch.tensor([0, 2, 6], dtype=torch.int32)
HEAD = torch.randn(20, 8)
CALLS: list[tuple[Callable[[MTLLM], object], str]] = [
    (lambda m: Engine(m, window=0), "window=0"),
    (lambda m: Engine(m, max_tokens=-1), "max_tokens=-1"),
    (lambda m: Engine(m, ahead=-1), "ahead=-1"),
    (lambda m: Engine(m, quantize="int3"), "quantize='int3'"),  # type: ignore[arg-type]
    (lambda m: Engine("./nosuch"), "nosuch"),
    (lambda m: Engine(m, device="tpu9"), "device=tpu9"),
    (lambda m: Engine(m).encode(["A river."], "zzz"), "'zzz'"),
    (lambda m: Engine(m).encode(["A river."], ["eng_Latn", "fra_Latn"]), "languages"),
    (lambda m: Engine(m).encode("A river."), "texts"),
    (lambda m: Engine(m).encode(["A river."], "eng_Latn", pooling="median"), "pooling='median'"),  # type: ignore[arg-type]
    (lambda m: Engine(m).classify(["A river."], "eng_Latn"), "model"),
    (lambda m: m.generate(["A river."], "eng_Latn", max_new_tokens=1), "causal=True"),
    (lambda m: m.set_head(HeadConfig(labels=("one",))), "labels"),
    (lambda m: MTLLM.stack(), "encoder"),
    (lambda m: MTLLM.stack("./nosuch", "./nosuch"), "encoder='./nosuch'"),
    (lambda m: MTLLM.from_pretrained("./nosuch"), "nosuch"),
    (lambda m: m.save_pretrained(__file__), "folder"),
    (lambda m: collate([], m.tokenizer), "rows"),
    (lambda m: m.tokenizer.language_id("deu"), "'deu'"),
    (lambda m: read_rows("text.txt", limit=-2), "limit"),
    (lambda m: read_rows("text.txt", labels="ab"), "labels"),
    (lambda m: read_rows("text.txt", labels=["a", "a"], label_column="x"), "labels"),
    (lambda m: PackedBatch.from_sequences([]), "sequences"),
    (lambda m: PackedBatch.from_sequences([[1.5]]), "sequence"),
    (lambda m: PackedBatch.from_padded(torch.ones(2, 3), torch.ones(2, 2)), "attention_mask"),
    (lambda m: DistillationWeights(kl=-1.0), "kl=-1.0"),
    (lambda m: DistillationWeights(temperature=float("nan")), "temperature=nan"),
    (lambda m: DistillationLoss(DistillationWeights(kl=1.0))(STATES, STATES, collate([TextRow("a b")], m.tokenizer)), "student has 6 rows"),
    (lambda m: linear_kl(STATES, HEAD, STATES[:, :4], HEAD), "h_t"),
    (lambda m: linear_kl(STATES, HEAD[:, :3], STATES), "w_s"),
    (lambda m: linear_kl(STATES, HEAD, STATES, temperature=0.0), "temperature"),
    (lambda m: linear_kl(STATES, HEAD, STATES, rows_s=torch.tensor([9]), rows_t=torch.tensor([0])), "rows_s"),
    (lambda m: linear_kl(STATES, HEAD, STATES, divergence="hellinger"), "divergence"),
    (lambda m: segment_mean(STATES, torch.tensor([0, 9], dtype=torch.int32)), "cu_seqlens"),
    (lambda m: segment_mean(STATES, BOUNDS, pooling="max"), "pooling"),
    (lambda m: pooled_mse(STATES, STATES[:, :4], BOUNDS, BOUNDS), "teacher"),
    (lambda m: pooled_mse(STATES, STATES, BOUNDS, BOUNDS[:2]), "cu_seqlens_s"),
    (lambda m: paired_mse(STATES, STATES[:, :4], torch.tensor([0]), torch.tensor([0])), "teacher"),
    (lambda m: paired_mse(STATES, STATES, torch.tensor([0, 1]), torch.tensor([0])), "rows"),
    (lambda m: packed_projection(STATES, torch.randn(4, 9)), "weight"),
    (lambda m: packed_projection(STATES, torch.randn(4, 8), activation="tanhh", hidden_weight=torch.randn(8, 8)), "activation"),
    (lambda m: packed_projection(STATES.long(), torch.randn(4, 8)), "x"),
]  # fmt: skip


@pytest.fixture(scope="module")
def model(world: Path) -> MTLLM:
    return MTLLM.from_pretrained(world / "stack", encoder=str(world / "encoder"), llm=str(world / "llm"))


@pytest.mark.parametrize(("call", "said"), CALLS)
def test_calls(call, said: str, model: MTLLM, world: Path, monkeypatch) -> None:
    monkeypatch.chdir(world)
    training, trained = model.training, [name for name, p in model.named_parameters() if p.requires_grad]
    before = _tree(world)
    with pytest.raises((ValueError, TypeError, IndexError)) as caught:
        call(model)
    message = str(caught.value)
    assert said in message, message
    assert message.count("\n") == 0, message
    assert _tree(world) == before
    assert model.training == training
    assert trained == [name for name, p in model.named_parameters() if p.requires_grad]


def test_a_reader_that_has_enough_is_no_error() -> None:
    command = [sys.executable, "-m", "mtllm_fast.cli", "help", "suite"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()  # as `head` does
    error = process.stderr.read()
    assert process.wait() == 0, error
    assert "Traceback" not in error and "Broken pipe" not in error
