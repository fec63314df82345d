"""Evaluation sets from the Hugging Face hub, through `datasets` (imported on first use)."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .base import SPLITS, nearest
from .files import Record

log = logging.getLogger(__name__)
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class HubSet:
    """How a task is laid out on the hub.

    Fields:
        name: the hub name; "" stands for mirrors under any name.
        configs: the task's language code -> the hub's configuration; languages not named here keep their code.
        closed: only the languages in `configs` are there; other configurations hold something else.
    """

    name: str = ""
    configs: Mapping[str, str] = field(default_factory=dict)
    closed: bool = False

    def config(self, language: str) -> str:
        """Raises ValueError for a language that a closed set does not have."""
        if self.closed and language not in self.configs:
            raise ValueError(f"language={language!r}: not in {self.name!r}; nearest: {nearest(language, self.configs)}")
        return self.configs.get(language, language)

    def languages(self, configs: Iterable[str]) -> list[str]:
        """The task's codes of the languages among a set's configurations, sorted."""
        code = {config: language for language, config in self.configs.items()}
        kept = (config for config in configs if config in code or not (self.closed or config in _UNIONS))
        return sorted(code.get(config, config) for config in kept)


# configurations of multilingual hub sets that are no language but several
_UNIONS = ("all_languages", "all", "default")


def looks_like_hub_name(source: str) -> bool:
    """Whether a string can be a hub name ("name" or "org/name") at all; paths like ../data cannot."""
    return _NAME.fullmatch(source) is not None


def hub_configs(name: str) -> list[str]:
    """Configurations (for the sets here: languages) of a hub data set.

    Raises:
        ValueError: there is no such data set, or it cannot be reached.
    """
    import datasets

    try:
        return list(datasets.get_dataset_config_names(name))
    except RuntimeError as error:
        if not _is_script(error):
            raise
        files = _converted_files(name)
        return sorted({path.split("/")[0] for path in files})
    except Exception as error:
        raise _unreachable(name, error) from error


def hub_splits(name: str, config: str) -> tuple[str, ...]:
    """Canonical splits of one configuration."""
    import datasets

    try:
        names = set(datasets.get_dataset_split_names(name, config))
    except RuntimeError as error:
        if not _is_script(error):
            raise
        names = {path.split("/")[1] for path in _converted_files(name) if path.startswith(f"{config}/")}
    except Exception as error:
        raise _unreachable(name, error) from error
    return tuple(split for split, aliases in SPLITS.items() if names & set(aliases))


def hub_records(name: str, config: str, split: str) -> list[Record]:
    """All records of one split; class indices are given back as label names where the set declares them.

    A set that still consists of a loading script is read from the hub's own parquet conversion, since no remote code
    is run; that is logged.

    Raises:
        ValueError: no such data set, configuration or split.
    """
    import datasets

    aliases = SPLITS[split]
    try:
        names = datasets.get_dataset_split_names(name, config)
        alias = next((alias for alias in aliases if alias in names), None)
        if alias is None:
            raise ValueError(f"split={split!r}: {name!r} has only {', '.join(names)} for {config!r}")
        table = datasets.load_dataset(name, config, split=alias)
    except RuntimeError as error:
        if not _is_script(error):
            raise
        table = _converted(name, config, split)
    except ValueError:
        raise
    except Exception as error:
        raise _unreachable(name, error) from error
    features = table.features
    classes = {column: feature for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)}
    rows: list[Record] = []
    for record in table:
        for column, feature in classes.items():
            value = record[column]
            record[column] = feature.int2str(value) if value is not None and value >= 0 else None
        rows.append(record)
    return rows


def _is_script(error: RuntimeError) -> bool:
    # `datasets` >= 4 refuses loading scripts with this sentence (huggingface/datasets issue 7693)
    return "scripts are no longer supported" in str(error)


def _converted_files(name: str) -> list[str]:
    from huggingface_hub import HfApi

    files = HfApi().list_repo_files(name, repo_type="dataset", revision="refs/convert/parquet")
    return [path for path in files if path.endswith(".parquet")]


def _converted(name: str, config: str, split: str) -> Any:
    import datasets

    files = _converted_files(name)
    for alias in SPLITS[split]:
        paths = sorted(path for path in files if path.startswith(f"{config}/{alias}/"))
        if paths:
            log.warning("%s is a loading script, which is not run: reading the hub's parquet conversion instead", name)
            urls = [f"hf://datasets/{name}@refs%2Fconvert%2Fparquet/{path}" for path in paths]
            return datasets.load_dataset("parquet", data_files={split: urls}, split=split)
    raise ValueError(f"split={split!r}: the parquet conversion of {name!r} has no such split for {config!r}")


def _unreachable(name: str, error: Exception) -> ValueError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ValueError(f"source={name!r}: no such folder here, and not readable as a hub data set: {reason}")
