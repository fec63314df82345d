"""Rows tokenised before: the same batches as from text, after any kill, and refused where they are not these rows."""

import json
import os
import pickle
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from mtllm_fast.cli import main
from mtllm_fast.data import PackedDataset, PackedLoader, StackTokenizer, TextRow, read_rows
from mtllm_fast.data.store import TokenStore, write_store
from tests.data.test_stream import OPTIONS, ROWS, fingerprint

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture
def store(stack, tmp_path):
    write_store(ROWS, stack, tmp_path / "store", shard_rows=40)
    return TokenStore(tmp_path / "store")


def batches(rows, stack, workers=0, **options):
    return [fingerprint(b) for b in PackedLoader(PackedDataset(rows, stack, **(OPTIONS | options)), workers)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("options", [{}, {"rank": 1, "world_size": 3}, {"start_batch": 4, "epoch": 2}])
def test_the_same_batches_as_from_text(stack, store, workers, options):
    assert batches(store, stack, workers, **options) == batches(ROWS, stack, **options)


def test_windows_of_their_own_size_are_the_same(stack, tmp_path):
    rows = [TextRow("the lazy dog " * (1 + i % 3), id=str(i), label=0) for i in range(1500)]
    write_store(rows, stack, tmp_path / "s")
    options = {"max_tokens": 1024, "lookahead": None}
    assert batches(TokenStore(tmp_path / "s"), stack, **options) == batches(rows, stack, **options)
    assert PackedDataset(TokenStore(tmp_path / "s"), stack, **options).window_rows() > 1024


def test_counts_and_report(stack, tmp_path):
    stack.max_mt_tokens = stack.max_llm_tokens = 8
    report = write_store(ROWS, stack, tmp_path / "s")
    read, stored = (PackedDataset(rows, stack, **OPTIONS) for rows in (ROWS, TokenStore(tmp_path / "s")))
    for dataset in (read, stored):
        assert len(list(dataset)) > 1
    assert read.counters.tokens == stored.counters.tokens == report.tokens
    assert read.counters.truncated == stored.counters.truncated == report.truncated
    assert report.truncated["mt"] > 0
    assert (report.rows, report.resumed) == (150, 0)


def test_only_one_side_and_no_labels(stack, tmp_path):
    rows = [TextRow(f"the cat {i}") for i in range(5)]
    write_store(rows, stack, tmp_path / "s", sides=("llm",))
    store = TokenStore(tmp_path / "s")
    batch = next(iter(PackedDataset(store, stack, sides=("llm",), align=False, max_tokens=512)))
    assert batch.labels is None
    assert batch.mt is None
    assert batch.ids == (None,) * 5
    with pytest.raises(ValueError, match="'mt' is needed"):
        PackedDataset(store, stack, max_tokens=512)


def test_goes_on_after_the_complete_shards(stack, tmp_path):
    class Killed(Exception):
        pass

    def kill(done):
        if done > 80:
            raise Killed

    with pytest.raises(Killed):
        write_store(ROWS, stack, tmp_path / "s", shard_rows=40, source="a", on_progress=kill)
    with pytest.raises(ValueError, match="is not complete: run the same"):
        TokenStore(tmp_path / "s")
    with pytest.raises(ValueError, match="begun with another source"):
        write_store(ROWS, stack, tmp_path / "s", shard_rows=40, source="b")
    assert write_store(ROWS, stack, tmp_path / "s", shard_rows=40, source="a").resumed == 80
    assert batches(TokenStore(tmp_path / "s"), stack) == batches(ROWS, stack)
    with pytest.raises(ValueError, match="holds a complete token store"):
        write_store(ROWS, stack, tmp_path / "s", shard_rows=40, source="a")


def test_other_tokens_are_refused(stack, store):
    for change in ({"max_mt_tokens": 77}, {"pair_separator": " | "}):
        other = StackTokenizer(stack.mt, stack.llm, **change)
        with pytest.raises(ValueError, match="tokenised with another"):
            PackedDataset(store, other, max_tokens=512)
    store.check(pickle.loads(pickle.dumps(stack)), ("mt", "llm"))
    stack.mt("padding leaves its settings behind", padding="max_length", max_length=9)
    store.check(stack, ("mt", "llm"))


def test_damage_is_named(stack, store):
    first = store.folder / "shard-00000" / "mt.ids.npy"
    first.write_bytes(first.read_bytes()[:20])
    with pytest.raises(ValueError, match="is damaged"):
        TokenStore(store.folder)
    shutil.rmtree(store.folder / "shard-00000")
    with pytest.raises(ValueError, match="is damaged"):
        TokenStore(store.folder)
    with pytest.raises(ValueError, match="is no token store"):
        TokenStore(store.folder.parent)


def test_bad_rows(stack, tmp_path):
    with pytest.raises(ValueError, match="choices"):
        write_store([TextRow("a", choices=("x", "y"))], stack, tmp_path / "a")
    with pytest.raises(ValueError, match="no usable row"):
        write_store([], stack, tmp_path / "b")
    with pytest.raises(ValueError, match="some rows of a shard have a label"):
        write_store([TextRow("a", label=1), TextRow("b")], stack, tmp_path / "c")


def test_rows_that_no_tokenizer_reads_are_left_out(stack, tmp_path, caplog):
    lone = "the \ud800 cat"
    good = [TextRow(f"the cat {i}", label=i, id=f"row-{i}") for i in range(9)]
    bad = [TextRow(lone, id="broken"), TextRow(lone, id="last")]
    rows = [*good[:4], bad[0], *good[4:], bad[1]]
    report = write_store(rows, stack, tmp_path / "s", shard_rows=5)
    store = TokenStore(tmp_path / "s")
    assert (report.rows, report.skipped) == (9, {"unreadable": 2})
    assert "row broken is left out: text" in caplog.text
    assert [len(shard["labels"]) for shard in store.shards if "labels" in shard] == [4, 5]
    assert len(store.shards) == 3, "the shard of one unreadable row is there, and empty"
    kept = store.take(np.arange(9), ("mt", "llm"))
    assert kept.ids == [row.id for row in good]
    assert kept.labels == list(range(9))


def test_rows_of_which_none_can_be_read_leave_nothing(stack, tmp_path):
    """Nor in a folder that was there, or that a killed call had begun: another call may take its place."""
    bad = [TextRow("the \ud800 cat", id=str(i)) for i in range(9)]

    class Killed(Exception):
        pass

    def kill(done):
        if done > 5:
            raise Killed

    (tmp_path / "there").mkdir()
    with pytest.raises(Killed):
        write_store(bad, stack, tmp_path / "begun", shard_rows=5, on_progress=kill)
    assert (tmp_path / "begun" / "shard-00000").is_dir()
    for name in ("new", "there", "begun"):
        with pytest.raises(ValueError, match="no usable row"):
            write_store(bad, stack, tmp_path / name, shard_rows=5)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["begun", "there"]
    assert write_store([*bad, TextRow("the cat")], stack, tmp_path / "begun", shard_rows=5).rows == 1


@pytest.fixture
def tokenizing(forked, encoder_folder, llm_folder, tmp_path):
    """`tokenizing(output)` is a command line, `started(...)` the pid of one that was stopped behind its first shard."""
    text = tmp_path / "t.txt"
    text.write_text("".join(f"the cat sat on mat number {i} and looked at the dog\n" for i in range(4_000)))

    def command(output):
        files = ["--encoder", encoder_folder, "--llm", llm_folder, "--text", str(text), "--output", str(output)]
        return ["tokenize", *files, "--max-length", "64", "--shard-rows", "512"]

    def started(output):
        pid = forked.start(*command(output))
        deadline = time.monotonic() + 60
        while not list(output.glob("shard-*")):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        os.kill(pid, signal.SIGSTOP)
        assert not (output / "store.json").exists()
        return pid

    return command, started


def _files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_second_of_two_is_refused(tokenizing, forked, capsys, tmp_path):
    command, started = tokenizing
    main(command(tmp_path / "whole"))
    pid = started(tmp_path / "s")
    try:
        before = _files(tmp_path / "s")
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(command(tmp_path / "s"))
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mtllm")]
        assert caught.value.code == 2 and len(said) == 1
        assert f"another process ({pid} on " in said[0] and str(tmp_path / "s") in said[0]
        assert _files(tmp_path / "s") == before
    finally:
        os.kill(pid, signal.SIGCONT)
        ended, _ = forked.wait()
    assert ended == 0
    assert _files(tmp_path / "s") == _files(tmp_path / "whole")
    assert len(_files(tmp_path / "whole")) == 8 * 10 + 2


def test_killed_and_resumed(tokenizing, forked, capsys, tmp_path):
    """The lock of a killed call is none; the store is that of rows tokenised by hand."""
    command, started = tokenizing
    tokenizer = StackTokenizer(*_tokenizers(*command("")[2:5:2]), max_mt_tokens=64, max_llm_tokens=64)
    rows = read_rows(tmp_path / "t.txt")
    write_store(rows, tokenizer, tmp_path / "whole", shard_rows=512, source=rows.identity())
    pid = started(tmp_path / "s")
    os.kill(pid, signal.SIGKILL)
    assert forked.wait()[0] == -signal.SIGKILL
    assert (tmp_path / "s" / ".lock").read_text().startswith(f"{pid} on ")
    capsys.readouterr()
    main(command(tmp_path / "s"))
    out = capsys.readouterr().out
    assert "4,000 rows" in out and "there before" in out
    assert _files(tmp_path / "s") == _files(tmp_path / "whole")


def test_a_refused_call_leaves_no_lock(stack, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("x")
    os.utime(tmp_path / "mine", (1, 1))
    with pytest.raises(ValueError, match="holds files, but no token store"):
        write_store(ROWS, stack, tmp_path / "mine")
    with pytest.raises(ValueError, match="no usable row"):
        write_store([], stack, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["mine", "notes"]
    assert (tmp_path / "mine").stat().st_mtime == 1  # nothing was made in it for a while, either


def _tokenizers(*folders):
    from transformers import AutoTokenizer

    return [AutoTokenizer.from_pretrained(folder) for folder in folders]


def test_adapting_from_a_store_gives_the_same_weights(encoder_folder, llm_folder, tmp_path):
    text = tmp_path / "t.txt"
    text.write_text("".join(f"the cat sat on mat number {i}\n" for i in range(40)))
    models = ["--encoder", encoder_folder, "--llm", llm_folder]
    main(["tokenize", *models, "--text", str(text), "--output", str(tmp_path / "s"), "--max-length", "64"])
    steps = ["--max-steps", "3", "--tokens", "128", "--max-length", "64", "--device", "cpu", "--no-progress"]
    for name, source in (("a", text), ("b", tmp_path / "s")):
        main(["adapt", *models, "--text", str(source), "--output", str(tmp_path / name), *steps])
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b"))
    assert one == two


# ---- a byte that is not what was written
def _flip(path, place=-1):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


DAMAGED = ["shard-00001/mt.ids.npy", "shard-00000/llm.ends.npy", "shard-00000/labels.npy", "shard-00001/mt.starts.npy"]


@pytest.fixture
def adapting(encoder_folder, llm_folder, tmp_path):
    """A labelled store of two shards, and `adapting(*more)`, which trains on it into `run`."""
    tokenizer = StackTokenizer(*_tokenizers(encoder_folder, llm_folder), max_mt_tokens=64, max_llm_tokens=64)
    rows = [TextRow(f"the cat sat on mat number {i}", "eng_Latn", label=i % 3, id=f"row-{i}") for i in range(40)]
    write_store(rows, tokenizer, tmp_path / "s", shard_rows=20)
    models = ["--encoder", encoder_folder, "--llm", llm_folder, "--text", str(tmp_path / "s")]
    settings = ["--tokens", "128", "--max-length", "64", "--device", "cpu", "--no-progress", "--report-to", "none"]

    def run(*more):
        main(["adapt", *models, "--output", str(tmp_path / "run"), *settings, *more])

    return run


def _store_json(folder):
    """One more row left out than there was: still JSON, still a store."""
    path = folder / "store.json"
    place = path.read_bytes().index(b'"unreadable": 0') + len('"unreadable": ')
    _flip(path, place)


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("name", [*DAMAGED, "store.json"])
def test_a_flipped_byte_is_named_before_training(adapting, name, resumed, capsys, tmp_path):
    more = ["--max-steps", "2"]
    if resumed:
        adapting(*more)
        more = ["--max-steps", "4", "--resume"]
    before = _files(tmp_path / "run")
    _store_json(tmp_path / "s") if name == "store.json" else _flip(tmp_path / "s" / name)
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        adapting(*more)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mtllm")]
    assert caught.value.code == 2 and len(said) == 1
    assert Path(name).name in said[0] and "is not what was written" in said[0]
    assert "/".join(Path(name).parts[:-1]) in said[0] and str(tmp_path / "s") in said[0]
    assert _files(tmp_path / "run") == before
    assert (tmp_path / "run").exists() == resumed


@pytest.mark.parametrize("old", [False, True])
def test_an_undamaged_store_is_accepted(adapting, old, tmp_path):
    """Control: with other times on all files, and as it was written before there were digests."""
    if old:
        record = json.loads((tmp_path / "s/store.json").read_text())
        assert len(record["files"]) == 2 and "check" in record
        del record["files"], record["check"]
        (tmp_path / "s/store.json").write_text(json.dumps(record, indent=1))
        for path in (tmp_path / "s").glob("shard-*/complete.json"):
            path.unlink()
    adapting("--max-steps", "2")
    for path in (tmp_path / "s").rglob("*"):
        os.utime(path, (1, 1))
    adapting("--max-steps", "4", "--resume")
    assert json.loads((tmp_path / "run/run.json").read_text())["train"]["max_steps"] == 4
    assert _files(tmp_path / "s").keys() >= {"store.json", "shard-00001/mt.ids.npy"}


def test_any_byte_of_store_json(stack, tmp_path):
    write_store(ROWS, stack, tmp_path / "s")
    path = tmp_path / "s" / "store.json"
    whole = path.read_bytes()
    for place in range(0, len(whole), 11):
        _flip(path, place)
        with pytest.raises(ValueError, match="is damaged"):
            TokenStore(tmp_path / "s")
        path.write_bytes(whole)
    TokenStore(tmp_path / "s")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_large_store_is_compared_shard_by_shard_as_it_is_read(stack, store, workers):
    """Rows of the shards before are read; a missing file of labels is no store without labels."""
    _flip(store.folder / "shard-00002" / "llm.ids.npy")
    opened = TokenStore(store.folder)
    opened.verify(most_bytes=1000)  # is larger
    assert len(opened.take(np.arange(80), ("mt", "llm")).ids) == 80
    with pytest.raises(ValueError, match=r"shard-00002: the content of llm\.ids\.npy is not what was written"):
        opened.take(np.array([81]), ("mt", "llm"))
    with pytest.raises(ValueError, match=r"shard-00002: the content of llm\.ids\.npy"):
        opened.verify()
    with pytest.raises(ValueError, match=r"shard-00002: the content of llm\.ids\.npy"):
        batches(TokenStore(store.folder), stack, workers)
    _flip(store.folder / "shard-00002" / "llm.ids.npy")
    TokenStore(store.folder).verify()
    (store.folder / "shard-00001" / "labels.npy").unlink()
    with pytest.raises(ValueError, match=r"shard-00001: labels\.npy is missing"):
        TokenStore(store.folder).verify()


def test_shards_of_a_call_before_there_were_digests_are_gone_on_from(stack, tmp_path):
    def killed(done):
        if done > 80:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_store(ROWS, stack, tmp_path / "s", shard_rows=40, on_progress=killed)
    for path in (tmp_path / "s").glob("shard-*/complete.json"):
        path.unlink()
    assert write_store(ROWS, stack, tmp_path / "s", shard_rows=40).resumed == 80
    write_store(ROWS, stack, tmp_path / "whole", shard_rows=40)
    assert _files(tmp_path / "s") == _files(tmp_path / "whole")
    TokenStore(tmp_path / "s").verify()
