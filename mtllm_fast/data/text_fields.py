"""The texts of a row by name, for what takes them one by one: translation, joining translations, blanks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from .read import TextRow


def text_fields(row: TextRow) -> dict[str, str]:
    """The texts of a row by name: text, text_pair, choice1, choice2, ..."""
    pair = {} if row.text_pair is None else {"text_pair": row.text_pair}
    return {"text": row.text, **pair, **{f"choice{i}": text for i, text in enumerate(row.choices or (), 1)}}


def with_text_fields(row: TextRow, texts: Mapping[str, str], language: str) -> TextRow:
    """A row with its texts replaced by those of the same names."""
    return replace(
        row,
        text=texts["text"],
        language=language,
        text_pair=None if row.text_pair is None else texts["text_pair"],
        choices=None if row.choices is None else tuple(texts[f"choice{i + 1}"] for i in range(len(row.choices))),
    )


def has_blank(row: TextRow) -> bool:
    """Whether one of its texts is empty or white space."""
    return not all(text.strip() for text in text_fields(row).values())
