"""What commands share that read a file and write one."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.language import language_read, reads_language
from ..jobs.durable import check_folder_above

if TYPE_CHECKING:
    from ..data.read import RowStream
    from ..data.tokenise import StackTokenizer


def check_given(command: object, *names: str) -> None:
    """Refuse a command that lacks one of these options."""
    for name in names:
        if not getattr(command, name):
            raise ValueError(f"--{name} is missing")


def output_file(command: Any, endings: tuple[str, ...]) -> Path:
    """The checked output path of a command with `output` and `overwrite` that goes on where it was stopped.

    A stopped run, which may replace the output, is known by the folder `<output>.part`.
    """
    check_given(command, "output")
    path = Path(command.output)
    if path.suffix not in endings:
        raise ValueError(f"--output {command.output}: expected a name ending in {' or '.join(endings)}")
    if path.is_dir():
        raise ValueError(f"--output {command.output}: is a folder; name a file")
    check_folder_above("--output", path)
    if path.exists() and not command.overwrite and not path.with_name(path.name + ".part").exists():
        raise ValueError(f"--output {command.output}: exists; pass --overwrite to replace it")
    return path


def check_least(command: object, **least: int) -> None:
    """Refuse a number of `command` that is too small: name of its option -> the least that it may be; None is any."""
    for name, number in least.items():
        value = getattr(command, name)
        if value is not None and value < number:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be at least {number}")


def check_written(command: object, *names: str) -> None:
    """Refuse, before any work, options of `command` that name a file which cannot be written; "" is none."""
    for name in names:
        if value := getattr(command, name):
            option = f"--{name.replace('_', '-')} {value}"
            if Path(value).is_dir():
                raise ValueError(f"{option}: is a folder; name a file")
            if not Path(value).absolute().parent.is_dir():
                raise ValueError(f"{option}: its folder does not exist")


def ranks() -> tuple[int, int, int]:
    """(rank, number of processes, rank on this machine) as torchrun sets them; (0, 1, 0) without it."""
    rank, count, local = (int(os.environ.get(name, "0")) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    return rank, max(count, 1), local


def device_of(command: Any) -> str:
    """The device of a command with `device`: where it names none, each process of a machine takes another GPU."""
    import torch

    if command.device or not torch.cuda.is_available():
        return command.device or "cpu"
    return f"cuda:{ranks()[2] % torch.cuda.device_count()}"


def tell(command: str) -> Callable[[str], None]:
    """What says a warning of `command` on stderr, in the first process alone."""

    def said(message: str) -> None:
        if not ranks()[0]:
            print(f"mtllm {command}: {message}", file=sys.stderr)

    return said


def in_language(rows: RowStream, tokenizer: StackTokenizer, side: str, command: str) -> RowStream:
    """The rows with the language that they are read in; those in an unknown one, and those that the tokenizer fails on,
    are left out and counted."""
    from ..inference.stream import language_check, text_check

    if not reads_language(tokenizer, side):
        return replace(rows, unusable=text_check(tokenizer, side))
    if "language_column" in rows.wanted:
        return replace(rows, unusable=text_check(tokenizer, side, language_check(tokenizer)))
    code = str(language_read(tokenizer, side, rows.language, "--language", tell=tell(command)))
    tokenizer.language_id(code)
    return replace(rows, language=code, unusable=text_check(tokenizer, side))


def print_skipped(rows: RowStream, command: str) -> None:
    """Say on stderr how many rows of the latest pass were left out, and why."""
    if skipped := rows.counts.empty + rows.counts.failed:
        reasons = "".join(f", {count} {reason}" for reason, count in rows.counts.reasons.items())
        print(f"{command}: {skipped} rows skipped: {rows.counts.empty} empty{reasons}", file=sys.stderr)


@contextmanager
def stoppable(command: str) -> Iterator[None]:
    """Where what runs inside is interrupted and goes on later, say so in one line; exit code 130."""
    from ..inference.stream import Interrupted

    try:
        yield
    except Interrupted as stopped:
        print(f"mtllm {command}: {stopped}", file=sys.stderr)
        raise SystemExit(130) from None
