"""A task from outside: one file that describes it, and one line that lists it; or any object that is a `Task`."""

import importlib.util

import pytest

from mtllm_fast.data import TextRow
from mtllm_fast.evaluation import TASKS, Task, evaluate, get_task
from mtllm_fast.evaluation.rows import task_sources
from mtllm_fast.reporting import read_scores, write_report
from tests.evaluation.fakes import FakeEngine

FILE = '''
"""Moods: how a line sounds, 3 labels, 3 languages. Files `<language>.<split>.csv`; one language has no MT code."""

from mtllm_fast.evaluation.tasks.folder import FolderTask
from mtllm_fast.evaluation.tasks.layout import Layout
from mtllm_fast.evaluation.tasks.table import Table

MOODS = FolderTask(
    name="moods",
    labels=("low", "calm", "high"),
    tables=(Table(text="line", label="mood", id="number", base=1),),
    english="english",
    mt_codes={"english": "eng_Latn", "swahili": "swh_Latn", "sindarin": None},
    layouts=(Layout("{language}.{split}", known=True),),
    notes={"swahili": "coastal"},
    about="The task is to hear how a line sounds.",
)
'''


@pytest.fixture
def source(tmp_path):
    for language in ("english", "swahili", "sindarin"):
        for split in ("train", "test"):
            lines = [f"{split}{i},{language} k{i % 3} and more,{i % 3 + 1}\n" for i in range(9)]
            (tmp_path / f"{language}.{split}.csv").write_text("number,line,mood\n" + "".join(lines))
    return tmp_path


def test_one_file_and_one_line(source, tmp_path, monkeypatch):
    (tmp_path / "moods.py").write_text(FILE)
    spec = importlib.util.spec_from_file_location("moods", tmp_path / "moods.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(ValueError, match=r"task='moods': expected one of sib200"):
        get_task("moods")
    monkeypatch.setitem(TASKS, "moods", module.MOODS)  # the line

    scores = evaluate(
        {"model": FakeEngine(["high", "low", "calm"]), "adapted": FakeEngine()},
        "moods",
        source,
        language_map={"sindarin": "eng_Latn"},
        alignment=True,
        progress=False,
        resamples=50,
    )
    head, probe = scores.models
    assert scores.languages == ("english", "sindarin", "swahili") == tuple(head.languages)
    assert (head.method, probe.method) == ("task head", "linear probe")
    assert head.languages["swahili"].mt_code == "swh_Latn" and head.languages["sindarin"].mapped
    assert probe.mean() == 1.0 > head.mean()  # FakeEngine's logits are in the order of the words, not of its labels
    assert "swahili: coastal" in scores.issues
    paths = write_report(scores, tmp_path / "report")
    assert read_scores(paths["json"]) == [scores] and "hear how a line sounds" in paths["html"].read_text()
    sources = list(task_sources(get_task("moods"), source, ["swahili"], {"swahili": "swh_Latn"}, limit=2))
    assert [(one.mt_code, one.language, one.field) for one in sources] == [("swh_Latn", "swahili", "text")] * 2


class InMemory:
    """No more than a `Task` must have."""

    name, kind, labels, english, default_source, notes = "memory", "classification", ("a", "b"), "en", "nowhere", {}

    def languages(self, source):
        return ["en", "sw"]

    def splits(self, source, language):
        return ("train", "test")

    def mt_code(self, language):
        return {"en": "eng_Latn", "sw": "swh_Latn"}[language]

    def rows(self, source, language, split="test", *, limit=None, labelled=True):
        code = self.mt_code(language)
        return [TextRow(f"{code} k{i % 2}", code, label=i % 2, id=f"{split}{i}") for i in range(6)][:limit]


def test_any_task_will_do():
    assert isinstance(InMemory(), Task)
    scores = evaluate(FakeEngine(classes=2), InMemory(), alignment=True, limit=4, progress=False, resamples=50)
    assert {code: score.accuracy for code, score in scores.models[0].languages.items()} == {"en": 1.0, "sw": 1.0}
    assert scores.models[0].languages["sw"].alignment and scores.source == "nowhere"
