import csv
import errno
import io
import json
import re
import stat

import pytest

from mtllm_fast.reporting import print_scores, read_scores, to_markdown, write_report
from mtllm_fast.reporting.numbers import to_csv, to_groups_csv
from mtllm_fast.reporting.score_figure import sorted_languages
from mtllm_fast.reporting.scores import to_latex
from mtllm_fast.reporting.table import latex_escape
from mtllm_fast.reporting.tables import tables
from tests.reporting.made import make_scores

SCORES = make_scores(seeds=3, alignment=True)
LAST = SCORES.languages[-1]
ENDINGS = ("-groups.csv", "-times.json", ".csv", ".html", ".json", ".md", ".png", ".tex")


def test_console_names_everything(capsys):
    from rich.console import Console

    print_scores(SCORES, Console(width=160))
    out = capsys.readouterr().out
    assert all(code in out for code in SCORES.languages)
    assert "no MT code" in out
    assert "eng_Latn (mapped)" not in out
    assert f"{SCORES.languages[1]} (mapped)" in out
    assert f"{LAST}: no MT code; name one with a language map" in out
    assert out.count("a note that both share") == 1
    assert "rows/s" in out
    assert "3 seeds" in out
    assert "gap to translate-test: " in out
    assert "only the first 10 rows" in out


def test_markdown_tables_are_regular():
    text = to_markdown(SCORES, figure="scores.png")
    assert "![Accuracy by language](scores.png)" in text
    assert "model\\|0" in text
    assert "rows/s" not in text
    blocks = [block.split("\n") for block in text.split("\n\n") if block.startswith("|")]
    assert len(blocks) == len(tables(SCORES)) == 6  # overview, alignment, family, script, resource, languages
    for lines in blocks:
        assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    assert len(blocks[-1]) == 2 + 9 + 2  # head, languages, two means
    mean = SCORES.models[0].mean("accuracy", SCORES.foreign())
    assert f"| **non-English mean** |  |  |  | **{100 * mean:.1f}** |" in text


def test_write_and_read_back(tmp_path):
    paths = write_report(SCORES, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"scores{ending}" for ending in ENDINGS]
    assert read_scores(paths["json"]) == [SCORES]
    content = json.loads(paths["json"].read_text())["tasks"][0]
    assert content["models"][0]["mean"]["non_english"]["languages"] == 7
    assert "time_s" not in paths["json"].read_text()
    times = json.loads(paths["times"].read_text())
    assert times["mini"]["runs/model|0"]["rows_per_s"] == pytest.approx(60.0)
    assert stat.S_IMODE(paths["json"].stat().st_mode) & 0o444 == stat.S_IMODE((tmp_path / "out").stat().st_mode) & 0o444
    with pytest.raises(ValueError, match=r"output=.*holds a report already"):
        write_report(SCORES, tmp_path / "out")
    write_report(SCORES, tmp_path / "out", overwrite=True)


def test_same_scores_give_the_same_bytes(tmp_path):
    """Times are the one thing that may differ, and they have their own file."""
    import dataclasses

    again = make_scores(seeds=3, alignment=True)
    for model in again.models:
        model.languages = {
            code: dataclasses.replace(one, time_s=one.time_s + 1) for code, one in model.languages.items()
        }
    first, second = write_report(SCORES, tmp_path / "a"), write_report(again, tmp_path / "b")
    differ = {name for name in first if first[name].read_bytes() != second[name].read_bytes()}
    assert differ == {"times"}


def test_tasks_of_a_suite_share_a_report(tmp_path):
    other = make_scores(5, names=("only",), task="other")
    paths = write_report([SCORES, other], tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == {"scores-mini.png", "scores-other.png"}
    assert [scores.task for scores in read_scores(paths["json"])] == ["mini", "other"]
    assert {row["task"] for row in csv.DictReader(io.StringIO(paths["csv"].read_text()))} == {"mini", "other"}
    with pytest.raises(ValueError, match="there are none"):
        write_report([], tmp_path)


def test_nothing_half_written(tmp_path, monkeypatch):
    from mtllm_fast.reporting import scores as module

    monkeypatch.setattr(module, "to_json", lambda scores: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(SCORES, tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"output=.*expected a folder"):
        write_report(SCORES, tmp_path / "file")


def test_disk_full_keeps_the_old_report(tmp_path, monkeypatch):
    from pathlib import Path

    paths = write_report(SCORES, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(self, *arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left on device"):
        write_report(make_scores(7), tmp_path, overwrite=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.suffix != ".png"} == {
        name: content for name, content in before.items() if not name.endswith(".png")
    }
    assert read_scores(paths["json"]) == [SCORES]


def test_csv_has_the_numbers():
    rows = list(csv.DictReader(io.StringIO(to_csv([SCORES]))))
    assert len(rows) == 2 * 9
    one = next(row for row in rows if row["model"] == "runs/model|0" and row["language"] == "ace_Latn")
    score = SCORES.models[0].languages["ace_Latn"]
    assert float(one["accuracy"]) == pytest.approx(score.accuracy, rel=1e-5)
    assert float(one["accuracy_low"]) <= score.accuracy <= float(one["accuracy_high"])
    assert float(one["gap"]) == pytest.approx(score.gap.accuracy, abs=1e-5)
    assert float(one["p"]) <= float(one["p_holm"])
    described = [one[name] for name in ("name", "family", "script", "resource")]
    assert described == ["Acehnese", "Austronesian", "Latin", "class 1"]
    assert one["mexa"] == "0.25"
    skipped = [row for row in rows if row["skipped"]]
    assert {row["language"] for row in skipped} == {LAST}
    assert all(row["accuracy"] == "" for row in skipped)
    groups = list(csv.DictReader(io.StringIO(to_groups_csv([SCORES]))))
    assert {row["grouping"] for row in groups} == {"overall", "family", "script", "resource"}


def test_latex_is_balanced_and_escaped():
    scores = make_scores(60, names=("runs/a_b & 50%", "translate-test"), task="sib_200")
    text = to_latex([scores, SCORES])
    stack = []
    for kind, name in re.findall(r"\\(begin|end)\{(\w+)\}", text):
        if kind == "begin":
            stack.append(name)
        else:
            assert stack.pop() == name
    assert not stack
    assert "longtable" in text
    plain = re.sub(r"\\[\\{}%&#_$]", "", text)
    assert plain.count("{") == plain.count("}")
    assert plain.count("$") % 2 == 0
    assert r"a\_b \& 50\%" in text
    body = re.search(r"\\begin\{tabular\}\{(\w+)\}(.*?)\\end\{tabular\}", text, re.DOTALL)
    columns, lines = body.group(1), [line for line in body.group(2).split("\n") if line.endswith(r"\\")]
    assert all(len(re.findall(r"(?<!\\)&", line)) == len(columns) - 1 for line in lines)
    assert latex_escape(r"\x_{y}~50%^$#&") == (r"\textbackslash{}x\_\{y\}\textasciitilde{}50\%\textasciicircum{}\$\#\&")


@pytest.mark.parametrize("count", [2, 9, 205])
def test_figure_is_legible(tmp_path, count):
    """Every label has its own place: the panel height gives each row at least its font's height."""
    from matplotlib.image import imread

    from mtllm_fast.reporting import score_figure

    scores = make_scores(count + 1)
    score_figure.draw_scores(scores, tmp_path / "f.png")
    height, width = imread(tmp_path / "f.png").shape[:2]
    panels = -(-count // score_figure._ROWS_PER_PANEL)
    rows = -(-count // panels)
    assert (height - 1.5 * 150) / rows > 7 / 72 * 150  # pixels per row against a 7-point font at 150 dpi
    assert max(width, height) < 3000


def test_languages_are_sorted_by_the_first_model():
    order = sorted_languages(SCORES)
    values = [SCORES.models[0].languages[code].accuracy for code in order[:-1]]
    assert values == sorted(values, reverse=True)
    assert order[-1] == LAST


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no such file"),
        ('{"models": ', "not JSON"),
        ("[]", "not a file written by"),
        ('{"format": 2, "tasks": [{}]}', "not a file written by"),
    ],
)
def test_bad_files(tmp_path, text, said):
    if text is not None:
        (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=said):
        read_scores(tmp_path / "x.json")


def test_import_is_light():
    import subprocess
    import sys

    code = "import sys, mtllm_fast.reporting.scores; print('matplotlib' in sys.modules, 'torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["False", "False"]
