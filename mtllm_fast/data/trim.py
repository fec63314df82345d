"""A tokenizer without the tokens that given texts do not need, which reads those texts as before.

What stays besides the tokens of the texts, and why the texts are then read as they were:

    Unigram     nothing: the best way to split a text is still there, and none that is better is new. But the piece of
                the least score stays, from which the cost of an unknown character is counted.
    BPE         every token that is met while the tokens are merged; a merge stays where its parts and its result do. Of
                the pairs that can be merged, the first one is then the same as before, at every step.
    WordPiece   nothing: the longest piece is still there, and no longer one is new.

Also special tokens, the ids up to the padding's (encoders count positions from it), bytes, and single characters: those
of the texts, all of the scripts that the texts are written in, and signs. So another text of the same languages is read
in smaller pieces where its own are gone, never as unknown. Which characters went is remembered in the tokenizer's
settings (`removed_characters`), and a text that holds one is refused when it is read (`text_tokens.BadText`): it is
left out and counted in training, and an error or NaN in `Engine`, where `<unk>` would be a wrong number in silence.
Source of the frequency threshold: arXiv 2306.01709.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mtllm_fast.data.characters import REMOVED, reader_of
from mtllm_fast.data.layout import texts_of
from mtllm_fast.data.read import TextRow
from mtllm_fast.data.text_tokens import encode, of_readable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

KINDS = ("Unigram", "BPE", "WordPiece")
_WINDOW = 1024  # texts that are tokenised together
_SCRIPT_SHARE = 1e-3  # of the characters of one source: fewer are names and quotations, and stay as single ones
# first words of the names of letters, marks and digits that belong to no script, or to all
_COMMON = (
    "COMBINING", "MODIFIER", "DIGIT", "SUPERSCRIPT", "SUBSCRIPT", "VULGAR", "FRACTION", "ROMAN", "FEMININE",
    "MASCULINE", "MICRO", "IDEOGRAPHIC", "VARIATION",
)  # fmt: skip
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SETTINGS = ("model_max_length", "padding_side", "truncation_side", "model_input_names")


@dataclass
class Seen:
    """What texts are made of.

    Fields:
        share: (V,) highest relative frequency of each token in one of the sources.
        texts, tokens: how many. unreadable: texts that the tokenizer fails on, left out.
        scripts: of the letters of the texts, but for rare ones.
    """

    share: NDArray[np.float64]
    texts: int = 0
    tokens: int = 0
    unreadable: int = 0
    scripts: set[str] = field(default_factory=set)


@dataclass(frozen=True, eq=False)
class Trimmed:
    """A smaller tokenizer.

    Fields:
        rows: (V',) int64, the old id of each new one, ascending.
        removed: characters that were tokens, and are none now.
    """

    tokenizer: PreTrainedTokenizerFast
    rows: NDArray[np.int64]
    removed: str


class Vocabulary:
    """The tokens of a fast tokenizer by its own description of itself.

    Raises:
        ValueError: one of a kind that cannot be trimmed.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.state: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
        self.model: dict[str, Any] = self.state["model"]
        self.kind = str(self.model.get("type"))
        if self.kind not in KINDS:
            raise ValueError(f"tokenizer: is of kind {self.kind!r}; only {', '.join(KINDS)} can be trimmed")
        odd = [name for name in ("dropout", "end_of_word_suffix") if self.model.get(name)]
        if self.kind == "BPE" and self.model.get("continuing_subword_prefix"):
            odd.append("continuing_subword_prefix")
        if odd:
            raise ValueError(f"tokenizer: a {self.kind} with {odd[0]}={self.model[odd[0]]!r} cannot be trimmed")
        if _holds(self.state["normalizer"], "ByteLevel"):
            raise ValueError("tokenizer: one whose normalizer writes bytes (ByteLevel) cannot be trimmed")
        self.bytes = _bytes_by_letter() if _holds(self.state["pre_tokenizer"], "ByteLevel") else None
        vocab = self.model["vocab"]
        pieces = (
            enumerate(piece for piece, _ in vocab) if self.kind == "Unigram" else ((i, p) for p, i in vocab.items())
        )
        self.pieces: dict[int, str] = dict(pieces)
        self.added: dict[int, str] = {token["id"]: token["content"] for token in self.state["added_tokens"]}
        self.named = _named(self.state["post_processor"])

    @property
    def size(self) -> int:
        """V, one more than the highest id."""
        return max(self.pieces.keys() | self.added.keys()) + 1

    def text(self, piece: str) -> str:
        """The characters that a piece stands for."""
        if self.bytes is not None:
            return bytes(self.bytes[c] for c in piece if c in self.bytes).decode(errors="ignore")
        if self.kind == "WordPiece":
            return piece.removeprefix(self.model["continuing_subword_prefix"])
        return "" if _BYTE.fullmatch(piece) else piece

    def special(self, languages: Iterable[int], kept_languages: Iterable[int]) -> set[int]:
        """Ids that stay whatever the texts are.

        Args:
            languages: of the language codes; kept_languages: of those among them that stay.
        """
        ids = set(self.added) - (set(languages) - set(kept_languages)) | set(self.named)
        if (pad := self.tokenizer.pad_token_id) is not None:
            ids.update(i for i in range(pad + 1) if i in self.pieces or i in self.added)
        unknown = self.model.get("unk_token")
        ids.update(i for i, piece in self.pieces.items() if piece == unknown or _BYTE.fullmatch(piece))
        if self.kind == "Unigram":
            scores = [score for _, score in self.model["vocab"]]
            ids.add(scores.index(min(scores)))
            if self.model["unk_id"] is not None:
                ids.add(self.model["unk_id"])
        if self.bytes is not None:
            ids.update(i for i, piece in self.pieces.items() if piece in self.bytes)
        return ids

    def characters(self) -> dict[int, str]:
        """Ids of the pieces that are one character, and which."""
        return {
            i: text for i, piece in self.pieces.items() if i not in self.added and len(text := self.text(piece)) == 1
        }

    def merged(self, ids: Iterable[int]) -> set[int]:
        """`ids` with every token that is met while they are merged out of characters, where the kind does that."""
        met = set(ids)
        if self.kind != "BPE":
            return met
        number = {piece: i for i, piece in self.pieces.items()}
        ranks = {_pair(merge): rank for rank, merge in enumerate(self.model["merges"])}
        for i in list(met & self.pieces.keys()):
            parts = list(self.pieces[i])
            while True:
                met.update(number[part] for part in parts if part in number)
                found = [(ranks[pair], place) for place, pair in enumerate(pairwise(parts)) if pair in ranks]
                if not found:
                    break
                _, place = min(found)
                parts[place : place + 2] = [parts[place] + parts[place + 1]]
        return met

    def without_others(self, rows: Sequence[int]) -> dict[str, Any]:
        """The description of the tokenizer with the tokens `rows`, ascending, whose ids are then their places."""
        new = {old: i for i, old in enumerate(rows)}
        state, model = dict(self.state), dict(self.model)
        if self.kind == "Unigram":
            model["vocab"] = [model["vocab"][i] for i in rows if i in self.pieces]
            if model["unk_id"] is not None:
                model["unk_id"] = new[model["unk_id"]]
        else:
            model["vocab"] = {piece: new[i] for piece, i in model["vocab"].items() if i in new}
        if self.kind == "BPE":
            kept = model["vocab"]
            pairs = ((merge, _pair(merge)) for merge in model["merges"])
            model["merges"] = [merge for merge, (a, b) in pairs if a in kept and b in kept and a + b in kept]
        state["model"] = model
        state["added_tokens"] = [{**t, "id": new[t["id"]]} for t in state["added_tokens"] if t["id"] in new]
        state["post_processor"] = _renumbered(state["post_processor"], new)
        if (padding := state["padding"]) is not None:  # left by a call of the tokenizer, or for those who make one
            state["padding"] = {**padding, "pad_id": new[padding["pad_id"]]} if padding["pad_id"] in new else None
        return state


def count(tokenizer: PreTrainedTokenizerFast, sources: Iterable[Iterable[TextRow]]) -> Seen:
    """What the texts of all `sources` are made of, as an encoder is given them; each is read once."""
    vocabulary = Vocabulary(tokenizer)
    letters = {i: vocabulary.text(piece) for i, piece in vocabulary.pieces.items() if i not in vocabulary.added}
    seen = Seen(np.zeros(vocabulary.size))
    for source in sources:
        counts = np.zeros(vocabulary.size, np.int64)
        for texts in _windows(source):
            ids = [one for one in tokens(tokenizer, texts) if one is not None]
            seen.unreadable += len(texts) - len(ids)
            seen.texts += len(ids)
            counts += np.bincount(np.array([i for one in ids for i in one], np.int64), minlength=vocabulary.size)
        seen.tokens += (total := int(counts.sum()))
        seen.share = np.maximum(seen.share, counts / max(total, 1))
        scripts: Counter[str] = Counter()
        for i in np.flatnonzero(counts).tolist():
            for character in letters.get(i, ""):
                scripts[_script(character)] += int(counts[i])
        least = _SCRIPT_SHARE * scripts.total()
        seen.scripts |= {script for script, number in scripts.items() if number >= least}
    return seen


def trim(
    tokenizer: PreTrainedTokenizerFast,
    seen: Seen,
    *,
    min_frequency: float = 0.0,
    languages: Iterable[int] = (),
    kept_languages: Iterable[int] = (),
) -> Trimmed:
    """The tokenizer without the tokens that were not `seen`; see the module's docstring.

    Args:
        min_frequency: relative frequency in one of the sources that a token needs to stay; 0: it was seen at all.
        languages: ids of the language codes; kept_languages: of those among them that stay.

    Raises:
        ValueError: a kind that cannot be trimmed, or whose tokens cannot be numbered anew.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    vocabulary = Vocabulary(tokenizer)
    used = set(np.flatnonzero((seen.share > 0) & (seen.share >= min_frequency)).tolist())
    kept = used | vocabulary.special(languages, kept_languages)
    characters = vocabulary.characters()
    written = {c for i in used - vocabulary.added.keys() for c in vocabulary.text(vocabulary.pieces[i])}
    scripts = {"", *seen.scripts}
    kept |= {i for i, c in characters.items() if c in written or _script(c) in scripts}
    kept = vocabulary.merged(kept)
    removed = set(characters.values()) - {characters[i] for i in kept & characters.keys()}
    removed |= set(reader_of(tokenizer).removed)

    rows = sorted(kept)
    state = vocabulary.without_others(rows)
    backend = Tokenizer.from_str(json.dumps(state, ensure_ascii=False))
    names = {**vocabulary.pieces, **vocabulary.added}
    if backend.get_vocab(with_added_tokens=True) != {names[old]: new for new, old in enumerate(rows)}:
        raise ValueError("tokenizer: its special tokens stand among the others, so that it cannot be numbered anew")
    options: dict[str, Any] = {name: getattr(tokenizer, name) for name in _SETTINGS}
    options |= {REMOVED: "".join(sorted(removed))} if removed else {}
    further = getattr(tokenizer, "extra_special_tokens", None) or ()
    options["extra_special_tokens"] = [str(t) for t in further if backend.token_to_id(str(t)) is not None]
    made = PreTrainedTokenizerFast(tokenizer_object=backend, **options, **tokenizer.special_tokens_map)
    return Trimmed(made, np.array(rows, np.int64), "".join(sorted(removed)))


def changed(
    tokenizer: PreTrainedTokenizerFast, trimmed: Trimmed, sources: Iterable[Iterable[TextRow]]
) -> tuple[int, int, int]:
    """How many texts there are in `sources`, how many of them the smaller tokenizer reads otherwise, and how many of
    those it refuses."""
    number = other = refused = 0
    for source in sources:
        for texts in _windows(source):
            for old, new in zip(tokens(tokenizer, texts), tokens(trimmed.tokenizer, texts), strict=True):
                if old is None:
                    continue
                number += 1
                if new is None or trimmed.rows[new].tolist() != old:
                    other += 1
                    refused += new is None
    return number, other, refused


def tokens(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int] | None]:
    """Token ids of each text as an encoder is given it, without special ones; None for a text that cannot be read."""
    ids, bad = of_readable(texts, lambda some: encode(tokenizer, some, compose=True)[0])
    read = iter(ids)
    return [None if place in bad else next(read) for place in range(len(texts))]


def _windows(source: Iterable[TextRow]) -> Iterable[list[str]]:
    stream = iter(source)
    while rows := list(islice(stream, _WINDOW)):
        yield [text for row in rows for text in texts_of(row)]


def _script(character: str) -> str:
    """The script of a letter, mark or digit: the first word of its name; "" of any other, or where it has none."""
    if unicodedata.category(character)[0] not in "LMN":
        return ""
    match = re.match("[A-Z]+", unicodedata.name(character, ""))
    return "" if match is None or match[0] in _COMMON else match[0]


def _pair(merge: str | list[str]) -> tuple[str, str]:
    """The two parts of a merge, which older files have as one string."""
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


def _parts(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A normalizer, pre-tokenizer or post-processor as a list of its steps."""
    if step is None:
        return []
    inner = next((step[name] for name in ("normalizers", "pretokenizers", "processors") if name in step), None)
    return [step] if inner is None else [part for one in inner for part in _parts(one)]


def _holds(step: dict[str, Any] | None, kind: str) -> bool:
    return any(part["type"] == kind for part in _parts(step))


def _named(processor: dict[str, Any] | None) -> set[int]:
    """Ids of the tokens that a post-processor writes. Raises ValueError for a kind that is not known."""
    ids: set[int] = set()
    for part in _parts(processor):
        if part["type"] == "TemplateProcessing":
            ids.update(i for token in part["special_tokens"].values() for i in token["ids"])
        elif part["type"] in ("BertProcessing", "RobertaProcessing"):
            ids.update((part["sep"][1], part["cls"][1]))
        elif part["type"] != "ByteLevel":
            raise ValueError(f"tokenizer: its post-processor {part['type']!r} is not known, so it cannot be trimmed")
    return ids


def _renumbered(processor: Any, new: dict[int, int]) -> Any:
    """A post-processor with other ids for its tokens."""
    if processor is None:
        return None
    processor = dict(processor)
    if processor["type"] == "Sequence":
        processor["processors"] = [_renumbered(part, new) for part in processor["processors"]]
    elif processor["type"] == "TemplateProcessing":
        processor["special_tokens"] = {
            name: {**token, "ids": [new[i] for i in token["ids"]]}
            for name, token in processor["special_tokens"].items()
        }
    elif "sep" in processor:
        processor |= {name: [processor[name][0], new[processor[name][1]]] for name in ("sep", "cls")}
    return processor


def _bytes_by_letter() -> dict[str, int]:
    """The letter that a byte-level tokenizer writes for each byte: its own where it can be seen, others above 255."""
    seen = [b for b in range(256) if chr(b).isprintable() and not chr(b).isspace() and b != 0xAD]
    hidden = [b for b in range(256) if b not in seen]
    return {chr(b): b for b in seen} | {chr(256 + n): b for n, b in enumerate(hidden)}
