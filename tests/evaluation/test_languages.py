import csv
from pathlib import Path

import pytest

from mtllm_fast.evaluation import languages as module
from mtllm_fast.evaluation.languages import UNKNOWN, Language, describe
from mtllm_fast.evaluation.tasks import TASKS
from mtllm_fast.evaluation.tasks.nusax import NUSAX
from mtllm_fast.evaluation.tasks.sib200 import LANGUAGES


def test_table_is_clean():
    with (Path(module.__file__).parent / "languages.tsv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    codes = [row["code"] for row in rows]
    assert codes == sorted(set(codes))
    assert all(row["name"] and row["family"] for row in rows)
    assert {row["resource"] for row in rows} == set("-012345")
    assert len({row["name"] for row in rows}) == len(rows)


@pytest.mark.parametrize("task", ["sib200", "nusax", "nli", "americasnli", "xnli", "belebele", "kardesnlu", "xcopa"])
def test_every_language_of_every_task_is_known(task):
    codes = LANGUAGES if task == "sib200" else TASKS[task].mt_codes
    unknown = [code for code in codes if describe(code, TASKS[task].mt_code(code)).family == UNKNOWN]
    assert not unknown


def test_known_answers():
    assert describe("swh_Latn") == Language("swh_Latn", "Swahili", "Atlantic-Congo", "Latin", "class 2")
    assert describe("acehnese", "ace_Latn") == Language("acehnese", "Acehnese", "Austronesian", "Latin", "class 1")
    assert describe("ngaju", NUSAX.mt_code("ngaju")) == Language("ngaju", "Ngaju", "Austronesian", "Latin", UNKNOWN)
    assert describe("arb_Latn", None).script == "Latin"  # its own script, not that of the code it may be read as
    assert describe("arb_Latn", "arb_Arab").name == "Modern Standard Arabic (romanised)"
    assert describe("zho_Hant").script == "Han (traditional)"
    assert describe("eng_Latn").resource == "class 5"


def test_unknown_codes_are_said_to_be_unknown():
    assert describe("xyz_Cyrl") == Language("xyz_Cyrl", "xyz_Cyrl", UNKNOWN, "Cyrillic", UNKNOWN)
    assert describe("my-dialect") == Language("my-dialect", "my-dialect", UNKNOWN, UNKNOWN, UNKNOWN)
    assert describe("my-dialect", "xyz_Taml").script == "Tamil"


def test_two_letter_codes_suggest_their_language_first():
    from mtllm_fast.evaluation.languages import _table
    from mtllm_fast.evaluation.tasks import nearest

    known = {row["code"] for row in _table().values() if "_" in row["code"]}
    for code, first in {
        "en": "eng_Latn",
        "es": "spa_Latn",
        "et": "est_Latn",
        "sw": "swh_Latn",
        "ja": "jpn_Jpan",
    }.items():
        assert nearest(code, known).split(", ")[0] == first, code
    assert nearest("zh", known).startswith("zho_Hans, zho_Hant")
    assert nearest("swh_Lat", known).startswith("swh_Latn")
