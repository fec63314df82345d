"""A task of one's own, described in one YAML file.

    name: reviews
    kind: pair                     # classification | pair | choice | generated
    columns: {text: title, pair: body, label: stars, id: number}
    labels: [bad, good]            # integer labels count from label_base (0); not for choice, generated
    english: en                    # which language is English
    languages: {en: eng_Latn, fr: fra_Latn, tlh: null}       # the set's code: MT code, null where there is none
    files: "data/{language}/{split}.csv"

`files` is a path with {language} and {split}; or a path per split, {train: en.csv, test: "test-{language}.jsonl"}; or a
path per language and split, {en: {train: a.csv, test: b.csv}, fr: {test: c.csv}}. Paths are relative to the YAML file.
A path per split without {language} holds English only, or, with columns.language, all languages.

For kind "choice", columns.choices lists the columns of the answers, the label is the number of the right one (counted
from label_base), and columns.text may be a list, e.g. [passage, question]. For kind "generated" the label column holds
the answer that is to be written, a number. csv files are read with quoting unless `quoted: false`; `header: [...]`
names the columns of a table without a header line.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...yaml_file import QUOTES, read_yaml
from .base import SPLITS, canonical_split, nearest
from .folder import FolderTask
from .layout import Layout
from .table import Table

KINDS = ("classification", "pair", "choice", "generated")
_KEYS = {"name", "kind", "columns", "labels", "label_base", "english", "languages", "files", "quoted", "header"}
_COLUMNS = {"text", "pair", "choices", "label", "id", "language"}


def from_yaml(path: str | Path, folder: str | Path | None = None) -> FolderTask:
    """The task that a YAML file describes (see the module's docstring); its files are read when rows are asked for.

    Args:
        folder: what its paths are relative to, if not to the YAML file.

    Raises:
        ValueError: no such file, no YAML mapping, an unknown or missing key, or values that do not fit together.
    """
    path = Path(path).expanduser()
    data = read_yaml(path, f"task={str(path)!r}")
    try:
        return _task(data, path, Path(folder).expanduser() if folder else path.parent)
    except _Fault as fault:
        raise ValueError(f"task={str(path)!r}: {fault}") from None


class _Fault(Exception):
    """What is wrong with a description."""


def _task(content: object, path: Path, home: Path) -> FolderTask:
    data = _mapping(content, "the file", _KEYS)
    kind = data.get("kind", "classification")
    if kind not in KINDS:
        raise _Fault(f"kind: {kind!r}, expected one of {', '.join(KINDS)}")
    columns = _mapping(data.get("columns", {}), "columns", _COLUMNS)
    for name in ("pair", "label", "id", "language"):
        if not isinstance(columns.get(name, ""), str):
            raise _Fault(f"columns.{name}: {columns[name]!r}, expected the name of a column")
    if not isinstance(columns.get("text", ""), (str, list)):
        raise _Fault(f"columns.text: {columns['text']!r}, expected the name of a column, or a list of them")
    quoted = data.get("quoted", True)
    if not isinstance(quoted, bool):
        raise _Fault(f"quoted: {quoted!r}, expected true or false")
    if not isinstance(data.get("name", ""), str):
        raise _Fault(f"name: {data['name']!r}, expected text")
    for name, needed in (("pair", "pair"), ("choices", "choice")):
        if (name in columns) != (kind == needed):
            raise _Fault(f"columns.{name}: {'needed' if kind == needed else 'only'} for kind {needed!r}")
    choices = tuple(_strings(columns.get("choices", []), "columns.choices"))
    labels = tuple(_strings(data.get("labels", []), "labels"))
    if kind == "choice":
        if labels:
            raise _Fault("labels: a choice task has none; the label column numbers the choices, from label_base")
        labels = tuple(str(number + 1) for number in range(len(choices)))
    for name in ("labels", "label_base"):
        if kind == "generated" and name in data:
            raise _Fault(f"{name}: a generated task has none; the label column holds the answer that is to be written")
    if kind != "generated" and (len(labels) < 2 or len(set(labels)) != len(labels)):
        raise _Fault(f"{'columns.choices' if kind == 'choice' else 'labels'}: expected at least two different names")
    base = data.get("label_base", 0)
    if not isinstance(base, int) or isinstance(base, bool):
        raise _Fault(f"label_base: {base!r}, expected an integer")
    codes = _codes(data.get("languages"))
    english = data.get("english", "eng_Latn")
    if english not in codes:
        raise _Fault(f"english: {english!r} is not among the languages; nearest: {nearest(str(english), codes)}")
    layouts = tuple(_layouts(data.get("files"), tuple(codes), english, "language" in columns))
    for layout in layouts:
        if "{" not in layout.path and not (home / layout.path).is_file():
            raise _Fault(f"files: no file {str(home / layout.path)!r}")
    text = columns.get("text", "text")
    header = data.get("header")
    table = Table(
        text=tuple(_strings(text, "columns.text")) if isinstance(text, list) else str(text),
        pair=columns.get("pair"),
        choices=choices,
        label=str(columns.get("label", "label")),
        id=columns.get("id"),
        header=tuple(_strings(header, "header")) if header is not None else None,
        quoted=quoted,
        base=base,
        language=columns.get("language"),
    )
    return FolderTask(
        name=str(data.get("name") or path.stem),
        labels=labels,
        tables=(table,),
        english=english,
        mt_codes=codes,
        layouts=layouts,
        kind="classification" if kind == "pair" else kind,
        home=str(home),
    )


def _layouts(files: object, languages: tuple[str, ...], english: str, shared: bool) -> list[Layout]:
    if isinstance(files, str):
        for part in ("{language}", "{split}"):
            if part not in files:
                raise _Fault(f"files: {files!r} holds no {part}; or give a path per split, or per language and split")
        return [Layout(_relative(files), known=True)]
    if not isinstance(files, Mapping) or not files:
        raise _Fault("files: expected a path with {language} and {split}, or a mapping")
    aliases = {alias for names in SPLITS.values() for alias in names}
    if set(files) <= aliases:
        everyone = languages if shared else (english,)
        return [_layout(file, split, () if "{language}" in str(file) else everyone) for split, file in files.items()]
    layouts = []
    for language, paths in files.items():
        if language not in languages:
            raise _Fault(
                f"files: {language!r} is not among the languages; nearest: {nearest(str(language), languages)}"
            )
        for split, file in _mapping(paths, f"files.{language}", aliases).items():
            layouts.append(_layout(file, split, (language,)))
    return layouts


def _layout(file: object, split: str, languages: tuple[str, ...]) -> Layout:
    return Layout(_relative(file), languages=languages, splits=(canonical_split(split),), known=True)


def _relative(path: object) -> str:
    if not isinstance(path, str) or Path(path).is_absolute():
        raise _Fault(f"files: {path!r} is no path relative to the YAML file")
    return path


def _codes(languages: object) -> dict[str, str | None]:
    """The set's code -> MT code."""
    if isinstance(languages, list):
        return {code: code for code in _strings(languages, "languages")}
    if not isinstance(languages, Mapping) or not languages:
        raise _Fault("languages: expected a list of MT codes, or a mapping of the set's codes to MT codes")
    for code, mt in languages.items():
        if not isinstance(code, str):  # YAML 1.1 reads `no` as false
            raise _Fault(f"languages: {code!r} is not text; put the code in quotes")
        if mt is not None and not isinstance(mt, str):
            raise _Fault(f"languages: {code}: {mt!r} is no MT code")
    return dict(languages)


def _mapping(value: object, where: str, known: set[str]) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise _Fault(f"{where}: expected a mapping")
    for key in value:
        if key not in known:
            raise _Fault(f"{where}: unknown key {key!r}; nearest: {nearest(str(key), known)}")
    return dict(value)


def _strings(value: object, where: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str | int) for item in value):
        raise _Fault(f"{where}: expected a list of names")
    for item in value:
        if isinstance(item, bool):
            raise _Fault(f"{where}: {item!r} is not text; {QUOTES}")
    return [str(item) for item in value]
