"""Which languages an encoder has read before, for tables that keep them apart from those it has not.

The list is XLM-RoBERTa's (arXiv 1911.02116, appendix A: CC-100), which multilingual-E5 starts from (arXiv 2402.05672),
as FLORES-200 codes; where CC-100 has a macrolanguage, its standard variety: Arabic is arb_Arab, Norwegian nob_Latn,
Albanian als_Latn. Breton, Western Frisian and Latin have no FLORES-200 code; romanised corpora are left out.
"""

from __future__ import annotations

XLM_R = frozenset(
    """
    afr_Latn als_Latn amh_Ethi arb_Arab asm_Beng azj_Latn bel_Cyrl ben_Beng bos_Latn bul_Cyrl cat_Latn ces_Latn cym_Latn
    dan_Latn deu_Latn ell_Grek eng_Latn epo_Latn est_Latn eus_Latn fin_Latn fra_Latn gaz_Latn gla_Latn gle_Latn glg_Latn
    guj_Gujr hau_Latn heb_Hebr hin_Deva hrv_Latn hun_Latn hye_Armn ind_Latn isl_Latn ita_Latn jav_Latn jpn_Jpan kan_Knda
    kat_Geor kaz_Cyrl khk_Cyrl khm_Khmr kir_Cyrl kmr_Latn kor_Hang lao_Laoo lit_Latn lvs_Latn mal_Mlym mar_Deva mkd_Cyrl
    mya_Mymr nld_Latn nob_Latn npi_Deva ory_Orya pan_Guru pbt_Arab pes_Arab plt_Latn pol_Latn por_Latn ron_Latn rus_Cyrl
    san_Deva sin_Sinh slk_Latn slv_Latn snd_Arab som_Latn spa_Latn srp_Cyrl sun_Latn swe_Latn swh_Latn tam_Taml tel_Telu
    tgl_Latn tha_Thai tur_Latn uig_Arab ukr_Cyrl urd_Arab uzn_Latn vie_Latn xho_Latn ydd_Hebr zho_Hans zho_Hant zsm_Latn
    """.split()  # noqa: SIM905
)
