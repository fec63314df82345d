"""Results as tables, Markdown, JSON and figures. Names load on first use."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .scores import check_output, print_scores, read_scores, to_json, to_markdown, write_report

__all__ = ["check_output", "print_scores", "read_scores", "to_json", "to_markdown", "write_report"]


def __getattr__(name: str) -> object:
    if name in __all__:
        return getattr(import_module(f"{__name__}.scores"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
