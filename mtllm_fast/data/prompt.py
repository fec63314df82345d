"""What an LLM reads around a text, and what it is to write after it, in its own tokens.

    [BOS] before <text> after target [EOS]

Source of the form: MindMerger (arXiv 2405.17386) and LangBridge (arXiv 2401.10695).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mtllm_fast.data.read import TextRow
from mtllm_fast.data.text_tokens import encode

if TYPE_CHECKING:
    from mtllm_fast.data.tokenise import StackTokenizer

FIELDS = {"text": "text", "pair": "text_pair"}  # in a template -> of a row
_PLACES = re.compile(r"\{(\w+)\}")

Ids = list[int]


@dataclass(frozen=True)
class Prompt:
    """The LLM's own tokens around a text.

    `{text}` and `{pair}` in a template stand for the row's own texts as the LLM's tokens, so that it reads them beside
    the encoder's states (MindMerger's augmentation). Special tokens written in a template count as such, so that a chat
    template can be given; those in a row's texts never do.
    """

    before: str = ""
    """Prompt before the text. BOS stands before it where the LLM's tokenizer writes one."""
    after: str = "\n"
    """Prompt between the text and what is written."""

    def __post_init__(self) -> None:
        for name in ("before", "after"):
            for field in _PLACES.findall(getattr(self, name)):
                if field not in FIELDS:
                    raise ValueError(f"prompt.{name}: {{{field}}} is none of {{text}} and {{pair}}")

    def ids(self, rows: Sequence[TextRow], tokenizer: StackTokenizer) -> tuple[list[Ids], list[Ids]]:
        """LLM tokens before (with BOS) and after the text of every row. Texts are cut to the tokenizer's limit.

        Raises:
            ValueError: a template names a field that a row lacks.
        """
        starts = [with_prefix(tokenizer.llm_prefix, ids) for ids in _filled("before", self.before, rows, tokenizer)]
        return starts, _filled("after", self.after, rows, tokenizer)


def prompt_of(before: str | None, after: str | None) -> Prompt | None:
    """The prompt that two options name; None where neither is given, and `Prompt`'s own for one that is not."""
    given = {name: text for name, text in (("before", before), ("after", after)) if text is not None}
    return Prompt(**given) if given else None


def target_ids(texts: Sequence[str], tokenizer: StackTokenizer, limit: int | None = None) -> tuple[list[Ids], int]:
    """LLM tokens of texts that are to be written, each with the end token; and how many were cut to `limit` tokens.

    A text that is cut has no end token: the model is not to learn that it ends there.

    Raises:
        ValueError: an LLM without an end token.
    """
    end = tokenizer.llm.eos_token_id
    if end is None:
        raise ValueError("llm: its tokenizer has no eos_token, so nothing says where a target ends; set one")
    found, _ = encode(tokenizer.llm, list(texts), limit=limit)
    whole = [[*ids, end] for ids in found]
    return [ids[:limit] for ids in whole], 0 if limit is None else sum(len(ids) > limit for ids in whole)


def _filled(name: str, template: str, rows: Sequence[TextRow], tokenizer: StackTokenizer) -> list[Ids]:
    parts = _PLACES.split(template)  # literal, field, literal, ...
    literals = [tokenizer.llm_ids(part) for part in parts[::2]]
    filled = [list(literals[0]) for _ in rows]
    limit = tokenizer.max_llm_tokens
    for field, literal in zip(parts[1::2], literals[1:], strict=True):
        texts = [getattr(row, FIELDS[field]) for row in rows]
        if any(text is None for text in texts):
            raise ValueError(f"prompt.{name}: {{{field}}}, but a row has no {FIELDS[field]}")
        for ids, text in zip(filled, encode(tokenizer.llm, texts, limit=limit)[0], strict=True):
            ids += [*text[:limit], *literal]
    return filled


def with_prefix(prefix: Ids, ids: Ids) -> Ids:
    """`ids` behind the tokens that open a text, which a chat template may have written already."""
    return ids if prefix and ids[: len(prefix)] == prefix else [*prefix, *ids]
