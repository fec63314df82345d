"""Two tokenizers read the same text: token ids and, for every token, the character at which it ends.

Formats, the same for training and inference:

    MT    single  [lang] A </s>          LLM   single  [BOS] A
          pair    [lang] A </s> B </s>         pair    [BOS] A <pair_separator> B
          choices [lang] A "\\n1" " c1" "\\n2" " c2" ... </s>, and the same after [BOS] for the LLM

`[BOS]` stands only where the LLM's own tokenizer writes one. An encoder without language codes gets the special tokens
of its own template instead of `[lang]` and `</s>`. Text never turns into a special token: `</s>` in a document is read
as the four characters it is made of.
"""

import json
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtllm_fast.data.characters import Written, read_up_to, reader_of
from mtllm_fast.data.language import language_read
from mtllm_fast.data.long_text import CHARACTERS_PER_TOKEN, beginning, settled, splits_at_spaces
from mtllm_fast.data.read import TextRow

logger = logging.getLogger(__name__)

# NLLB-200 `eng_Latn`, M2M100 `__en__`, mBART `en_XX`
_LANGUAGE_CODE = re.compile(r"[a-z]{3}_[A-Z][a-z]{3}|__[a-z]{2,3}__|[a-z]{2}_[A-Z]{2}")
_OPTIONS_FILE = "stack_tokenizer.json"
_FOLDERS = {"mt": "mt_tokenizer", "llm": "llm_tokenizer"}


class BadText(ValueError):
    """A text that a tokenizer cannot read, or one of several."""


@dataclass(frozen=True, eq=False)
class TokenizedSide:
    """Rows as one of the two models reads them.

    Fields:
        ids: per row (n,) int64 token ids, special tokens included.
        ends: per row (n,) int32, exclusive character end of each token in `text + "\\n" + text_pair` (choices: in
            `text` followed by the choice segments); -1 for special and separator tokens and for tokens that hold no
            character. Empty where the ends were not asked for.
        truncated: number of rows that were cut to the limit.
        spans: per row (C, 2) int32 token ranges of the choices, or None where no row has choices.
    """

    ids: list[NDArray[np.int64]]
    ends: list[NDArray[np.int32]]
    truncated: int
    spans: list[NDArray[np.int32]] | None = None


@dataclass(frozen=True)
class _Template:
    """What stands around the texts of a row on one side."""

    suffix: list[int]
    separator: list[int]


class StackTokenizer:
    """The MT tokenizer and the LLM tokenizer of a stack, with a language per row.

    Args:
        mt: fast tokenizer of the MT encoder, or None.
        llm: fast tokenizer of the LLM, or None.
        max_mt_tokens, max_llm_tokens: limit per row, special tokens included. Longer rows are cut and counted: a single
            text at its end, a pair longest-first, a multiple-choice row at the start of its text (the question stands
            at the end), then longest-first over its choices.
        pair_separator: what stands between the texts of a pair on the LLM side.
        fallbacks: language codes to read as another one, e.g. {"arb_Latn": "arb_Arab"}; uses are logged and counted in
            `fallback_counts`.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """

    def __init__(
        self,
        mt: Any,
        llm: Any,
        *,
        max_mt_tokens: int = 512,
        max_llm_tokens: int = 512,
        pair_separator: str = "\n",
        fallbacks: Mapping[str, str] | None = None,
    ) -> None:
        if mt is None and llm is None:
            raise ValueError("mt and llm are both None: give at least one tokenizer")
        for name, tokenizer in (("mt", mt), ("llm", llm)):
            _check_tokenizer(name, tokenizer)
        for name, limit in (("max_mt_tokens", max_mt_tokens), ("max_llm_tokens", max_llm_tokens)):
            if not isinstance(limit, int) or isinstance(limit, bool):
                raise TypeError(f"{name} must be an integer, got {limit!r}")
            if limit < 4:
                raise ValueError(f"{name} must be at least 4 (special tokens and some text), got {limit}")
        if not isinstance(pair_separator, str):
            raise TypeError(f"pair_separator must be a string, got {pair_separator!r}")
        self.mt = mt
        self.llm = llm
        self.max_mt_tokens = max_mt_tokens
        self.mt_positions: int | None = None  # of the encoder that reads the tokens; set by the model
        self.max_llm_tokens = max_llm_tokens
        self.pair_separator = pair_separator
        self.fallback_counts: Counter[str] = Counter()
        self.fallbacks: dict[str, str] = {}
        self._language_ids = _language_ids(mt) if mt is not None else {}
        for code, target in (fallbacks or {}).items():
            if code in self._language_ids:
                raise ValueError(f"fallbacks: {code!r} is a language of the MT tokenizer and needs no fallback")
            self.language_id(target)  # a fallback that is no language itself is refused here
            self.fallbacks[code] = target

    @classmethod
    def from_pretrained(cls, folder: str | Path, **overrides: Any) -> "StackTokenizer":
        """Read what `save_pretrained` wrote; keyword arguments of the constructor override what is stored.

        Raises:
            FileNotFoundError: the folder holds no stack_tokenizer.json.
            ValueError: stack_tokenizer.json cannot be read.
        """
        from transformers import AutoTokenizer

        folder = Path(folder)
        path = folder / _OPTIONS_FILE
        if not path.is_file():
            raise FileNotFoundError(f"folder {str(folder)!r} holds no {_OPTIONS_FILE}: not a saved StackTokenizer")
        try:
            options = json.loads(path.read_text(encoding="utf-8"))
            sides = options.pop("sides")
        except (json.JSONDecodeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is damaged ({error}): save the tokenizer again") from None
        tokenizers: dict[str, Any] = {"mt": None, "llm": None}
        for side in sides:
            if not (folder / _FOLDERS[side]).is_dir():  # its name alone would mean a model of the hub
                raise ValueError(f"folder {str(folder)!r}: {_FOLDERS[side]} is missing: save the tokenizer again")
            tokenizers[side] = AutoTokenizer.from_pretrained(str(folder / _FOLDERS[side]), trust_remote_code=False)
        return cls(tokenizers["mt"], tokenizers["llm"], **{**options, **overrides})

    def save_pretrained(self, folder: str | Path) -> None:
        """Write mt_tokenizer/, llm_tokenizer/ and stack_tokenizer.json under `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        sides = [side for side in _FOLDERS if getattr(self, side) is not None]
        for side in sides:
            getattr(self, side).save_pretrained(str(folder / _FOLDERS[side]))
        options = {
            "sides": sides,
            "max_mt_tokens": self.max_mt_tokens,
            "max_llm_tokens": self.max_llm_tokens,
            "pair_separator": self.pair_separator,
            "fallbacks": self.fallbacks,
        }
        (folder / _OPTIONS_FILE).write_text(json.dumps(options, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @property
    def mt_limit(self) -> int:
        """Tokens of a row on the MT side: `max_mt_tokens`, or the encoder's positions where those are fewer."""
        return min(self.max_mt_tokens, self.mt_positions or self.max_mt_tokens)

    @property
    def languages(self) -> tuple[str, ...]:
        """Codes of the MT tokenizer, sorted; empty for an encoder that takes no language token."""
        return tuple(self._language_ids)

    @property
    def ends_with_language(self) -> bool:
        """Whether the MT tokenizer itself writes a language code behind a text, where this class writes it before."""
        return self.mt is not None and not set(self._language_ids.values()).isdisjoint(_own_specials(self.mt)[1])

    def language_id(self, code: str) -> int:
        """Token id of a language code; never `<unk>`.

        Raises:
            ValueError: an unknown code, with the nearest valid ones.
        """
        if not isinstance(code, str):
            raise TypeError(f"language must be a code such as 'eng_Latn', got {code!r}")
        found = self._language_ids.get(code)
        if found is None:
            found = self._language_ids.get(f"__{code}__")
        if found is not None:
            return found
        if code in self.fallbacks:
            target = self.fallbacks[code]
            if not self.fallback_counts[code]:
                logger.warning("language %s has no MT code, read as %s", code, target)
            self.fallback_counts[code] += 1
            return self.language_id(target)
        if not self._language_ids:
            raise ValueError(f"language {code!r}: the MT tokenizer has no language codes")
        nearest = ", ".join(_nearest(code, self.languages))
        raise ValueError(f"language {code!r} is unknown to the MT tokenizer; nearest valid codes: {nearest}")

    def mt_side(self, rows: Sequence[TextRow], *, ends: bool = True) -> TokenizedSide:
        """`[lang] A </s>` per row; see the module docstring for pairs and choices.

        A row without a language is read as English, with a FutureWarning, where the tokenizer has languages.

        Args:
            ends: also find where each token ends, which alignment needs and nothing else.

        Raises:
            ValueError: no MT tokenizer, an unknown language, or choices that do not fit in `max_mt_tokens`.
        """
        if self.mt is None:
            raise ValueError("mt is None: this StackTokenizer has no MT tokenizer")
        if self._language_ids:
            assumed = ""
            if any(row.language is None for row in rows):
                assumed = language_read(self, "mt", None, "TextRow.language") or ""
            prefixes = [[self.language_id(assumed if row.language is None else row.language)] for row in rows]
        else:
            prefixes = [self._mt_prefix] * len(rows)
        return self._side("max_mt_tokens", self.mt, self.mt_limit, prefixes, self._mt_template, rows, ends)

    def llm_side(self, rows: Sequence[TextRow], *, ends: bool = True) -> TokenizedSide:
        """`[BOS] A` per row; see the module docstring for pairs and choices, and `mt_side` for `ends`.

        Raises:
            ValueError: no LLM tokenizer, a pair separator without tokens, or choices that do not fit.
        """
        if self.llm is None:
            raise ValueError("llm is None: this StackTokenizer has no LLM tokenizer")
        separator = self._separator_ids if any(row.text_pair is not None for row in rows) else []
        template = _Template(suffix=[], separator=separator)
        return self._side(
            "max_llm_tokens", self.llm, self.max_llm_tokens, [self._llm_prefix] * len(rows), template, rows, ends
        )

    @cached_property
    def _mt_template(self) -> _Template:
        if self._language_ids:
            eos = self.mt.eos_token_id
            if eos is None:
                raise ValueError("mt: the tokenizer has language codes but no eos_token, set one")
            return _Template(suffix=[eos], separator=[eos])
        suffix = _own_specials(self.mt)[1]
        return _Template(suffix=suffix, separator=suffix)

    @cached_property
    def _mt_prefix(self) -> list[int]:
        return _own_specials(self.mt)[0]

    @cached_property
    def _llm_prefix(self) -> list[int]:
        """BOS where the tokenizer itself would write one: many define a `bos_token` that their model never saw."""
        bos = self.llm.bos_token_id
        return [bos] if bos is not None and bos in _own_specials(self.llm)[0] else []

    @cached_property
    def _separator_ids(self) -> list[int]:
        # not refused in the constructor: a tokenizer that drops whitespace is fine as long as nobody reads pairs
        ids, _ = _encode(self.llm, [self.pair_separator])
        if not ids[0] or self.llm.unk_token_id in ids[0]:
            what = "to nothing" if not ids[0] else "to an unknown token"
            raise ValueError(
                f"pair_separator {self.pair_separator!r} tokenises {what} with the llm tokenizer: "
                "set pair_separator to a text that it knows"
            )
        return list(ids[0])

    def _side(
        self,
        limit_name: str,
        tokenizer: Any,
        limit: int,
        prefixes: list[list[int]],
        template: _Template,
        rows: Sequence[TextRow],
        with_ends: bool,
    ) -> TokenizedSide:
        segments: list[str] = []
        counts: list[int] = []
        for row in rows:
            texts = _segments(row)
            segments.extend(texts)
            counts.append(len(texts))
        compose = limit_name == "max_mt_tokens"  # the LLM reads text as it is
        if any(row.choices is not None for row in rows):  # of a question the end is kept
            token_ids, read = _encode(tokenizer, segments, with_ends, compose)
        else:
            token_ids, read = _encode_up_to(limit, tokenizer, segments, with_ends, compose)

        all_ids: list[NDArray[np.int64]] = []
        all_ends: list[NDArray[np.int32]] = []
        spans: list[NDArray[np.int32]] = []
        truncated = 0
        if not with_ends and len(segments) == len(rows):
            for prefix, ids in zip(prefixes, token_ids, strict=True):
                room = max(limit - len(prefix) - len(template.suffix), 0)
                truncated += len(ids) > room
                all_ids.append(np.array([*prefix, *ids[:room], *template.suffix], dtype=np.int64))
            return TokenizedSide(all_ids, all_ends, truncated)
        first = 0
        for row, prefix, count in zip(rows, prefixes, counts, strict=True):
            stop = first + count
            lengths = [len(ids) for ids in token_ids[first:stop]]
            separator = template.separator if row.text_pair is not None else []
            room = limit - len(prefix) - len(separator) - len(template.suffix)
            keep = lengths
            if sum(lengths) > room:
                truncated += 1
                keep = _shorten(row, lengths, room, limit_name, limit)

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
            ids += template.suffix
            ends += [-1] * len(template.suffix)
            all_ids.append(np.array(ids, dtype=np.int64))
            if with_ends:
                all_ends.append(np.array(ends, dtype=np.int32))
            spans.append(np.array(row_spans, dtype=np.int32).reshape(-1, 2))
            first = stop
        has_choices = any(row.choices is not None for row in rows)
        return TokenizedSide(all_ids, all_ends, truncated, spans if has_choices else None)


def _segments(row: TextRow) -> list[str]:
    if row.choices is not None:
        if row.text_pair is not None:
            raise ValueError("a TextRow takes text_pair or choices, not both: put the question at the end of text")
        if not row.choices:
            raise ValueError("choices must hold at least one choice or be None, got ()")
        numbered = ((f"\n{i}", f" {choice}") for i, choice in enumerate(row.choices, 1))
        return [row.text, *(segment for pair in numbered for segment in pair)]
    return [row.text] if row.text_pair is None else [row.text, row.text_pair]


def _shorten(row: TextRow, lengths: list[int], room: int, limit_name: str, limit: int) -> list[int]:
    """How many tokens of each segment to keep so that they add up to `room`."""
    if row.choices is None:
        return _longest_first(lengths, room)
    markers, choices = lengths[1::2], lengths[2::2]
    for_choices = room - sum(markers)
    if for_choices < len(choices):
        raise ValueError(f"{limit_name} {limit} leaves no room for {len(choices)} choices: raise it")
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


def _encode(
    tokenizer: Any, texts: list[str], with_ends: bool = False, compose: bool = False
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids without special tokens, and where in the text each ends; special-token strings in it are plain text.

    An end is -1 where the tokens so far have not read exactly the characters before a place of the text. `compose`:
    canonically equal texts give the same tokens.
    """
    if not texts:
        return [], []
    reader = reader_of(tokenizer)
    written = [reader.write(text, compose) if isinstance(text, str) else Written(text) for text in texts]
    ids: list[list[int]] = [[] for _ in texts]
    ends: list[list[int]] = [[] for _ in texts]
    for mapped in (False, True):
        mine = [
            i for i, one in enumerate(written) if (one.ends is not None and reader.characters is not None) == mapped
        ]
        if mine:
            encoded = _encode_as_it_is(reader.backend(mapped), [written[i].text for i in mine], with_ends)
            for i, one in zip(mine, encoded, strict=True):
                ids[i] = one.ids
                if with_ends:
                    ends[i] = read_up_to(one.offsets, written[i])
    return ids, ends


def _encode_as_it_is(backend: Any, texts: list[str], with_offsets: bool) -> list[Any]:
    # what tokenizer(texts, ...) calls in the end, without its detour through a dictionary per text
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    try:
        encode = backend.encode_batch if with_offsets else backend.encode_batch_fast
        return encode(texts, add_special_tokens=False)
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


def _encode_up_to(
    limit: int, tokenizer: Any, texts: list[str], with_ends: bool, compose: bool = False
) -> tuple[list[list[int]], list[list[int]]]:
    """As `_encode`, but of a text with far more than `limit` tokens only more than `limit` of its first ones."""
    longest = max((len(text) for text in texts if isinstance(text, str)), default=0)
    if longest <= CHARACTERS_PER_TOKEN * limit or not splits_at_spaces(tokenizer):
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


def _check_tokenizer(name: str, tokenizer: Any) -> None:
    if tokenizer is None:
        return
    if not callable(tokenizer) or not hasattr(tokenizer, "is_fast"):
        raise TypeError(f"{name} must be a Hugging Face tokenizer or None, got {type(tokenizer).__name__}")
    if not tokenizer.is_fast:
        raise ValueError(
            f"{name}: {type(tokenizer).__name__} gives no character offsets, use a fast tokenizer (tokenizer.json)"
        )


def _language_ids(tokenizer: Any) -> dict[str, int]:
    """Language codes among the tokenizer's added tokens; a code inside the plain vocabulary does not count."""
    found = {
        str(token): index
        for index, token in tokenizer.added_tokens_decoder.items()
        if _LANGUAGE_CODE.fullmatch(str(token)) and index != tokenizer.unk_token_id
    }
    return dict(sorted(found.items()))


def _own_specials(tokenizer: Any) -> tuple[list[int], list[int]]:
    """(prefix, suffix) that the tokenizer's own template puts around a text."""
    for probe in ("a", "the", "1"):
        plain = tokenizer(probe, add_special_tokens=False)["input_ids"]
        full = tokenizer(probe, add_special_tokens=True)["input_ids"]
        for start in range(len(full) - len(plain) + 1):
            if plain and full[start : start + len(plain)] == plain:
                return full[:start], full[start + len(plain) :]
    return [], []


def _nearest(code: str, languages: Sequence[str], count: int = 4) -> list[str]:
    """Codes of the same language first, then by spelling."""
    stem = code.strip("_").split("_")[0].lower()

    def distance(candidate: str) -> tuple[bool, float, str]:
        same = candidate.strip("_").lower().startswith(stem)
        return not same, -SequenceMatcher(None, code.lower(), candidate.lower()).ratio(), candidate

    return sorted(languages, key=distance)[:count]
