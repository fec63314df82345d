"""The README's Python runs as it stands, with tiny models in place of the named ones."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from mtllm_fast import MTLLM
from tests.conftest import REPO
from tests.tiny import LINES


def _blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (REPO / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def test_first_lines(encoder_folder: str, llm_folder: str, capsys) -> None:
    """The first block of Python: five lines, behind a line of installation."""
    readme = (REPO / "README.md").read_text(encoding="utf-8")
    code = _blocks()[0]
    assert readme.index("pip install") < readme.index(code) < readme.index("## ")
    assert len([line for line in code.splitlines() if line.strip()]) == 5
    for name, folder in (("models/e5-small", encoder_folder), ("models/smollm2-135m", llm_folder)):
        assert name in code and f"--output {name}" in readme
        code = code.replace(name, folder)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out == "(2, 48)\n"


def test_training_loop(encoder_folder: str, llm_folder: str, tmp_path: Path, monkeypatch) -> None:
    code = next(block for block in _blocks() if "DistillationLoss" in block)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "english.txt").write_text("\n".join(LINES * 15) + "\n", encoding="utf-8")
    assert "batch_size=32" in code
    code = code.replace("batch_size=32", f"batch_size={len(LINES)}")
    for name, folder in (
        ("facebook/nllb-200-distilled-600M", encoder_folder),
        ("meta-llama/Meta-Llama-3-8B-Instruct", llm_folder),
    ):
        assert name in code
        code = code.replace(name, folder)
    assert len([line for line in code.splitlines() if line.strip() and "import" not in line]) <= 12
    scope: dict = {"__name__": "readme"}
    losses: list[float] = []
    code = code.replace(".backward()  #", ".backward(); record(terms)  #")
    scope["record"] = lambda terms: losses.append(float(terms["pooled_mse"].sum.detach()))
    exec(compile(code, "README.md", "exec"), scope)
    assert len(losses) == 15
    assert losses[-1] < losses[0]


def test_engine(encoder_folder: str, llm_folder: str, tmp_path: Path) -> None:
    first, second = (block for block in _blocks() if "engine.encode" in block)
    MTLLM.stack(encoder_folder, llm_folder).save_pretrained(tmp_path / "run")
    folders = {
        "models/e5-small": encoder_folder,
        "models/smollm2-135m": llm_folder,
        "runs/adapted": str(tmp_path / "run"),
    }
    assert "models/e5-small" in first and "runs/adapted" in second
    for code in (first, second):
        for name, folder in folders.items():
            code = code.replace(name, folder)
        scope: dict = {}
        exec(compile(code, "README.md", "exec"), scope)
        assert scope["embeddings"].shape == (2, scope["engine"].model.hidden_size)
        assert bool(torch.as_tensor(scope["embeddings"]).isfinite().all())


def test_linear_kl_alone() -> None:
    code = next(block for block in _blocks() if "linear_kl(" in block)
    scope: dict = {}
    exec(compile(code, "README.md", "exec"), scope)
    assert float(scope["student_states"].grad.abs().max()) > 0
    assert float(scope["count"]) == len(scope["student_states"])


def test_planted_faults_are_those_of_the_results() -> None:
    readme = (REPO / "README.md").read_text(encoding="utf-8")
    counts = json.loads((REPO / "benchmarks/results/cpu/mutants.json").read_text(encoding="utf-8"))["counts"]
    assert f"[{counts['found']} of {counts['planted']} single-line faults]" in readme
    assert counts["found"] + counts["equivalent"] == counts["planted"] == counts["run"]


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/guide.md", "docs/results.md"])
def test_links_lead_somewhere(page: str) -> None:
    path = REPO / page
    targets = re.findall(r"\]\(([^)#]+)", path.read_text(encoding="utf-8"))
    for target in targets:
        assert "://" in target or (path.parent / target).exists(), target
    assert targets


def test_files_named_in_the_readme_exist() -> None:
    tree = (REPO / "README.md").read_text(encoding="utf-8").split("## Files")[1]
    names = re.findall(r"^(?:  )?(\S+/)(?: |$)|(\w+\.py)", tree, re.MULTILINE)
    found = [a or b for a, b in names]
    assert len(found) > 8
    for name in found:
        assert list(REPO.glob(name.rstrip("/"))) or list(REPO.glob(f"*/{name.rstrip('/')}")), name
