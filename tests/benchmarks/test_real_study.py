"""The study on real weights: its numbers from predictions, its texts, and the README's blocks made from its results."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks.real import readme, study, study_table
from mtllm_fast.evaluation.aggregate import ModelCells, summarise
from mtllm_fast.evaluation.languages import describe
from mtllm_fast.evaluation.statistics import RESAMPLES
from tests.conftest import REPO
from tests.reporting import made

SHARED = REPO.parent / "shared" / "data"


def of(output: Path, seeds: list[int]) -> study_table.Study:
    return study_table.Study(output, "sib200", "SIB-200", seeds)


@pytest.mark.parametrize("page", readme.BLOCKS)
def test_blocks_are_those_of_the_committed_results(page: str) -> None:
    text = (REPO / page).read_text(encoding="utf-8")
    assert readme.with_blocks(page, text) == text
    name = next(iter(readme.BLOCKS[page]))
    with pytest.raises(ValueError, match=f"{page}: has no <!-- {name}:begin -->"):
        readme.with_blocks(page, "nothing")


def write_cells(output: Path, right: dict[str, list[list[int]]], codes: tuple[str, ...]) -> None:
    """Cells of two seeds, for each seed one list of hits a language."""
    for system, cells in right.items():
        for index, cell in enumerate(cells):
            folder = output / "sib200/suite/cells/read before" / system / f"seed {1 + index // len(codes)}"
            folder.mkdir(parents=True, exist_ok=True)
            gold = 3 + np.arange(len(cell))
            content = {"predictions": np.where(np.array(cell) == 1, gold, 0), "gold": gold}
            save_file(content, folder / f"{codes[index % len(codes)]}.safetensors")


def test_rows_are_paired_over_languages_and_seeds(tmp_path: Path) -> None:
    """Two seeds and two languages of three parallel rows, by hand."""
    right = {
        "MT-LLM": [[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 0, 0]],
        "other": [[0, 1, 0], [0, 0, 0], [1, 1, 1], [0, 0, 0]],
    }
    codes = ("deu_Latn", "swh_Latn")
    write_cells(tmp_path, right, codes)
    ours, theirs = (study_table.hits(of(tmp_path, [0, 1]), "read before", name, codes) for name in right)
    assert {code: rows.tolist() for code, rows in ours.items()} == {"deu_Latn": [1, 1, 0.5], "swh_Latn": [1, 0, 0]}
    assert {code: rows.tolist() for code, rows in theirs.items()} == {"deu_Latn": [0.5, 1, 0.5], "swh_Latn": [0, 0, 0]}
    middle, low, high = study_table.difference(ours, theirs)
    assert middle == pytest.approx(0.25)
    assert (low, high) == pytest.approx((0.0, 0.75))  # only the first row differs: drawn never, or always


def test_the_report_pairs_as_the_cells_do() -> None:
    """What MT-LLM has more by the suite's own gaps, and by the rows themselves."""
    cells = {
        name: {
            code: made.cell(right, mt_code=code) for code, right in zip(("eng_Latn", "deu_Latn", "swh_Latn"), rights)
        }
        for name, rights in {"MT-LLM": (25, 20, 9), "other": (28, 11, 14)}.items()
    }
    models = [ModelCells(name, "task head", [], [one]) for name, one in cells.items()]
    described = {code: describe(code) for code in cells["other"]}
    ours, theirs = summarise(
        models, described, english="eng_Latn", num_classes=3, reference="MT-LLM", resamples=RESAMPLES
    )
    assert study_table.ours_minus(ours.overall("non_english").gap) is None
    hits = [
        {code: (one.predictions == one.gold).astype(float) for code, one in cells[name].items() if code != "eng_Latn"}
        for name in ("MT-LLM", "other")
    ]
    found = study_table.ours_minus(theirs.overall("non_english").gap)
    assert found == pytest.approx(study_table.difference(*hits), abs=1e-6)
    assert found != pytest.approx(study_table.difference(*reversed(hits)), abs=1e-2), "the control: the other way round"
    scores = replace(made.make_scores(3), models=[ours, theirs], english="eng_Latn")
    assert study_table.of_english(scores, "other")["accuracy"] == pytest.approx(28 / 30)


def test_languages_of_unequal_rows(tmp_path: Path) -> None:
    """AmericasNLI: a mean over languages, not over rows; one of a single row moves the interval by its half alone."""
    codes = ("aym", "oto")
    write_cells(tmp_path, {"MT-LLM": [[1, 1, 1, 0], [1]], "other": [[1, 1, 0, 0], [0]]}, codes)
    ours, theirs = (study_table.hits(of(tmp_path, [0]), "read before", name, codes) for name in ("MT-LLM", "other"))
    middle, low, high = study_table.difference(ours, theirs)
    assert middle == pytest.approx((0.25 + 1.0) / 2)
    assert low == pytest.approx(0.5) and 0.75 <= high <= 1.0  # aym's only differing row is drawn never, or often


def test_the_sets_of_nli(tmp_path: Path) -> None:
    """Two sets, one read before and one not; languages asked for go to the set that has them, unknown ones to none."""
    for folder, codes in {"xnli": ("en", "de", "sw"), "americasnli": ("aym", "bzd")}.items():
        for code in codes:
            (tmp_path / folder / code).mkdir(parents=True)
            header = "id\tlanguage\tpremise\thypothesis\tlabel\n" if folder == "americasnli" else ""
            (tmp_path / folder / code / "dev.tsv").write_text(header + ("1\tx\t" if header else "") + "a\tb\tneutral\n")
    options = argparse.Namespace(task="nli", data=tmp_path, languages=None)
    groups = study.groups_of(options)
    assert {name: (one["task"], one["languages"]) for name, one in groups.items()} == {
        "read before": ("xnli", ["en", "de", "sw"]),
        "not read before": ("americasnli", ["aym", "bzd"]),
    }
    options.languages = ["sw", "aym"]
    assert [one["languages"] for one in study.groups_of(options).values()] == [["en", "sw"], ["aym"]]
    options.languages = ["sw", "swh_Latn"]
    with pytest.raises(SystemExit, match="--languages: swh_Latn: not of nli"):
        study.groups_of(options)


def test_lines_on_retrieval_and_translate_test() -> None:
    share = {"to_english": 0.5, "interval": [0.25, 0.75]}
    systems = {"MT-LLM": {"groups": {"read before": {"retrieval": share}}}, "old": {"groups": {"read before": {}}}}
    assert study_table.retrieved({"rows": 40, "systems": systems})[-1] == "- MT-LLM: 50.0 [25, 75] (read before)"
    assert len(study_table.retrieved({"rows": 40, "systems": systems})) == 4
    assert study_table.retrieved({"systems": {"old": systems["old"]}}) == []
    own = {"accuracy": 0.5, "interval": [0.25, 0.75]}
    ours = {"accuracy": 0.75, "interval": [0.5, 1.0], "gap": [0.25, -0.125, 0.5]}
    found = {"translated": {"por_Latn": {"rows": 8, "systems": {"MT-LLM": ours, "translate-test": own}}}}
    assert study_table.translated(found)[-1] == (
        "- por_Latn, 8 rows: translate-test 50.0 [25, 75]; MT-LLM 75.0 [50, 100], +25.0 [-12.5, +50.0] against it"
    )
    assert study_table.translated({}) == study_table.translated({"translated": None}) == []


def test_the_systems_of_a_study() -> None:
    assert list(study.systems([0, 500, 2000], anew=True).items())[3:] == [
        ("stack without stage 1", "stack-0"),
        ("stack, 500 texts", "stack-500"),
        ("MT-LLM", "stack-2000"),
        ("MT-LLM, adapter anew", "stack-2000-anew"),
    ]
    assert list(study.systems([0, 500], stacks=True)) == ["stack without stage 1", "MT-LLM"]
    assert study.command("adapt", {"lora.dropout": 0.0, "over_variance": True})[-3:] == [
        "--lora.dropout",
        "0.0",
        "--over-variance",
    ]
    assert study.command("distill", {"watch.languages": ["a", "b"]})[-3:] == ["--watch.languages", "a", "b"]


@pytest.mark.skipif(not SHARED.is_dir(), reason="no evaluation data beside the project")
def test_texts_are_english_lines_in_one_order(tmp_path: Path) -> None:
    count = study.write_texts(SHARED, tmp_path / "a.txt")
    assert study.write_texts(SHARED, tmp_path / "b.txt") == count
    lines = (tmp_path / "a.txt").read_text(encoding="utf-8").splitlines()
    assert (tmp_path / "a.txt").read_bytes() == (tmp_path / "b.txt").read_bytes()
    assert len(lines) == len(set(lines)) == count
    pairs = json.loads((SHARED / "mnli_sample/en/train.json").read_text(encoding="utf-8"))
    assert " ".join(pairs["0"]["text_a"].split()) in lines


def test_cpu_seconds_of_a_run_and_its_resume(tmp_path: Path) -> None:
    def run(code: str) -> float | None:
        log = tmp_path / "seed-0/sib200/stack-8.log"
        log.write_text("")
        for part in code:
            study_lines = {"s": "python -m mtllm_fast.cli distill --x\n", "c": "CPU-seconds: 12.5\n", "o": "step 3\n"}
            log.write_text(log.read_text() + study_lines[part])
        return study_table.of_log(log)

    (tmp_path / "seed-0/sib200").mkdir(parents=True)
    assert run("sosoc") is None  # stopped, and what it took until then is not known
    assert run("soc") == 12.5
    assert run("socsoc") == 25.0
    (tmp_path / "seed-0/adapted-8.log").write_text("python -m mtllm_fast.cli adapt --x\nCPU-seconds: 30\n")
    (tmp_path / "seed-0/sib200/stack-8").mkdir()
    (tmp_path / "seed-0/sib200/stack-8/result.json").write_text('{"best_eval_accuracy": 0.5}')
    found = study_table.of_training(of(tmp_path, [0, 1]), "stack-8")
    assert found == {"cpu_seconds": [55], "english_validation": [0.5]}


def test_the_chosen_checkpoint_and_the_best_in_hindsight(tmp_path: Path) -> None:
    folder = tmp_path / "seed-4/sib200/stack-8"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text('{"best_step": 44, "best_eval_accuracy": 0.75}')
    entries: list[dict] = []
    for step, english, deu, swh in ((22, 0.5, 0.75, 0.5), (44, 0.75, 0.5, 0.25), (66, 0.75, 0.5, 0.5)):
        entries += [{"step": step, "eval_accuracy": english}, {"step": step, "loss": 1.0}]
        entries += [{"step": step, "watch_deu_accuracy": deu, "watch_swh_accuracy": swh, "watch_deu_rows": 40}]
    entries += [{"step": 88, "eval_accuracy": 1.0}]  # nobody looked
    entries += [{"step": 11, "watch_deu_accuracy": 0.75, "watch_swh_accuracy": 0.75}]  # and nobody chose
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, entries)))
    assert study_table.of_checkpoints(of(tmp_path, [4]), "stack-8") == [
        {
            "seed": 4,
            "steps": [11, 22, 44, 66],
            "english_validation": [None, 0.5, 0.75, 0.75],
            "watched": [0.75, 0.625, 0.375, 0.5],
            "chosen": 0.375,
            "hindsight": 0.75,
        }
    ]


def test_the_block_of_stage_ones_texts() -> None:
    def system(accuracy: float, seeds: list[float], gain: list[float] | None, used: list[int]) -> dict:
        group = {"accuracy": accuracy, "interval": [accuracy - 0.1, accuracy + 0.1], "seeds": seeds}
        return {"groups": {"read before": {**group, "ours_minus_it": gain}}, "training": {"cpu_seconds": used}}

    results = {
        "task": "SIB-200", "rows": 40, "dtype": "float32", "seeds": [0, 1], "languages": {"read before": ["deu_Latn"]},
        "texts": {"stack without stage 1": 0, "MT-LLM": 8000},
        "english": {key: {"accuracy": 0.9, "interval": [0.8, 1.0]} for key in ("stack without stage 1", "MT-LLM")},
        "systems": {
            "encoder, probe": system(0.1, [0.1, 0.1], [0.5, 0.5, 0.5], []),
            "stack without stage 1": system(0.5, [0.48, 0.52], [0.125, 0.05, 0.2], [100, 120]),
            "MT-LLM": system(0.625, [0.625, 0.625], None, [900, 1100]),
        },
        "checkpoints": [{"steps": [22, 44], "chosen": 0.5, "hindsight": 0.625}],
    }  # fmt: skip
    lines = readme.curve_block(results)
    assert "| 0 | 90.0 [80, 100] | 50.0 [40, 60] | 48.0, 52.0 | 110 |" in lines
    assert "| 8,000 | 90.0 [80, 100] | 62.5 [52, 72] | 62.5, 62.5 | 1000 |" in lines
    assert "- 8,000 texts against 0: +12.5 [+5.0, +20.0] (read before)" in lines
    assert not any("probe" in line for line in lines)
    assert any("lie 0.0 to 4.0 points apart here" in line for line in lines)
    assert lines[-1].endswith("chose has 50.0 % there, the best in hindsight 62.5 %.")
