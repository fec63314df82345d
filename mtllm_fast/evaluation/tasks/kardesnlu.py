"""Kardeş-NLU (Senel et al., EACL 2024; github.com/lksenel/Kardes-NLU): inference in five Turkic languages.

`<name>/xnli.{dev,test}.<language>.csv` (also below `Data/`), 1,000 and 2,000 rows, English and translation side by
side, with csv quoting; test files have a byte-order mark, CRLF and a nameless id column, and the Uyghur ones newlines
inside fields. The ids are row numbers of XNLI's dev and test set. The set has no English of its own and is not on the
hub. Its multiple-choice part is in `copa.py`.
"""

from __future__ import annotations

from .folder import FolderTask
from .layout import Layout
from .table import Table

NAMES = {"az": "azeri", "kk": "kazakh", "ky": "kyrgyz", "ug": "uyghur", "uz": "uzbek"}
CODES: dict[str, str | None] = {
    "az": "azj_Latn",
    "kk": "kaz_Cyrl",
    "ky": "kir_Cyrl",
    "ug": "uig_Arab",
    "uz": "uzn_Latn",
}
NOTES = {"ug": "Uyghur in Cyrillic script; read as uig_Arab, which NLLB-200 has only seen in Arabic script"}

KARDESNLU = FolderTask(
    name="kardesnlu",
    about="The task (Kardeş-NLU) is to say whether a second sentence follows from the first, contradicts it, or "
    "neither, in Turkic languages.",
    labels=("entailment", "neutral", "contradiction"),
    tables=tuple(Table("s1_translation", "s2_translation", label="gold_label", id=id) for id in ("Unnamed: 0", "")),
    english="en",
    mt_codes={**CODES, "en": "eng_Latn"},
    layouts=(
        Layout("{name}/xnli.{split}.{language}", names=NAMES, endings=(".csv",)),
        Layout("Data/{name}/xnli.{split}.{language}", names=NAMES, endings=(".csv",)),
    ),
    notes=NOTES,
)
