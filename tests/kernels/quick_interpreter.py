"""Import it to halve the time of Triton's interpreter. Nothing else changes.

The interpreter replaces the functions of `triton.language` by its own at every call of a `triton.jit` function, also of one
called by a kernel, where they are replaced already: half of its time.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any

from triton import language
from triton.runtime import interpreter

_patch, _replaced = interpreter._patch_lang, set()


def _patch_once(fn: FunctionType) -> Any:
    modules = {id(m): m for m in fn.__globals__.values() if any(m is one for one in (language, language.core))}
    if modules and modules.keys() <= _replaced:
        return interpreter._LangPatchScope()  # of no changes
    scope, new = _patch(fn), modules.keys() - _replaced
    restore = scope.restore

    def restore_and_forget() -> None:
        restore()
        _replaced.difference_update(new)

    _replaced.update(new)
    scope.restore = restore_and_forget
    return scope


if hasattr(interpreter, "_LangPatchScope"):
    interpreter._patch_lang = _patch_once
