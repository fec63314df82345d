"""The settings of a command from a YAML file whose keys are its options."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import tyro

from ..yaml_file import converted, did_you_mean, read_yaml, wrong_type

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Settings = TypeVar("Settings", bound="DataclassInstance")

Values = dict[tuple[str, ...], Any]  # the path of a field, through nested dataclasses -> its value
Options = dict[str, tuple[tuple[str, ...], Any]]  # key -> path and type of its field


def read_settings(settings_type: type[Settings], path: str) -> Settings:
    """An instance of `settings_type` with the values of the file in place of its own.

    Raises:
        ValueError: the file is missing, no YAML mapping, has a key that is no option, or a value of another type.
    """
    where = f"--config {path}"
    data = read_yaml(path, where)
    if not isinstance(data, dict):
        raise ValueError(f"{where}: expected a mapping of options")
    return settings_from(settings_type, data, where)


def settings_from(settings_type: type[Settings], data: Mapping[object, object], where: str) -> Settings:
    """As `read_settings`, of a mapping that is at hand; errors start with `where`."""
    values = values_of(settings_type, data, where)
    try:
        return replaced(settings_type(), values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _options_of(settings_type: type) -> Options:
    """Not to be changed. A field may also be called as its option is (`from`), and what has no prefix
    on the command line (`tyro.conf.arg(name="")`) needs none here."""
    hints = typing.get_type_hints(settings_type, include_extras=True)
    options, flat = Options(), Options()
    for field in dataclasses.fields(settings_type):
        kind, names = hints[field.name], []
        if typing.get_origin(kind) is Annotated:
            kind, *extras = typing.get_args(kind)
            names = [one.name for one in extras if isinstance(one, type(tyro.conf.arg()))]  # type: ignore[attr-defined]
        options |= {name.replace("-", "_"): ((field.name,), kind) for name in (field.name, *names) if name}
        if "" in names:
            flat |= {key: ((field.name, *path), inner) for key, (path, inner) in options_of(kind).items()}
    return flat | options


options_of: Callable[[type], Options] = cache(_options_of)


def values_of(settings_type: type[DataclassInstance], data: Mapping[object, object], where: str) -> Values:
    """The checked values of a mapping; keys may use `-` or `_`."""
    options, values = options_of(settings_type), Values()
    for key, value in data.items():
        name = str(key).replace("-", "_")
        if name not in options:
            raise ValueError(f"{where}: unknown option {key!r}{did_you_mean(name, options)}")
        path, kind = options[name]
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            if not isinstance(value, dict):
                raise ValueError(f"{where}: {key} must be a mapping")
            found = {(*path, *inner): one for inner, one in values_of(kind, value, f"{where}: {key}").items()}
        else:
            try:
                found = {path: converted(kind, value)}
            except ValueError:
                raise ValueError(f"{where}: {key}: {wrong_type(value, kind)}") from None
        if twice := values.keys() & found.keys():
            raise ValueError(f"{where}: {key}: {min(twice)[-1]} is given twice")
        values |= found
    return values


def replaced(base: Settings, values: Values) -> Settings:
    """`base`, an instance of a dataclass, with the values of some of its fields and of those nested in it."""
    changes = {}
    for name in {path[0] for path in values}:
        inner = {path[1:]: value for path, value in values.items() if path[0] == name}
        changes[name] = inner[()] if () in inner else replaced(getattr(base, name), inner)
    return dataclasses.replace(base, **changes)
