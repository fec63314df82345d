"""The experiment's tasks ask what they say, its cells are made once, and its report says what the figures say."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.miniworld.ambiguity import AmbiguousWorld
from benchmarks.miniworld.cells import ExperimentConfig, kind_rows
from benchmarks.miniworld.curves import with_typos
from benchmarks.miniworld.experiment import SYSTEMS, run_experiment
from benchmarks.miniworld.report import crossing, estimate, report
from benchmarks.miniworld.topics import say, topic_task, unlabelled_topics
from mtllm_fast.miniworld.languages import ENGLISH
from mtllm_fast.miniworld.world import World

TINY = ExperimentConfig(
    texts=40, unlabelled=40, train_rows=24, dev_rows=12, test_rows=4, rows=16, teacher_steps=1, encoder_steps=1,
    adapt_steps=1, task_steps=1, distill_steps=1, num_beams=1, longer_adaptation=(2,), lengths=(1, 3), typos=(0.0, 0.2), mt_steps=1, curve_rows=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def world() -> World:
    return World(seed=0)


@pytest.fixture(scope="module")
def ambiguous() -> AmbiguousWorld:
    return AmbiguousWorld(seed=0, high=600, low=300)


def test_more_than_half_of_a_text_is_of_its_kind(world: World) -> None:
    for text, label in topic_task(world, "test", 120, (1, 2, 3, 4, 6, 8)):
        kinds = Counter(world.kinds[clause.subjects[0]][0] for clause in text)
        assert 2 * kinds[world.categories[label]] > len(text)
        assert {world.noun_split[clause.subjects[0]] for clause in text} == {"test"}
    lengths = Counter(len(text) for text, _ in topic_task(world, "train", 60, (2, 5)))
    assert lengths == {2: 30, 5: 30}
    assert topic_task(world, "test", 9, (3,)) == topic_task(world, "test", 9, (3,))
    with pytest.raises(ValueError, match="split"):
        topic_task(world, "dev", 1, (1,))
    spoken = say(world, "xba_Cyrl", topic_task(world, "test", 1, (4,))[0][0])
    assert spoken and spoken != say(world, ENGLISH, topic_task(world, "test", 1, (4,))[0][0])
    assert all(unlabelled_topics(world, 20, (1, 4)))


def test_a_word_with_two_senses_means_two_nouns_of_different_kinds(ambiguous: AmbiguousWorld) -> None:
    for code, senses in ambiguous.two_senses.items():
        assert set(senses) == set(ambiguous.test_nouns)
        words = Counter(senses.values())
        assert set(words.values()) == {2}
        assert not set(words) & set(ambiguous.languages[code].words.values())
        for word in words:
            one, other = (noun for noun, spoken in senses.items() if spoken == word)
            assert ambiguous.kinds[one][0] != ambiguous.kinds[other][0]


def test_parallel_text_uses_both_senses_and_the_clear_words(ambiguous: AmbiguousWorld) -> None:
    code = "xaa_Latn"
    noun = ambiguous.test_nouns[0]
    word, clear = ambiguous.two_senses[code][noun], ambiguous.languages[code].words[noun]
    pairs = list(ambiguous.parallel(code))
    with_word = [english for foreign, english in pairs if word in foreign]
    assert any(noun in english.split() for english in with_word)
    assert any(noun not in english.split() for english in with_word)  # the other sense
    assert any(clear in foreign and noun in english.split() for foreign, english in pairs)


def test_topics_of_the_ambiguous_world_are_told_by_their_other_words(ambiguous: AmbiguousWorld) -> None:
    for text, label in ambiguous.topic_task("test", 24):
        nouns = [noun for clause in text for noun in clause.subjects]
        assert {ambiguous.kinds[noun][0] for noun in nouns} == {ambiguous.categories[label]}
        clear, unclear = (ambiguous.say("xda_Deva", text, chosen) for chosen in ((), nouns))
        assert clear != unclear
        assert ambiguous.say(ENGLISH, text, nouns) == ambiguous.say(ENGLISH, text)


def test_typos_are_as_many_as_asked_for() -> None:
    text = "tozibis tomukfon zoyuj kuzu " * 200
    letters = sum(letter != " " for letter in text)
    assert with_typos(text, 0.0, random.Random(0)) == text
    spoilt = with_typos(text, 0.3, random.Random(0))
    assert spoilt.count(" ") == text.count(" ")
    assert spoilt != text and abs(len(spoilt.replace(" ", "")) - letters) < 0.1 * letters


def test_estimates_are_students() -> None:
    assert estimate([0.5]).mean == 0.5 and math.isnan(estimate([0.5]).half)
    found = estimate([1.0, 2.0, 3.0])
    assert found.mean == 2.0 and found.half == pytest.approx(
        2.484, abs=1e-3
    )  # scipy.stats.t.interval(0.95, 2, 2, 1/3**.5)
    with pytest.raises(ValueError, match="none given"):
        estimate([])


def test_the_crossing_is_where_the_lead_begins_for_good() -> None:
    assert crossing((1, 2, 3, 4), (0.5, 0.5, 0.5, 0.5), (0.9, 0.7, 0.4, 0.2)) == pytest.approx(2 + 2 / 3)
    assert crossing((1, 2, 3), (0.9, 0.4, 0.9), (0.5, 0.5, 0.5)) == pytest.approx(2.2)
    assert crossing((1, 2), (0.9, 0.9), (0.5, 0.5)) == 1
    assert crossing((1, 2), (0.9, 0.4), (0.5, 0.5)) is None


def test_labelled_texts_in_free_english_keep_their_labels(world: World) -> None:
    plain, free = (kind_rows(world, ENGLISH, "train", 50, free=value) for value in (False, True))
    assert [row.label for row in plain] == [row.label for row in free]
    assert any(a.text != b.text for a, b in zip(plain, free, strict=True))


def test_cells_are_made_once_and_the_report_has_every_system(tmp_path: Path) -> None:
    root, said = tmp_path / "run", []
    first = run_experiment(root, seeds=(1,), parts=("matrix",), config=TINY, say=said.append)
    assert set(first["matrix"]["1"]) == set(SYSTEMS)
    made = len(said)
    (root / "matrix" / "seed-1" / "scores" / "full.json").unlink()
    (root / "matrix" / "seed-1" / "full" / "done.json").unlink()
    again = run_experiment(root, seeds=(1,), parts=("matrix",), config=TINY, say=said.append)
    assert again == first
    assert [line.split(":")[0] for line in said[made:]] == ["matrix, seed 1", "  seed-1 full"]
    text = report(root)
    assert all(title in text for title in SYSTEMS.values())
    assert "Stage 1 helps" in text and "cannot be told" in text  # one seed tells nothing
    assert json.loads((root / "results.json").read_text())["matrix"].keys() == SYSTEMS.keys()
    with pytest.raises(ValueError, match="other settings"):
        run_experiment(root, seeds=(1,), config=ExperimentConfig())
    with pytest.raises(ValueError, match="parts"):
        run_experiment(root, seeds=(1,), parts=("speed",), config=TINY)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("x")
    with pytest.raises(ValueError, match="something else"):
        run_experiment(tmp_path / "other", config=TINY)


def test_a_curve_is_reported_with_its_crossing(tmp_path: Path) -> None:
    for seed in (1, 2):
        for clauses, ours, theirs in ((1, 0.9, 1.0), (3, 0.8, 0.7)):
            path = tmp_path / "length" / f"seed-{seed}" / "scores" / f"length-{clauses}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            score = {"mt_llm": ours, "translate_test": theirs, "translate_clauses": 1.0}
            path.write_text(json.dumps({"languages": {"xaa_Latn": score, "xab_Latn": score}}))
    text = report(tmp_path)
    assert "Crossing at 2.00" in text and "2 of 2 languages cross" in text
    assert (tmp_path / "length.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="no finished cell"):
        report(tmp_path / "nothing")
