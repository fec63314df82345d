"""What a task is, and the names of splits."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from ...data.read import TextRow

# canonical split -> names it goes by in published sets
SPLITS: dict[str, tuple[str, ...]] = {
    "train": ("train",),
    "dev": ("dev", "valid", "val", "validation", "dev_matched", "validation_matched"),
    "test": ("test",),
}


@runtime_checkable
class Task(Protocol):
    """A labelled data set in many languages.

    `source` is a local folder in the set's published format or the name of a hub data set. Languages are named by the
    set's own codes; `mt_code` says what the MT model calls them.
    """

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> Literal["classification", "choice", "generated"]:
        """The `HeadConfig.kind` it takes. Rows of a "choice" task have `choices`, and `label` says which is right. A
        "generated" task takes no head: its rows have a `target`, the answer that is to be written (see `answers`)."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Label names; a row's `label` is an index into them. "1", "2", ... where the label is a choice; none where the
        answer is generated."""

    @property
    def default_source(self) -> str | None:
        """Where the set is when the user names no source: its hub name, or the folder of a task file."""

    @property
    def notes(self) -> Mapping[str, str]:
        """The set's code -> what a reader of scores has to know about how the MT model reads that language."""

    @property
    def english(self) -> str:
        """The set's own code of English."""

    def languages(self, source: str | Path) -> list[str]:
        """The set's codes of the languages that `source` holds, sorted."""

    def splits(self, source: str | Path, language: str) -> tuple[str, ...]:
        """Which of "train", "dev", "test" `source` holds for a language, in that order."""

    def mt_code(self, language: str) -> str | None:
        """The MT model's code for a language, None where it has none."""

    def rows(
        self, source: str | Path, language: str, split: str = "test", *, limit: int | None = None, labelled: bool = True
    ) -> list[TextRow]:
        """All rows of a split in file order; their `language` is the MT code, or the set's code where there is none."""


def canonical_split(split: str) -> str:
    """ "dev" for "dev", "valid" and "validation", and so on; ValueError for any other name."""
    for name, aliases in SPLITS.items():
        if split in aliases:
            return name
    known = ", ".join(alias for aliases in SPLITS.values() for alias in aliases)
    raise ValueError(f"split={split!r}: expected one of {known}")


# two-letter codes of ISO 639-1 whose three-letter code does not begin alike, or which begin that of another language
_ISO_639_1 = {
    "ar": "arb", "as": "asm", "be": "bel", "bn": "ben", "bs": "bos", "cs": "ces", "da": "dan", "de": "deu", "el": "ell",
    "en": "eng", "es": "spa", "et": "est", "fa": "pes", "fi": "fin", "fr": "fra", "ga": "gle", "gu": "guj", "ha": "hau",
    "hi": "hin", "hr": "hrv", "id": "ind", "it": "ita", "ja": "jpn", "ka": "kat", "km": "khm", "ko": "kor", "lv": "lvs",
    "ms": "zsm", "my": "mya", "ne": "npi", "nl": "nld", "no": "nob", "pl": "pol", "pt": "por", "ro": "ron", "ru": "rus",
    "sk": "slk", "sl": "slv", "sq": "als", "sr": "srp", "sv": "swe", "sw": "swh", "ta": "tam", "te": "tel", "th": "tha",
    "tr": "tur", "uk": "ukr", "ur": "urd", "vi": "vie", "zh": "zho",
}  # fmt: skip


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """The known names nearest to `name`, for error messages; of a two-letter language code ("en") first its own."""
    names = sorted(known)
    if len(name) == 2:
        start = _ISO_639_1.get(name.lower(), name.lower())
        same = [item for item in names if item.lower().startswith(start)]
        if same and name not in names:
            others = nearest(name + "_", set(names) - set(same), count)
            return ", ".join(same[:count]) + (f", {others}" if len(same) < count else "")
    lower = {item.lower(): item for item in names}
    close = [lower[item] for item in difflib.get_close_matches(name.lower(), lower, n=count, cutoff=0.5)]
    return ", ".join(close or names[: 2 * count]) + ("" if close or len(names) <= 2 * count else ", ...")
