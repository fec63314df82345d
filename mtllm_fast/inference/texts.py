"""What `Engine` takes and says of plain texts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..data.read import TextRow

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
