"""Text in, packed batches out: readers, tokenizers, alignment, packing. Names load on first use.

The function `collate` is imported from its module, `mtllm_fast.data.collate`, because a package cannot hold both names.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtllm_fast.data.align import align_rows
    from mtllm_fast.data.batch import Batch
    from mtllm_fast.data.collate import PackedDataset
    from mtllm_fast.data.layout import TokenizedSide
    from mtllm_fast.data.loader import PackedLoader
    from mtllm_fast.data.pack import PackedBatch, token_budget_packs
    from mtllm_fast.data.read import RowStream, TextRow, read_rows
    from mtllm_fast.data.tokenise import StackTokenizer

_HOME = {
    "align_rows": "align",
    "Batch": "batch",
    "PackedBatch": "pack",
    "token_budget_packs": "pack",
    "RowStream": "read",
    "TextRow": "read",
    "read_rows": "read",
    "PackedDataset": "collate",
    "PackedLoader": "loader",
    "StackTokenizer": "tokenise",
    "TokenizedSide": "layout",
}

__all__ = [
    "Batch",
    "PackedBatch",
    "PackedDataset",
    "PackedLoader",
    "RowStream",
    "StackTokenizer",
    "TextRow",
    "TokenizedSide",
    "align_rows",
    "read_rows",
    "token_budget_packs",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
