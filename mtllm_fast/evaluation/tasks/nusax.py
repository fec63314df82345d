"""NusaX-Senti: sentiment, 3 labels, 12 languages of Indonesia and English (Winata et al., EACL 2023;
github.com/IndoNLP/nusax).

500 train, 100 dev and 400 test rows per language, row-aligned. Files `<language>/{train,valid,test}.csv` with csv
quoting and newlines inside fields; on the hub `indonlp/NusaX-senti`, whose configurations are ISO 639-3 codes.
"""

from __future__ import annotations

from .folder import FolderTask
from .hub import HubSet
from .table import Table

# language -> (NLLB code, hub configuration). NLLB-200 knows neither Madurese, nor Ngaju, nor Toba Batak; the authors
# of MT-LLM fed Ngaju's ISO code to it, which the tokenizer turned into <unk>. Here such a language runs only with an
# explicit mapping.
LANGUAGES: dict[str, tuple[str | None, str]] = {
    "acehnese": ("ace_Latn", "ace"),
    "balinese": ("ban_Latn", "ban"),
    "banjarese": ("bjn_Latn", "bjn"),
    "buginese": ("bug_Latn", "bug"),
    "english": ("eng_Latn", "eng"),
    "indonesian": ("ind_Latn", "ind"),
    "javanese": ("jav_Latn", "jav"),
    "madurese": (None, "mad"),
    "minangkabau": ("min_Latn", "min"),
    "ngaju": (None, "nij"),
    "sundanese": ("sun_Latn", "sun"),
    "toba_batak": (None, "bbc"),
}

NUSAX = FolderTask(
    name="nusax",
    about="The task (NusaX) is to say whether a short review or comment is positive, negative or neutral. The same "
    "texts are given in every language.",
    labels=("negative", "neutral", "positive"),
    tables=(Table(text="text", label="label", id="id"),),
    english="english",
    mt_codes={language: code for language, (code, _) in LANGUAGES.items()},
    hubs=(HubSet("indonlp/NusaX-senti", {language: config for language, (_, config) in LANGUAGES.items()}),),
)
