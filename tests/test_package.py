"""What a wheel holds by setup.py, and what the commands say that need more than that."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from mtllm_fast import cli
from mtllm_fast.commands import evidence
from mtllm_fast.commands.recipe_file import names
from mtllm_fast.miniworld import demo
from tests.conftest import REPO


@pytest.fixture
def packaged(monkeypatch: pytest.MonkeyPatch) -> set[Path]:
    """The files of a wheel, relative to the repository; nothing is built."""
    options: dict = {}
    monkeypatch.setattr("setuptools.setup", options.update)
    monkeypatch.chdir(REPO)
    runpy.run_path("setup.py")
    found: set[Path] = set()
    for package in options["packages"]:
        folder = Path(options["package_dir"].get(package, package.replace(".", "/")))
        found.update(folder.glob("*.py"))
        for pattern in options["package_data"].get(package, ()):
            found.update(path for path in folder.glob(pattern) if path.is_file())
    return found


def test_a_wheel_holds_the_library_and_no_evidence(packaged: set[Path]) -> None:
    tops = {path.parts[0] for path in packaged}
    assert tops == {"mtllm_fast", "kernels"}
    sources = {p.relative_to(REPO) for top in tops for p in (REPO / top).rglob("*.py")}
    assert {path for path in packaged if path.suffix == ".py"} >= {p for p in sources if p.parts[1] != "kernels"}
    needed = (
        "demo/assets/english.txt",
        "demo/assets/test/swh_Latn.txt",
        "reporting/templates/report.html.j2",
        "py.typed",
        "recipes/mt_llm.yaml",
    )
    assert packaged >= {Path("mtllm_fast") / name for name in needed}
    assert {path.stem for path in packaged if path.parent.name == "recipes"} == set(names())
    assert not [path for path in packaged if path.suffix == ".safetensors"]
    assert sum(path.stat().st_size for path in packaged) < 3 * 2**20


@pytest.mark.parametrize("command", [["bench", "--list"], ["bench"], ["report", "bench.json"]])
def test_the_benchmarks_are_missed_in_one_line(command: list[str], tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(evidence, "CHECKOUT", tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.main(command)
    said = capsys.readouterr()
    assert (ended.value.code, said.out, said.err.count("\n")) == (2, "", 1)
    assert "pip install --editable" in said.err


def test_another_package_called_benchmarks_is_not_taken_for_ours(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    import benchmarks

    assert evidence.benchmarks("registry").__file__ == str(REPO / "benchmarks" / "registry.py")
    monkeypatch.setattr(benchmarks, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(ValueError, match="hides the benchmarks of this library"):
        evidence.benchmarks("registry")


def test_the_worlds_models_are_missed_in_one_line(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(demo, "ASSETS", tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.main(["demo", "--world", "--output", str(tmp_path / "run")])
    said = capsys.readouterr()
    assert (ended.value.code, said.out, said.err.count("\n")) == (2, "", 1)
    assert "--from-scratch" in said.err
    assert not (tmp_path / "run").exists()
