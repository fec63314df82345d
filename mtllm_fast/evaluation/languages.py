"""What is known about a language: name, family, script and resource level.

`languages.tsv` covers the codes of SIB-200, NLLB-200, NusaX and AmericasNLI, with these sources:

* name: the FLORES-200 list (github.com/facebookresearch/flores, flores200/README.md).
* family: Glottolog's top-level family (glottolog.org); creoles stand with their lexifier's family, as there.
* resource: class 0 (least data) to 5 (most) of Joshi et al., "The State and Fate of Linguistic Diversity and Inclusion
  in the NLP World", ACL 2020 (microsoft.github.io/linguisticdiversity). Their list has names, not codes: a code gets
  the class of its own name, else of the macrolanguage's name (gaz_Latn: Oromo), the higher one where two spellings are
  listed. "-" where neither is listed; regional Arabic is not given the class of Arabic.
* script: the ISO 15924 part of the code.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

UNKNOWN = "unknown"
_CODE = re.compile(r"[a-z]{2,3}_([A-Z][a-z]{3})")
SCRIPTS = {
    "Arab": "Arabic", "Armn": "Armenian", "Beng": "Bengali", "Cyrl": "Cyrillic", "Deva": "Devanagari",
    "Ethi": "Ethiopic", "Geor": "Georgian", "Grek": "Greek", "Gujr": "Gujarati", "Guru": "Gurmukhi", "Hang": "Hangul",
    "Hans": "Han (simplified)", "Hant": "Han (traditional)", "Hebr": "Hebrew", "Jpan": "Japanese", "Khmr": "Khmer",
    "Knda": "Kannada", "Laoo": "Lao", "Latn": "Latin", "Mlym": "Malayalam", "Mymr": "Myanmar", "Nkoo": "N’Ko",
    "Olck": "Ol Chiki", "Orya": "Odia", "Sinh": "Sinhala", "Taml": "Tamil", "Telu": "Telugu", "Tfng": "Tifinagh",
    "Thai": "Thai", "Tibt": "Tibetan",
}  # fmt: skip


@dataclass(frozen=True)
class Language:
    """A language of an evaluation set: `code` as the set has it; `resource` is "class 0" ... "class 5"; "unknown" for
    what is not known."""

    code: str
    name: str
    family: str
    script: str
    resource: str

    def group(self, by: str) -> str:
        """Its family, script or resource level."""
        return str(getattr(self, by))


GROUPINGS = ("family", "script", "resource")


def describe(code: str, mt_code: str | None = None) -> Language:
    """The language that a set calls `code` and the MT model `mt_code` (None: it has no code for it)."""
    table = _table()
    row = table.get(code) or table.get(mt_code or "")
    known = row["code"] if row else next((c for c in (code, mt_code) if c and _CODE.fullmatch(c)), "")
    match = _CODE.fullmatch(code) or _CODE.fullmatch(known)
    script = SCRIPTS.get(match.group(1), match.group(1)) if match else UNKNOWN
    if row is None:
        return Language(code, code, UNKNOWN, script, UNKNOWN)
    resource = UNKNOWN if row["resource"] == "-" else f"class {row['resource']}"
    return Language(code, row["name"], row["family"], script, resource)


@cache
def _table() -> dict[str, dict[str, str]]:
    """Every code and other name of a language -> its row."""
    rows: dict[str, dict[str, str]] = {}
    with (Path(__file__).parent / "languages.tsv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            for name in (row["code"], *filter(None, row["also"].split(","))):
                rows[name] = row
    return rows
