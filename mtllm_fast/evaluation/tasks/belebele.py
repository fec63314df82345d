"""Belebele (Bandarkar et al., ACL 2024): reading comprehension, 4 choices, 122 language variants, 900 rows each.

* Published zip and hub repository: `<language>.jsonl` (also below `data/`), a test set. Hub `facebook/belebele`.
* Training set (English, 67.5 thousand rows and 3.7 thousand for validation, from RACE, SciQ and others): the
  `belebele_training_set.tsv` that the set's `assemble_training_set.py` writes, `eng_Latn_{train,validation}.parquet` of
  the authors of MT-LLM, or hub `WueNLP/belebele-fleurs-train-val-text`.

A row reads `passage question`, then the choices; `correct_answer_num` counts from 1. The id is link and question
number.
"""

from __future__ import annotations

from .folder import FolderTask
from .hub import HubSet
from .layout import Layout
from .table import Table

# FLORES-200 codes, which NLLB-200 uses verbatim; the six romanised variants are not among its languages. They run with
# an explicit language map, e.g. hin_Latn=hin_Deva.
WITHOUT_MT_CODE = ("arb_Latn", "ben_Latn", "hin_Latn", "npi_Latn", "sin_Latn", "urd_Latn")

LANGUAGES = tuple(
    """
    acm_Arab afr_Latn als_Latn amh_Ethi apc_Arab arb_Arab arb_Latn ars_Arab ary_Arab arz_Arab asm_Beng azj_Latn
    bam_Latn ben_Beng ben_Latn bod_Tibt bul_Cyrl cat_Latn ceb_Latn ces_Latn ckb_Arab dan_Latn deu_Latn ell_Grek
    eng_Latn est_Latn eus_Latn fin_Latn fra_Latn fuv_Latn gaz_Latn grn_Latn guj_Gujr hat_Latn hau_Latn heb_Hebr
    hin_Deva hin_Latn hrv_Latn hun_Latn hye_Armn ibo_Latn ilo_Latn ind_Latn isl_Latn ita_Latn jav_Latn jpn_Jpan
    kac_Latn kan_Knda kat_Geor kaz_Cyrl kea_Latn khk_Cyrl khm_Khmr kin_Latn kir_Cyrl kor_Hang lao_Laoo lin_Latn
    lit_Latn lug_Latn luo_Latn lvs_Latn mal_Mlym mar_Deva mkd_Cyrl mlt_Latn mri_Latn mya_Mymr nld_Latn nob_Latn
    npi_Deva npi_Latn nso_Latn nya_Latn ory_Orya pan_Guru pbt_Arab pes_Arab plt_Latn pol_Latn por_Latn ron_Latn
    rus_Cyrl shn_Mymr sin_Latn sin_Sinh slk_Latn slv_Latn sna_Latn snd_Arab som_Latn sot_Latn spa_Latn srp_Cyrl
    ssw_Latn sun_Latn swe_Latn swh_Latn tam_Taml tel_Telu tgk_Cyrl tgl_Latn tha_Thai tir_Ethi tsn_Latn tso_Latn
    tur_Latn ukr_Cyrl urd_Arab urd_Latn uzn_Latn vie_Latn war_Latn wol_Latn xho_Latn yor_Latn zho_Hans zho_Hant
    zsm_Latn zul_Latn
    """.split()  # noqa: SIM905
)
_TEST = tuple(f"mc_answer{i}" for i in range(1, 5))
_TRAIN = tuple(f"answer{i}" for i in range(1, 5))

BELEBELE = FolderTask(
    name="belebele",
    about="The task (Belebele) is to pick the right one of four answers to a question about a short passage. The same "
    "passages are given in every language.",
    labels=("1", "2", "3", "4"),
    tables=(
        Table(
            ("flores_passage", "question"),
            choices=_TEST,
            label="correct_answer_num",
            id=("link", "question_number"),
            base=1,
        ),
        Table(
            ("passage", "question"),
            choices=_TRAIN,
            label="correct_answer_num",
            id=("dataset", "passage_id", "question_id"),
            base=1,
            split="split",
        ),
        Table(("passage", "question"), choices=_TRAIN, label="correct_answer_num", base=1),
    ),
    english="eng_Latn",
    mt_codes={code: None if code in WITHOUT_MT_CODE else code for code in LANGUAGES},
    hubs=(
        HubSet("facebook/belebele"),
        HubSet("WueNLP/belebele-fleurs-train-val-text", {"eng_Latn": "default"}, closed=True),
    ),
    layouts=(
        Layout(),
        Layout("{language}", splits=("test",), known=True),
        Layout("data/{language}", splits=("test",), known=True),
        Layout("{language}_{split}", known=True),
        Layout("belebele_training_set.tsv", languages=("eng_Latn",), splits=("train", "dev")),
    ),
    kind="choice",
)
