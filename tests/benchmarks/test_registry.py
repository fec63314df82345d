"""The registered cases: gates that can fail, a broken kernel that gets no speed, sizes, sources, `pytest --benchmark`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from benchmarks import ceilings, registry, run, sources
from benchmarks.common import DTYPES, Record, relative_error, write
from benchmarks.registry import Case, Study, Work
from tests.conftest import REPO

CEILINGS = {"copy": 1e10, "gemm_fp32": 1e11, "gemm_bf16": 1e11}
ONCE = run.Measuring(repeats=1, memory=False)
CASES = {name: case for name, case in registry.load().items() if isinstance(case, Case)}


def warm(case: Case):
    return case.build(case.warm, DTYPES["fp32"], "cpu")


def test_what_the_issue_asks_for_is_registered() -> None:
    kernels = {"packed_projection", "pooled_mse", "paired_mse", "linear_kl", "attention", "lora"}
    pipelines = {"pack_collate", "adaptation_step", "task_distillation_step", "encode", "translate"}
    assert kernels | pipelines <= set(registry.CASES)
    assert {"ours", "ours-moments", "unfused", "compile", "chunked", "liger-chunked"} <= set(
        CASES["linear_kl"].variants
    )
    for case in registry.CASES.values():
        assert case.about
        assert isinstance(case, Study) or case.work or case.floor_variant or case.name == "joint_pass"
        assert sources.sources_hash(case.sources), case.name


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("translate", "joint_pass")])
def test_every_variant_is_right_and_its_gate_can_fail(name: str) -> None:
    case = CASES[name]
    problem = warm(case)
    want = case.reference(case.small(problem) if case.small else problem)
    tolerance = case.tolerance["fp32"]
    for key, right in want.items():  # negative controls: zeros, and a tenth of it scaled by 1.05
        assert relative_error(torch.zeros_like(right), right) > tolerance, key
        wrong = right.detach().double().clone().flatten()
        order = wrong.abs().argsort(descending=True)[: max(1, wrong.numel() // 10)]
        wrong[order] *= 1.05
        assert relative_error(wrong.view_as(right), right) > tolerance, key
    for variant, spec in case.variants.items():
        if spec.missing("cpu") or spec.slow or "compiler" in spec.needs or (spec.applies and not spec.applies(problem)):
            continue
        verdict, errors = registry.gate(case, variant, problem, "fp32")
        assert verdict == ("pass" if spec.gated else "none"), (variant, errors)


def test_a_slow_product_is_measured_on_a_part() -> None:
    sides: list[int] = []

    def product(x: torch.Tensor, y: torch.Tensor) -> None:
        assert x.shape == y.shape and x.is_contiguous()
        sides.append(len(x))
        time.sleep(0.1 if len(x) >= slow else 0.0)

    whole, slow = torch.ones(1024, 1024), 512
    rate = ceilings.gemm_rate(whole, whole, product)
    assert set(sides) == {256, 512}
    assert 0 < rate <= 2 * 512**3 / 0.1
    sides.clear()
    slow = 2048
    assert ceilings.gemm_rate(whole, whole, product) > rate
    assert set(sides) == {256, 512, 1024}


def test_a_broken_kernel_gets_no_speed_and_fails_the_run(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    case = CASES["pooled_mse"]
    right = case.variants["ours"]

    def broken(problem):
        out = right.run(problem)
        out["gradient"] = out["gradient"] * 1.01
        return out

    monkeypatch.setitem(case.variants, "ours", replace(right, run=broken))
    size = {"label": "warm", **case.warm}
    records = run.run_case(case, size, "cpu", "fp32", ceilings=CEILINGS, how=ONCE)
    by = {r.variant: r for r in records}
    assert by["ours"].gate == "fail"
    assert (by["ours"].time_ms, by["ours"].round_ms, by["ours"].peak_incremental_mib) == (None, [], None)
    assert by["padded"].gate == "pass"
    assert by["padded"].time_ms > 0
    assert run.failed(records) == ["pooled_mse warm ours"]
    run.print_table(records)
    assert "no speed is reported" in capsys.readouterr().out

    monkeypatch.setattr(ceilings, "measure", lambda device: CEILINGS)
    arguments = ["pooled_mse", "--device", "cpu", "--quick", "--repeats", "1", "--no-memory", "--variants", "ours"]
    assert run.main(arguments) == 1


def test_a_variant_that_breaks_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    case = CASES["pooled_mse"]
    size = {"label": "warm", **case.warm}

    def breaks(problem):
        raise RuntimeError("no kernel image is available")

    def too_large(problem):
        raise torch.OutOfMemoryError("CUDA out of memory")

    aims = {"warm": (("ours", "padded", "time", 1.0),)}
    monkeypatch.setattr(run, "chosen", lambda names: [replace(case, aims=aims)])
    for failing, gate, note in (
        (breaks, "fail", "RuntimeError: no kernel image"),
        (too_large, "pass", "out of memory"),
    ):
        changed = replace(case.variants["padded"], run=failing, gated=gate == "fail")
        monkeypatch.setitem(case.variants, "padded", changed)
        records = run.run_case(case, size, "cpu", "fp32", ceilings=CEILINGS, how=ONCE)
        by = {r.variant: r for r in records}
        assert note in by["padded"].notes and by["padded"].time_ms is None
        assert (by["padded"].gate == "fail") == (gate == "fail")
        assert by["ours"].time_ms > 0
        run.print_table(records)
        assert "ours / padded" not in capsys.readouterr().out


@pytest.mark.parametrize("at", ["a gate", "a round", "a memory"])
def test_a_run_that_is_ended_loses_no_more_than_what_it_was_at(
    monkeypatch: pytest.MonkeyPatch, tmp_path, at: str
) -> None:
    """As at a time-out: the other variants of the same size are in the file, with times."""
    case, path = CASES["pooled_mse"], tmp_path / "found.json"
    last = list(case.variants)[-1]
    names = ("padded", "ours") if at == "a memory" else ("ours", "padded", last)
    calls = {"runs": 0}

    def ends(problem):
        calls["runs"] += 1
        if at == "a gate" or (at == "a round" and calls["runs"] > 4):  # once before the rounds, warm-up, a round
            raise KeyboardInterrupt
        return case.variants[last].run(problem)

    def memory(case, size, name, *rest):
        if name == "padded":
            raise KeyboardInterrupt
        return 7.0

    monkeypatch.setattr(run, "measure_memory", memory)
    monkeypatch.setattr(ceilings, "measure", lambda device: CEILINGS)
    changed = {name: case.variants[name] for name in names}
    if at != "a memory":
        changed[last] = replace(case.variants[last], run=ends, gated=False)
    changed_case = replace(case, variants=changed, sizes={**case.sizes, "cpu": ({"label": "warm", **case.warm},)})
    monkeypatch.setattr(run, "chosen", lambda names: [changed_case])
    with pytest.raises(KeyboardInterrupt):
        run.run(("pooled_mse",), how=run.Measuring(repeats=3), path=path)
    by = {row["variant"]: row for row in json.loads(path.read_text())}
    assert list(by) == (["padded", "ours"] if at == "a memory" else ["ours", "padded"] + [last] * (at == "a round"))
    for row in by.values():
        assert row["time_ms"] > 0
        assert len(row["round_ms"]) == {"a gate": 0, "a round": 1, "a memory": 3}[at]
        assert (row["notes"] == run.PROVISIONAL) == (at == "a gate")
        assert row["variant"] == last or row["gate"] == "pass"
    assert [row["peak_incremental_mib"] for row in by.values()] == [None] * len(by)


def test_results_are_never_half_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    path = tmp_path / "found.json"
    write(path, [{"variant": "ours"}])

    def ends(self, text):
        with self.open("w") as file:
            file.write(text[:3])
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.write_text", ends)
    with pytest.raises(KeyboardInterrupt):
        write(path, [{"variant": "ours"}, {"variant": "theirs"}])
    monkeypatch.undo()
    assert json.loads(path.read_text()) == [{"variant": "ours"}]


def test_a_red_case_has_no_speedup_in_a_report(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.report.throughput import speedups

    record = Record("c", {"T": 1}, "fp32", "cpu", "ours", "fail", size="s", ours=True)
    other = Record("c", {"T": 1}, "fp32", "cpu", "padded", "pass", time_ms=2.0, size="s")
    assert speedups([record, other]) == []
    assert len(speedups([replace(record, gate="pass", time_ms=1.0), other])) == 1


def test_sizes_of_another_device_are_never_built() -> None:
    step = CASES["adaptation_step"]
    assert "llm" not in step.size("web text, KL", "cpu")  # the 8-billion-parameter one has the same label
    assert step.size("web text, KL", "cuda")["llm"][0] == 4096
    with pytest.raises(ValueError, match="NLI, KL"):
        step.size("no such", "cpu")
    assert CASES["linear_kl"].size("8x16x32", "cpu")["vocab"] == 32
    with pytest.raises(ValueError, match="ROWSxWIDTHxVOCAB"):
        CASES["linear_kl"].size("8x16", "cpu")


def test_bad_options_are_one_line() -> None:
    for arguments, message in (
        ({"names": ("linear_lk",)}, "linear_kl"),
        ({"names": ("lora",), "how": run.Measuring(variants=("no",))}, "variant 'no'"),
        ({"how": run.Measuring(repeats=0)}, "repeats=0"),
        ({"device": "tpu"}, "device='tpu'"),
    ):
        with pytest.raises(ValueError, match=message):
            run.run(**arguments)


def test_floor_is_the_slower_of_bytes_and_flops() -> None:
    assert ceilings.floor_ms(1e10, 0, "fp32", CEILINGS) == 1000
    assert ceilings.floor_ms(0, 2e11, "fp32", CEILINGS) == 2000
    assert ceilings.floor_ms(1e10, 2e11, "fp16", CEILINGS) == 2000
    record = Record("c", {}, "fp32", "cpu", "ours", "pass", ceilings=CEILINGS)
    run.set_floor(record, Work(1e9, 1e9))
    assert record.floor_ms == 100


def test_the_hash_sees_code_and_nothing_else(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sources.ROOTS, "kernels", tmp_path)
    path = tmp_path / "a.py"

    def hashed(text: str) -> str:
        path.write_text(text)
        return sources.sources_hash(("kernels/*.py",))

    first = hashed('"""Docs."""\n\ndef f(x):\n    """More."""\n    return x + 1\n')
    assert hashed('"""Other docs,\nlonger."""\n# a comment\ndef f(x):\n\n    # why\n    return x + 1\n') == first
    assert hashed("def f(x):\n    return x + 2\n") != first
    assert sources.sources_hash(("kernels/none*.py",)) == ""


def test_memory_is_measured_in_a_process_of_its_own() -> None:
    case = CASES["pooled_mse"]
    size = {"label": "some", "lengths": "padding 25%", "count": 64, "width": 16, "out": 2048}
    problem = case.build(size, torch.float32, "cpu")
    found = run.measure_memory(case, size, "padded", "fp32", "cpu", problem)
    padded = 64 * 64 * 2048 * 4 / 2**20  # the gradient of the padded states, at least
    assert padded * 0.9 < found < padded * 12


def test_the_benchmark_flag(tmp_path, request: pytest.FixtureRequest) -> None:
    """Plain pytest collects no benchmark; with the flag nothing else is; pytest-benchmark's own JSON works."""
    pytest.importorskip("pytest_benchmark")
    assert not any("bench_cases" in item.nodeid for item in request.session.items)
    file = tmp_path / "b.json"
    command = [sys.executable, "-m", "pytest", "--benchmark", "-k", "paired_mse and ours", f"--benchmark-json={file}"]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # no xdist worker
    done = subprocess.run(command, cwd=REPO, env=alone, capture_output=True, text=True, timeout=300)
    assert "1 passed" in done.stdout, done.stdout + done.stderr
    assert "paired_mse, NLI, small" in done.stdout
    (found,) = json.loads(file.read_text())["benchmarks"]
    assert "bench_cases.py" in found["fullname"]
    assert found["extra_info"]["gate"] == "pass"
    assert found["extra_info"]["floor_ms"] > 0


@pytest.mark.parametrize(
    ("asked", "said"),
    [({"sizes": ["xnli"]}, "sizes="), ({"how": run.Measuring(variants=("ours",))}, "variants=")],
)
def test_a_part_of_a_study_is_refused_and_not_left_out(asked, said) -> None:
    with pytest.raises(ValueError, match=rf"{said}.*: encode measures itself as a whole"):
        run.run(("encode",), **asked)
