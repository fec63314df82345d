"""Who may import whom, read from the source; nothing is imported. Data flows one way, and so do the imports.

Rooms are the folders and files at the top of `mtllm_fast`, with `kernels`. An import, wherever it stands in a file, is of
the own room or of one further left in `ROOMS`; imports at the top of modules make no circle, and those within functions
none either, but for what `LATE` gives a reason for; nothing imports the benchmarks but the one door. Modules that are
named by a variable (in the lazy `__getattr__` of packages) are not seen.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import REPO

FOR_ALL = "kernels failures yaml_file jobs auto"
ON_THE_WAY = "text data models auto_config losses training inference evaluation planning reporting"
AROUND = "demo miniworld mtllm_fast doctor commands cli"
ROOMS = f"{FOR_ALL} {ON_THE_WAY} {AROUND}".split()
DOOR = "commands.evidence"  # to the benchmarks

# Imports within functions that point right, or close a circle: "importer -> imported": why.
LATE = {
    "auto -> auto_config": "registered when transformers is imported, not before",
    "auto_config -> inference.pipeline": "transformers looks for a pipeline when a config is read",
    "training.validation -> inference": "English validation scores the model as it will be used: by the Engine's packs",
    "training.validation -> inference.likelihood": "or, where it writes, by the likelihood of the labels",
}


class Import(NamedTuple):
    """`importer` and `imported` are modules within `mtllm_fast` ("models.storage"), or "benchmarks"."""

    importer: str
    imported: str
    when: str  # "at once", "late" within a function, "never" for types alone

    def __str__(self) -> str:
        return f"{self.importer} -> {self.imported}"


def modules(root: Path) -> dict[str, Path]:
    """The library's modules by name: "models.storage", "models" for a package, "mtllm_fast" for the whole."""
    found = {}
    for folder, prefix in ((root / "mtllm_fast", ()), (root / "kernels", ("kernels",))):
        for path in folder.rglob("*.py"):
            if prefix or (folder / "kernels") not in path.parents:  # a link to it, in some checkouts
                names = (*prefix, *path.relative_to(folder).with_suffix("").parts)
                found[".".join(names).removesuffix("__init__").rstrip(".") or "mtllm_fast"] = path
    return found


def imports(known: dict[str, Path]) -> list[Import]:
    """Every import of the library or of the benchmarks in the modules `known`."""
    return [
        Import(name, imported, when)
        for name, path in known.items()
        for target, when in _targets(ast.parse(path.read_text(encoding="utf-8")), name, path.name == "__init__.py")
        if (imported := _within(target, known)) not in (None, name)
    ]


def _targets(tree: ast.AST, name: str, package: bool, when: str = "at once") -> Iterator[tuple[str, str]]:
    """("mtllm_fast.models.storage.load", when) for each name that is imported."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, when) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = ["mtllm_fast", *(name.split(".") if name != "mtllm_fast" else ())]
            base = parts[: len(parts) - node.level + package] if node.level else []
            base += node.module.split(".") if node.module else []
            yield from ((".".join([*base, alias.name]), when) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and ast.unparse(node.func).endswith("import_module"):
            yield ast.unparse(node.args[0]).lstrip("f").strip("'\""), when
        inner = when
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            inner = "late"
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            inner = "never"
        yield from _targets(node, name, package, inner)


def _within(target: str, known: dict[str, Path]) -> str | None:
    """The module of the library that holds `target`, "benchmarks", or None."""
    first, _, rest = target.partition(".")
    if first == "benchmarks" or target.startswith("mtllm_fast.benchmarks"):
        return "benchmarks"
    if first != "mtllm_fast":
        return None
    while rest and rest not in known:
        rest = rest.rpartition(".")[0]
    return rest or "mtllm_fast"


def room(module: str) -> int:
    """Place of a module's room. Raises ValueError for one that is not in `ROOMS`."""
    return ROOMS.index(module.partition(".")[0])


def in_circles(edges: list[Import]) -> list[Import]:
    """Those of the imports that lie on a circle of them."""
    after: dict[str, set[str]] = {}
    for edge in edges:
        after.setdefault(edge.importer, set()).add(edge.imported)

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        ahead = [start]
        while ahead:
            new = after.get(ahead.pop(), set()) - seen
            seen |= new
            ahead += new
        return seen

    behind = {module: reached(module) for module in after}
    return [edge for edge in edges if edge.importer in behind.get(edge.imported, ())]


def wrong(known: dict[str, Path]) -> set[str]:
    """What breaks the rules, apart from the tables: "importer -> imported" as in them."""
    found = imports(known)
    of_library = [edge for edge in found if edge.imported != "benchmarks"]
    run = [edge for edge in of_library if edge.when != "never"]
    bad = {edge for edge in found if edge.imported == "benchmarks" and (edge.importer, edge.when) != (DOOR, "late")}
    bad |= {edge for edge in of_library if room(edge.imported) > room(edge.importer)}
    bad |= set(in_circles([edge for edge in run if edge.when == "at once"]))
    bad |= {edge for edge in in_circles(run) if edge.when == "late"}
    return {str(edge) for edge in bad}


def test_imports_point_one_way_and_make_no_circles() -> None:
    bad = wrong(modules(REPO))
    assert sorted(bad - LATE.keys()) == [], "these point right in ROOMS, or close a circle"
    assert sorted(LATE.keys() - bad) == [], "these are no longer there, or in order: delete them in the table"


def test_what_is_late_stands_within_a_function() -> None:
    late = {str(edge) for edge in imports(modules(REPO)) if edge.when == "at once"} & LATE.keys()
    assert not late


@pytest.mark.parametrize(
    ("file", "line", "found"),
    [
        ("mtllm_fast/data/read.py", "from ..models import storage", "data.read -> models.storage"),
        ("mtllm_fast/data/read.py", "def f():\n    import mtllm_fast.models.storage", "data.read -> models.storage"),
        ("mtllm_fast/data/read.py", "if TYPE_CHECKING:\n    from ..models import Model", "data.read -> models"),
        ("mtllm_fast/data/__init__.py", "from .. import cli", "data -> cli"),
        ("kernels/op.py", "from mtllm_fast.data import read", "kernels.op -> data.read"),
        ("mtllm_fast/models/storage.py", "from . import fingerprint", "models.storage -> models.fingerprint"),
        ("mtllm_fast/models/storage.py", "def f():\n    from .fingerprint import g", "models.storage -> models.fingerprint"),
        ("mtllm_fast/cli.py", "from benchmarks.run import main", "cli -> benchmarks"),
        ("mtllm_fast/cli.py", "def f():\n    import_module(f'benchmarks.{x}')", "cli -> benchmarks"),
        ("mtllm_fast/commands/evidence.py", "import benchmarks", "commands.evidence -> benchmarks"),
    ],
)  # fmt: skip
def test_what_breaks_a_rule_is_found(tmp_path: Path, file: str, line: str, found: str) -> None:
    files = {
        "mtllm_fast/__init__.py": "", "mtllm_fast/data/__init__.py": "", "mtllm_fast/data/read.py": "import json",
        "mtllm_fast/models/__init__.py": "from .storage import Model\nfrom ..data import read",
        "mtllm_fast/models/storage.py": "from ..kernels import op\nif TYPE_CHECKING:\n    from . import fingerprint",
        "mtllm_fast/models/fingerprint.py": "from .storage import Model", "kernels/__init__.py": "", "kernels/op.py": "",
        "mtllm_fast/commands/evidence.py": "def f(x):\n    return import_module(f'benchmarks.{x}')",
        "mtllm_fast/cli.py": "def f():\n    from .commands import evidence",
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert wrong(modules(tmp_path)) == set()
    (tmp_path / file).write_text(f"{files[file]}\n{line}\n")
    bad = wrong(modules(tmp_path))
    assert found in bad
    assert bad - {found} <= {"models.fingerprint -> models.storage"}  # its other half, where both are at once


def test_a_new_room_must_be_given_a_place(tmp_path: Path) -> None:
    (tmp_path / "mtllm_fast" / "attic").mkdir(parents=True)
    (tmp_path / "mtllm_fast" / "cli.py").write_text("from . import attic\n")
    (tmp_path / "mtllm_fast" / "attic" / "__init__.py").write_text("")
    with pytest.raises(ValueError, match="attic"):
        wrong(modules(tmp_path))
