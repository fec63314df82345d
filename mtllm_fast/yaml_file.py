"""YAML that people write: a key that is given twice is an error, not the last one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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


def read_yaml(path: str | Path) -> Any:
    """As `yaml.safe_load` of the file's text.

    Raises:
        ValueError: not YAML, or a key is given twice; says in which lines.
    """
    try:
        return yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        said = " ".join(str(error).split())
        raise ValueError(said if "is given twice" in said else f"not YAML: {said}") from None
