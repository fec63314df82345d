"""Everything that needs a GPU, unattended: all `gpu` tests, then the benchmarks, within a time budget.

    python -m benchmarks.gpu_suite OUT [--budget 520] [--part 1] [--only ladder] [--archive FILE.tar.gz]

Part 1 is what everything else rests on (tests of the kernels, linear_kl with its baselines, accuracy of its gradient),
part 2 the training step (ladder, training steps), part 3 the other tests, the small kernels, attention and LoRA.
Each step is a process of its own with its own limit, and its log in OUT; records are JSON in OUT/<device>, the folder
that belongs into benchmarks/results, with a report of them in Markdown and HTML. A step that fails or runs out of time
is named in the table at the end, keeps what it had written, and does not stop the others.
Needs torch and triton with a GPU, pytest and numpy; what else is missing (liger-kernel, matplotlib) is named.
`--device cpu --quick` tries all of it at tiny sizes.

On a machine that gives back few files, all of them in one, where git and the commit do not travel:

    MTLLM_COMMIT=... python -m benchmarks.gpu_suite /tmp/gpu --archive $OUT/gpu.tar.gz
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from . import REPO

BEAT = 30.0  # seconds between two archives while a step runs
OPTIONAL = {"liger_kernel": "Liger baselines", "matplotlib": "report.html", "jinja2": "report.html", "pytest": "tests"}
# What the tests outside tests/kernels import; without one of these only the kernels' own tests run.
WHOLE_SUITE = ("transformers", "peft", "accelerate", "safetensors", "hypothesis", "yaml")


@dataclass(frozen=True)
class Step:
    """Processes that run side by side: one for anything that is timed, one per file for tests (compiling is CPU work).

    `share` is the limit as a part of the budget, of those that run; unused time goes to the steps after it.
    """

    name: str
    commands: dict[str, tuple[str, ...]]  # by the name of the log
    share: float
    part: int


@dataclass
class Outcome:
    step: str
    status: str  # "ok", "failed (n)", "out of time", "no time left"
    seconds: float
    log: str
    last_line: str = ""


def test_commands(out: Path, kernels: bool) -> dict[str, tuple[str, ...]]:
    """One pytest per file that has GPU tests, of the kernels or of all else; of those none where it has no imports."""
    whole = all(importlib.util.find_spec(name) is not None for name in WHOLE_SUITE)
    spread = ("-n", "4") if importlib.util.find_spec("xdist") else ()
    own = REPO / "tests" / "kernels"
    found = {}
    for path in sorted((own if kernels else REPO / "tests").rglob("test_*.py")):
        left_out = not kernels and (own in path.parents or not whole)
        if left_out or "mark.gpu" not in path.read_text():
            continue
        found[path.stem] = (
            sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-ra", "--tb=short", "-o",
            "addopts=--import-mode=importlib", f"--junitxml={out / path.stem}.xml",
            *spread, *(() if whole else ("--noconftest",)), str(path),
        )  # fmt: skip
    return found


def steps(out: Path, device: str = "cuda", quick: bool = False, folder: str = "") -> list[Step]:
    """The suite, most important first.

    Args:
        folder: of the records within `out`.
    """

    def benchmark(
        part: int, name: str, module: str, share: float, *arguments: str, sizes: tuple[str, ...] = ()
    ) -> Step:
        log = name.replace(" ", "_")
        where = ("--device", device, "--json", str(out / folder / f"{log}.json"))
        chosen = ("--quick",) if quick else ("--sizes", *sizes) if sizes else ()
        return Step(
            name, {log: (sys.executable, "-m", f"benchmarks.{module}", *where, *arguments, *chosen)}, share, part
        )

    # torch.compile of every size would take the whole budget; linear_kl keeps it
    packed = ("ours", "ours-triton", "ours-library", "padded", "packed, unfused", "gemm", "copy")
    small = ("T=16384, 1024 to 4096", "T=16384, 2048 to 4096", "NLI")
    shapes = ("8192x4096x128256", "2048x4096x128256", "4096x2048x32000")
    few = ("--repeats", "1" if quick else "5")
    return [
        Step("kernel tests", test_commands(out, True), 0.14, 1),
        benchmark(1, "linear kl", "cases.linear_kl", 0.16, *few, sizes=shapes),
        benchmark(1, "gradient accuracy", "cases.kl_accuracy", 0.04),
        benchmark(2, "ladder", "studies.ladder", 0.24, "--climb", "--repeats", "1" if quick else "3"),
        benchmark(2, "training steps", "cases.steps", 0.12, *few),
        Step("other tests", test_commands(out, False), 0.14, 3),
        benchmark(3, "small kernels", "cases.packed_path", 0.06, *few, "--variants", *packed, sizes=small),
        benchmark(3, "projection in training", "cases.projection_training", 0.02, *few, sizes=small),
        benchmark(3, "attention, lora, labels", "run", 0.08, "attention", "lora", "label_likelihood", *few),
    ]


def run_step(
    step: Step, out: Path, limit: float, environment: dict[str, str], beat: Callable[[], None] = lambda: None
) -> list[Outcome]:
    """Run a step's processes under `limit` seconds, each with a log; `beat` is called every `BEAT` seconds."""
    start = time.monotonic()
    running: dict[str, subprocess.Popen[bytes]] = {}
    outcomes = []
    try:
        for name, command in step.commands.items():
            with (out / f"{name}.log").open("w") as file:
                running[name] = subprocess.Popen(
                    command,
                    cwd=REPO,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                    preexec_fn=hear_interrupts,
                )
        for name, process in running.items():
            status = wait(process, start + limit, beat)
            log = out / f"{name}.log"
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            last = lines[-1][:100] if lines else ""
            outcomes.append(Outcome(f"{step.name}: {name}", status, time.monotonic() - start, log.name, last))
    finally:  # the suite itself was ended
        for process in running.values():
            if process.poll() is None:
                end(process)
    return outcomes


def wait(process: subprocess.Popen[bytes], until: float, beat: Callable[[], None]) -> str:
    """Status of a process that ended, or was ended at the time `until`."""
    while True:
        left = until - time.monotonic()
        try:
            code = process.wait(timeout=max(0.1, min(BEAT, left)))
            return "ok" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            if left <= BEAT:
                end(process)
                return "out of time"
            beat()


def hear_interrupts() -> None:
    """A shell's background jobs ignore SIGINT, and their children with them; `end` needs it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def end(process: subprocess.Popen[bytes]) -> None:
    """Interrupt a process and its children: pytest then writes what it found; kill them where that takes long."""
    try:
        os.killpg(process.pid, signal.SIGINT)
        process.wait(timeout=10)
    except (subprocess.TimeoutExpired, ProcessLookupError):
        pass
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def pack(out: Path, archive: Path | None) -> None:
    """Put all of `out` into `archive`, if there is to be one; it is whole at any time."""
    if archive is not None:
        archive.parent.mkdir(parents=True, exist_ok=True)
        part = archive.with_name(f".{archive.name}.part")
        with tarfile.open(part, "w:gz") as tar:
            tar.add(out, arcname=out.name, filter=lambda x: None if x.name.endswith(".part") else x)
        part.replace(archive)


def importable(out: Path) -> dict[str, str]:
    """Environment in which `mtllm_fast` has its folder `kernels`, where it is not installed; the same in this process,
    which writes the report."""
    if importlib.util.find_spec("mtllm_fast.kernels") is not None:
        return {}
    where = out / "path"
    where.mkdir(exist_ok=True)
    finder = FINDER.format(root=str(REPO))
    (where / "sitecustomize.py").write_text(finder)
    exec(finder, {})
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(where), str(REPO), os.environ.get("PYTHONPATH", "")]))}


# setup.py maps the folder; without an installation the interpreter has to be told
FINDER = """\
import importlib.abc, importlib.util, pathlib, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "mtllm_fast.kernels":
            return None
        folder = pathlib.Path({root!r}) / "kernels"
        return importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )

sys.meta_path.append(Finder())
"""


def write_report(out: Path) -> str | None:
    """report.md and report.html from every result file; why not, where there is none."""
    files = sorted(out.glob("*/*.json"))
    try:
        from .report.throughput import read_results, to_markdown

        records = read_results(files)
    except (ImportError, ValueError) as error:
        return str(error)
    (out / "report.md").write_text(to_markdown(records), encoding="utf-8")
    missing = [name for name in ("matplotlib", "jinja2") if importlib.util.find_spec(name) is None]
    if missing:
        return f"no report.html: {', '.join(missing)} missing"
    from .report.html import to_html

    (out / "report.html").write_text(to_html(records), encoding="utf-8")
    return None


def machine(device: str) -> dict[str, Any]:
    """Device, driver, versions, and what is missing."""
    from .common import commit, device_name, versions

    query = ["nvidia-smi", "--query-gpu=name,driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
    try:
        smi = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        smi = "nvidia-smi did not answer"
    wanted = {**dict.fromkeys(WHOLE_SUITE, "tests outside tests/kernels"), **OPTIONAL}
    missing = [f"{n} ({why})" for n, why in wanted.items() if importlib.util.find_spec(n) is None]
    return {
        "device": device_name(device),
        "smi": smi,
        "host": platform.platform(),
        "missing": missing,
        "commit": commit(),
        **versions(),
    }


def main(argv: list[str] | None = None) -> int:
    """Run the suite; 0 when every step is ok, 2 without a GPU or torch."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_suite", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path, help="folder for results, figures and logs")
    parser.add_argument("--budget", type=float, default=520.0, help="seconds in all")
    parser.add_argument("--part", type=int, choices=(1, 2, 3), help="the steps of one part; they share the budget")
    parser.add_argument("--only", nargs="+", default=[], help="steps by name; they share the whole budget")
    parser.add_argument("--archive", type=Path, help="also put everything into this .tar.gz, while and after steps run")
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="tiny sizes: a trial of the suite itself")
    parser.add_argument("--name", default="", help="folder of the records in OUT; default: the device's own name")
    options = parser.parse_args(argv)
    if importlib.util.find_spec("torch") is None:
        print("no torch: nothing to run; this takes the machine's own", file=sys.stderr)
        return 2
    import torch

    from .common import folder_name

    if options.device == "cuda" and not torch.cuda.is_available():
        print("no GPU: nothing to run (--device cpu --quick tries the suite)", file=sys.stderr)
        return 2
    about = machine(options.device)
    folder = options.name or folder_name(about["device"])
    out: Path = options.out.resolve()
    every = steps(out, options.device, options.quick, folder)
    if unknown := sorted(set(options.only) - {step.name for step in every}):
        parser.error(f"--only {unknown[0]!r}: there are {', '.join(step.name for step in every)}")
    names = options.only or [step.name for step in every if options.part in (None, step.part)]
    chosen = shared([step for step in every if step.name in names])
    (out / folder).mkdir(parents=True, exist_ok=True)
    (out / "machine.txt").write_text("\n".join(f"{k}: {v}" for k, v in about.items()) + "\n")
    print("\n".join(f"{k}: {v}" for k, v in about.items()), flush=True)
    begin = time.monotonic()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", **importable(out)}
    outcomes: list[Outcome] = []
    carried = 0.0
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        for step in chosen:
            limit = min(step.share * options.budget + carried, options.budget - (time.monotonic() - begin))
            if limit < 5 or not step.commands:
                status = "no time left" if step.commands else "packages missing"
                outcomes.append(Outcome(step.name, status, 0.0, ""))
                continue
            done = run_step(step, out, limit, environment, lambda: pack(out, options.archive))
            outcomes += done
            carried = max(0.0, limit - max(o.seconds for o in done))
            print(f"{step.name}: {', '.join(o.status for o in done)}", flush=True)
            write_summary(out, outcomes)
            pack(out, options.archive)
        reason = write_report(out)
    finally:
        signal.signal(signal.SIGTERM, before)
        write_summary(out, outcomes)
        pack(out, options.archive)
    if reason:
        print(f"report: {reason}")
    print(f"\n{'step':34} {'status':16} {'s':>5}  last line")
    for o in outcomes:
        print(f"{o.step:34} {o.status:16} {o.seconds:5.0f}  {o.last_line}")
    print(f"{time.monotonic() - begin:.0f} s in all; results in {out}, records in {out / folder}")
    return int(any(o.status != "ok" for o in outcomes))


def shared(chosen: list[Step]) -> list[Step]:
    """The steps with shares of the whole budget, in their own proportion."""
    whole = sum(step.share for step in chosen)
    return [replace(step, share=step.share / whole) for step in chosen]


def write_summary(out: Path, outcomes: list[Outcome]) -> None:
    """summary.json: one entry per step (not a list of records, so that it is not taken for results)."""
    (out / "summary.json").write_text(json.dumps({o.step: asdict(o) for o in outcomes}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
