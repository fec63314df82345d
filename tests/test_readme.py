"""The README's Python runs as it stands, with tiny models in place of the named ones."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from mtllm_fast import MTLLM
from tests.conftest import REPO
from tests.tiny import LINES


def _blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (REPO / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def test_training_loop(encoder_folder: str, llm_folder: str) -> None:
    code = next(block for block in _blocks() if "MTLLM.stack" in block)
    for name, folder in (
        ("facebook/nllb-200-distilled-600M", encoder_folder),
        ("meta-llama/Meta-Llama-3-8B-Instruct", llm_folder),
    ):
        assert name in code
        code = code.replace(name, folder)
    assert len([line for line in code.splitlines() if line.strip() and "import" not in line]) <= 10
    scope: dict = {"batches": [LINES] * 15, "__name__": "readme"}
    losses: list[float] = []
    code = code.replace(".backward()  #", ".backward(); record(terms)  #")
    scope["record"] = lambda terms: losses.append(float(terms["pooled_mse"].sum.detach()))
    exec(compile(code, "README.md", "exec"), scope)
    assert len(losses) == 15
    assert losses[-1] < losses[0]


def test_engine(encoder_folder: str, llm_folder: str, tmp_path: Path) -> None:
    code = next(block for block in _blocks() if "engine.encode" in block)
    MTLLM.stack(encoder_folder, llm_folder).save_pretrained(tmp_path / "run")
    assert "runs/adapted" in code
    scope: dict = {}
    exec(compile(code.replace("runs/adapted", str(tmp_path / "run")), "README.md", "exec"), scope)
    assert scope["embeddings"].shape == (2, scope["engine"].model.hidden_size)
    assert bool(torch.as_tensor(scope["embeddings"]).isfinite().all())


def test_linear_kl_alone() -> None:
    code = next(block for block in _blocks() if "linear_kl(" in block)
    student = torch.randn(7, 16, requires_grad=True)
    scope = {"student_states": student, "teacher_states": torch.randn(7, 16), "lm_head_weight": torch.randn(40, 16)}
    exec(compile(code, "README.md", "exec"), scope)
    assert student.grad is not None
    assert float(student.grad.abs().max()) > 0
    assert float(scope["count"]) == 7


def test_files_named_in_the_readme_exist() -> None:
    tree = (REPO / "README.md").read_text(encoding="utf-8").split("## Files")[1]
    names = re.findall(r"^(?:  )?(\S+/)(?: |$)|(\w+\.py)", tree, re.MULTILINE)
    found = [a or b for a, b in names]
    assert len(found) > 8
    for name in found:
        assert list(REPO.glob(name.rstrip("/"))) or list(REPO.glob(f"*/{name.rstrip('/')}")), name
