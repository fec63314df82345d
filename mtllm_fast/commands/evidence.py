"""The one door from the library to its benchmarks, which are in the repository and not in the package."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

CHECKOUT = Path(__file__).resolve().parents[2]


def benchmarks(module: str) -> ModuleType:
    """The module `benchmarks.<module>` of the checkout that this package runs from.

    Raises:
        ValueError: the package was installed without them, or another package of this name comes first.
    """
    folder = CHECKOUT / "benchmarks"
    if not (folder / "registry.py").is_file():
        raise ValueError(
            "the benchmarks are not part of the installed package: get the repository of mtllm-fast and run "
            "`pip install --editable .` in it"
        )
    if str(CHECKOUT) not in sys.path:
        sys.path.append(str(CHECKOUT))  # for the processes that measure memory, too; last, for it has a `kernels`
    package = import_module("benchmarks")
    if Path(package.__file__ or "").parent != folder:
        raise ValueError(
            f"{package.__file__} hides the benchmarks of this library: run `python -m benchmarks.run` in {CHECKOUT}"
        )
    return import_module(f"benchmarks.{module}")
