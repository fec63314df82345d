"""Everything that needs a GPU, unattended: all `gpu` tests, then the benchmarks, within a time budget.

    python -m benchmarks.gpu_suite OUT [--budget 520] [--only ladder] [--archive FILE.tar.gz]

Each step is a process of its own with its own limit, and its log in OUT; results are JSON, with a report of them in
Markdown and HTML. A step that fails or runs out of time is named in the table at the end and does not stop the others.
Needs torch and triton with a GPU, pytest and numpy; what else is missing (liger-kernel, matplotlib) is named.

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
from dataclasses import asdict, dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OPTIONAL = {"liger_kernel": "Liger baselines", "matplotlib": "report.html", "jinja2": "report.html", "pytest": "tests"}
# What the tests outside tests/kernels import; without one of these only the kernels' own tests run.
WHOLE_SUITE = ("transformers", "peft", "accelerate", "safetensors", "hypothesis", "yaml")


@dataclass(frozen=True)
class Step:
    """Processes that run side by side: one for anything that is timed, one per file for tests (compiling is CPU work).

    `share` is the limit as a part of the budget; unused time goes to the steps after it.
    """

    name: str
    commands: dict[str, tuple[str, ...]]  # by the name of the log
    share: float


@dataclass
class Outcome:
    step: str
    status: str  # "ok", "failed (n)", "out of time", "no time left"
    seconds: float
    log: str
    last_line: str = ""


def test_commands(out: Path) -> dict[str, tuple[str, ...]]:
    """One pytest per file that has GPU tests; only the kernels' own where the rest could not be imported."""
    whole = all(importlib.util.find_spec(name) is not None for name in WHOLE_SUITE)
    spread = ("-n", "4") if importlib.util.find_spec("xdist") else ()
    found = {}
    for path in sorted((ROOT / "tests" if whole else ROOT / "tests" / "kernels").rglob("test_*.py")):
        if "mark.gpu" not in path.read_text():
            continue
        found[path.stem] = (
            sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-ra", "--tb=short", "-o",
            "addopts=--import-mode=importlib", f"--junitxml={out / path.stem}.xml",
            *spread, *(() if whole else ("--noconftest",)), str(path),
        )  # fmt: skip
    return found


def steps(out: Path) -> list[Step]:
    """The suite, most important first."""

    def benchmark(name: str, module: str, share: float, *arguments: str) -> Step:
        log = name.replace(" ", "_")
        where = ("--device", "cuda", "--json", str(out / f"{log}.json"))
        return Step(name, {log: (sys.executable, "-m", f"benchmarks.{module}", *where, *arguments)}, share)

    # torch.compile of every size would take the whole budget; linear_kl keeps it
    packed = ("ours", "ours-triton", "ours-library", "padded", "packed, unfused", "gemm", "copy")
    sizes = ("T=16384, 1024 to 4096", "T=16384, 2048 to 4096", "NLI")
    shapes = ("2048x4096x128256", "8192x4096x128256", "4096x2048x32000")
    few = ("--repeats", "5")
    return [
        benchmark("kernels", "packed_path", 0.08, *few, "--sizes", *sizes, "--variants", *packed),
        Step("tests", test_commands(out), 0.28),
        benchmark("linear kl", "linear_kl", 0.15, *few, "--sizes", *shapes),
        benchmark("training steps", "steps", 0.12, *few),
        benchmark("attention and lora", "run", 0.08, "attention", "lora", *few),
        benchmark("gradient accuracy", "kl_accuracy", 0.04),
        # it writes what it has after every rung
        benchmark("ladder", "ladder", 0.25),
    ]


def run_step(step: Step, out: Path, limit: float, environment: dict[str, str]) -> list[Outcome]:
    """Run a step's processes under `limit` seconds, each with a log."""
    start = time.monotonic()
    running = {}
    for name, command in step.commands.items():
        with (out / f"{name}.log").open("w") as file:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
                preexec_fn=hear_interrupts,
            )  # fmt: skip
        running[name] = process
    outcomes = []
    for name, process in running.items():
        try:
            code = process.wait(timeout=max(0.1, limit - (time.monotonic() - start)))
            status = "ok" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            end(process)
            status = "out of time"
        log = out / f"{name}.log"
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        seconds = time.monotonic() - start
        outcomes.append(Outcome(f"{step.name}: {name}", status, seconds, log.name, lines[-1][:100] if lines else ""))
    return outcomes


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
    """Put all of `out` into `archive`, if there is to be one."""
    if archive is not None:
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(out, arcname=out.name)


def write_report(out: Path) -> str | None:
    """report.md and report.html from every result file; why not, where there is none."""
    from mtllm_fast.reporting.throughput import read_results, to_markdown

    files = [path for path in sorted(out.glob("*.json")) if path.name != "summary.json"]
    try:
        records = read_results(files)
    except ValueError as error:
        return str(error)
    (out / "report.md").write_text(to_markdown(records), encoding="utf-8")
    missing = [name for name in ("matplotlib", "jinja2") if importlib.util.find_spec(name) is None]
    if missing:
        return f"no report.html: {', '.join(missing)} missing"
    from mtllm_fast.reporting.throughput_html import to_html

    (out / "report.html").write_text(to_html(records), encoding="utf-8")
    return None


def machine() -> dict[str, object]:
    """Device, driver, versions."""
    import torch

    from .common import commit, versions

    query = ["nvidia-smi", "--query-gpu=name,driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
    try:
        smi = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        smi = "nvidia-smi did not answer"
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    wanted = {**dict.fromkeys(WHOLE_SUITE, "tests outside tests/kernels"), **OPTIONAL}
    missing = [f"{n} ({why})" for n, why in wanted.items() if importlib.util.find_spec(n) is None]
    return {
        "device": name,
        "smi": smi,
        "host": platform.platform(),
        "missing": missing,
        "commit": commit(),
        **versions(),
    }


def main(argv: list[str] | None = None) -> int:
    """Run the suite; 0 when every step is ok, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_suite", description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder for results, figures and logs")
    parser.add_argument("--budget", type=float, default=520.0, help="seconds in all")
    parser.add_argument("--only", nargs="+", default=[], help="steps by name; they share the whole budget")
    parser.add_argument("--archive", type=Path, help="also put everything into this .tar.gz, after every step")
    options = parser.parse_args(argv)
    out: Path = options.out.resolve()
    chosen = steps(out)
    if unknown := sorted(set(options.only) - {step.name for step in chosen}):
        parser.error(f"--only {unknown[0]!r}: there are {', '.join(step.name for step in chosen)}")
    if options.only:
        chosen = [replace(step, share=1.0 / len(options.only)) for step in chosen if step.name in options.only]
    out.mkdir(parents=True, exist_ok=True)
    import torch

    about = machine()
    (out / "machine.txt").write_text("\n".join(f"{k}: {v}" for k, v in about.items()) + "\n")
    print("\n".join(f"{k}: {v}" for k, v in about.items()), flush=True)
    if not torch.cuda.is_available():
        print("no GPU: nothing to run", file=sys.stderr)
        return 2
    begin = time.monotonic()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    outcomes: list[Outcome] = []
    carried = 0.0
    for step in chosen:
        limit = min(step.share * options.budget + carried, options.budget - (time.monotonic() - begin))
        if limit < 5:
            outcomes.append(Outcome(step.name, "no time left", 0.0, ""))
            continue
        done = run_step(step, out, limit, environment)
        outcomes += done
        carried = max(0.0, limit - max(o.seconds for o in done)) if done else limit
        print(f"{step.name}: {', '.join(o.status for o in done)}", flush=True)
        write_summary(out, outcomes)
        pack(out, options.archive)
    reason = write_report(out)
    pack(out, options.archive)
    if reason:
        print(f"report: {reason}")
    print(f"\n{'step':34} {'status':14} {'s':>5}  last line")
    for o in outcomes:
        print(f"{o.step:34} {o.status:14} {o.seconds:5.0f}  {o.last_line}")
    print(f"{time.monotonic() - begin:.0f} s in all; results in {out}")
    return int(any(o.status != "ok" for o in outcomes))


def write_summary(out: Path, outcomes: list[Outcome]) -> None:
    """summary.json: one entry per step (not a list of records, so that it is not taken for results)."""
    (out / "summary.json").write_text(json.dumps({o.step: asdict(o) for o in outcomes}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
