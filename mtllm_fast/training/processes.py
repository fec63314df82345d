"""How many processes share a run, and how many packs of a step each of them takes."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)


def processes() -> int:
    """How many processes torchrun or `accelerate launch` started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def leaving_group() -> Iterator[None]:
    """Leave the group of processes at the end of the block, if it ends well.

    A process that ends within its group is aborted now and then ("terminate called without an active exception"), and
    torchrun then ends the others, whatever they are writing.
    """
    try:
        yield
    except SystemExit as ending:
        if not ending.code:
            _leave()
        raise
    _leave()


def _leave() -> None:
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


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
    if not int(os.environ.get("RANK", "0")):
        log.warning(
            "gradient_accumulation is %d instead of %d: a step keeps its %d packs, on %d processes instead of %d",
            packs // now, asked, packs, now, processes_before,
        )  # fmt: skip
    return packs // now
