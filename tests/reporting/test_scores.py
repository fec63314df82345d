import json
import stat

import pytest

from mtllm_fast.evaluation.results import NO_MT_CODE, LanguageScore, ModelScores, Scores
from mtllm_fast.reporting import print_scores, read_scores, to_markdown, write_report
from mtllm_fast.reporting.score_figure import sorted_languages


def make(languages, models=2):
    def score(code, number):
        mapped = code == "l01_Latn"
        value = (languages.index(code) + number) / (len(languages) + models)
        return LanguageScore("eng_Latn" if mapped else code, mapped, 10, value, value / 2, 0, 0.5)

    missing = languages[-1]
    found = [
        ModelScores(
            f"runs/model|{number}",
            "task head",
            {code: score(code, number) for code in languages if code != missing},
            {missing: NO_MT_CODE},
            notes=["a note that both share"],
            counts={"truncated": number},
        )
        for number in range(models)
    ]
    return Scores(
        "mini", "data", "test", ("a", "b", "c"), "l00_Latn", tuple(languages), {"l01_Latn": "eng_Latn"}, found, limit=10
    )


SCORES = make([f"l{i:02}_Latn" for i in range(9)])


def test_console_names_everything(capsys):
    from rich.console import Console

    print_scores(SCORES, Console(width=160))
    out = capsys.readouterr().out
    assert all(code in out for code in SCORES.languages)
    assert "no MT code" in out
    assert "eng_Latn (mapped)" in out
    assert "l01_Latn as eng_Latn" in out
    assert "l08_Latn: no MT code; name one with a language map" in out
    assert out.count("a note that both share") == 1
    assert "rows/s" in out
    assert "only the first 10 rows" in out


def test_markdown_tables_are_regular():
    text = to_markdown(SCORES, figure="scores.png")
    assert "![Accuracy by language](scores.png)" in text
    assert "runs/model\\|0" in text
    blocks = [block.split("\n") for block in text.split("\n\n") if block.startswith("|")]
    assert len(blocks) == 2
    for lines in blocks:
        assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    assert len(blocks[1]) == 2 + 9 + 3  # head, languages, three means
    mean = SCORES.models[0].mean("accuracy", SCORES.foreign())
    assert f"| non-English mean |  |  | {100 * mean:.1f} |" in text


def test_write_and_read_back(tmp_path):
    paths = write_report(SCORES, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["scores.json", "scores.md", "scores.png"]
    assert read_scores(paths["json"]) == SCORES
    content = json.loads(paths["json"].read_text())
    assert content["models"][0]["mean"]["non_english"]["languages"] == 7
    assert content["models"][0]["rows_per_s"] == pytest.approx(20.0)
    assert stat.S_IMODE(paths["json"].stat().st_mode) & 0o444 == stat.S_IMODE((tmp_path / "out").stat().st_mode) & 0o444
    with pytest.raises(ValueError, match=r"output=.*holds a report already"):
        write_report(SCORES, tmp_path / "out")
    write_report(SCORES, tmp_path / "out", overwrite=True)


def test_nothing_half_written(tmp_path, monkeypatch):
    from mtllm_fast.reporting import scores as module

    monkeypatch.setattr(module, "to_json", lambda scores: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(SCORES, tmp_path)
    assert not (tmp_path / "scores.json").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"output=.*expected a folder"):
        write_report(SCORES, tmp_path / "file")


@pytest.mark.parametrize("count", [2, 9, 205])
def test_figure_is_legible(tmp_path, count):
    """Every label has its own place: the panel height gives each row at least its font's height."""
    from matplotlib.image import imread

    from mtllm_fast.reporting import score_figure

    scores = make([f"l{i:02}_Latn" for i in range(count)])
    score_figure.draw_scores(scores, tmp_path / "f.png")
    height, width = imread(tmp_path / "f.png").shape[:2]
    panels = -(-count // score_figure._ROWS_PER_PANEL)
    rows = -(-count // panels)
    assert (height - 1.5 * 150) / rows > 7 / 72 * 150  # pixels per row against a 7-point font at 150 dpi
    assert max(width, height) < 3000


def test_languages_are_sorted_by_the_first_model():
    order = sorted_languages(SCORES)
    assert order[0] == "l07_Latn"
    assert order[-2:] == ["l00_Latn", "l08_Latn"]


def test_bad_files(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        read_scores(tmp_path / "none.json")
    (tmp_path / "x.json").write_text('{"models": ')
    with pytest.raises(ValueError, match="not JSON"):
        read_scores(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(ValueError, match="not a file written by"):
        read_scores(tmp_path / "x.json")


def test_import_is_light():
    import subprocess
    import sys

    code = "import sys, mtllm_fast.reporting.scores; print('matplotlib' in sys.modules, 'torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["False", "False"]
