"""SIGTERM and SIGINT as a request to stop after the step that is running."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from .processes import is_first

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """While it is entered, the first SIGTERM or SIGINT is remembered in `received`; a second one ends the process.

    A batch system that ends jobs sends SIGTERM some time before SIGKILL; under SLURM, `#SBATCH --signal=TERM@120` sends
    it to the processes of `srun` 120 seconds before the time limit, long enough for the step and its checkpoint.

    Attributes:
        received: the signal, None while there was none.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = signal.Signals(number)
        if is_first():
            text = f"{self.received.name}: this step is finished and saved; a second signal stops at once\n"
            os.write(2, text.encode())  # print may be in the middle of a line
