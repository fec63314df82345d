"""The language that texts are read in: named by whoever brings them, wherever the reader has languages."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar
from weakref import WeakSet

if TYPE_CHECKING:
    from mtllm_fast.data.read import TextRow
    from mtllm_fast.data.tokenise import StackTokenizer

logger = logging.getLogger(__name__)

# what MT tokenizers call English: NLLB, M2M100 (less its underscores), mBART
ENGLISH_CODES = ("eng_Latn", "en", "en_XX")

_told: WeakSet[StackTokenizer] = WeakSet()  # tokenizers of which it was said that they read no language
Languages = TypeVar("Languages")


def reads_language(tokenizer: StackTokenizer, side: str) -> bool:
    """Whether what is read on `side` ("mt" or "llm") depends on the language of a text."""
    return side == "mt" and bool(tokenizer.languages)


def language_read(
    tokenizer: StackTokenizer,
    side: str,
    given: Languages | None,
    argument: str,
    tell: Callable[[str], None] | None = None,
) -> Languages | str | None:
    """What `argument` stands for: `given`, or for this release English where a reader with languages got None.

    A language that is given to a reader without languages is ignored; a log line says so, once for each tokenizer.

    Args:
        tell: takes the warning of a missing language; by default it is a FutureWarning.

    Raises:
        ValueError: None, and the tokenizer has no English.
    """
    if not reads_language(tokenizer, side):
        if given is not None and tokenizer not in _told:
            _told.add(tokenizer)
            reader = "the LLM reads its own tokens" if side == "llm" else "the encoder takes no language codes"
            logger.warning("%s is ignored: %s", argument, reader)
        return given
    if given is not None:
        return given
    code = english_code(tokenizer)
    if code is None:
        known = ", ".join(tokenizer.languages[:4])
        raise ValueError(f"{argument} is missing: name the language of the texts, one of {known}, ...")
    message = (
        f"{argument} is missing, so the texts are read as English ({code}): name their language, from the next release "
        "on this is an error"
    )
    if tell is None:
        warnings.warn(message, FutureWarning, stacklevel=3)
    else:
        tell(message)
    return code


def english_code(tokenizer: StackTokenizer) -> str | None:
    """What `tokenizer` calls English; None where it has no code for it."""
    known = {*tokenizer.languages, *(code.strip("_") for code in tokenizer.languages), *tokenizer.fallbacks}
    return next((code for code in ENGLISH_CODES if code in known), None)


def rows_read(rows: Sequence[TextRow], tokenizer: StackTokenizer, side: str, argument: str) -> list[TextRow]:
    """Rows with the language that each is read in; see `language_read`."""
    if any(row.language is not None for row in rows):
        language_read(tokenizer, side, argument, argument)
    if all(row.language is not None for row in rows):
        return list(rows)
    assumed = language_read(tokenizer, side, None, argument)
    return [row if row.language is not None else replace(row, language=assumed) for row in rows]
