"""The `mtllm` command: picks the subcommand, reads YAML, and turns errors into one line.

The options of every subcommand are the fields of its dataclass in `commands/`.
"""

from __future__ import annotations

import os
import sys
import typing
from typing import Any

from .commands.table import COMMANDS, SHARED, settings_of
from .failures import RunFailed

USAGE = """usage: mtllm COMMAND [options]

{commands}

`mtllm COMMAND --help` shows the options of one command. Every command takes --config FILE.yaml, whose keys are its
options (nested where the option has a dot); options on the command line override it.
`mtllm help TOPIC` shows the keys of a file; topics are suite, task, recipe and compare."""


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Exit codes: 0 done, 1 failure, 2 usage or bad input, 130 interrupted."""
    try:
        dispatch(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        enough()
    except SystemExit as ending:
        if isinstance(ending.__context__, BrokenPipeError):  # rich's way to end
            enough()
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            enough()
        raise


def enough() -> typing.NoReturn:
    """End well where whoever read the output has enough of it, as `head` has."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python's own flush at the end fails
    raise SystemExit(0) from None


def dispatch(arguments: list[str] | None) -> None:
    """Run the command, or say in one line why not."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if len(arguments) > 1 and arguments[0] == "help":
        explain(arguments[1])
        return
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        width = max(map(len, COMMANDS))
        print(USAGE.format(commands="\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())))
        raise SystemExit(0 if arguments else 2)
    if arguments[0] in ("-V", "--version"):
        from . import __version__

        print(f"mtllm-fast {__version__}")
        return
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        from .yaml_file import did_you_mean

        fail("", f"unknown command {name!r}{did_you_mean(name, COMMANDS)}; see `mtllm --help`")
    try:
        run(name, rest)
    except KeyboardInterrupt:
        print(f"mtllm {name}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        raise
    except (ValueError, TypeError, OSError, RunFailed) as error:
        if os.environ.get("MTLLM_TRACEBACK"):
            raise
        # 1: a full disk, a file that may not be written, a run that cannot go on
        bad_input = isinstance(error, (ValueError, TypeError, FileNotFoundError))
        fail(name, str(error), code=2 if bad_input else 1)


def explain(topic: str) -> None:
    """What `mtllm help TOPIC` prints: the keys of a file, or the options of a command."""
    if topic in COMMANDS:
        run(topic, ["--help"])
    from .commands.help import page

    try:
        print(page(topic))
    except ValueError as error:
        fail("help", str(error))


def run(name: str, arguments: list[str]) -> None:
    """Parse the options of command `name` and run it."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler reports on itself
    from .commands.help import parse

    settings_type = settings_of(name)
    default, arguments = yaml_default(settings_type, arguments)
    settings = parse(name, settings_type, arguments, default)
    count = int(os.environ.get("WORLD_SIZE") or 1)
    if count > 1 and name not in SHARED:
        raise ValueError(f"{name} runs in one process, but WORLD_SIZE={count}: start it without torchrun")
    quiet()
    settings.run()


def quiet() -> None:
    """Keep the libraries' own bars and notices out of the output; warnings of ours and errors stay."""
    import warnings

    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)


def yaml_default(settings_type: type, arguments: list[str]) -> tuple[Any, list[str]]:
    """The settings that `--config FILE` holds (None without one), and the other arguments."""
    if "--config" not in arguments:
        return None, arguments
    from .commands.from_yaml import read_settings

    index = arguments.index("--config")
    if index + 1 >= len(arguments):
        raise ValueError("--config needs a YAML file")
    return read_settings(settings_type, arguments[index + 1]), arguments[:index] + arguments[index + 2 :]


def fail(name: str, message: str, code: int = 2) -> typing.NoReturn:
    """Print one line and exit."""
    print(f"mtllm{' ' + name if name else ''}: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
