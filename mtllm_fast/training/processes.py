"""How many processes share a run, and how many packs of a step each of them takes."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)

INTERRUPTED = 130  # the exit code of a shell's command that SIGINT ended


def processes() -> int:
    """How many processes torchrun or `accelerate launch` started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process is the one that speaks and writes for all."""
    return not int(os.environ.get("RANK", "0"))


@contextmanager
def ends_process() -> Iterator[None]:
    """The block is the last thing this process does: one that joined a group of processes ends with it, if all is well.

    It ends as Python would, with threads, exit handlers and output, but tears nothing down. During the teardown a
    thread of gloo that wants the GIL aborts the process now and then ("terminate called without an active exception",
    https://github.com/pytorch/pytorch/issues/190489), and torchrun then ends the others, whatever they are writing.
    `destroy_process_group` does not end these threads where a reference to the group is left (DDP holds one in a cycle,
    FSDP2 in a cache). After an error the group is kept: leaving could wait for the others.
    """
    try:
        yield
    except SystemExit as ending:
        if ending.code in (None, 0, INTERRUPTED):  # it stopped as it was asked to
            _end(ending.code or 0)
        raise
    _end()


def _end(code: int = 0) -> None:
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return
    if distributed.get_backend() != "gloo":  # NCCL has work of its own to finish
        distributed.destroy_process_group()
    gc.disable()  # the group in the cycle stays
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def packs_per_process(asked: int, before: int, processes_before: int) -> int:
    """gradient_accumulation with which the steps of a resumed run keep their packs on the processes there are now.

    Args:
        asked: the setting now. before, processes_before: the setting and the processes the run was started with.

    Raises:
        ValueError: the processes that there are now cannot share the packs of a step evenly.
    """
    packs, now = before * processes_before, processes()
    if asked * now == packs:
        return asked
    if asked != before:
        raise ValueError(
            f"--resume: gradient_accumulation={asked} on {now} processes makes steps of {asked * now} packs, but the "
            f"run was started with steps of {packs}; leave it at {before}, it is adapted to the processes"
        )
    if packs % now:
        fitting = ", ".join(str(n) for n in range(1, packs + 1) if packs % n == 0)
        raise ValueError(
            f"--resume: {now} processes cannot share the {packs} packs of a step evenly; possible are {fitting}"
        )
    if is_first():
        log.warning(
            "gradient_accumulation is %d instead of %d: a step keeps its %d packs, on %d processes instead of %d",
            packs // now,
            asked,
            packs,
            now,
            processes_before,
        )
    return packs // now
