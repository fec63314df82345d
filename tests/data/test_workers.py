"""Rows that no tokenizer reads, and workers that die: the other rows come, each once and in order."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from mtllm_fast.data import PackedDataset, TextRow
from mtllm_fast.data.loader import PackedLoader
from mtllm_fast.data.tokenise import StackTokenizer
from mtllm_fast.data.workers import WorkerDied
from tests.conftest import REPO
from tests.tiny import LINES, llm_tokenizer, nllb_tokenizer

ROWS = [TextRow(f"{LINES[i % len(LINES)]} {i}", id=str(i)) for i in range(240)]
OPTIONS = {"max_tokens": 96, "lookahead": 16}


@pytest.fixture(scope="module")
def stack() -> StackTokenizer:
    lines = list(LINES)
    return StackTokenizer(nllb_tokenizer(lines), llm_tokenizer(lines), max_mt_tokens=48, max_llm_tokens=48)


def _ids(batches) -> list[tuple[str | None, ...]]:
    return [batch.ids for batch in batches]


def test_killed_workers_are_replaced(stack, caplog) -> None:
    whole = _ids(PackedDataset(ROWS, stack, **OPTIONS))
    dataset = PackedDataset(ROWS, stack, **OPTIONS)
    found, killed = [], []
    for number, batch in enumerate(PackedLoader(dataset, num_workers=2)):
        found.append(batch.ids)
        if number in (2, 20):
            worker = max(multiprocessing.active_children(), key=lambda child: child.pid)
            os.kill(worker.pid, signal.SIGKILL)
            killed.append(worker.pid)
            time.sleep(0.2)  # nothing is raised here, where training would be
    assert found == whole
    assert all(f"process {pid}" in caplog.text for pid in killed)
    assert dataset.counters.rows == len(ROWS)


class _Deadly(list):
    """Rows that kill the worker that reads them."""

    def __iter__(self):
        if multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__iter__()


def test_workers_that_keep_dying_are_an_error(stack) -> None:
    with pytest.raises(WorkerDied, match=r"data worker 1 of 1 \(process \d+\) was killed by SIGKILL"):
        list(PackedLoader(PackedDataset(_Deadly(ROWS), stack, **OPTIONS), num_workers=1))


def test_workers_end_with_an_iterator_that_is_garbage(stack) -> None:
    """What is wrong with a row is an error that holds the frames of the loader, and they it."""
    before = multiprocessing.active_children()
    rows = [*ROWS[:40], TextRow("x", language="ell_Latn")]

    def fail() -> None:
        with pytest.raises(ValueError, match="'ell_Latn' is unknown"):
            list(PackedLoader(PackedDataset(rows, stack, **OPTIONS), num_workers=2))

    fail()
    gc.collect()
    assert multiprocessing.active_children() == before


def _read_and_wait(stack: StackTokenizer, pipe) -> None:
    batches = iter(PackedLoader(PackedDataset(ROWS * 20, stack, max_tokens=96, lookahead=1024), num_workers=2))
    next(batches)
    pipe.send([child.pid for child in multiprocessing.active_children()])
    time.sleep(60)


def test_workers_end_with_a_killed_main_process(stack) -> None:
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    main = context.Process(target=_read_and_wait, args=(stack, there))
    main.start()
    workers = here.recv()
    time.sleep(0.5)  # they wait with windows that nobody will take
    os.kill(main.pid, signal.SIGKILL)
    main.join()
    deadline = time.monotonic() + 5
    alive = workers
    while alive and time.monotonic() < deadline:
        alive = [pid for pid in alive if _runs(pid)]
        time.sleep(0.05)
    assert len(workers) == 2
    assert not alive


def _runs(pid: int) -> bool:
    try:
        return open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("workers", [0, 2])
def test_poisoned_rows_are_left_out(stack, caplog, workers) -> None:
    rows = list(ROWS)
    rows[37], rows[200] = TextRow("half \ud800 a pair"), TextRow("another \udc00", id="two hundred")
    dataset = PackedDataset(rows, stack, **OPTIONS)
    found = _ids(PackedLoader(dataset, workers))
    good = {row.id for row in ROWS} - {"37", "200"}
    assert sorted(name for names in found for name in names) == sorted(good)
    assert dataset.counters.unreadable == 2
    assert "row two hundred is left out" in caplog.text
    assert "lone surrogate" in caplog.text


def test_every_row_poisoned_gives_no_batch(stack) -> None:
    dataset = PackedDataset([TextRow("\ud800")] * 3, stack, **OPTIONS)
    assert list(dataset) == []
    assert dataset.counters.unreadable == 3


def test_a_process_ends_while_its_workers_wait(tmp_path):
    """Workers ignore SIGTERM, which is how Python ends its children: one that is left in the middle would never end."""
    script = tmp_path / "left.py"
    script.write_text(
        "from mtllm_fast.data import PackedDataset, PackedLoader, StackTokenizer, TextRow\n"
        "from tests.tiny import LINES, llm_tokenizer\n"
        "tokenizer = StackTokenizer(None, llm_tokenizer(list(LINES)), max_llm_tokens=16)\n"
        "rows = [TextRow('a b c')] * 1000\n"
        "options = dict(max_tokens=16, sides=('llm',), align=False, lookahead=8)\n"
        "batches = iter(PackedLoader(PackedDataset(rows, tokenizer, **options), 2))\n"
        "print(next(batches).num_rows, flush=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=90)
    assert (done.returncode, done.stdout.strip()) == (0, "5"), done.stderr
