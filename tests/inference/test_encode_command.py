"""`mtllm encode`: the three formats, kill -9 and resumption, refusals, ranks, rows that are left out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import parquet
from safetensors import safe_open

from mtllm_fast import MTLLM, Engine, cli
from mtllm_fast.data import read_rows
from mtllm_fast.inference import parts
from mtllm_fast.inference.stream import encode_file
from tests.tiny import LINES

LANGUAGES = ("eng_Latn", "fra_Latn", "zho_Hans")
REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, encoder_folder, llm_folder) -> str:
    folder = tmp_path_factory.mktemp("model") / "stack"
    MTLLM.stack(encoder_folder, llm_folder, dtype=torch.float32).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def engine(model_folder) -> Engine:
    return Engine(MTLLM.from_pretrained(model_folder), window=16, max_tokens=200)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    """43 lines: row 5 is empty, row 17 in an unknown language, the last one no JSON."""
    path = tmp_path_factory.mktemp("text") / "rows.jsonl"
    rows = [{"id": f"r{k}", "text": f"{LINES[k % 6]} {k}", "lang": LANGUAGES[k % 3]} for k in range(42)]
    rows[5]["text"] = " "
    rows[17]["lang"] = "xxx_Latn"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "not json\n")
    return str(path)


def rows_of(source: str):
    return read_rows(source, language_column="lang", id_column="id")


def command(model_folder: str, source: str, output: Path, *more: str) -> list[str]:
    columns = ["--language-column", "lang", "--id-column", "id", "--window", "16", "--device", "cpu"]
    return ["encode", "--model", model_folder, "--input", source, "--output", str(output), *columns, *more]


def refused(capsys, arguments: list[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_three_formats(model_folder, source, tmp_path, capsys, engine) -> None:
    for ending in (".npy", ".parquet", ".safetensors"):
        cli.main(command(model_folder, source, tmp_path / f"e{ending}"))
    out = capsys.readouterr().out
    assert "40 x 48" in out
    for reason in ("1 empty", "1 unknown language 'xxx_Latn'", "1 invalid JSON", "e.npy.skipped.tsv"):
        assert reason in out
    listed = (tmp_path / "e.npy.skipped.tsv").read_text().splitlines()
    assert [line.split("\t")[0].rpartition(":")[2] for line in listed] == ["6", "18", "43"]

    kept = [k for k in range(42) if k not in (5, 17)]
    expected = engine.encode([f"{LINES[k % 6]} {k}" for k in kept], [LANGUAGES[k % 3] for k in kept])
    array = np.load(tmp_path / "e.npy", mmap_mode="r")
    assert array.dtype == np.float32
    np.testing.assert_allclose(array, expected, rtol=1e-4, atol=1e-5)
    assert abs(array[::-1] - expected).max() > 1e-2  # control: the order shows at this tolerance
    table = parquet.read_table(tmp_path / "e.parquet")
    assert table["id"].to_pylist() == [f"r{k}" for k in kept]
    assert table["language"].to_pylist() == [LANGUAGES[k % 3] for k in kept]
    assert str(table.schema.field("embedding").type) == "fixed_size_list<element: float>[48]"
    assert (np.stack(table["embedding"].to_numpy()) == array).all()
    assert parquet.ParquetFile(tmp_path / "e.parquet").num_row_groups == 3
    with safe_open(tmp_path / "e.safetensors", "np") as file:
        assert (file.get_tensor("embeddings") == array).all()
        assert file.metadata()["pooling"] == "mean"
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.endswith(".tsv")) == [
        "e.npy",
        "e.parquet",
        "e.safetensors",
    ]


@pytest.mark.parametrize(("ending", "stride"), [(".npy", 1), (".parquet", 5), (".safetensors", 5)])
def test_killed_at_every_change_of_the_disk(forked, model_folder, source, tmp_path, ending, stride) -> None:
    """See crash_points.py: half a write and then kill -9, everywhere; the run after it gives the same bytes."""
    code = Path(__file__).with_name("crash_points.py").read_text(encoding="utf-8")
    out = forked.run(model_folder, source, tmp_path, ending, stride, code=code)
    assert int(out.split()[-2]) >= 30 // stride


def test_ctrl_c_and_kill_9_of_the_command(forked, model_folder, tmp_path) -> None:
    text = tmp_path / "long.txt"
    text.write_text("".join(f"{LINES[k % 6]} {k}\n" for k in range(6000)))
    whole, output = tmp_path / "whole.npy", tmp_path / "killed.npy"
    arguments = ["encode", "--model", model_folder, "--input", str(text), "--window", "64", "--device", "cpu"]
    cli.main([*arguments, "--output", str(whole)])
    log = tmp_path / "killed.npy.part" / "0.log"
    sizes = [0]
    for sent in (signal.SIGINT, signal.SIGKILL):
        pid = forked.start(*arguments, "--output", output)
        deadline = time.monotonic() + 60
        while not log.exists() or log.stat().st_size < sizes[-1] + 3 * parts.RECORD.itemsize:
            os.kill(pid, 0)  # it is still there
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.kill(pid, sent)
        code, error = forked.wait()
        assert not output.exists()
        assert code == (130 if sent == signal.SIGINT else -signal.SIGKILL), error
        if sent == signal.SIGINT:
            assert "rows are saved in" in error and "the same command goes on" in error
            assert "Traceback" not in error
        sizes.append(log.stat().st_size)
    assert sizes[0] < sizes[1] < sizes[2]
    cli.main([*arguments, "--output", str(output)])
    assert output.read_bytes() == whole.read_bytes()


def test_resumption_tokenises_nothing_again(engine, source, tmp_path, monkeypatch) -> None:
    class Stop(Exception):
        pass

    append = parts.Parts.append

    def once(self, *arguments):
        append(self, *arguments)
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(parts.Parts, "append", once)
        with pytest.raises(Stop):
            encode_file(engine, rows_of(source), tmp_path / "e.npy")
    seen: list[str] = []
    mt_side = type(engine.model.tokenizer).mt_side
    monkeypatch.setattr(
        type(engine.model.tokenizer),
        "mt_side",
        lambda self, rows, **o: seen.extend(row.id for row in rows) or mt_side(self, rows, **o),
    )
    report = encode_file(engine, rows_of(source), tmp_path / "e.npy")
    assert (report.rows, report.resumed) == (40, 16)
    assert len(seen) == 24 and "r0" not in seen


def test_refusals(model_folder, source, tmp_path, capsys, engine) -> None:
    output = tmp_path / "e.npy"
    cli.main(command(model_folder, source, output))
    assert "exists; pass --overwrite" in refused(capsys, command(model_folder, source, output))
    before = output.read_bytes()
    cli.main(command(model_folder, source, output, "--overwrite", "--normalize"))
    assert output.read_bytes() != before
    output.unlink()

    # a stopped run: its folder, with the settings of a run that was normalised
    parts_of_run = parts.Parts(output, {"normalize": True, "window": 16})
    assert "another process" in refused(capsys, command(model_folder, source, output, "--overwrite"))
    parts_of_run.close()
    message = refused(capsys, command(model_folder, source, output))
    assert "normalize was True and is False" in message
    assert "--overwrite" in message
    assert "window" not in message
    cli.main(command(model_folder, source, output, "--overwrite"))
    assert output.read_bytes() == before

    assert ".parquet" in refused(capsys, command(model_folder, source, tmp_path / "e.txt"))
    assert "eng_Latn" in refused(
        capsys, [*command(model_folder, source, tmp_path / "f.npy")[:7], "--language", "eng_Lat"]
    )
    nothing = tmp_path / "nothing.jsonl"
    nothing.write_text('{"text": "a", "lang": "xxx_Latn", "id": "1"}\n')
    assert "unknown language 'xxx_Latn'" in refused(capsys, command(model_folder, str(nothing), tmp_path / "n.npy"))
    assert not list(tmp_path.glob("*.part*")), "a run that saved nothing leaves nothing"


@pytest.mark.parametrize("ending", [".npy", ".parquet", ".safetensors"])
def test_ranks_give_the_bytes_of_one_process(engine, source, tmp_path, ending) -> None:
    encode_file(engine, rows_of(source), tmp_path / f"one{ending}")
    reports = [
        encode_file(engine, rows_of(source), tmp_path / f"two{ending}", rank=rank, world_size=2) for rank in (1, 0)
    ]
    assert [report.complete for report in reports] == [False, True]
    assert reports[1].resumed == 16 and reports[1].rows == 40
    assert (tmp_path / f"two{ending}").read_bytes() == (tmp_path / f"one{ending}").read_bytes()
    # another number of processes takes what is left
    encode_file(engine, rows_of(source), tmp_path / f"three{ending}", rank=2, world_size=3)
    encode_file(engine, rows_of(source), tmp_path / f"three{ending}")
    assert (tmp_path / f"three{ending}").read_bytes() == (tmp_path / f"one{ending}").read_bytes()
    assert not list(tmp_path.glob("*.part*"))


def test_torchrun(model_folder, source, tmp_path) -> None:
    """Two processes at once, beginning anew over a stopped run and an older output."""
    one, two = tmp_path / "one.npy", tmp_path / "two.npy"
    cli.main(command(model_folder, source, one))
    parts.Parts(two, {"settings": "old"}).close()
    two.write_bytes(b"old")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mtllm_fast.cli",
         *command(model_folder, source, two, "--overwrite")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("40 x 48") == 1
    assert two.read_bytes() == one.read_bytes()
