"""A command in a process of its own, with what it used; signals reach it through its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
HEARTBEAT_S = 10.0
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss


@dataclass(frozen=True)
class Used:
    """Wall time, processor time with that of children that have ended, and the most memory that a process held."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_memory_bytes: int = 0

    def and_then(self, other: Used) -> Used:
        """Of two processes, one after the other."""
        peak = max(self.peak_memory_bytes, other.peak_memory_bytes)
        return Used(self.seconds + other.seconds, self.cpu_seconds + other.cpu_seconds, peak)


@dataclass(frozen=True)
class Ended:
    """How a process ended. `code`: as of subprocess, negative for a signal; `received`: what this process was sent."""

    code: int
    used: Used
    received: signal.Signals | None


def run_measured(words: Sequence[str], log: Path | None, report: Callable[[Used], object] = lambda used: None) -> Ended:
    """Run a command to its end.

    It is in a process group of its own: a signal of the terminal comes to this process alone, which passes it on once,
    and then waits for the command to save what it has.

    Args:
        log: file that what it writes is added to; None: it writes where this process does.
        report: called every 10 s with what it has used so far, for the case that this process is killed; on Linux.
    """
    began, received = time.monotonic(), list[signal.Signals]()
    output = None if log is None else log.open("ab")
    try:
        with _signals(received):
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=None if output is None else subprocess.STDOUT,
                process_group=0,
            )
            try:
                status, usage = _waited(process, received, lambda: report(_so_far(process.pid, began)))
            except BaseException:
                process.kill()
                process.wait()
                raise
    finally:
        if output is not None:
            output.close()
    peak = usage.ru_maxrss * _RSS_UNIT
    used = Used(time.monotonic() - began, usage.ru_utime + usage.ru_stime, peak)
    return Ended(os.waitstatus_to_exitcode(status), used, received[0] if received else None)


def _waited(
    process: subprocess.Popen[bytes], received: Sequence[signal.Signals], beat: Callable[[], object]
) -> tuple[int, os.struct_rusage]:  # type: ignore[name-defined]
    """Status and usage of the process when it has ended; meanwhile signals are passed on."""
    passed, wait_s, next_beat = 0, 0.005, time.monotonic() + HEARTBEAT_S
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)  # or Popen would wait for it too
            return status, usage
        for number in received[passed:]:
            os.kill(process.pid, number)
            passed += 1
        time.sleep(wait_s)
        wait_s = min(2 * wait_s, 0.2)
        if time.monotonic() >= next_beat:
            beat()
            next_beat = time.monotonic() + HEARTBEAT_S


@contextmanager
def _signals(received: list[signal.Signals]) -> Iterator[None]:
    """Inside, signals that ask to stop are only noted."""
    if threading.current_thread() is not threading.main_thread():  # Python allows handlers nowhere else
        yield
        return

    def note(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _so_far(pid: int, began: float) -> Used:
    """What a running process has used; only its time where the system does not say (other than Linux)."""
    seconds = time.monotonic() - began
    try:
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]  # its own, then its children's
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return Used(seconds)
    peak = next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:")), 0)
    return Used(seconds, sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK"), peak)
