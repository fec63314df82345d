"""Whether a model's name means a folder or a model of the hub."""

from __future__ import annotations

import re
from pathlib import Path

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def is_path(name: str | Path) -> bool:
    """Whether `name` can only mean a folder here, so that the hub is not asked for it.

    It is there, begins as paths do, has more parts than a hub name, or lies in a folder that is there.
    """
    text = str(name)
    if isinstance(name, Path) or Path(text).expanduser().exists() or not _HUB_NAME.fullmatch(text):
        return True
    return "/" in text and Path(text.split("/")[0]).is_dir()


def check_folder(role: str, name: str | Path) -> None:
    """Raise ValueError where `name` is a path and no folder with a config.json is there."""
    if not is_path(name):
        return
    if not Path(name).is_dir():
        raise ValueError(f"{role}={str(name)!r}: no such folder")
    if not (Path(name) / "config.json").is_file():
        raise ValueError(f"{role}={str(name)!r}: the folder holds no config.json, so it is not a model folder")
