from types import SimpleNamespace

import numpy as np
import pytest

from mtllm_fast.evaluation import FolderTask, evaluate
from mtllm_fast.evaluation.results import NO_MT_CODE, Scores
from tests.evaluation.fakes import FakeEngine, write_folder

TASK = FolderTask("mini", ("a", "b", "c"), mt_codes={"eng_Latn": "eng_Latn", "fra_Latn": "fra_Latn", "arb_Latn": None})


@pytest.fixture
def source(tmp_path):
    return write_folder(tmp_path / "data", ("arb_Latn", "eng_Latn", "fra_Latn"))


def run(models, source, **options):
    return evaluate(models, options.pop("task", TASK), source, progress=False, **options)


def test_head_in_another_label_order_is_permuted(source):
    class Reordered(FakeEngine):
        def classify(self, rows):
            return super().classify(rows)[:, [2, 0, 1]]

    scores = run(Reordered(["c", "a", "b"]), source)
    (model,) = scores.models
    assert (model.name, model.method) == ("model", "task head")
    assert {code: (found.rows, found.accuracy, found.macro_f1) for code, found in model.languages.items()} == {
        "eng_Latn": (12, 1.0, 1.0),
        "fra_Latn": (12, 1.0, 1.0),
    }
    unpermuted = run(Reordered(["a", "b", "c"]), source)
    assert unpermuted.models[0].mean() == 0.0


def test_language_without_code_is_named_and_runs_with_a_mapping(source):
    engine = FakeEngine(["a", "b", "c"])
    scores = run(engine, source)
    assert scores.languages == ("arb_Latn", "eng_Latn", "fra_Latn")
    assert scores.models[0].skipped == {"arb_Latn": NO_MT_CODE}
    assert scores.without_mt_code() == ["arb_Latn"]
    assert not any(row.text.startswith("arb_Latn") for row in engine.seen)

    engine = FakeEngine(["a", "b", "c"])
    scores = run(engine, source, language_map={"arb_Latn": "arb_Arab"})
    found = scores.models[0].languages["arb_Latn"]
    assert (found.mt_code, found.mapped, found.rows) == ("arb_Arab", True, 12)
    assert {row.language for row in engine.seen if row.text.startswith("arb_Latn")} == {"arb_Arab"}
    assert scores.language_map == {"arb_Latn": "arb_Arab"}
    assert not scores.models[0].languages["fra_Latn"].mapped


def test_a_mapped_language_need_not_be_chosen(source):
    """One mapping for a whole suite, of which a run may take some languages."""
    mapping = {"arb_Latn": "arb_Arab"}
    scores = run(FakeEngine(["a", "b", "c"]), source, language_map=mapping, languages=["fra_Latn"])
    assert set(scores.models[0].languages) == {"fra_Latn"}


def test_tokenizer_fallback_counts_as_a_mapping(source):
    scores = run(FakeEngine(["a", "b", "c"], fallbacks={"arb_Latn": "arb_Arab"}), source)
    assert (scores.models[0].languages["arb_Latn"].mt_code, scores.models[0].languages["arb_Latn"].mapped) == (
        "arb_Arab",
        True,
    )


def test_a_reader_without_language_codes_runs_everything(source):
    for engine in (FakeEngine(["a", "b", "c"], side="llm"), FakeEngine(["a", "b", "c"], languages=())):
        model = run(engine, source).models[0]
        assert set(model.languages) == {"arb_Latn", "eng_Latn", "fra_Latn"}
        assert model.languages["arb_Latn"].mt_code is None


def test_code_that_the_model_lacks(source):
    model = run(FakeEngine(["a", "b", "c"], languages=("eng_Latn",)), source).models[0]
    assert model.skipped["fra_Latn"] == "MT code fra_Latn unknown to the model"
    m2m = run(FakeEngine(["a", "b", "c"], languages=("__en__",)), source, language_map={"eng_Latn": "en"}).models[0]
    assert m2m.languages["eng_Latn"].mt_code == "__en__"


def test_headless_model_is_probed_on_english(source):
    engine = FakeEngine()
    scores = run({"adapted": engine}, source)
    (model,) = scores.models
    assert model.method == "linear probe"
    assert model.mean() == 1.0
    assert "linear probe" in model.notes[0]
    assert "36 English rows" in model.notes[0]
    fitted_on = engine.seen[: 36 + 12]
    assert all(row.text.startswith("eng_Latn") for row in fitted_on)
    again = run({"adapted": FakeEngine()}, source)
    assert again.models[0].notes == model.notes


def test_probe_source_limit_and_missing_train(source, tmp_path):
    for language in ("eng_Latn", "fra_Latn"):
        for split in ("train", "dev"):
            (source / language / f"{split}.tsv").unlink()
    with pytest.raises(ValueError, match=r"no task head.*has only test for 'eng_Latn'; .*probe_source"):
        run(FakeEngine(), source)
    other = write_folder(tmp_path / "other", ("eng_Latn",))
    (other / "eng_Latn/dev.tsv").unlink()
    scores = run(FakeEngine(), source, probe_source=other, probe_rows=10, limit=5)
    assert "held-out English train" in scores.models[0].notes[0]
    assert "8 English rows" in scores.models[0].notes[0]
    assert scores.models[0].languages["fra_Latn"].rows == 5
    french = write_folder(tmp_path / "french", ("fra_Latn",))
    with pytest.raises(ValueError, match="has no 'eng_Latn'"):
        run(FakeEngine(), french)


class FakeTranslator:
    """Keeps the class word and says that it is English."""

    name, languages, truncated, unfinished = "fake-mt", ("eng_Latn", "fra_Latn", "arb_Arab"), 0, 0
    tokenizer = SimpleNamespace(side=lambda name, rows, ends: None)

    def __init__(self):
        self.asked = []

    def translate_rows(self, rows, target, **decoding):
        from dataclasses import replace

        self.asked.extend(rows)
        self.truncated += 1
        return [replace(row, text="translated " + row.text, language=target) for row in rows]


def test_translate_test_beside_a_model(source):
    translator, teacher = FakeTranslator(), FakeEngine(["a", "b", "c"], side="llm")
    scores = run({"stack": FakeEngine(["a", "b", "c"])}, source, translator=translator, teacher=teacher)
    stack, test = scores.models
    assert (test.name, test.method) == ("translate-test", "translate-test")
    assert test.skipped == {"arb_Latn": NO_MT_CODE}
    assert test.mean() == stack.mean() == 1.0
    assert {row.language for row in translator.asked} == {"fra_Latn"}  # English rows are not translated
    french = [row for row in teacher.seen if "fra_Latn" in row.text]
    assert all(row.text.startswith("translated") and row.language == "eng_Latn" for row in french)
    assert test.counts["truncated_before_translation"] == 2
    assert scores.shared() == ["fra_Latn"]
    only = run({}, source, translator=FakeTranslator(), teacher=teacher)
    assert [model.name for model in only.models] == ["translate-test"]


def test_a_translator_is_loaded_once_and_shared_by_the_seeds(source, monkeypatch):
    loaded = []
    monkeypatch.setattr(
        "mtllm_fast.inference.translator.Translator.from_pretrained",
        lambda name, device: loaded.append((name, device)) or FakeTranslator(),
    )
    teachers = [FakeEngine(["a", "b", "c"], side="llm") for _ in range(2)]
    (baseline,) = run({}, source, translator="an/mt-model", teacher=teachers, device="cpu").models
    assert loaded == [("an/mt-model", "cpu")] and baseline.seeds == 2


def test_progress_names_what_comes_next(source, monkeypatch, capsys):
    monkeypatch.setattr("mtllm_fast.inference.progress.SECONDS_BETWEEN_LINES", -1.0)
    evaluate({"m": FakeEngine(["a", "b", "c"])}, TASK, source, languages=["eng_Latn", "fra_Latn"])
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" languages,")[0] for line in lines] == [f"mini: {n} of 2" for n in (0, 1, 1, 2)]
    assert [line.partition(", now ")[2] for line in lines] == ["m eng_Latn", "", "m fra_Latn", ""]


def test_means_and_json_round_trip(source):
    class Worse(FakeEngine):
        def classify(self, rows):
            rows = list(rows)
            logits = super().classify(rows)
            wrong = np.array([row.text.startswith("fra_Latn") for row in rows])
            logits[wrong] = [[9, 0, 0]]
            return logits

    scores = run({"m": Worse(["a", "b", "c"]), "n": FakeEngine(["a", "b", "c"], side="llm")}, source)
    means = scores.means(scores.models[0])
    assert means["all"]["languages"] == 2
    assert means["all"]["accuracy"] == pytest.approx((1 + 1 / 3) / 2)
    assert means["non_english"]["accuracy"] == pytest.approx(1 / 3)
    assert means["non_english_shared"]["languages"] == 1
    assert scores.means(scores.models[1])["non_english"]["languages"] == 2
    assert Scores.from_dict(scores.to_dict()) == scores
    with pytest.raises(ValueError, match="not a file written by"):
        Scores.from_dict({"task": "x"})


def test_blank_rows_and_truncation_are_counted(source):
    class Cutting(FakeEngine):
        def classify(self, rows):
            rows = list(rows)
            self.truncated += len(rows)
            return super().classify(rows)

    (source / "fra_Latn/test.tsv").write_text('text\tlabel\n" "\ta\nk1 x\tb\n')
    model = run(Cutting(["a", "b", "c"]), source).models[0]
    assert model.languages["fra_Latn"].blank == 1
    assert model.languages["fra_Latn"].rows == 2
    assert model.counts == {"truncated": 14}


def test_a_language_without_the_split_is_named(source):
    (source / "fra_Latn/test.tsv").unlink()
    assert run(FakeEngine(["a", "b", "c"]), source).models[0].skipped["fra_Latn"] == "no test split"
    with pytest.raises(ValueError, match=r"split='test'.*has only train, dev for 'fra_Latn'"):
        run(FakeEngine(["a", "b", "c"]), source, languages="eng_Latn,fra_Latn")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"languages": "eng_Latn,deu_Latn"}, "languages: 'deu_Latn' is not in this source"),
        ({"languages": []}, "languages: none given"),
        ({"languages": "arb_Latn"}, "languages: none of them can be run .arb_Latn: no MT code"),
        ({"split": "validate"}, "split='validate'"),
        ({"language_map": {"arb": "arb_Arab"}}, "language_map: 'arb' is not a language.*nearest: arb_Latn"),
        ({"language_map": {"arb_Latn": "arb_Arb"}}, "language_map: 'arb_Latn' -> 'arb_Arb'.*arb_Arab"),
        ({"translator": "somewhere"}, "translator and teacher"),
        ({"limit": 0}, "limit=0"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"task": "sib"}, "task='sib'"),
    ],
)
def test_bad_arguments(source, options, match):
    with pytest.raises(ValueError, match=match) as caught:
        run(FakeEngine(["a", "b", "c"]), source, **options)
    assert "\n" not in str(caught.value)


def test_models_that_do_not_fit(source):
    with pytest.raises(ValueError, match=r"model='m': its head has the labels x, y, but 'mini' has a, b, c"):
        run({"m": FakeEngine(["x", "y"])}, source)
    with pytest.raises(ValueError, match="its head scores choices"):
        run(FakeEngine(kind="choice"), source)
    with pytest.raises(ValueError, match="models: none given"):
        run({}, source)

    class Broken(FakeEngine):
        def classify(self, rows):
            return np.full_like(super().classify(rows), np.nan)

    with pytest.raises(ValueError, match="not finite"):
        run(Broken(["a", "b", "c"]), source)


def test_label_outside_the_set_costs_its_language_only(source):
    (source / "fra_Latn/test.tsv").write_text("text\tlabel\nx\tz\n")
    scores = run(FakeEngine(["a", "b", "c"]), source)
    assert set(scores.models[0].languages) == {"eng_Latn"}
    assert "row 0: label 'z' is not one of a, b, c" in scores.models[0].skipped["fra_Latn"]
    assert any(line.startswith("fra_Latn left out: ") for line in scores.issues)
    with pytest.raises(ValueError, match=r"fra_Latn/test\.tsv' row 0: label 'z' is not one of a, b, c"):
        run(FakeEngine(["a", "b", "c"]), source, languages="eng_Latn,fra_Latn")
