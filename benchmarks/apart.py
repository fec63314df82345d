"""A function called in a process of its own: for memory, and for variants that change the process for good."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from . import REPO


def apart(method: str, function: Callable[..., Any], *args: Any, preload: Sequence[str] = ()) -> Any:
    """What `function(*args)` gives in a fresh process.

    Args:
        method: "spawn", or "forkserver": from a process that has imported all and computed nothing, so at once.
        preload: modules to import beside the function's own; what the first call names holds for all.

    Raises:
        RuntimeError: the process ended without a result.
    """
    context: Any = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload([function.__module__, *preload])
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(send, function, args))
    with _environment():
        process.start()
    send.close()
    try:
        return receive.recv()
    except EOFError:
        raise RuntimeError(f"{function.__name__}{args} ended without a result, see above") from None
    finally:
        process.join()


@contextmanager
def _environment() -> Iterator[None]:
    """What a new Python needs: the child runs the module that is `main` here once more, as multiprocessing does, and
    Python wonders at that; and a fork server is not told this process's sys.path, by which the benchmarks are found."""
    before = {name: os.environ.get(name) for name in ("PYTHONWARNINGS", "PYTHONPATH")}
    os.environ["PYTHONWARNINGS"] = "ignore::RuntimeWarning"
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (before["PYTHONPATH"], str(REPO))))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _send(pipe: Any, function: Callable[..., Any], args: Any) -> None:
    pipe.send(function(*args))
