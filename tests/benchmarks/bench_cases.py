"""The registered cases through pytest-benchmark: `pytest --benchmark`, with all of its options and its JSON.

A variant whose result is wrong fails here and gets no time. `mtllm bench` measures the same cases with the variants
interleaved, and memory; here they run one after the other, at small sizes.
"""

from __future__ import annotations

import functools
import time
from typing import Any

import pytest
import torch

from benchmarks import ceilings, registry
from benchmarks.common import DTYPES
from benchmarks.registry import Case
from benchmarks.run import names_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [case for case in registry.load().values() if isinstance(case, Case)]
PARAMETERS = [
    pytest.param(case, size, name, id=f"{case.name}, {size['label']}: {name}")
    for case in CASES
    for size in case.sizes["quick"]
    for name in names_of(case, (), True)
    if not case.variants[name].missing(DEVICE)
]


@functools.cache
def measured() -> dict[str, float]:
    """Ceilings, once per run."""
    return ceilings.measure(DEVICE)


@functools.lru_cache(maxsize=1)
def problem(name: str, label: str) -> Any:
    """The problem that the variants of one group share."""
    case = registry.CASES[name]
    assert isinstance(case, Case)
    return case.build(case.size(label, DEVICE), DTYPES[case.dtypes[DEVICE]], DEVICE)


@pytest.mark.parametrize(("case", "size", "name"), PARAMETERS)
def test_case(case: Case, size: Any, name: str, benchmark: Any) -> None:
    built = problem(case.name, size["label"])
    variant, dtype = case.variants[name], case.dtypes[DEVICE]
    if variant.applies and not variant.applies(built):
        pytest.skip(f"{name} does not apply")
    verdict, errors = registry.gate(case, name, built, dtype)
    if verdict == "fail":
        pytest.fail(f"{case.name} {name}: wrong result, so no time is taken: {errors}")
    benchmark.group = f"{case.name}, {size['label']} {case.shape(built)} {dtype}"
    benchmark.name = name
    benchmark.extra_info.update(gate=verdict, errors=errors, ceilings=measured())
    work = variant.work(built) if variant.work else case.work(built) if case.work else None
    if work is not None:
        benchmark.extra_info["floor_ms"] = ceilings.floor_ms(work.bytes, work.flops, dtype, measured())
    if variant.prepare:
        variant.prepare(built)

    def step() -> None:
        variant.run(built)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    step()
    begin = time.perf_counter()
    step()
    rounds = int(1 / (time.perf_counter() - begin))  # about a second, whatever one step takes
    benchmark.pedantic(step, rounds=min(100, max(5, rounds)))
