"""Commands and options keep their names: those of today against the committed list."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import tyro

from mtllm_fast.cli import COMMANDS
from mtllm_fast.commands.help import registry

LIST = Path(__file__).with_name("cli_options.txt")
RENEW = "python -m tests.test_cli_options --renew"


def options() -> list[str]:
    """ "command --option" for each name of an option, "command NAME" for each positional argument; sorted."""
    found = set()
    for command, (place, _) in COMMANDS.items():
        module, _, name = place.partition(":")
        settings = getattr(importlib.import_module(f"mtllm_fast.commands.{module}"), name)
        parser = tyro.extras.get_parser(settings, default=settings(), registry=registry)
        for action in parser._actions:
            found.update(f"{command} {text}" for text in action.option_strings or [action.dest.upper()])
    return sorted(found)


def test_commands_and_options_are_those_of_the_list() -> None:
    listed = LIST.read_text(encoding="utf-8").splitlines()
    assert len(listed) > 300
    assert options() == listed, f"if that is meant, renew the list: {RENEW}"


if __name__ == "__main__":
    if sys.argv[1:] != ["--renew"]:
        raise SystemExit(f"usage: {RENEW}")
    LIST.write_text("".join(f"{line}\n" for line in options()), encoding="utf-8")
