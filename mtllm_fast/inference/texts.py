"""What `Engine` takes and says of plain texts, and what the doors to other libraries make of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..data.language import rows_read
from ..data.pack import PackedBatch
from ..data.read import TextRow
from ..data.tokenise import StackTokenizer

OnBadText = Literal["fail", "nan"]


class Classified(NamedTuple):
    """What `Engine.classify` says of N texts."""

    labels: list[str | None]  # the most probable class of each text, None where the text was bad
    probabilities: NDArray[np.float32]  # (N, C)
    classes: tuple[str, ...]  # the names of the C columns


def check_on_bad_text(value: str) -> None:
    if value not in ("fail", "nan"):
        raise ValueError(f"on_bad_text={value!r}: expected 'fail' or 'nan'")


def text_rows(
    texts: Iterable[str], languages: str | Iterable[str] | None, on_bad_text: OnBadText
) -> tuple[int, list[TextRow], NDArray[np.int64]]:
    """How many texts there are, a row for each good one, and which ones these are. Errors as in `Engine.encode`."""
    if isinstance(texts, str):
        raise TypeError("texts: got one str; pass a list of texts")
    check_on_bad_text(on_bad_text)
    texts = list(texts)
    if languages is None or isinstance(languages, str):
        codes: list[str | None] = [languages] * len(texts)
    else:
        codes = list(languages)
    if len(codes) != len(texts):
        raise ValueError(f"languages: {len(codes)} codes for {len(texts)} texts")
    good = [index for index, text in enumerate(texts) if isinstance(text, str) and text.strip()]
    if on_bad_text == "fail" and len(good) < len(texts):
        index = next(k for k, known in enumerate([*good, None]) if k != known)
        if not isinstance(texts[index], str):
            raise TypeError(f"texts[{index}] is {type(texts[index]).__name__}, not str")
        raise ValueError(f"texts[{index}] is empty")
    return len(texts), [TextRow(texts[index], codes[index]) for index in good], np.array(good, np.int64)


def check_one_language(language: object) -> None:
    """ValueError for what a door to another library cannot take beside its texts: more than one language."""
    if language is not None and not isinstance(language, str):
        raise ValueError(
            f"language={language!r}: one MT code for all; for a language per text pass dicts, "
            '{"text": ..., "language": ...}'
        )


def padded(rows: Sequence[TextRow], tokenizer: StackTokenizer, side: str) -> tuple[dict[str, Tensor], list[int]]:
    """`input_ids` and `attention_mask` (B, L) int64 of rows as a model reads them, and which rows have no token."""
    ids = tokenizer.side(side, rows_read(rows, tokenizer, side, "language")).ids
    tokens, mask = PackedBatch.from_sequences(ids).to_padded(getattr(tokenizer, side).pad_token_id or 0)
    return {"input_ids": tokens, "attention_mask": mask}, [row for row, own in enumerate(ids) if not len(own)]
