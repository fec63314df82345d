"""The cases: an op or a pipeline, its sizes, its variants, the least work it takes, and what its results must be.

A module of `cases` registers its own when it is imported; `MODULES` says which. `benchmarks.run` measures them for
`mtllm bench`, `tests/benchmarks` for `pytest --benchmark`.
"""

from __future__ import annotations

import importlib
import importlib.util
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .common import Record, relative_error

# case: the module of `cases` that registers it, in the order in which all are run
MODULES = {
    "linear_kl": "linear_kl",
    "linear_ce": "linear_ce",
    "packed_projection": "packed_path",
    "projection_training": "projection_training",
    "pooled_mse": "packed_path",
    "paired_mse": "packed_path",
    "distillation_loss": "packed_path",
    "attention": "attention",
    "lora": "lora",
    "joint_pass": "joint_pass",
    "adaptation_step": "steps",
    "task_distillation_step": "steps",
    "pack_collate": "pipelines",
    "translate": "pipelines",
    "encode": "pipelines",
    "label_likelihood": "label_likelihood",
    "kl_accuracy": "kl_accuracy",
}
Size = Mapping[str, Any]  # "label" and the keyword arguments of `make`


class Work(NamedTuple):
    """The least that any implementation must do, whatever it fuses."""

    bytes: float = 0.0
    flops: float = 0.0


@dataclass(frozen=True)
class Variant:
    """One way to compute a case.

    run: problem -> one step, forward and backward; what it returns goes to `result`.
    result: (problem, what `run` returned) -> tensors by name, in the case's own layout; by default the return value.
    ours: a variant of this library; its failing gate fails the run.
    gated: False for something that only bounds the others (a bare GEMM, a copy) and has no result to check.
    work: problem -> Work, where it differs from the case's.
    needs: modules, "module:attribute" where not every release has it, or "compiler".
    prepare: run once before anything is timed.
    applies: problem -> whether the variant can compute it.
    keys: the results that it gives, where it gives only some of them.
    tolerance: its own, by dtype, where it has to be nearer than the case asks.
    quick: False to leave it out of `pytest --benchmark`; slow: left out unless named (compiling a model on a CPU).
    """

    run: Callable[[Any], Any]
    result: Callable[[Any, Any], dict[str, Tensor]] | None = None
    ours: bool = False
    gated: bool = True
    devices: tuple[str, ...] = ("cpu", "cuda")
    needs: tuple[str, ...] = ()
    work: Callable[[Any], Work] | None = None
    prepare: Callable[[Any], object] | None = None
    applies: Callable[[Any], bool] | None = None
    keys: tuple[str, ...] = ()
    tolerance: Mapping[str, float] = field(default_factory=dict)
    quick: bool = True
    slow: bool = False

    def missing(self, device: str) -> str | None:
        """Why the variant cannot run here; None if it can."""
        if device not in self.devices:
            return f"not on {device}"
        for name in self.needs:
            if name == "compiler":
                if device == "cpu" and not (shutil.which("g++") or shutil.which("c++")):
                    return "torch.compile needs a C++ compiler"
            elif reason := _not_installed(name):
                return reason
        return None


def _not_installed(name: str) -> str | None:
    """Why `name`, a module or "module:attribute" of any release of a package, is not to be had; None if it is."""
    module, _, attribute = name.partition(":")
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    if not attribute:
        return None
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        return f"{module} cannot be imported: {error}"
    return None if hasattr(found, attribute) else f"this {package} has no {attribute}"


@dataclass(frozen=True)
class Case:
    """One op or pipeline.

    make(dtype=, device=, **size) -> problem; shape(problem) -> what records say about it.
    sizes: by "quick" (`pytest --benchmark`), "cpu" and "cuda".
    reference(problem) -> tensors by name in fp64, what every gated variant must give within `tolerance` (relative, in
    the 2-norm, by dtype). small(problem) -> the problem the gate runs on, where the whole is too large for fp64.
    work(problem) -> Work; floor_variant: the variant whose time is the floor, where bytes and FLOPs say nothing.
    warm: keyword arguments of a tiny problem that loads the libraries before memory is measured.
    aims: by size label, (numerator, denominator, "time", "forward" or "memory", the most that their ratio should be).
    """

    name: str
    about: str
    make: Callable[..., Any]
    sizes: Mapping[str, tuple[Size, ...]]
    variants: dict[str, Variant]
    reference: Callable[[Any], dict[str, Tensor]]
    tolerance: Mapping[str, float]
    shape: Callable[[Any], dict[str, int]]
    warm: Size
    work: Callable[[Any], Work] | None = None
    floor_variant: str = ""
    small: Callable[[Any], Any] | None = None
    dtypes: Mapping[str, str] = field(default_factory=lambda: {"cpu": "fp32", "cuda": "bf16"})
    aims: Mapping[str, tuple[tuple[str, str, str, float], ...]] = field(default_factory=dict)
    sources: tuple[str, ...] = ("kernels/*.py",)
    parse: Callable[[str], Size] | None = None

    def size(self, label: str, device: str) -> Size:
        """The size of `device`, or the quick one, called `label`, or one that `parse` understands.

        Raises:
            ValueError: none of them.
        """
        known = {s["label"]: s for kind in ("quick", device) for s in self.sizes[kind]}
        if label in known:
            return known[label]
        if self.parse is not None:
            return self.parse(label)
        raise ValueError(f"size {label!r}: {self.name} has {', '.join(known)}")

    def build(self, size: Size, dtype: torch.dtype, device: str) -> Any:
        """The problem of a size."""
        return self.make(dtype=dtype, device=device, **{k: v for k, v in size.items() if k != "label"})


@dataclass(frozen=True)
class Study:
    """Something that measures itself: run(device, repeats, memory) gives finished records."""

    name: str
    about: str
    run: Callable[..., list[Record]]
    devices: tuple[str, ...] = ("cpu", "cuda")
    sources: tuple[str, ...] = ("kernels/*.py",)


CASES: dict[str, Case | Study] = {}


def register(case: Case | Study) -> None:
    """Add a case; the last one of a name counts."""
    CASES[case.name] = case


def load() -> dict[str, Case | Study]:
    """All cases, in the order in which they are run."""
    return {name: get(name) for name in MODULES}


def module_of(name: str) -> str:
    """Full name of the module that registers the case `name`."""
    return f"{__package__}.cases.{MODULES[name]}"


def get(name: str) -> Case | Study:
    """The case `name`. Only its own module is imported: kernels need neither transformers nor peft.

    Raises:
        ValueError: an unknown name.
    """
    if name not in MODULES:
        raise ValueError(f"case {name!r} is unknown; there are: all, {', '.join(MODULES)}")
    importlib.import_module(module_of(name))
    return CASES[name]


def chosen(names: tuple[str, ...]) -> list[Case | Study]:
    """The named cases, or all.

    Raises:
        ValueError: an unknown name.
    """
    if not names or "all" in names:
        return list(load().values())
    return [get(name) for name in names]


def wanted(case: Case, problem: Any) -> dict[str, Tensor]:
    """What every variant must give on the problem that the gate runs on, in fp64."""
    return case.reference(case.small(problem) if case.small else problem)


def gate(
    case: Case, name: str, problem: Any, dtype: str, want: dict[str, Tensor] | None = None
) -> tuple[str, dict[str, float]]:
    """("pass" | "fail" | "none", relative error by result) of one variant against fp64.

    Args:
        want: from `wanted`, where it is known already.
    """
    variant = case.variants[name]
    if not variant.gated:
        return "none", {}
    small = case.small(problem) if case.small else problem
    if variant.prepare:
        variant.prepare(small)
    want = wanted(case, problem) if want is None else want
    returned = variant.run(small)
    got = variant.result(small, returned) if variant.result else returned
    errors = {}
    for key, right in want.items():
        if variant.keys and key not in variant.keys:
            continue
        value = got.get(key)
        errors[key] = relative_error(value, right) if value is not None and value.shape == right.shape else float("inf")
    limit = variant.tolerance.get(dtype, case.tolerance[dtype])
    return ("pass" if all(e <= limit for e in errors.values()) else "fail"), errors
