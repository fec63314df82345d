"""Two tokenizers read the same text: token ids and, for every token, the character at which it ends.

Formats, the same for training and inference:

    MT    single  [lang] A </s>          LLM   single  [BOS] A
          pair    [lang] A </s> B </s>         pair    [BOS] A <pair_separator> B
          choices [lang] A "\\n1" " c1" "\\n2" " c2" ... </s>, and the same after [BOS] for the LLM

`[BOS]` stands only where the LLM's own tokenizer writes one. An encoder without language codes gets the special tokens
of its own template instead of `[lang]` and `</s>`. Text never turns into a special token: `</s>` in a document is read
as the four characters it is made of.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import SequenceMatcher
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mtllm_fast.data.language import english_code, language_read
from mtllm_fast.data.layout import SideFormat, TokenizedSide, lay_out
from mtllm_fast.data.read import TextRow
from mtllm_fast.data.text_tokens import encode, own_specials

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# NLLB-200 `eng_Latn`, M2M100 `__en__`, mBART `en_XX`
_LANGUAGE_CODE = re.compile(r"[a-z]{3}_[A-Z][a-z]{3}|__[a-z]{2,3}__|[a-z]{2}_[A-Z]{2}")
_OPTIONS_FILE = "stack_tokenizer.json"
_FOLDERS = {"mt": "mt_tokenizer", "llm": "llm_tokenizer"}


class StackTokenizer:
    """The MT tokenizer and the LLM tokenizer of a stack, with a language per row.

    Args:
        mt: fast tokenizer of the MT encoder, or None.
        llm: fast tokenizer of the LLM, or None.
        max_mt_tokens, max_llm_tokens: limit per row, special tokens included. Longer rows are cut and counted: a single
            text at its end, a pair longest-first, a multiple-choice row at the start of its text (the question stands
            at the end), then longest-first over its choices. A partner (see `mt_side`) has the limit to itself.
        pair_separator: what stands between the texts of a pair on the LLM side.
        fallbacks: language codes to read as another one, e.g. {"arb_Latn": "arb_Arab"}; uses are logged and counted in
            `fallback_counts`.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """

    def __init__(
        self,
        mt: PreTrainedTokenizerBase | None,
        llm: PreTrainedTokenizerBase | None,
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
        # whoever reads one of them knows that it is there
        self.mt: Any = mt
        self.llm: Any = llm
        self.max_mt_tokens = max_mt_tokens
        self.mt_positions: int | None = None  # of the encoder that reads the tokens; set by the model
        self.partners = False  # whether that encoder reads the English of a text beside it; set by the model
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
    def from_pretrained(cls, folder: str | Path, **overrides: Any) -> StackTokenizer:
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
        tokenizers: dict[str, PreTrainedTokenizerBase | None] = {"mt": None, "llm": None}
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
        return self.mt is not None and not set(self._language_ids.values()).isdisjoint(self._mt_specials[1])

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

    def side(self, name: str, rows: Sequence[TextRow], *, ends: bool = True) -> TokenizedSide:
        """`mt_side` or `llm_side`, by the name "mt" or "llm"."""
        return self.mt_side(rows, ends=ends) if name == "mt" else self.llm_side(rows, ends=ends)

    def mt_side(self, rows: Sequence[TextRow], *, ends: bool = True) -> TokenizedSide:
        """`[lang] A </s>` per row; see the module docstring for pairs and choices.

        A row without a language is read as English, with a FutureWarning, where the tokenizer has languages. With
        `partners`, the `teacher_text` of a row is its partner, which is read as English.

        Args:
            ends: also find where each token ends, which alignment needs and nothing else.

        Raises:
            ValueError: no MT tokenizer, an unknown language, choices that do not fit in `max_mt_tokens`, or a partner
                of a row that is more than one text.
        """
        if self.mt is None:
            raise ValueError("mt is None: this StackTokenizer has no MT tokenizer")
        side = self._mt_rows(rows, ends)
        if not self.partners:
            return side
        english = english_code(self) if self._language_ids else None
        beside = [replace(row.for_teacher(), language=english) for row in rows if row.teacher_text is not None]
        if beside and english is None and self._language_ids:
            raise ValueError("teacher_text: is read as English, which the MT tokenizer has no code for")
        read = self._mt_rows(beside, ends=False)
        tokens = iter(read.ids)
        none = np.empty(0, dtype=np.int64)
        partners = [none if row.teacher_text is None else next(tokens) for row in rows]
        return replace(side, truncated=side.truncated + read.truncated, partners=partners)

    def _mt_rows(self, rows: Sequence[TextRow], ends: bool) -> TokenizedSide:
        if self._language_ids:
            assumed = ""
            if any(row.language is None for row in rows):
                assumed = language_read(self, "mt", None, "TextRow.language") or ""
            prefixes = [[self.language_id(assumed if row.language is None else row.language)] for row in rows]
        else:
            prefixes = [self._mt_specials[0]] * len(rows)
        suffix = self._mt_suffix
        return lay_out(SideFormat("mt", self.mt, self.mt_limit, suffix, suffix), prefixes, rows, ends)

    def llm_side(self, rows: Sequence[TextRow], *, ends: bool = True) -> TokenizedSide:
        """`[BOS] A` per row; see the module docstring for pairs and choices, and `mt_side` for `ends`.

        Raises:
            ValueError: no LLM tokenizer, a pair separator without tokens, or choices that do not fit.
        """
        if self.llm is None:
            raise ValueError("llm is None: this StackTokenizer has no LLM tokenizer")
        separator = self._separator_ids if any(row.text_pair is not None for row in rows) else []
        form = SideFormat("llm", self.llm, self.max_llm_tokens, [], separator)
        return lay_out(form, [self.llm_prefix] * len(rows), rows, ends)

    def llm_ids(self, prompt: str) -> list[int]:
        """LLM tokens of a prompt, without BOS; special tokens written in it count as such."""
        return list(self.llm(prompt, add_special_tokens=False)["input_ids"]) if prompt else []

    @cached_property
    def _mt_specials(self) -> tuple[list[int], list[int]]:
        return own_specials(self.mt)

    @property
    def _mt_suffix(self) -> list[int]:
        if not self._language_ids:
            return self._mt_specials[1]
        if (eos := self.mt.eos_token_id) is None:
            raise ValueError("mt: the tokenizer has language codes but no eos_token, set one")
        return [eos]

    @cached_property
    def llm_prefix(self) -> list[int]:
        """BOS where the tokenizer itself would write one: many define a `bos_token` that their model never saw."""
        bos = self.llm.bos_token_id
        return [bos] if bos is not None and bos in own_specials(self.llm)[0] else []

    @cached_property
    def _separator_ids(self) -> list[int]:
        # not refused in the constructor: a tokenizer that drops whitespace is fine as long as nobody reads pairs
        ids, _ = encode(self.llm, [self.pair_separator])
        if not ids[0] or self.llm.unk_token_id in ids[0]:
            what = "to nothing" if not ids[0] else "to an unknown token"
            raise ValueError(
                f"pair_separator {self.pair_separator!r} tokenises {what} with the llm tokenizer: "
                "set pair_separator to a text that it knows"
            )
        return list(ids[0])


def _check_tokenizer(name: str, tokenizer: object) -> None:
    if tokenizer is None:
        return
    if not callable(tokenizer) or not hasattr(tokenizer, "is_fast"):
        raise TypeError(f"{name} must be a Hugging Face tokenizer or None, got {type(tokenizer).__name__}")
    if not tokenizer.is_fast:
        raise ValueError(
            f"{name}: {type(tokenizer).__name__} gives no character offsets, use a fast tokenizer (tokenizer.json)"
        )


def _language_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Language codes among the tokenizer's added tokens; a code inside the plain vocabulary does not count."""
    found = {
        str(token): index
        for index, token in tokenizer.added_tokens_decoder.items()
        if _LANGUAGE_CODE.fullmatch(str(token)) and index != tokenizer.unk_token_id
    }
    return dict(sorted(found.items()))


def _nearest(code: str, languages: Sequence[str], count: int = 4) -> list[str]:
    """Codes of the same language first, then by spelling."""
    stem = code.strip("_").split("_")[0].lower()

    def distance(candidate: str) -> tuple[bool, float, str]:
        same = candidate.strip("_").lower().startswith(stem)
        return not same, -SequenceMatcher(None, code.lower(), candidate.lower()).ratio(), candidate

    return sorted(languages, key=distance)[:count]
