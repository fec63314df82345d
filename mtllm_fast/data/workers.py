"""Items of a DataLoader's worker processes, with the death of a worker as an error of its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing.util import Finalize
from typing import TYPE_CHECKING, TypeVar

import torch
from torch.utils.data import DataLoader

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess
    from types import FrameType

T = TypeVar("T")
_ABANDONED: list[Iterator[object]] = []  # of dead workers: ending them can wait for ever, for a lock that those held


class WorkerDied(ChildProcessError):
    """A worker process ended before its work was done; the message says which one and how."""


def start_worker(_: int) -> None:
    """`worker_init_fn`: one core per worker, and a life as long as the main process wants it."""
    # threads inside a forked tokenizer would also warn about the fork
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    # sent to the whole group by a terminal or a batch system; the main process still needs data for its last step
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_after, args=(os.getppid(),), daemon=True).start()


def _end_after(parent: int) -> None:
    """End this process when its parent is gone; a worker of PyTorch alone can wait for ever to hand over its data."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def from_workers(loader: DataLoader[T]) -> Iterator[T]:
    """Iterate over a DataLoader with workers.

    PyTorch raises the death of a worker as a RuntimeError wherever the main process happens to be, in the middle of a
    training step too. Here it is raised while an item is waited for and nowhere else.

    Raises:
        WorkerDied: a worker was killed or crashed.
    """
    others = set(multiprocessing.active_children())
    items = iter(loader)
    workers = [child for child in multiprocessing.active_children() if child not in others]
    workers.sort(key=lambda worker: worker.pid or 0)
    # at its end Python sends SIGTERM to what is left of them, which they ignore, and then waits
    at_exit = Finalize(None, _kill, (workers,), exitpriority=1)
    waiting = False

    def check() -> None:
        for number, worker in enumerate(workers):
            if (code := worker.exitcode) not in (None, 0):
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                hint = ", which the kernel sends when memory is short" if code == -signal.SIGKILL else ""
                raise WorkerDied(f"data worker {number + 1} of {len(workers)} (process {worker.pid}) {how}{hint}")

    def on_child(number: int, frame: FrameType | None) -> None:
        if waiting:
            check()

    in_main = threading.current_thread() is threading.main_thread()  # only there Python allows handlers
    before = signal.signal(signal.SIGCHLD, on_child) if in_main else None
    try:
        while True:
            waiting = True
            try:
                check()
                item = next(items)
            except StopIteration:
                return
            except RuntimeError:
                check()
                raise
            finally:
                waiting = False
            yield item
    except WorkerDied:
        _ABANDONED.append(items)
        raise
    finally:
        # of an iterator that goes as garbage, PyTorch cannot tell its workers that they are to end
        _kill(workers)
        at_exit.cancel()
        if in_main:
            signal.signal(signal.SIGCHLD, before)


def _kill(workers: Sequence[BaseProcess]) -> None:
    for worker in workers:
        worker.kill()
        worker.join()
