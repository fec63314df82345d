"""Options that commands have in common, as bases of their dataclasses, and what is read by them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from ..data.read import RowStream


@dataclass
class TextOptions:
    """How rows of text are read.

    `COLUMNS`: the command's own options that `read_rows` takes, too. `READING`: those here but the column of the text.
    """

    COLUMNS: ClassVar[tuple[str, ...]] = ()
    READING: ClassVar = ("language", "language_column", "quoted", "split", "limit")
    text_column: str = "text"
    """Column of the text."""
    language: str | None = None
    """MT code of the text's language; by default the encoder's own code for English."""
    language_column: str | None = None
    """Column with a code per row, instead of `language`."""
    quoted: bool = True
    """Quote marks in .csv and .tsv files stand around fields; without, they are text."""
    split: str = "train"
    """Split of a hub dataset."""
    limit: int | None = None
    """Read at most this many rows."""

    def rows(self, source: str, labels: tuple[str, ...] | None = None) -> RowStream:
        """The rows of a file, folder, glob or hub dataset; see `read_rows`."""
        from ..data.read import read_rows

        given = {name: getattr(self, name) for name in ("text_column", "language_column", *self.COLUMNS)}
        given |= {"language": self.language, "split": self.split, "limit": self.limit, "quoting": self.quoted}
        return read_rows(source, labels=labels, **given)

    def record(self, *names: str) -> dict[str, object]:
        """Options as plain data for a run's record, which is compared on resume."""
        return without_quoted({name: getattr(self, name) for name in names})


def without_quoted(options: dict[str, object]) -> dict[str, object]:
    """Without what runs that were started before there was `quoted` do not have: they read with it."""
    return {name: value for name, value in options.items() if name != "quoted" or not value}


def check_text(source: str) -> None:
    """Refuse a folder of tokens where text is read."""
    from ..data.store import STORE_FILE

    if (Path(source) / STORE_FILE).is_file():
        raise ValueError(f"--text {source}: holds tokens that `mtllm tokenize` wrote; name the text itself")
