"""Scores made from invented cells, so that intervals, gaps and groups are the real code's."""

from __future__ import annotations

import numpy as np

from mtllm_fast.evaluation.aggregate import ModelCells, summarise
from mtllm_fast.evaluation.cells import Cell
from mtllm_fast.evaluation.languages import describe
from mtllm_fast.evaluation.results import NO_MT_CODE, Scores
from mtllm_fast.evaluation.tasks.sib200 import LANGUAGES

LABELS = ("a", "b", "c")


def cell(right, rows=30, mt_code="eng_Latn", **fields):
    """A cell whose first `right` predictions are right."""
    gold = np.arange(rows) % 3
    predictions = np.where(np.arange(rows) < right, gold, (gold + 1) % 3)
    logits = np.eye(3, dtype=np.float32)[predictions]
    return Cell(logits, predictions, gold, tuple(map(str, range(rows))), mt_code, **{"time_s": 0.5, **fields})


def make_scores(languages=9, names=("runs/model|0", "translate-test"), *, seeds=1, alignment=False, task="mini"):
    """Scores of `languages` languages of SIB-200 (the last one not run), English among them."""
    codes = list(languages) if not isinstance(languages, int) else ["eng_Latn", *LANGUAGES[: languages - 1]]
    codes = list(dict.fromkeys(codes))
    models = []
    for number, name in enumerate(names):
        runs = []
        for seed in range(seeds if name != "translate-test" else 1):
            run = {
                code: cell(5 + (index * (3 + number) + seed) % 24, mt_code=code, mapped=index == 1)
                for index, code in enumerate(codes[:-1])
            }
            runs.append({**run, codes[-1]: Cell.without_rows(NO_MT_CODE)})
        metrics = dict.fromkeys(("to_english", "from_english", "mexa", "cosine", "cka"), 0.25)
        aligned = [dict.fromkeys(codes[1:-1], metrics)] * seeds if alignment and name != "translate-test" else []
        method = "translate-test" if name == "translate-test" else "task head"
        models.append(ModelCells(name, method, ["a note that both share"], runs, aligned))
    reference = "translate-test" if "translate-test" in names else None
    described = {code: describe(code) for code in codes}
    return Scores(
        task,
        "data",
        "test",
        LABELS,
        "eng_Latn",
        tuple(codes),
        {codes[1]: "eng_Latn"},
        summarise(models, described, english="eng_Latn", num_classes=3, reference=reference, resamples=200),
        limit=10,
        reference=reference,
        resamples=200,
        described=described,
    )
