"""YAML that people write: a key that is given twice is an error, not the last one."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import yaml


class _UniqueKeys(yaml.SafeLoader):
    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        lines: dict[str, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if (name := repr(key)) in lines:
                raise yaml.YAMLError(f"{key!r} is given twice, in lines {lines[name]} and {line}")
            lines[name] = line
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path, where: str) -> Any:
    """As `yaml.safe_load` of the file's text.

    Args:
        where: what errors begin with: the argument and its value.

    Raises:
        ValueError: no such file, not YAML, or a key is given twice; says in which lines.
    """
    if not Path(path).is_file():
        raise ValueError(f"{where}: no such file")
    try:
        return yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{where}: {said if 'is given twice' in said else f'not YAML: {said}'}") from None


def converted(kind: Any, value: Any) -> Any:
    """`value` as a `kind`: a list becomes a tuple, and a number may be a string, as 1e-4 is to YAML.

    Raises:
        ValueError: it is of another type.
    """
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        for part in parts:
            try:
                return converted(part, value)
            except ValueError:
                pass
    elif origin is tuple and isinstance(value, list):
        return tuple(converted(parts[0], one) for one in value)
    elif origin is dict and isinstance(value, dict):
        return {converted(parts[0], key): converted(parts[1], one) for key, one in value.items()}
    elif origin is list and isinstance(value, list):
        return [converted(parts[0], one) for one in value]
    elif origin is Literal and isinstance(value, str) and value in parts:
        return value
    elif kind in (int, float) and isinstance(value, (str, int, kind)) and not isinstance(value, bool):
        return kind(value)
    elif origin is None and kind not in (int, float) and isinstance(value, kind):
        return value
    raise ValueError(value)


QUOTES = "put `no`, `yes`, `on` and `off` in quotes"  # which YAML 1.1 reads as true and false


def wrong_type(value: Any, kind: Any) -> str:
    """What a value is that `converted` refuses, and what was expected."""
    parts = value if isinstance(value, list) else [value]
    quotes = f"; {QUOTES}" if any(part is True or part is False for part in parts) and "text" in described(kind) else ""
    return f"{value!r}: expected {described(kind)}{quotes}"


def described(kind: Any) -> str:
    """A type in the words of an error message."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(described(part) for part in parts)
    if origin is dict:
        return f"a mapping, each {described(parts[0])} to {described(parts[1])}"
    if origin in (tuple, list):
        return f"a list, each {described(parts[0])}"
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return words.get(kind, kind.__name__)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """What an error says behind a name that is not known, where one that is looks like it."""
    near = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {near[0]!r}?" if near else ""
