"""Shared fixtures: tiny models and tokenizers in folders, and the tolerance check that carries its own negative control."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.forked import Forked
from tests.tiny import build_encoder_folder, build_llm_folder

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(min(2, torch.get_num_threads()))

REPO = Path(__file__).resolve().parent.parent
BENCHMARKS = REPO / "tests" / "benchmarks" / "bench_cases.py"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--benchmark", action="store_true", help="Run the benchmarks, and nothing else.")


def pytest_configure(config: pytest.Config) -> None:
    """`--benchmark` collects the benchmark file alone (it is no test file, so nothing else ever does)."""
    if not config.getoption("--benchmark"):
        return
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("--benchmark needs pytest-benchmark: pip install 'mtllm-fast[bench]'")
    config.args = [str(BENCHMARKS)]
    config.option.benchmark_skip = False
    config.option.benchmark_sort = "min" if config.option.benchmark_sort is None else config.option.benchmark_sort
    if not config.option.benchmark_columns:
        config.option.benchmark_columns = ["min", "median", "max", "iqr", "rounds"]


@pytest.fixture(scope="module", autouse=True)
def imports_are_no_garbage() -> None:
    """Every training run collects garbage, which looks at all objects: most of them belong to modules."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def forked() -> Iterator[Forked]:
    """Real child processes without their seconds of imports."""
    with Forked() as server:
        yield server


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest deviation over the largest expected magnitude."""
    scale = expected.detach().double().abs().max().clamp(min=1e-30)
    return float((actual.detach().double() - expected.detach().double()).abs().max() / scale)


def assert_matches(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """`actual` is within `tolerance` of `expected`, and the tolerance is one that wrong results fail.

    Negative controls: zeros, and `expected` with the tenth of it that holds its largest value scaled by 1.05.
    """
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all()
    assert expected.abs().max() > 0, "nothing to compare: the expected tensor is zero"
    assert relative_error(torch.zeros_like(expected), expected) > tolerance
    wrong = expected.detach().clone().flatten()
    peak, width = int(wrong.abs().argmax()), max(wrong.numel() // 10, 1)
    start = min(max(peak - width // 2, 0), wrong.numel() - width)
    wrong[start : start + width] *= 1.05
    assert relative_error(wrong.view_as(expected), expected) > tolerance
    assert relative_error(actual.detach(), expected) <= tolerance


@pytest.fixture
def matches():
    """The function `assert_matches(actual, expected, tolerance)`."""
    return assert_matches


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real evaluation data; the test is skipped where it is absent."""
    root = Path(os.environ.get("MTLLM_DATA", REPO.parent / "shared" / "data"))
    if not root.is_dir():
        pytest.skip(f"real evaluation data is not at {root}")
    return root


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny NLLB model with its tokenizer, as a folder."""
    return build_encoder_folder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="session")
def llm_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Llama with its tokenizer, as a folder."""
    return build_llm_folder(tmp_path_factory.mktemp("llm"))


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, str], Path]:
    """`hub_cache(folder, "me/model")` puts a copy into a hub cache that is empty at first, and returns it."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))

    def put(folder: Path, name: str) -> Path:
        home, commit = cache / f"models--{name.replace('/', '--')}", "c" * 40
        (home / "refs").mkdir(parents=True)
        (home / "refs" / "main").write_text(commit)
        return Path(shutil.copytree(folder, home / "snapshots" / commit))

    return put
