"""Texts through one tokenizer: token ids without special tokens, and where in the text each token ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from mtllm_fast.data.characters import Written, read_up_to, reader_of
from mtllm_fast.data.long_text import CHARACTERS_PER_TOKEN, beginning, settled, splits_at_spaces

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerFast

Encoded = tuple[list[list[int]], list[list[int]]]  # ids of every text, ends of every text
Item = TypeVar("Item")
Result = TypeVar("Result")


class BadText(ValueError):
    """A text that a tokenizer cannot read, or one of several."""


def of_readable(items: Sequence[Item], read: Callable[[list[Item]], Result]) -> tuple[Result, dict[int, BadText]]:
    """What `read` makes of the items that a tokenizer can read; and of the others, by place, why not."""
    try:
        return read(list(items)), {}
    except BadText:
        pass  # which one it was is not said
    bad: dict[int, BadText] = {}
    for place, item in enumerate(items):
        try:
            read([item])
        except BadText as error:
            bad[place] = error
    return read([item for place, item in enumerate(items) if place not in bad]), bad


def encode(
    tokenizer: PreTrainedTokenizerFast,
    texts: list[str],
    with_ends: bool = False,
    compose: bool = False,
    limit: int | None = None,
) -> Encoded:
    """Token ids without special tokens, and where in the text each ends; special-token strings in it are plain text.

    An end is -1 where the tokens so far have not read exactly the characters before a place of the text.

    Args:
        compose: canonically equal texts give the same tokens.
        limit: of a text with far more tokens than that, only more than `limit` of its first ones are made.
    """
    longest = max((len(text) for text in texts if isinstance(text, str)), default=0)
    if limit is None or longest <= CHARACTERS_PER_TOKEN * limit or not splits_at_spaces(tokenizer):
        return _encode(tokenizer, texts, with_ends, compose)
    ids: list[list[int]] = [[] for _ in texts]
    ends: list[list[int]] = [[] for _ in texts]
    waiting, tokens = list(range(len(texts))), limit
    while waiting:
        read = [beginning(texts[i], tokens) for i in waiting]
        for i, found, places in zip(waiting, *_encode(tokenizer, read, with_ends, compose), strict=True):
            ids[i], ends[i] = found, places
        unsettled = [len(read[k]) < len(texts[i]) and not settled(ids[i], limit) for k, i in enumerate(waiting)]
        waiting, tokens = [i for i, again in zip(waiting, unsettled) if again], 2 * tokens
    return ids, ends


def _encode(tokenizer: PreTrainedTokenizerFast, texts: list[str], with_ends: bool, compose: bool) -> Encoded:
    if not texts:
        return [], []
    reader = reader_of(tokenizer)
    written = [reader.write(text, compose) if isinstance(text, str) else Written(text) for text in texts]
    for text, given in zip(texts, written, strict=True) if reader.removed else ():
        if isinstance(text, str) and (missing := reader.missing(given)) is not None:
            raise BadText(
                f"text {text[:40]!r} holds {missing!r}, which the full vocabulary had and this trimmed one lacks: "
                "read it with the full model, or trim that with such texts too (`mtllm shrink --text`)"
            )
    ids: list[list[int]] = [[] for _ in texts]
    ends: list[list[int]] = [[] for _ in texts]
    for mapped in (False, True):
        mine = [
            i for i, one in enumerate(written) if (one.ends is not None and reader.characters is not None) == mapped
        ]
        if mine:
            encoded = _run_backend(reader.backend(mapped), [written[i].text for i in mine], with_ends)
            for i, one in zip(mine, encoded, strict=True):
                ids[i] = one.ids
                if with_ends:
                    ends[i] = read_up_to(one.offsets, written[i])
    return ids, ends


def _run_backend(backend: Tokenizer, texts: list[str], with_offsets: bool) -> list[Encoding]:
    # what tokenizer(texts, ...) calls in the end, without its detour through a dictionary per text
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    try:
        run = backend.encode_batch if with_offsets else backend.encode_batch_fast
        return run(texts, add_special_tokens=False)
    except BaseException as error:
        # a panic of the Rust library is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(f"text must be a string, got {text!r}") from None
            if any("\ud800" <= c <= "\udfff" for c in text):
                raise BadText(f"text {text[:40]!r} holds a lone surrogate: it is not valid Unicode") from None
        raise BadText(f"the tokenizer fails on {texts[0][:40]!r}: {error}") from error


def own_specials(tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """(prefix, suffix) that the tokenizer's own template puts around a text."""
    for probe in ("a", "the", "1"):
        plain = tokenizer(probe, add_special_tokens=False)["input_ids"]
        full = tokenizer(probe, add_special_tokens=True)["input_ids"]
        for start in range(len(full) - len(plain) + 1):
            if plain and full[start : start + len(plain)] == plain:
                return full[:start], full[start + len(plain) :]
    return [], []
