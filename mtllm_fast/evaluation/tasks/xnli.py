"""XNLI (Conneau et al., EMNLP 2018): natural language inference in 15 languages, 2,490 dev and 5,010 test rows.

* XTREME's layout: `<language>/{dev,test}.tsv[.gz]` or `{dev,test}-<language>.tsv`, without header or quoting: premise,
  hypothesis, label; the test files have no label column, so `derived/test.labels.tsv` (or `test.labels.tsv`), one line
  per row, gives them.
* Published zip: `xnli.{dev,test}.jsonl`, all languages in one file.
* Hub: `facebook/xnli`, with MultiNLI as its train split (machine-translated but for English).
"""

from __future__ import annotations

from .folder import FolderTask
from .hub import HubSet
from .layout import Layout
from .table import Table

CODES: dict[str, str | None] = {
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

XNLI = FolderTask(
    name="xnli",
    about="The task (XNLI) is to say whether a second sentence follows from the first, contradicts it, or neither.",
    labels=("entailment", "neutral", "contradiction"),
    tables=(
        Table("sentence1", "sentence2", label="gold_label", id="pairID", language="language", quoted=False),
        Table("premise", "hypothesis", quoted=False),
        Table("premise", "hypothesis", header=("premise", "hypothesis", "label"), quoted=False),
    ),
    english="en",
    mt_codes=CODES,
    label_files=("derived/{split}.labels.tsv", "{split}.labels.tsv"),
    hubs=(HubSet("facebook/xnli"),),
    layouts=(
        Layout(),
        Layout("{split}-{language}", known=True),
        Layout("xnli.{split}", languages=tuple(CODES), endings=(".jsonl",)),
    ),
)
