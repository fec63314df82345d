"""Faults in what goes on after a kill: locks, atomic writes, marks, keys."""

from __future__ import annotations

from .planted import Mutant, planted

DURABLE = ("tests/jobs/test_durable.py",)
CHECKPOINT = ("tests/jobs/test_checkpoint.py",)
LEDGER = ("tests/jobs/test_ledger.py",)

MUTANTS: list[Mutant] = [
    *planted(
        "jobs", "mtllm_fast/jobs/durable.py", DURABLE,
        ("            if is_at(handle, self.path):\n                break", "            if True:\n                break"),
        ("if is_at(handle, self.path):  # else", "if True:  # else"),
        ("self.path.unlink(missing_ok=True)", "pass"),
        ("        sync(temporary)\n", ""),
        ("        temporary.unlink(missing_ok=True)\n        raise", "        raise"),
        ("    sync(path.parent)\n", ""),
    ),
    *planted(
        "jobs", "mtllm_fast/jobs/durable.py", CHECKPOINT,
        ("if size != is_to_be[\"bytes\"]:", "if size > is_to_be[\"bytes\"]:"),
        ("if sha256_of(folder / name) != is_to_be[\"sha256\"]:", "if False:"),
        ("if p.is_file() and p.name != MARKER)", "if p.is_file() and p.parent == folder)"),
    ),
    *planted(
        "jobs", "mtllm_fast/jobs/checkpoint.py", CHECKPOINT,
        ("for path in reversed(checkpoints(folder)):", "for path in checkpoints(folder):"),
        ("if step_of(path) <= step_of(newest)]", "]"),
        ("if best is None or path.name != Path(best).name:", "if True:"),
    ),
    *planted(
        "jobs", "mtllm_fast/jobs/ledger.py", LEDGER,
        ("for name in {**now, **before}", "for name in now"),
        ("for name in {**now, **before}", "for name in {**before, **now}"),
        ("if before.get(name) != now.get(name)]", "if name not in before or before[name] != now.get(name)]"),
    ),
]  # fmt: skip
