"""Where the files of a set stand in its folder."""

from __future__ import annotations

import glob
import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from .base import SPLITS
from .files import ENDINGS


@dataclass(frozen=True)
class Layout:
    """One way in which the files of a set are named.

    Fields:
        path: below the set's folder, with "{language}", "{split}" and "{name}" for `names`; an ending of
            `files.ENDINGS` may be left open.
        languages: what a file holds whose path does not say it; rows are told apart by the table's language column
            where there are several.
        splits: likewise the splits.
        names: language -> what "{name}" is for it.
        endings: those that count, where the path leaves the ending open.
        known: only languages of the task's table; for paths that other files could fit too.
    """

    path: str = "{language}/{split}"
    languages: tuple[str, ...] = ()
    splits: tuple[str, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    endings: tuple[str, ...] = ENDINGS
    known: bool = False

    def __post_init__(self) -> None:
        if not self.languages and "{language}" not in self.path:
            raise ValueError(f"path={self.path!r}: holds no {{language}}, so `languages` must say whose it is")
        if not self.splits and "{split}" not in self.path:
            raise ValueError(f"path={self.path!r}: holds no {{split}}, so `splits` must say which it is")

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        aliases = "|".join(re.escape(alias) for names in SPLITS.values() for alias in names)
        kinds = {"language": "[^/]+", "split": aliases, "name": "[^/]+"}
        seen: set[str] = set()

        def group(match: re.Match[str]) -> str:
            kind = match[1]
            if kind in seen:
                return f"(?P={kind})"
            seen.add(kind)
            return f"(?P<{kind}>{kinds[kind]})"

        # re.escape leaves the braces' backslashes: \{language\}
        body = re.sub(r"\\\{(language|split|name)\\\}", group, re.escape(self.path))
        ending = "" if self.path.endswith(ENDINGS) else "(?:" + "|".join(map(re.escape, self.endings)) + ")"
        return re.compile(body + ending)

    def _glob(self, language: str | None) -> str:
        wanted = {"language": glob.escape(language) if language else "*", "split": "*"}
        wanted["name"] = glob.escape(self.names.get(language or "", "")) or "*"
        parts = re.split(r"\{(language|split|name)\}", self.path)
        pattern = "".join(wanted[part] if i % 2 else glob.escape(part) for i, part in enumerate(parts))
        return pattern if self.path.endswith(ENDINGS) else pattern + ".*"


@dataclass(frozen=True)
class DataFile:
    """A file, one language and one split that it holds, and the layout by which it was found."""

    language: str
    split: str
    path: Path
    layout: Layout


def find(
    folder: Path, layouts: Iterable[Layout], language: str | None = None, known: Container[str] | None = None
) -> list[DataFile]:
    """The data files below a folder, sorted by language; of one language if it is given.

    Args:
        known: the languages of the task's table, None where every name is a language.
    """
    files: dict[tuple[str, str, Path], DataFile] = {}
    for layout in layouts:
        fixed = "{language}" not in layout.path
        if fixed and language is not None and language not in layout.languages:
            continue
        for path in sorted(folder.glob(layout._glob(None if fixed else language))):
            match = layout._pattern.fullmatch(path.relative_to(folder).as_posix())
            if match is None or not path.is_file():
                continue
            parts = match.groupdict()
            languages = layout.languages if fixed else (parts["language"],)
            splits = layout.splits or (next(s for s, names in SPLITS.items() if parts["split"] in names),)
            for code in languages:
                unknown = layout.known and known is not None and code not in known
                other = "name" in parts and layout.names.get(code) != parts["name"]
                if unknown or other or (language is not None and code != language):
                    continue
                for split in splits:
                    files.setdefault((code, split, path), DataFile(code, split, path, layout))
    return sorted(files.values(), key=lambda file: (file.language, list(SPLITS).index(file.split), file.path))
