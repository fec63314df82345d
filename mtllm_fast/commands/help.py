"""What the command line says: required options first and marked, texts that wrap, errors in one line."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import io
import os
import sys
import textwrap
import typing
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

# topic of `mtllm help TOPIC`: (file whose docstring it is, what it describes)
TOPICS = {
    "suite": ("evaluation/suite_file.py", "the file of `--suite`"),
    "task": ("evaluation/tasks/custom.py", "the file of `--task FILE.yaml`"),
    "recipe": ("commands/recipe_file.py", "the file of `--recipe`"),
    "compare": ("commands/compare_file.py", "the file of `mtllm compare`"),
}
registry = ConstructorRegistry()


def parse(name: str, settings_type: type, arguments: Sequence[str], default: Any = None) -> Any:
    """The settings of command `name` from its command line.

    Args:
        default: an instance with the values of a YAML file; None for the type's own.

    Raises:
        ValueError: an option that is not there, or a value that it cannot have. SystemExit: help was asked for.
    """

    def parsed() -> Any:
        return tyro.cli(
            settings_type,
            prog=f"mtllm {name}",
            description=description(settings_type),
            args=list(arguments),
            default=settings_type() if default is None else default,
            registry=registry,
        )

    if {"-h", "--help"} & set(arguments):
        return parsed()
    stderr, width = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "10000"  # tyro's box is read line by line
    try:
        with contextlib.redirect_stderr(stderr):
            return parsed()
    except SystemExit as ending:
        if ending.code != 2:
            raise
        message = _message(stderr.getvalue()).removeprefix(f"{settings_type.__name__}: ")
        raise ValueError(f"{message}; see `mtllm {name} --help`") from None
    finally:
        os.environ.pop("COLUMNS") if width is None else os.environ.update(COLUMNS=width)
        if sys.exc_info()[0] is None:
            sys.stderr.write(stderr.getvalue())


def _message(box: str) -> str:
    """The message in a box of tyro's, with the first option that it says is similar."""
    lines = [line.strip(" │╭╮╰╯") for line in box.splitlines()]
    parts: list[list[str]] = [[]]
    for line in lines[1:]:  # below the title
        if line and not line.strip("─-"):  # the second where the output is not UTF-8
            parts.append([])
        elif line:
            parts[-1].append(line)
    parts = [part for part in parts if part]
    message = " ".join(parts[0]).removeprefix("Error parsing ").replace("Unrecognized options:", "unknown options:")
    for part in parts[1:]:
        if part[0].startswith(("Perhaps you meant", "Arguments similar")):
            return f"{message}; did you mean {part[1].split()[0].rstrip(',')}?"
    return message.partition(". Got errors:")[0].rstrip(".")


def description(settings_type: type) -> str:
    """The docstring of a command: its paragraphs in one line each, and its examples in lines that a shell takes."""
    lines: list[str] = []
    example = False
    for line in inspect.cleandoc(settings_type.__doc__ or "").splitlines():
        if line.startswith("Example: "):
            lines, example = [*lines, *([""] if lines and lines[-1] else []), line], True
        elif line and example:
            lines[-1] += " \\"
            lines.append(f"    {line}")
        elif line and lines and lines[-1]:
            lines[-1] += f" {line}"
        else:
            lines, example = [*lines, line], False
    topics = [page(name) for name in getattr(settings_type, "TOPICS", ())]
    return "\n\n".join(["\n".join(lines), *topics])


def page(name: str) -> str:
    """A page of `mtllm help`. Raises ValueError for a name that is none."""
    if name not in TOPICS:
        raise ValueError(f"{name!r}: expected a command, or one of {', '.join(TOPICS)}")
    file, what = TOPICS[name]
    source = (Path(__file__).parents[1] / file).read_text(encoding="utf-8")  # importing it would take torch
    return f"Keys of {what}\n\n{ast.get_docstring(ast.parse(source))}"


@registry.struct_rule
def _documented(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Dataclasses with what `REQUIRED` of a command says: option -> what to write behind its text."""
    if not dataclasses.is_dataclass(info.type):
        return None
    hints = typing.get_type_hints(info.type, include_extras=True)
    required, fields = getattr(info.type, "REQUIRED", {}), []
    instance = info.default if dataclasses.is_dataclass(info.default) else info.type()  # type: ignore[misc]
    for field in dataclasses.fields(info.type):
        kind, value = hints[field.name], getattr(instance, field.name)
        if kind == bool | None:  # a pair of flags, and None where neither is given
            kind = Annotated[kind, tyro.conf.DisallowNone]
        if not dataclasses.is_dataclass(value):
            kind = Annotated[kind, tyro.conf.arg(help_behavior_hint=_hint(value, required.get(field.name)))]
        fields.append(StructFieldSpec(field.name, kind, value, partial(_text, info.type, field.name)))
    fields.sort(key=lambda field: field.name not in required)
    return StructConstructorSpec(info.type, tuple(fields))


def _hint(value: object, required: str | None) -> str | Callable[[str], str]:
    """What stands behind the text of an option: that it is required, or its default where it has one."""
    if isinstance(value, bool):
        return f"(default: {'on' if value else 'off'})"
    if value is None or value == "" or value == ():
        return f"({required})" if required else ""
    return lambda shown: f"(default: {shown})"


def _text(kind: type, name: str) -> str:
    return _texts(kind).get(name, "")


@lru_cache
def _texts(kind: type) -> dict[str, str]:
    """The string below each field of a dataclass, in one line."""
    texts: dict[str, str] = {}
    for cls in reversed(kind.__mro__[:-1]):
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        assert isinstance(node, ast.ClassDef)
        for field, text in pairwise(node.body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                assert isinstance(field.target, ast.Name)
                texts[field.target.id] = " ".join(str(text.value.value).split())
    return texts
