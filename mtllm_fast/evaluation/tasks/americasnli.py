"""AmericasNLI (Ebrahimi et al., ACL 2022; github.com/abteen/americasnli): inference in 10 Indigenous languages.

`<language>/{dev,test}.tsv`, or as published `{dev,test}/<language>.tsv`, with header `id language premise hypothesis
label`, no quoting; up to 743 and 750 rows, joined to XNLI by id. No English and no train split: both are MultiNLI's.
Hub: `nala-cub/americas_nli`, an older snapshot without ids.
"""

from __future__ import annotations

from .folder import FolderTask
from .hub import HubSet
from .layout import Layout
from .table import Table

# Bribri, Asháninka, Wixarika, Nahuatl, Otomí, Shipibo-Konibo and Rarámuri are not among NLLB's languages.
CODES: dict[str, str | None] = {
    "aym": "ayr_Latn",
    "bzd": None,
    "cni": None,
    "gn": "grn_Latn",
    "hch": None,
    "nah": None,
    "oto": None,
    "quy": "quy_Latn",
    "shp": None,
    "tar": None,
}

AMERICASNLI = FolderTask(
    name="americasnli",
    about="The task (AmericasNLI) is to say whether a second sentence follows from the first, contradicts it, or "
    "neither, in languages of the Americas.",
    labels=("entailment", "neutral", "contradiction"),
    tables=(
        Table("premise", "hypothesis", id="id", quoted=False),
        Table("premise", "hypothesis", quoted=False),
    ),
    english="en",
    mt_codes={**CODES, "en": "eng_Latn"},
    hubs=(HubSet("nala-cub/americas_nli"),),
    layouts=(
        Layout(),
        Layout("{split}/{language}", known=True),
        Layout("data/anli_final/{split}/{language}", known=True),
        Layout("{language}_{split}", known=True),
    ),
)
