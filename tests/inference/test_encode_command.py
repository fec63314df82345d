"""`mtllm encode`: the three formats, kill -9 and resumption, refusals, ranks, rows that are left out."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import parquet
from safetensors import safe_open

from mtllm_fast import MTLLM, Engine, cli
from mtllm_fast.data import read_rows
from mtllm_fast.inference.stream import encode_file
from mtllm_fast.jobs import parts
from mtllm_fast.models.fusion import FusionSettings
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
    columns = ["--language-column", "lang", "--id-column", "id"]
    how = ["--window", "16", "--device", "cpu", "--on-bad-row", "skip"]
    return ["encode", "--model", model_folder, "--input", source, "--output", str(output), *columns, *how, *more]


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
    assert np.load(tmp_path / "e.npy.index.npy").tolist() == kept
    assert f"{tmp_path / 'e.npy.index.npy'} says which row each is" in out
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
    outputs = [path.name for path in tmp_path.iterdir() if not path.name.endswith((".tsv", ".index.npy"))]
    assert sorted(outputs) == ["e.npy", "e.parquet", "e.safetensors"]


def test_row_i_is_line_i(model_folder, tmp_path, capsys, engine) -> None:
    """8 lines of which 7 cannot be used: NaN in their places, or an index, or an error that names the first."""
    text = tmp_path / "t.jsonl"
    good, bad = {"text": LINES[0], "lang": "fra_Latn", "id": "d"}, {"text": LINES[1], "lang": "xx_Latn", "id": "h"}
    lines = [{"text": ""}, {"text": " ", "id": "b"}, {"text": 3}, good, {"no": "text"}, {"text": None}, "broken", bad]
    text.write_text("".join((x if x == "broken" else json.dumps({"lang": "fra_Latn", **x})) + "\n" for x in lines))
    run = command(model_folder, str(text), tmp_path / "e")[:-2]
    expected = engine.encode([LINES[0]], "fra_Latn")[0]

    def encode(name: str, *more: str):
        run[run.index("--output") + 1] = str(tmp_path / name)
        cli.main([*run, *more])
        return tmp_path / name

    array = np.load(encode("nan.npy"))  # which is the default
    assert array.shape == (8, 48)
    assert np.isnan(array[[0, 1, 2, 4, 5, 6, 7]]).all()
    np.testing.assert_allclose(array[3], expected, rtol=1e-4, atol=1e-5)
    assert "7 rows unusable: NaN (3 empty; " in capsys.readouterr().out
    listed = [line.split("\t") for line in (tmp_path / "nan.npy.skipped.tsv").read_text().splitlines()]
    assert [place.rpartition(":")[2] for place, _ in listed] == ["1", "2", "3", "5", "6", "7", "8"]
    assert listed[-1][1] == "unknown language 'xx_Latn'"
    assert not (tmp_path / "nan.npy.index.npy").exists()
    table = parquet.read_table(encode("nan.parquet", "--window", "3"))
    assert table["id"].to_pylist() == ["0", "b", "2", "d", "4", "5", "6", "h"]
    held = np.stack(table["embedding"].to_numpy())
    assert (np.isnan(held) == np.isnan(array)).all() and np.array_equal(held[3], array[3])

    assert np.load(encode("skip.npy", "--on-bad-row", "skip")).shape == (1, 48)
    assert np.load(tmp_path / "skip.npy.index.npy").tolist() == [3]
    capsys.readouterr()
    run[run.index("--output") + 1] = str(tmp_path / "fail.npy")
    message = refused(capsys, [*run, "--on-bad-row", "fail"])
    assert f"{text}:1: empty; --on-bad-row nan or skip" in message
    assert not list(tmp_path.glob("fail*"))
    # the index of an earlier run does not stay beside an output that needs none
    encode("skip.npy", "--overwrite")
    assert not (tmp_path / "skip.npy.index.npy").exists()


def test_a_model_that_reads_translations_says_that_it_has_none(encoder_folder, tmp_path, capsys) -> None:
    model = MTLLM.stack(encoder_folder, reader="encoder", dtype=torch.float32)
    text = tmp_path / "t.txt"
    text.write_text(LINES[0])
    for name, fusion in (("plain", FusionSettings()), ("fused", FusionSettings(1, 1))):
        model.set_fusion(fusion)
        model.save_pretrained(tmp_path / name)
        files = ["--model", str(tmp_path / name), "--input", str(text), "--output", str(tmp_path / f"{name}.npy")]
        cli.main(["encode", *files, "--language", "fra_Latn", "--device", "cpu", "--no-progress"])
        said = [line for line in capsys.readouterr().err.splitlines() if "reads a text alone" in line]
        assert len(said) == (name == "fused")
    assert said[0].startswith(f"mtllm encode: {tmp_path / 'fused'} reads a text alone, without the English translation")


def test_what_fail_left_undone_goes_on_with_nan(engine, source, tmp_path) -> None:
    """The window before the bad row is kept: up to there both write the same."""
    small = Engine(engine.model, window=4, max_tokens=200)
    with pytest.raises(ValueError, match=r"rows.jsonl:6: empty"):
        encode_file(small, rows_of(source), tmp_path / "e.npy", on_bad_row="fail")
    assert encode_file(small, rows_of(source), tmp_path / "e.npy").resumed == 4
    assert np.flatnonzero(np.isnan(np.load(tmp_path / "e.npy")).any(1)).tolist() == [5, 17, 42]


def test_embeddings_that_are_not_finite_are_refused(encoder_folder, llm_folder, tmp_path, capsys) -> None:
    """Sums overflow: the row is named, and nothing is written that looks finished."""
    model = MTLLM.stack(encoder_folder, llm_folder, dtype=torch.float32)
    with torch.no_grad():
        model.projection.layers.weight.copy_(model.projection.layers.weight.sign() * 3e38)  # still finite
    model.save_pretrained(tmp_path / "model")
    text = tmp_path / "t.txt"
    text.write_text("\n" + "".join(f"{line}\n" for line in LINES))
    arguments = ["encode", "--model", str(tmp_path / "model"), "--input", str(text), "--language", "eng_Latn"]
    message = refused(capsys, [*arguments, "--output", str(tmp_path / "e.npy"), "--device", "cpu"])
    assert "row 1: the model gives NaN or infinite numbers for it, and for 5 more near it" in message
    assert not list(tmp_path.glob("e.npy*"))


@pytest.mark.parametrize(("ending", "stride"), [(".npy", 1), (".parquet", 5), (".safetensors", 5)])
def test_killed_at_every_change_of_the_disk(forked, model_folder, source, tmp_path, ending, stride) -> None:
    """See crash_points.py: half a write and then kill -9, everywhere; the run after it gives the same bytes."""
    code = Path(__file__).with_name("crash_points.py").read_text(encoding="utf-8")
    out = forked.run(model_folder, source, tmp_path, ending, stride, code=code)
    assert int(out.split()[-2]) >= 30 // stride


def test_ctrl_c_and_kill_9_of_the_command(forked, model_folder, tmp_path) -> None:
    text = tmp_path / "long.txt"
    text.write_text("".join(f"{LINES[k % 6]} {k}\n" for k in range(3000)))
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
            encode_file(engine, rows_of(source), tmp_path / "e.npy", on_bad_row="skip")
    seen: list[str] = []
    mt_side = type(engine.model.tokenizer).mt_side
    monkeypatch.setattr(
        type(engine.model.tokenizer),
        "mt_side",
        lambda self, rows, **o: seen.extend(row.id for row in rows) or mt_side(self, rows, **o),
    )
    report = encode_file(engine, rows_of(source), tmp_path / "e.npy", on_bad_row="skip")
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
def test_windows_of_bad_rows_alone_are_nothing_to_keep(engine, tmp_path, ending) -> None:
    """NaN for each of them is stored before it is known whether a row can be used at all."""
    source, output = tmp_path / "rows.jsonl", tmp_path / f"e{ending}"
    good, bad = ({"text": LINES[0], "lang": lang, "id": "x"} for lang in ("fra_Latn", "xxx_Latn"))
    source.write_text("".join(json.dumps(bad) + "\n" for _ in range(3 * engine.window)))
    with pytest.raises(ValueError, match="holds no usable row"):
        encode_file(engine, rows_of(source), output)
    assert list(tmp_path.iterdir()) == [source]
    # control: one embedding is worth going on from
    source.write_text("".join(json.dumps(row) + "\n" for row in [good] * engine.window + [bad]))
    with pytest.raises(ValueError):
        encode_file(engine, rows_of(source), output, on_bad_row="fail")
    assert encode_file(engine, rows_of(source), output).resumed == engine.window


@pytest.mark.parametrize("ending", [".npy", ".parquet", ".safetensors"])
def test_ranks_give_the_bytes_of_one_process(engine, source, tmp_path, ending) -> None:
    skip: dict = {"on_bad_row": "skip"}
    encode_file(engine, rows_of(source), tmp_path / f"one{ending}", **skip)
    reports = [
        encode_file(engine, rows_of(source), tmp_path / f"two{ending}", rank=rank, world_size=2, **skip)
        for rank in (1, 0)
    ]
    assert [report.complete for report in reports] == [False, True]
    assert reports[1].resumed == 16 and reports[1].rows == 40
    assert (tmp_path / f"two{ending}").read_bytes() == (tmp_path / f"one{ending}").read_bytes()
    # another number of processes takes what is left
    encode_file(engine, rows_of(source), tmp_path / f"three{ending}", rank=2, world_size=3, **skip)
    encode_file(engine, rows_of(source), tmp_path / f"three{ending}", **skip)
    assert (tmp_path / f"three{ending}").read_bytes() == (tmp_path / f"one{ending}").read_bytes()
    assert not list(tmp_path.glob("*.part*"))


def test_two_processes(forked, model_folder, source, tmp_path) -> None:
    """Two processes at once, beginning anew over a stopped run and an older output."""
    one, two = tmp_path / "one.npy", tmp_path / "two.npy"
    cli.main(command(model_folder, source, one))
    parts.Parts(two, {"settings": "old"}).close()
    two.write_bytes(b"old")
    outs = forked.group(*command(model_folder, source, two, "--overwrite"))
    assert sorted("40 x 48" in out for out in outs) == [False, True], (
        "the rank that finishes last, whichever it is, joins"
    )
    assert two.read_bytes() == one.read_bytes()
