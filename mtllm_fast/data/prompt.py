"""What an LLM reads around a text, and what it is to write after it, in its own tokens.

    [BOS] before <text> after target [EOS]

Source of the form: MindMerger (arXiv 2405.17386) and LangBridge (arXiv 2401.10695).
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

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

    def ids(self, rows: Sequence[TextRow], tokenizer: StackTokenizer) -> tuple[list[Ids], list[Ids], int]:
        """LLM tokens before (with BOS) and after the text of every row, and how many rows had a text in them cut to the
        tokenizer's limit.

        Raises:
            ValueError: a template names a field that a row lacks.
        """
        before, first = _filled("before", self.before, rows, tokenizer)
        after, second = _filled("after", self.after, rows, tokenizer)
        return [with_prefix(tokenizer.llm_prefix, ids) for ids in before], after, len(first | second)


def prompt_of(before: str | None, after: str | None, own: Prompt | None = None) -> Prompt | None:
    """The prompt that two options name; what is not given is `own`'s, the model's, or else `Prompt`'s.

    None where nothing is given and there is no own one.
    """
    given = {name: text for name, text in (("before", before), ("after", after)) if text is not None}
    return replace(own or Prompt(), **given) if given else own


@dataclass(frozen=True)
class Writing:
    """Rows whose targets are to be written.

    Fields:
        prompt: what the LLM reads around the text.
        target_limit: tokens of a target, the end token included; longer ones are cut and counted.
        masked: share of the target's tokens that a stack's LLM does not see; see `masked`. seed: chooses them.
    """

    prompt: Prompt
    target_limit: int | None = None
    masked: float = 0.0
    seed: int = 0

    def longest(self, tokenizer: StackTokenizer) -> int:
        """The most tokens that stand around a text, its target and a boundary with them."""
        total = len(tokenizer.llm_prefix) + 1 + (self.target_limit or tokenizer.max_llm_tokens)
        for template in (self.prompt.before, self.prompt.after):
            parts = _PLACES.split(template)
            total += sum(len(tokenizer.llm_ids(part)) for part in parts[::2])
            total += len(parts[1::2]) * tokenizer.max_llm_tokens
        return total


@dataclass(frozen=True, eq=False)
class PromptTokens:
    """LLM tokens around the texts of N rows, and what is to be written after them.

    Fields:
        before, after, targets: per row.
        seen: the targets as a stack's LLM reads them while it writes, with what stands for tokens that are masked.
        truncated: targets that were cut; cut: rows whose text within the prompt was.
    """

    before: list[Ids]
    after: list[Ids]
    targets: list[Ids]
    seen: list[Ids]
    truncated: int
    cut: int

    @classmethod
    def of(cls, writing: Writing, rows: Sequence[TextRow], tokenizer: StackTokenizer) -> PromptTokens:
        """Raises ValueError where a row has no target, or lacks what a template names."""
        texts = [row.target for row in rows if row.target is not None]
        if len(texts) < len(rows):
            raise ValueError(f"target: {len(rows) - len(texts)} of {len(rows)} rows have none; name the target column")
        before, after, cut = writing.prompt.ids(rows, tokenizer)
        targets, truncated = target_ids(texts, tokenizer, writing.target_limit)
        for row, ids in zip(rows, targets, strict=True):
            if not row.finished and ids[-1] == tokenizer.llm.eos_token_id:
                del ids[-1]
        seen = targets
        if writing.masked:
            token = mask_token(tokenizer)
            seen = [masked(row, ids, token, writing) for row, ids in zip(rows, targets, strict=True)]
        return cls(before, after, targets, seen, truncated, cut)

    def lengths(self) -> NDArray[np.int64]:
        """(N,) tokens around each text, the target's with them."""
        parts = (self.before, self.after, self.targets)
        return np.sum([[len(ids) for ids in part] for part in parts], 0, dtype=np.int64)

    def whole(self, index: int, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """All that the LLM reads of a row whose text it reads as its own tokens `ids`."""
        return np.array([*self.before[index], *ids, *self.after[index], *self.targets[index]], dtype=np.int64)


NO_TOKEN = 2**31 - 1  # among LLM tokens, above those of any vocabulary: an input embedding of zeros


def mask_token(tokenizer: StackTokenizer) -> int:
    """What an LLM reads in place of a token that it is not to see: its mask token, or the one for unknown words, as in
    LUSIFER's code; `NO_TOKEN` where it has neither, or the latter begins or ends its texts."""
    llm = tokenizer.llm
    if llm.mask_token_id is not None:
        return int(llm.mask_token_id)
    unknown = llm.unk_token_id
    return NO_TOKEN if unknown in (None, llm.bos_token_id, llm.eos_token_id) else int(unknown)


def masked(row: TextRow, target: Ids, token: int, writing: Writing) -> Ids:
    """The tokens of a row's target, each replaced by `token` with the probability `writing.masked`.

    The choice is a function of the seed and of the row's text and target alone, so that it is the same in every epoch,
    pack and process. Source: LUSIFER (arXiv 2501.00874), whose decoder reads masked what it is to write.
    """
    chance = random.Random(f"{writing.seed}/{row.text}/{row.target}".encode("utf-8", "surrogatepass"))
    return [token if chance.random() < writing.masked else own for own in target]


def target_rows(lengths: Sequence[int], targets: Sequence[int]) -> NDArray[np.int64]:
    """Packed rows whose states predict the target tokens: those before each of the last `targets[b]` of sequence b."""
    ends, counts = np.cumsum(lengths), np.asarray(targets, dtype=np.int64)
    offset = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
    return np.repeat(ends - counts - 1, counts) + offset


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


def _filled(name: str, template: str, rows: Sequence[TextRow], tokenizer: StackTokenizer) -> tuple[list[Ids], set[int]]:
    """The template's tokens for every row, and the rows whose text in it was cut."""
    parts = _PLACES.split(template)  # literal, field, literal, ...
    literals = [tokenizer.llm_ids(part) for part in parts[::2]]
    filled = [list(literals[0]) for _ in rows]
    limit, cut = tokenizer.max_llm_tokens, set[int]()
    for field, literal in zip(parts[1::2], literals[1:], strict=True):
        texts = [getattr(row, FIELDS[field]) for row in rows]
        if any(text is None for text in texts):
            raise ValueError(f"prompt.{name}: {{{field}}}, but a row has no {FIELDS[field]}")
        for row, (ids, text) in enumerate(zip(filled, encode(tokenizer.llm, texts, limit=limit)[0], strict=True)):
            ids += [*text[:limit], *literal]
            if len(text) > limit:
                cut.add(row)
    return filled, cut


def with_prefix(prefix: Ids, ids: Ids) -> Ids:
    """`ids` behind the tokens that open a text, which a chat template may have written already."""
    return ids if prefix and ids[: len(prefix)] == prefix else [*prefix, *ids]
