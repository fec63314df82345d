"""Runs tests on mutants: imports what is slow to import once, forks for every job, and lets the child read the copy.

A program of its own, so that nothing of the project is in memory when it forks:

    python server.py COPY MODULE...      one job a line on stdin, one result a line on stdout, both JSON

A job: {"file", "text" (None: nothing is changed), "tests" (and other arguments of pytest), "limit"}. A result: {"code",
"seconds", "tail"}, the exit code of pytest, -1 where it ran into the limit, -2 where it died. Seconds are of processor time,
so that what else the machine does decides nothing; a test that waits for ever is ended after PATIENCE times the limit.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import math
import os
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest

PATIENCE = 60.0


def run(copy: Path, job: dict, number: int) -> dict:
    """The result of one job; the file is as it was afterwards."""
    target = copy / job["file"] if job["text"] is not None else None
    original = target.read_text(encoding="utf-8") if target else ""
    if target:
        _write(target, job["text"], number)
    try:
        return _forked(copy, job)
    finally:
        if target:
            _write(target, original, number + 1)


def _end_with_the_parent() -> None:
    """A test that hangs must not outlive the run that it belongs to."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _write(path: Path, text: str, number: int) -> None:
    """A compiled file holds for a time of change in whole seconds and a size: no two texts of `path` share a time."""
    path.write_text(text, encoding="utf-8")
    os.utime(path, (2e9 + number, 2e9 + number))


def _forked(copy: Path, job: dict) -> dict:
    start = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)  # its own children end with it
            _end_with_the_parent()
            resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(job["limit"]), resource.RLIM_INFINITY))
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            code = 3
            try:
                os.chdir(copy)
                sys.path.insert(0, str(copy))
                code = pytest.main(["-x", "-q", "--no-header", "--tb=line", "-p", "no:cacheprovider", *job["tests"]])
            finally:
                sys.stdout.flush()
                os._exit(int(code))
        ended, status, used = 0, 0, None
        while not ended:
            ended, status, used = os.wait4(child, os.WNOHANG)
            if not ended and time.monotonic() - start > PATIENCE * job["limit"]:
                os.killpg(child, signal.SIGXCPU)
            time.sleep(0.05)
        output.seek(0)
        tail = output.read()[-1500:]
    code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else -1 if os.WTERMSIG(status) == signal.SIGXCPU else -2
    return {"code": code, "seconds": round(used.ru_utime + used.ru_stime, 2), "tail": tail}


def main() -> None:
    _end_with_the_parent()
    copy, modules = Path(sys.argv[1]), sys.argv[2:]
    sys.path.pop(0)  # the lists beside this file have names of packages
    for module in modules:
        importlib.import_module(module)
    with contextlib.redirect_stdout(sys.stderr):
        pytest.main(["--version"])  # imports pytest's plugins
    for number, line in enumerate(sys.stdin):
        print(json.dumps(run(copy, json.loads(line), 2 * number)), flush=True)


if __name__ == "__main__":
    main()
