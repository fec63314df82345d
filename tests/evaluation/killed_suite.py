"""Run a suite whole, then again with kills at random places until it is done, in forked processes.

python killed_suite.py SUITE WHOLE_FOLDER KILLED_FOLDER KILLS SEED      prints one JSON line; run by test_suite_file
"""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from mtllm_fast.commands.evaluate import Evaluate
from mtllm_fast.evaluation import suite_file
from mtllm_fast.models import MTLLM
from mtllm_fast.reporting import write_report


def start(suite: str, output: Path) -> int:
    """A child that runs `mtllm evaluate --suite`. Everything is imported before the fork, so a kill meets the work."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        torch.set_num_threads(1)
        log = os.open(output.parent / f"{output.name}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        Evaluate(suite=suite, output=str(output), progress=False).run()
        sys.stdout.flush()
        status = 0
    finally:
        os._exit(status)


def parts(output: Path) -> int:
    return sum(1 for path in (output / "cells").rglob("*") if path.is_file() and not path.name.startswith("."))


def main(suite: str, whole: Path, killed: Path, kills: int, seed: int) -> dict[str, object]:
    _, status = os.waitpid(start(suite, whole), 0)
    assert status == 0, "the whole run failed"
    total, rng, struck = parts(whole), random.Random(seed), []
    for target in sorted(rng.randrange(total) for _ in range(kills)):
        child, deadline = start(suite, killed), time.monotonic() + 60
        while parts(killed) <= target and os.waitpid(child, os.WNOHANG) == (0, 0) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.02)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        struck.append({"parts": parts(killed), "killed": os.WIFSIGNALED(status)})
    _, status = os.waitpid(start(suite, killed), 0)
    return {"total": total, "struck": struck, "status": status}


if __name__ == "__main__":
    assert suite_file and MTLLM and write_report  # imported here so that children need not
    gc.freeze()
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))))
