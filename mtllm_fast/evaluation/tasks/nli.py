"""Natural language inference: XNLI, AmericasNLI and MultiNLI files as one task, told apart by what stands in them.

* XNLI (Conneau et al., EMNLP 2018), in the layout of XTREME: `<language>/{dev,test}.tsv[.gz]` without header or
  quoting, premise, hypothesis, label; the test files have no label column, so `derived/test.labels.tsv` (or
  `test.labels.tsv`), one line per row, gives them. 2,490 and 5,010 rows. Hub: `facebook/xnli` (with MultiNLI as its
  train split).
* AmericasNLI (Ebrahimi et al., ACL 2022): `<language>/{dev,test}.tsv` with header `id language premise hypothesis
  label`, no quoting; up to 743 and 750 rows, joined to XNLI by id. Hub: `nala-cub/americas_nli`.
* MultiNLI samples: `en/{train,dev}.json`, one object of `{text_a, text_b, label}` objects.
* Parquet or JSON with premise, hypothesis and label: the NLLB translations that the authors of MT-LLM published.
"""

from __future__ import annotations

from .folder import FolderTask, Table

XNLI_CODES = {
    "ar": "arb_Arab",
    "bg": "bul_Cyrl",
    "de": "deu_Latn",
    "el": "ell_Grek",
    "en": "eng_Latn",
    "es": "spa_Latn",
    "fr": "fra_Latn",
    "hi": "hin_Deva",
    "ru": "rus_Cyrl",
    "sw": "swh_Latn",
    "th": "tha_Thai",
    "tr": "tur_Latn",
    "ur": "urd_Arab",
    "vi": "vie_Latn",
    "zh": "zho_Hans",
}
# Bribri, Asháninka, Wixarika, Nahuatl, Otomí, Shipibo-Konibo and Rarámuri are not among NLLB's languages.
AMERICASNLI_CODES: dict[str, str | None] = {
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


NLI = FolderTask(
    name="nli",
    labels=("entailment", "neutral", "contradiction"),
    tables=(
        Table("premise", "hypothesis", id="id", quoted=False),
        Table("premise", "hypothesis", quoted=False),
        Table("text_a", "text_b", quoted=False),
        Table("premise", "hypothesis", header=("premise", "hypothesis", "label"), quoted=False),
    ),
    english="en",
    mt_codes={**XNLI_CODES, **AMERICASNLI_CODES},
    label_files=("derived/{split}.labels.tsv", "{split}.labels.tsv"),
)
