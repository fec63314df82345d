"""The settings of a command from a YAML file whose keys are its options."""

from __future__ import annotations

import dataclasses
import difflib
import os
import types
import typing
from typing import Annotated, Any, Literal

import tyro

Values = dict[tuple[str, ...], Any]  # the path of a field, through nested dataclasses -> its value


def read_settings(settings_type: Any, path: str) -> Any:
    """An instance of `settings_type` with the values of the file in place of its own.

    Raises:
        ValueError: the file is missing, no YAML mapping, has a key that is no option, or a value of another type.
    """
    import yaml

    where = f"--config {path}"
    if not os.path.isfile(path):
        raise ValueError(f"{where}: no such file")
    with open(path, encoding="utf-8") as handle:
        try:
            data = yaml.load(handle, Loader=_unique_keys())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            said = "" if "is given twice" in str(error) else "not YAML: "
            raise ValueError(f"{where}: {said}{' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{where}: expected a mapping of options")
    return _replaced(settings_type(), _values(settings_type, data, where))


def _unique_keys() -> Any:
    """YAML's safe loader, for which a key that is given twice is an error and not the last one."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen: dict[Any, int] = {}
            for key_node, _ in node.value:
                if key_node.tag == "tag:yaml.org,2002:merge":
                    continue
                key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
                name = str(key).replace("-", "_")  # either is the same option
                if name in seen:
                    raise yaml.YAMLError(f"{key!r} is given twice, in lines {seen[name]} and {line}")
                seen[name] = line
            return super().construct_mapping(node, deep)

    return Loader


def _options(settings_type: Any) -> dict[str, tuple[tuple[str, ...], Any]]:
    """Key -> path and type of its field. A field may also be called as its option is (`from`), and what has no prefix
    on the command line (`tyro.conf.arg(name="")`) needs none here."""
    hints = typing.get_type_hints(settings_type, include_extras=True)
    options: dict[str, tuple[tuple[str, ...], Any]] = {}
    flat: dict[str, tuple[tuple[str, ...], Any]] = {}
    for field in dataclasses.fields(settings_type):
        kind, names = hints[field.name], []
        if typing.get_origin(kind) is Annotated:
            kind, *extras = typing.get_args(kind)
            names = [one.name for one in extras if isinstance(one, type(tyro.conf.arg()))]  # type: ignore[attr-defined]
        options |= {name.replace("-", "_"): ((field.name,), kind) for name in (field.name, *names) if name}
        if "" in names:
            flat |= {key: ((field.name, *path), inner) for key, (path, inner) in _options(kind).items()}
    return flat | options


def _values(settings_type: Any, data: dict[Any, Any], where: str) -> Values:
    """The checked values of a mapping; keys may use `-` or `_`."""
    options, values = _options(settings_type), Values()
    for key, value in data.items():
        name = str(key).replace("-", "_")
        if name not in options:
            near = difflib.get_close_matches(name, options, 1)
            raise ValueError(f"{where}: unknown option {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        path, kind = options[name]
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, dict):
                raise ValueError(f"{where}: {key} must be a mapping")
            found = {(*path, *inner): one for inner, one in _values(kind, value, f"{where}: {key}").items()}
        else:
            try:
                found = {path: _converted(kind, value)}
            except ValueError:
                raise ValueError(f"{where}: {key}: {value!r}: expected {_described(kind)}") from None
        if twice := values.keys() & found.keys():
            raise ValueError(f"{where}: {key}: {min(twice)[-1]} is given twice")
        values |= found
    return values


def _replaced(base: Any, values: Values) -> Any:
    """`base`, an instance of a dataclass, with the values of some of its fields and of those nested in it."""
    changes = {}
    for name in {path[0] for path in values}:
        inner = {path[1:]: value for path, value in values.items() if path[0] == name}
        changes[name] = inner[()] if () in inner else _replaced(getattr(base, name), inner)
    return dataclasses.replace(base, **changes)


def _converted(kind: Any, value: Any) -> Any:
    """`value` as a `kind`: a list becomes a tuple, and a number may be a string, as 1e-4 is to YAML.

    Raises:
        ValueError: it is of another type.
    """
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        for part in parts:
            try:
                return _converted(part, value)
            except ValueError:
                pass
    elif origin is tuple and isinstance(value, list):
        return tuple(_converted(parts[0], one) for one in value)
    elif origin is Literal and isinstance(value, str) and value in parts:
        return value
    elif kind in (int, float) and isinstance(value, (str, int, kind)) and not isinstance(value, bool):
        return kind(value)
    elif origin is None and kind not in (int, float) and isinstance(value, kind):
        return value
    raise ValueError(value)


def _described(kind: Any) -> str:
    """A type in the words of an error message."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_described(part) for part in parts)
    if origin is tuple:
        return f"a list, each {_described(parts[0])}"
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return words.get(kind, kind.__name__)
