"""Texts far above the limit on tokens: only their beginning is tokenised, and gives the very same tokens.

A tokenizer that splits text at spaces before anything else cannot look past a space. So what it makes of everything
before a space is known once the space and one character after it have been read. A web document of 50,000 characters of
which 512 tokens are kept then costs no more than one of 3,000, and a line of 10 MB no memory to speak of.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHARACTERS_PER_TOKEN = 6  # what English rarely exceeds; a text that does is tokenised whole, after its beginning
_UNSETTLED = 64  # most tokens that one space and one character can be


def splits_at_spaces(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the tokenizer's words end at a space, whatever follows it."""
    backend = tokenizer.backend_tokenizer
    if backend.pre_tokenizer is None:
        return False
    probe = "a b" if backend.normalizer is None else backend.normalizer.normalize_str("a b")
    pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(probe)]
    return len(pieces) > 1 and not any("a" in piece and "b" in piece for piece in pieces)


def beginning(text: str, tokens: int) -> str:
    """The beginning of `text` that settles its first `tokens` tokens, as a rule: it ends one character after a single
    space. `text` itself where it is not much longer or has no such place."""
    start = CHARACTERS_PER_TOKEN * (tokens + _UNSETTLED)
    if len(text) <= start + start // 4:
        return text
    space = text.find(" ", start, 2 * start)
    while space != -1:
        if space + 1 < len(text) and not text[space - 1].isspace() and not text[space + 1].isspace():
            return text[: space + 2]
        space = text.find(" ", space + 1, 2 * start)
    return text


def settled(ids: Sequence[int], tokens: int) -> bool:
    """Whether the first `tokens` tokens of a beginning are those of its whole text."""
    return len(ids) >= tokens + _UNSETTLED
