"""What stands where in the tokens of a row: texts, separators, special tokens, and which are left out at the limit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mtllm_fast.data.read import TextRow
from mtllm_fast.data.text_tokens import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, eq=False)
class TokenizedSide:
    """Rows as one of the two models reads them.

    Fields:
        ids: per row (n,) int64 token ids, special tokens included.
        ends: per row (n,) int32, exclusive character end of each token in `text + "\\n" + text_pair` (choices: in
            `text` followed by the choice segments); -1 for special and separator tokens and for tokens that hold no
            character. Empty where the ends were not asked for.
        truncated: number of rows that were cut to the limit; a partner counts by itself.
        spans: per row (C, 2) int32 token ranges of the choices, or None where no row has choices.
        partners: per row (n,) int64 token ids of its partner, what is read beside it, no tokens where it has none;
            None where the reader takes no partners.
    """

    ids: list[NDArray[np.int64]]
    ends: list[NDArray[np.int32]]
    truncated: int
    spans: list[NDArray[np.int32]] | None = None
    partners: list[NDArray[np.int64]] | None = None

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row, its partner with it."""
        if self.partners is None:
            return [len(ids) for ids in self.ids]
        return [len(ids) + len(beside) for ids, beside in zip(self.ids, self.partners, strict=True)]


@dataclass(frozen=True)
class SideFormat:
    """How one model's rows are written.

    Fields:
        name: "mt" or "llm".
        limit: tokens of a row, special ones included.
        suffix, separator: tokens at the end of a row, and between the texts of a pair.
    """

    name: str
    tokenizer: PreTrainedTokenizerFast
    limit: int
    suffix: list[int]
    separator: list[int]


def lay_out(form: SideFormat, prefixes: Sequence[list[int]], rows: Sequence[TextRow], with_ends: bool) -> TokenizedSide:
    """Rows with the special tokens `prefixes` before each.

    Raises:
        ValueError: text_pair and choices in one row, no choices, or choices that do not fit.
    """
    segments: list[str] = []
    counts: list[int] = []
    for row in rows:
        texts = texts_of(row)
        segments.extend(texts)
        counts.append(len(texts))
    has_choices = any(row.choices is not None for row in rows)
    # the LLM reads text as it is; of a question with choices the end is kept
    token_ids, read = encode(
        form.tokenizer, segments, with_ends, compose=form.name == "mt", limit=None if has_choices else form.limit
    )

    all_ids: list[NDArray[np.int64]] = []
    all_ends: list[NDArray[np.int32]] = []
    spans: list[NDArray[np.int32]] = []
    truncated = 0
    if not with_ends and len(segments) == len(rows):
        for prefix, ids in zip(prefixes, token_ids, strict=True):
            room = max(form.limit - len(prefix) - len(form.suffix), 0)
            truncated += len(ids) > room
            all_ids.append(np.array([*prefix, *ids[:room], *form.suffix], dtype=np.int64))
        return TokenizedSide(all_ids, all_ends, truncated)
    first = 0
    for row, prefix, count in zip(rows, prefixes, counts, strict=True):
        stop = first + count
        lengths = [len(ids) for ids in token_ids[first:stop]]
        separator = form.separator if row.text_pair is not None else []
        room = form.limit - len(prefix) - len(separator) - len(form.suffix)
        keep = lengths
        if sum(lengths) > room:
            truncated += 1
            keep = _shorten(row, lengths, room, form)

        ids, ends, base = list(prefix), [-1] * len(prefix), 0
        row_spans: list[tuple[int, int]] = []
        for k in range(count):
            begin = len(ids)
            # multiple choice keeps the end of the text, everything else the beginning
            part = slice(lengths[k] - keep[k], None) if row.choices is not None and k == 0 else slice(0, keep[k])
            ids += token_ids[first + k][part]
            if with_ends:
                # an end of 0 has read no character (a lone `▁` before the text)
                ends += [end + base if end > 0 else -1 for end in read[first + k][part]]
            base += len(segments[first + k])
            if row.choices is not None and k > 0 and k % 2 == 0:
                row_spans.append((begin, len(ids)))
            if row.text_pair is not None and k == 0:
                ids += separator
                ends += [-1] * len(separator)
                base += 1  # the "\n" between text and text_pair
        ids += form.suffix
        ends += [-1] * len(form.suffix)
        all_ids.append(np.array(ids, dtype=np.int64))
        if with_ends:
            all_ends.append(np.array(ends, dtype=np.int32))
        spans.append(np.array(row_spans, dtype=np.int32).reshape(-1, 2))
        first = stop
    return TokenizedSide(all_ids, all_ends, truncated, spans if has_choices else None)


def texts_of(row: TextRow) -> list[str]:
    """The texts of a row, each of which is tokenised by itself.

    Raises:
        ValueError: text_pair and choices in one row, or no choices.
    """
    if row.choices is not None:
        if row.text_pair is not None:
            raise ValueError("a TextRow takes text_pair or choices, not both: put the question at the end of text")
        if not row.choices:
            raise ValueError("choices must hold at least one choice or be None, got ()")
        numbered = ((f"\n{i}", f" {choice}") for i, choice in enumerate(row.choices, 1))
        return [row.text, *(segment for pair in numbered for segment in pair)]
    return [row.text] if row.text_pair is None else [row.text, row.text_pair]


def _shorten(row: TextRow, lengths: list[int], room: int, form: SideFormat) -> list[int]:
    """How many tokens of each segment to keep so that they add up to `room`."""
    if row.choices is None:
        return _longest_first(lengths, room)
    markers, choices = lengths[1::2], lengths[2::2]
    for_choices = room - sum(markers)
    if for_choices < len(choices):
        raise ValueError(f"max_{form.name}_tokens {form.limit} leaves no room for {len(choices)} choices: raise it")
    text = min(lengths[0], max(0, for_choices - sum(choices)))
    choices = _longest_first(choices, for_choices - text)
    return [text, *(n for pair in zip(markers, choices, strict=True) for n in pair)]


def _longest_first(lengths: list[int], room: int) -> list[int]:
    """Cut the longest until all fit: every length is capped at one level, left-over tokens go to the first ones."""
    keep = list(lengths)
    waiting = sorted(range(len(lengths)), key=lambda i: lengths[i])
    for done, i in enumerate(waiting):
        share, left_over = divmod(max(room, 0), len(lengths) - done)
        if lengths[i] <= share:
            room -= lengths[i]
            continue
        for rank, j in enumerate(sorted(waiting[done:])):
            keep[j] = min(lengths[j], share + (rank < left_over))
        break
    return keep
