"""MGSM (Shi et al., ICLR 2023, arXiv 2210.03057): word problems of grade-school mathematics, answered by a number.

Ten languages and English, 250 test rows each, row-aligned; the answer is written and not chosen.

* Published repository (google-research/url-nlp, `mgsm/`): `mgsm_<language>.tsv`, or `<language>/test.tsv`, without
  header or quoting: question, answer ("2,125").
* Hub `juletxara/mgsm`, also with eight worked examples as train split.
"""

from __future__ import annotations

from .folder import FolderTask
from .hub import HubSet
from .layout import Layout
from .table import Table

CODES: dict[str, str | None] = {
    "bn": "ben_Beng",
    "de": "deu_Latn",
    "en": "eng_Latn",
    "es": "spa_Latn",
    "fr": "fra_Latn",
    "ja": "jpn_Jpan",
    "ru": "rus_Cyrl",
    "sw": "swh_Latn",
    "te": "tel_Telu",
    "th": "tha_Thai",
    "zh": "zho_Hans",
}

MGSM = FolderTask(
    name="mgsm",
    about="The task (MGSM) is to solve a word problem of grade-school mathematics and to write the answer, a number. "
    "The same problems are given in every language.",
    labels=(),
    tables=(
        Table("question", label="answer_number"),
        Table("question", label="answer", header=("question", "answer"), quoted=False),
    ),
    english="en",
    mt_codes=CODES,
    hubs=(HubSet("juletxara/mgsm"),),
    layouts=(Layout(), Layout("mgsm_{language}", splits=("test",), known=True)),
    kind="generated",
)
