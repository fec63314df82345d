"""Choice of plausible alternatives: which of two sentences is the cause, or the result, of a premise.

* XCOPA (Ponti et al., EMNLP 2020; github.com/cambridgeltl/xcopa), 11 languages, 100 dev and 500 test rows:
  `<language>/{val,test}.<language>.jsonl` (also below `data/`), labels 0 and 1. Hub `cambridgeltl/xcopa`; its
  `translation-*` configurations are English translations and are not read here.
* COPA (Roemmele et al., 2011) in SuperGLUE's files, English, 400 train and 100 dev rows: `{train,val}.jsonl`; its test
  split has no labels. Hub `aps/super_glue`, configuration "copa".
* Kardeş-NLU (Senel et al., EACL 2024), five Turkic languages, 100 dev and 500 test rows:
  `<name>/xcopa.{dev,test}.<language>.csv` (also below `Data/`), labels 1 and 2.

A row reads `premise question`. The sets give the question as "cause" or "effect" in every language, so it is asked in
English; translate-test translates what stands before it.
"""

from __future__ import annotations

from collections.abc import Sequence

from . import kardesnlu
from .folder import FolderTask
from .hub import HubSet
from .layout import Layout
from .table import Table

QUESTIONS = {"cause": "What was the cause?", "effect": "What happened as a result?"}

CODES: dict[str, str | None] = {
    "en": "eng_Latn",
    "et": "est_Latn",
    "ht": "hat_Latn",
    "id": "ind_Latn",
    "it": "ita_Latn",
    "qu": "quy_Latn",
    "sw": "swh_Latn",
    "ta": "tam_Taml",
    "th": "tha_Thai",
    "tr": "tur_Latn",
    "vi": "vie_Latn",
    "zh": "zho_Hans",
}
NOTES = {"qu": "Eastern Apurímac Quechua; read as quy_Latn (Ayacucho Quechua), its nearest relative in NLLB-200"}

_ENGLISH = Table(("premise", "question"), choices=("choice1", "choice2"), id="idx", words={"question": QUESTIONS})


def _kardes(id: str, text: Sequence[str]) -> Table:
    premise, first, second = text
    return Table(
        (premise, "asks-for"),
        choices=(first, second),
        label="most-plausible-alternative",
        id=id,
        base=1,
        words={"asks-for": QUESTIONS},
    )


XCOPA = FolderTask(
    name="xcopa",
    about="The task (XCOPA) is to pick the likelier one of two causes or effects of an event.",
    labels=("1", "2"),
    tables=(_ENGLISH, _kardes("id", ("p_translation", "a1_translation", "a2_translation"))),
    english="en",
    mt_codes=CODES | kardesnlu.CODES,
    hubs=(HubSet("cambridgeltl/xcopa", {code: code for code in CODES if code != "en"}, closed=True),),
    layouts=(
        Layout(),
        Layout("{language}/{split}.{language}"),
        Layout("data/{language}/{split}.{language}"),
        Layout("{name}/xcopa.{split}.{language}", names=kardesnlu.NAMES, endings=(".csv",)),
        Layout("Data/{name}/xcopa.{split}.{language}", names=kardesnlu.NAMES, endings=(".csv",)),
    ),
    kind="choice",
    notes=NOTES | kardesnlu.NOTES,
    fixed_words=tuple(QUESTIONS.values()),
)

COPA = FolderTask(
    name="copa",
    about="The task (COPA) is to pick the likelier one of two causes or effects of an event.",
    labels=("1", "2"),
    tables=(_ENGLISH,),
    english="en",
    mt_codes={"en": "eng_Latn"},
    hubs=(HubSet("aps/super_glue", {"en": "copa"}, closed=True),),
    layouts=(Layout(), Layout("{split}", languages=("en",), endings=(".jsonl",))),
    kind="choice",
    fixed_words=tuple(QUESTIONS.values()),
)
