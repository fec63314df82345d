"""A hash of the code that a result depends on, blind to comments, docstrings and blank lines."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Sequence
from pathlib import Path

import mtllm_fast.kernels

import mtllm_fast

ROOTS = {
    "benchmarks": Path(__file__).parent,
    "kernels": Path(mtllm_fast.kernels.__file__).parent,
    "mtllm_fast": Path(mtllm_fast.__file__).parent,
}


def code_lines(text: str) -> list[str]:
    """The lines of a module that can change what it does (line ranges, so equal for every Python version)."""
    dropped: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                dropped.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    lines = [line.rstrip() for n, line in enumerate(text.splitlines(), 1) if n not in dropped]
    return [line for line in lines if line and not line.lstrip().startswith("#")]


def sources_hash(patterns: Sequence[str]) -> str:
    """Hash of the files that `patterns` name ("kernels/linear_kl*.py", "mtllm_fast/losses/*.py"); "" if there are none.

    The ahead-of-time compile gate (kernels/aot*.py) never counts: it changes no kernel.
    """
    digest = hashlib.sha256()
    found = False
    for pattern in sorted(set(patterns)):
        root, _, rest = pattern.partition("/")
        for path in sorted(ROOTS[root].glob(rest)):
            if path.name.startswith("aot"):
                continue
            found = True
            digest.update(f"{root}/{path.relative_to(ROOTS[root]).as_posix()}\n".encode())
            digest.update("\n".join(code_lines(path.read_text(encoding="utf-8"))).encode())
    return digest.hexdigest()[:16] if found else ""
