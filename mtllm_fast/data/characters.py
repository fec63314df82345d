"""The text that a tokenizer is given, and which of its characters a token has read.

Canonically equal texts are not equal to a tokenizer: `é` may be one character or two. So text is composed (Unicode NFC)
before it is tokenised. And a sentencepiece model maps characters to others first. The Rust library does that wrongly
where a letter and its marks do not stand in the map together (it keeps the first and drops the rest: `ế` written as `e`
and two marks becomes `ê`), and the offsets it gives are off by what was dropped. So that map is applied here, as
sentencepiece does: the longest key wins.

Both keep account of the boundaries between characters: a boundary of the new text is one of the old text, or lies
inside something that was replaced as a whole and is none.
"""

from __future__ import annotations

import base64
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.normalizers import Normalizer
    from transformers import PreTrainedTokenizerFast

Form = Literal["NFC", "NFKC"]

REMOVED = "removed_characters"  # setting of a tokenizer that was trimmed (trim.py): what it does not know any more

# canonically equal texts are one to these, with nothing but those before them
_CANONICAL = ("Precompiled", "NFC", "NFKC", "NFD", "NFKD")
_HARMLESS = ("Lowercase", "Strip", "Prepend")
# what composition can change stands here (a test looks at the rest)
_DECOMPOSING = (
    range(0x3400), range(0xA000, 0xAC00), range(0xF900, 0x17000), range(0x1B000, 0x1FC00), range(0x2F800, 0x2FA20)
)  # fmt: skip
_LONGEST_CLUSTER = 32  # characters; inside of longer ones no boundary is looked for


@dataclass(frozen=True, slots=True)
class Written:
    """A text as a tokenizer is given it.

    Fields:
        text: what it is given.
        ends: (len(text) + 1,) where each boundary of `text` lies in the text that was written differently, -1 for one
            that lies inside a replacement. None where nothing was changed.
        unread: boundary of `text` at which characters were left out; nothing after it has read all that was written.
    """

    text: str
    ends: list[int] | None = None
    unread: int | None = None


Edit = tuple[int, int, str, dict[int, int]]  # start, end, replacement, its inner boundaries -> those in [start, end]


def _rewritten(text: str, edits: Iterable[Edit]) -> Written:
    """`text` with non-overlapping edits in order."""
    parts: list[str] = []
    ends = [0]
    unread: int | None = None
    at = 0
    for start, end, new, inner in edits:
        parts += (text[at:start], new)
        ends.extend(range(at + 1, start + 1))
        if new:
            ends.extend(inner.get(k, -1) for k in range(1, len(new)))
            ends.append(end)
        elif unread is None and not _nothing_to_read(text[start:end]):
            unread = len(ends) - 1
        at = end
    if not parts:
        return Written(text)
    parts.append(text[at:])
    ends.extend(range(at + 1, len(text) + 1))
    return Written("".join(parts), ends, unread)


def _then(first: Written, second: Written) -> Written:
    """Two rewritings, one after the other."""
    if second.ends is None or first.ends is None:
        return Written(second.text, second.ends or first.ends, second.unread if first.unread is None else first.unread)
    return Written(second.text, [-1 if end < 0 else first.ends[end] for end in second.ends], second.unread)


def composed(text: str, form: Form = "NFC") -> Written:
    """`text` in Unicode's form NFC, or NFKC."""
    if text.isascii() or unicodedata.is_normalized(form, text):
        return Written(text)

    def edits() -> Iterable[Edit]:
        for match in _clusters(form).finditer(text):
            cluster = match[0]
            new = unicodedata.normalize(form, cluster)
            if new != cluster:
                yield match.start(), match.end(), new, _inner(cluster, new, match.start(), form)

    return _rewritten(text, edits())


def _inner(cluster: str, new: str, start: int, form: Form) -> dict[int, int]:
    """Boundaries inside `new` at which it is the composed form of a beginning of `cluster`."""
    found: dict[int, int] = {}
    if len(new) > 1 and len(cluster) <= _LONGEST_CLUSTER:
        for k in range(1, len(cluster)):
            beginning = unicodedata.normalize(form, cluster[:k])
            if len(beginning) < len(new) and new.startswith(beginning):
                found[len(beginning)] = start + k
    return found


@cache
def _clusters(form: Form) -> re.Pattern[str]:
    """What composition can change, one match for everything that it can change together."""
    joining = set(range(0x1161, 0x1176)) | set(range(0x11A8, 0x11C3))  # the vowels and finals of Hangul
    alone: set[int] = set()
    for point in chain(*_DECOMPOSING):
        parts = unicodedata.decomposition(chr(point))
        if unicodedata.combining(chr(point)):
            joining.add(point)
        if parts and not parts.startswith("<"):
            joining.update(int(part, 16) for part in parts.split()[1:])
        if parts and not unicodedata.is_normalized(form, chr(point)):
            alone.add(point)
    decomposed: Literal["NFD", "NFKD"] = "NFD" if form == "NFC" else "NFKD"
    joining |= {point for point in alone if ord(unicodedata.normalize(decomposed, chr(point))[0]) in joining}
    return re.compile(f"[^{_class(joining)}]?[{_class(joining)}]+|[{_class(alone)}]", re.DOTALL)


def _class(points: Iterable[int]) -> str:
    """Code points as the inside of a character class."""
    ranges: list[list[int]] = []
    for point in sorted(points):
        if ranges and ranges[-1][1] == point - 1:
            ranges[-1][1] = point
        else:
            ranges.append([point, point])
    return "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in ranges)


class CharacterMap:
    """A sentencepiece model's map of characters, from its compiled form.

    Args:
        data: `precompiled_charsmap`: the size of a double-array trie (darts-clone), the trie, strings ending in NUL.

    Raises:
        ValueError: `data` is no such map.
    """

    def __init__(self, data: bytes) -> None:
        size = int.from_bytes(data[:4], "little")
        if not size or size % 4 or size + 4 > len(data):
            raise ValueError(f"precompiled_charsmap: {len(data)} bytes that are no sentencepiece character map")
        units = np.frombuffer(data, "<u4", size // 4, 4).astype(np.int64)
        self._units: list[int] = units.tolist()
        self._strings = data[4 + size :]
        self._root = _points_to(self._units[0])
        # where a replacement can begin is found by one fast search; most text has no such place, and even less to do
        single, first, second = self._beginnings(units)
        self._needed = frozenset(map(chr, single | second))
        places = [f"(?<=[{_class(single)}])"] if single else []
        places += [f"(?<=[{_class(first)}][{_class(second)}])"] if second else []
        self._places = re.compile(f"[{_class(single | second)}](?:{'|'.join(places)})" if places else "(?!)", re.DOTALL)

    def __call__(self, text: str) -> Written:
        """`text` with every key replaced; of several that begin at a character, the longest."""
        return Written(text) if self._needed.isdisjoint(text) else _rewritten(text, self._edits(text))

    def _edits(self, text: str) -> Iterable[Edit]:
        at = 0
        while match := self._places.search(text, at):
            place = match.start()
            # the second character of a longer key, or one that is a key by itself
            found = self._longest(text, place - 1) if place > at else None
            start = place - 1
            if found is None:
                found, start = self._longest(text, place), place
            if found is None:
                at = place + 1
                continue
            at, new = found
            if text[start:at] != new:
                yield start, at, new, {}

    def _longest(self, text: str, start: int) -> tuple[int, str] | None:
        """(end, replacement) of the longest key that begins at `start`."""
        found, place, units = None, self._root, self._units
        for at in range(start, len(text)):
            for byte in text[at].encode(errors="surrogatepass"):
                place ^= byte
                if place >= len(units) or units[place] & _LABEL != byte:
                    return found and (found[0], self._replacement(found[1]))
                unit = units[place]
                place ^= _points_to(unit)
            if unit & _HAS_VALUE:
                found = at + 1, units[place] & _VALUE
        return found and (found[0], self._replacement(found[1]))

    def _replacement(self, at: int) -> str:
        return self._strings[at : self._strings.index(b"\0", at)].decode()

    def _beginnings(self, units: NDArray[np.int64]) -> tuple[set[int], set[int], set[int]]:
        """Characters that are replaced by themselves, and the first and the second characters of longer keys."""
        # a unit stands at (where its parent points) xor (its byte), so it tells its parent
        label = units & _LABEL
        inner = np.flatnonzero((label > 0) & (label < 256))
        children: dict[int, list[int]] = {}
        for unit, parent in zip(inner.tolist(), (inner ^ label[inner]).tolist()):
            children.setdefault(parent, []).append(unit)

        def characters(place: int, key: bytes = b"") -> Iterator[tuple[str, int, bool]]:
            for unit in children.get(place, ()):
                longer, below = key + bytes([self._units[unit] & 0xFF]), unit ^ _points_to(self._units[unit])
                if len(longer) == _utf8_length(longer[0]):
                    yield longer.decode(), below, bool(self._units[unit] & _HAS_VALUE)
                else:
                    yield from characters(below, longer)

        single: set[int] = set()
        first: set[int] = set()
        second: set[int] = set()
        seen: set[int] = set()  # the trie shares its endings
        for character, below, ends in characters(self._root):
            if ends and self._replacement(self._units[below] & _VALUE) != character:
                single.add(ord(character))
            if below not in seen:
                seen.add(below)
                longer = {ord(following) for following, _, _ in characters(below)}
                second |= longer
            if children.get(below):
                first.add(ord(character))
        return single, first, second


# fields of a unit of darts-clone's double array
_LABEL = 0x800000FF
_HAS_VALUE = 0x100
_VALUE = 0x7FFFFFFF


def _points_to(unit: int) -> int:
    return (unit >> 10) << ((unit & 0x200) >> 6)


def _utf8_length(byte: int) -> int:
    return 1 if byte < 0x80 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4


class Reader:
    """How one tokenizer is given text.

    Args:
        tokenizer: a fast Hugging Face tokenizer.

    Attributes:
        characters: its character map where it begins with one, which is then applied here and not by the tokenizer.
        canonical: canonically equal texts are one to it, whether they are composed here or not.
        removed: characters that it knew before it was trimmed (trim.py).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._backend = tokenizer.backend_tokenizer
        steps = _steps(self._backend.normalizer)
        kinds = [step["type"] for step in steps if step["type"] not in _HARMLESS]
        self.canonical = bool(kinds) and kinds[0] in _CANONICAL
        self.characters: CharacterMap | None = None
        self._form: Form = "NFC"
        if steps and steps[0]["type"] == "Precompiled":
            self.characters = CharacterMap(base64.b64decode(steps[0]["precompiled_charsmap"]))
            # sentencepiece's remove_extra_whitespaces, of which the library leaves out the end of the text
            self._one_space = any(step.get("pattern") == {"Regex": " {2,}"} for step in steps)
        elif steps and steps[0]["type"] in ("NFKC", "NFKD"):
            self._form = "NFKC"  # the library's own gives wrong offsets where a ligature has a mark
        self._rest: Tokenizer | None = None
        self.removed = frozenset(getattr(tokenizer, "init_kwargs", {}).get(REMOVED, ""))

    def missing(self, written: Written) -> str | None:
        """A character of the text that a trimmed tokenizer does not know any more; None where there is none."""
        if not self.removed:
            return None
        text = written.text
        if self.characters is None and self._backend.normalizer is not None:
            text = self._backend.normalizer.normalize_str(text)
        return None if self.removed.isdisjoint(text) else next(c for c in text if c in self.removed)

    def write(self, text: str, compose: bool) -> Written:
        """`text` as the tokenizer is given it; `compose`: as sentencepiece does, where the tokenizer does not.

        An LLM reads text as its own library gives it, a separator of white space too.
        """
        if text.isascii() and self.characters is None:
            return Written(text)
        written = composed(text, self._form) if compose or self.canonical else Written(text)
        if self.characters is None:
            return written
        written = _then(written, self.characters(written.text))
        if not (compose and self._one_space and written.text.endswith(" ")):
            return written
        kept = written.text.rstrip(" ")
        return Written(kept, written.ends and written.ends[: len(kept) + 1], written.unread)

    def backend(self, mapped: bool) -> Tokenizer:
        """The Rust tokenizer for texts that the character map left as they are, or (`mapped`) changed."""
        if not mapped:
            return self._backend
        if self._rest is None:
            from tokenizers import Tokenizer

            # a copy: other threads and the tokenizer's owner go on using the first one
            state = json.loads(self._backend.to_str())
            kept = _without_map(state["normalizer"])
            self._rest = Tokenizer.from_str(json.dumps({**state, "normalizer": kept}))
        return self._rest


def _steps(normalizer: Normalizer | None) -> list[dict[str, Any]]:
    if normalizer is None:
        return []
    state = json.loads(normalizer.__getstate__())
    while state["type"] == "Sequence" and state["normalizers"] and state["normalizers"][0]["type"] == "Sequence":
        state = state["normalizers"][0]
    return state["normalizers"] if state["type"] == "Sequence" else [state]


def _without_map(state: dict[str, Any]) -> dict[str, Any] | None:
    if state["type"] != "Sequence":
        return None
    first, *others = state["normalizers"]
    kept = _without_map(first)
    return {"type": "Sequence", "normalizers": [*([kept] if kept else []), *others]}


_READERS: WeakKeyDictionary[PreTrainedTokenizerFast, Reader] = WeakKeyDictionary()


def reader_of(tokenizer: PreTrainedTokenizerFast) -> Reader:
    """The Reader of a tokenizer, made once."""
    reader = _READERS.get(tokenizer)
    if reader is None or reader._backend is not tokenizer.backend_tokenizer:
        reader = _READERS[tokenizer] = Reader(tokenizer)
    return reader


def read_up_to(offsets: Sequence[tuple[int, int]], written: Written) -> list[int]:
    """For every token the character of the original text up to which it and those before it have read everything.

    -1 where there is none: a token that ends inside a character or something that was replaced as a whole, and every
    token after characters that no token holds. White space need not be held by a token, nor do invisible format
    characters.

    Args:
        offsets: characters [start, end) of `written.text` that each token holds.
    """
    text = written.text
    ends: list[int] = []
    reach = 0
    for start, end in offsets:
        if start != reach:
            if start < reach:  # the token before holds only a part of its last character
                if ends:
                    ends[-1] = -1
            elif not _nothing_to_read(text[reach:start]):
                break
        ends.append(end)
        if end > reach:
            reach = end
    if len(ends) < len(offsets) or not _nothing_to_read(text[reach:]):
        # a tokenizer gives what it made of several characters the place of the first one
        if ends:
            ends[-1] = -1
        ends += [-1] * (len(offsets) - len(ends))
    if written.ends is not None:
        last = len(text) if written.unread is None else written.unread
        ends = [written.ends[end] if 0 <= end <= last else -1 for end in ends]
    return ends


def _nothing_to_read(text: str) -> bool:
    return not text or text.isspace() or all(c.isspace() or unicodedata.category(c) == "Cf" for c in text)
