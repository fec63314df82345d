"""transformers' Auto classes read an MTLLM folder as soon as `mtllm_fast` and they are imported, in either order.

No remote code is involved: config, model and tokenizer are classes of this package, registered as transformers
foresees. `import mtllm_fast` stays cheap: transformers is not imported for it, so what is to be registered waits for
the import of its AutoConfig; and what is registered then is a config that brings the models only when a folder is read.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

_AUTO = "transformers.models.auto.configuration_auto"


def register_when_imported() -> None:
    """Register the config of an MTLLM with transformers now, or once it has its AutoConfig."""
    if _AUTO in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Waiting())


class _Waiting(MetaPathFinder):
    """Finds one module, as Python itself would, and registers after it has been imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _AUTO:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                _register()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _register() -> None:
    from . import auto_config  # noqa: F401
