"""Kills `encode_file` at every system call that changes the disk, goes on, and compares the bytes. Run by test_encode_command.

python crash_points.py MODEL INPUT FOLDER ENDING STRIDE     prints how many crashes there were, or fails

STRIDE: kill at every STRIDE-th call.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch

from mtllm_fast import MTLLM, Engine
from mtllm_fast.data import read_rows
from mtllm_fast.inference.stream import encode_file

OPTIONS = {"text_column": "text", "language_column": "lang", "id_column": "id"}


def encode(engine: Engine, source: str, output: Path, **options) -> None:
    encode_file(engine, read_rows(source, **OPTIONS), output, normalize=True, on_bad_row="skip", **options)


def in_child(run) -> int:
    """The signal that ended a forked child that calls `run`, 0 where none did."""
    child = os.fork()
    if not child:
        try:
            run()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0, "the child failed"
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def dying(run, after: int) -> None:
    """Run until the disk has been changed `after` times; the next change is half done and then kill -9 comes."""
    left = after

    def counted(name: str):
        original = getattr(os, name)

        def call(*arguments, **options):
            nonlocal left
            left -= 1
            if left < 0:
                if name == "write":
                    original(arguments[0], arguments[1][: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        return call

    for name in ("write", "replace", "ftruncate", "fsync", "unlink", "mkdir"):
        setattr(os, name, counted(name))
    run()


def main() -> None:
    model, source, folder, ending, stride = sys.argv[1:]
    torch.set_num_threads(1)
    # every child prepares its windows itself: a thread would not survive the fork
    engine = Engine(MTLLM.from_pretrained(model), window=16, max_tokens=200, ahead=0)
    run, made = engine._run, {}

    def once(window, *rest):
        if window.index not in made:  # by the first run, before there are children: what is killed here is the writing
            made[window.index] = run(window, *rest)
        return made[window.index]

    engine._run = once
    whole, output = Path(folder, f"whole{ending}"), Path(folder, f"killed{ending}")
    beside = (".skipped.tsv", ".index.npy")
    encode(engine, source, whole)
    expected = whole.read_bytes()
    told = {end: whole.with_name(whole.name + end).read_bytes() for end in beside}

    crashes = 0

    def killed() -> None:
        dying(lambda: encode(engine, source, output), crashes * int(stride))

    while in_child(killed):
        crashes += 1
        finished = output.exists() and not output.with_name(output.name + ".part").exists()
        # what is left by this crash is finished by a run that is not killed
        assert finished or in_child(lambda: encode(engine, source, output)) == 0
        assert output.read_bytes() == expected, f"other bytes after crash {crashes}"
        assert told == {end: output.with_name(output.name + end).read_bytes() for end in beside}
        assert not list(Path(folder).glob("*.part")), "the part folder is still there"
        output.unlink()
        for end in beside:
            output.with_name(output.name + end).unlink()
    assert output.read_bytes() == expected
    print(f"{crashes} crashes")


if __name__ == "__main__":
    main()
