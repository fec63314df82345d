"""`evaluate` on the published files, with an engine that costs nothing."""

import pytest

from mtllm_fast.evaluation import evaluate
from mtllm_fast.evaluation.tasks import TASKS
from tests.evaluation.fakes import FakeEngine

NLI = TASKS["americasnli"].labels


class Constant(FakeEngine):
    """Always the first label."""

    def classify(self, rows):
        logits = super().classify(rows)
        logits[:] = 0
        logits[:, 0] = 1
        return logits


@pytest.mark.parametrize(("split", "rows"), [("dev", 743), ("test", 750)])
def test_translate_test_from_the_published_translations(data_root, split, rows):
    teacher = Constant(NLI, side="llm")
    scores = evaluate(
        {"reads it itself": Constant(NLI, side="llm")},
        "americasnli",
        data_root / "americasnli",
        split=split,
        translations=data_root / "amnli_nllb600m",
        teacher=teacher,
        resamples=100,
        progress=False,
    )
    test = scores.models[1]
    assert {code: one.rows for code, one in test.languages.items()} == {"aym": rows, "gn": rows, "quy": rows}
    assert set(test.skipped.values()) == {"no translations"}
    assert len(test.skipped) == 7
    assert not any(name.startswith("translations_") for name, count in test.counts.items() if count)
    assert all(row.language == "eng_Latn" for row in teacher.seen)
    for code in ("aym", "gn", "quy"):  # the same answer to the same rows: joined by id, the gap is nothing
        gap = scores.models[0].languages[code].gap
        assert (gap.accuracy, gap.low, gap.high, gap.p) == (0.0, 0.0, 0.0, 1.0)
    assert scores.models[0].groups["overall"]["shared"].languages == 3


def test_two_hundred_languages_in_groups(data_root):
    task = TASKS["sib200"]
    scores = evaluate(
        Constant(task.labels, side="llm", classes=7), task, data_root / "sib200", resamples=20, progress=False
    )
    (model,) = scores.models
    assert len(model.languages) == 205
    assert {one.rows for one in model.languages.values()} == {204}
    assert {one.accuracy for one in model.languages.values()} == {51 / 204}  # science/technology
    assert sum(one.languages for one in model.groups["family"].values()) == 204  # without English
    assert "unknown" not in model.groups["family"]
    assert "unknown" not in model.groups["script"]
    assert set(model.groups["resource"]) == {"unknown", *(f"class {n}" for n in range(6))}
    # bam_Latn holds Kikuyu rows, and seven evaluation rows stand in their training split (SOURCE.md): two of them are dev
    assert any(line.startswith("6 rows whose text also stands in the training split") for line in scores.issues), (
        scores.issues
    )
