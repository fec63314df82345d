"""What `mtllm adapt` does when something goes wrong: one fault per run, and a table of the outcomes.

    python -m benchmarks.studies.faults --json benchmarks/results/cpu/faults.json

Tiny models, every run a process of its own. The full disk is a tmpfs of 8 MiB (needs the right to mount; without it the
limit on the size of a file, RLIMIT_FSIZE, of the running process). "same" compares the finished model, byte for byte,
with the one of a run without the fault; "-" where the fault changes what is trained on, as it should.
"""

from __future__ import annotations

import gzip
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks.common import parser_of, study_record, write
from benchmarks.studies.faulty import MARK
from benchmarks.studies.survive import Run, entries, make_inputs, unreadable
from mtllm_fast.reporting.table import Table

STEPS, SAVE_STEPS = 120, 10
FULL = 8 * 2**20


@dataclass
class Outcome:
    """One row of the table."""

    fault: str
    outcome: str
    exit_codes: list[int]
    kept: str
    same: str
    message: str
    ok: bool


class Scene:
    """A folder with inputs, runs in it, and the result of a run without faults."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.inputs = folder, make_inputs(folder, lines=1500)
        self.lines = (folder / "text.txt").read_text(encoding="utf-8").splitlines()
        self.whole = self.run("whole")
        self.whole.finish()

    def run(self, name: str, fault: str = "", text: str = "text.txt", workers: int = 0) -> Run:
        program = ("-m", "benchmarks.studies.faulty", fault) if fault else ("-m", "mtllm_fast.cli")
        return Run(self.inputs, self.folder / name, STEPS, SAVE_STEPS, workers, program, text)

    def with_line(self, name: str, line: bytes) -> str:
        """A copy of the text with one more line, which every run reaches in its first epoch."""
        parts = ["\n".join(part).encode() for part in (self.lines[:300], self.lines[300:])]
        (self.folder / name).write_bytes(parts[0] + b"\n" + line + b"\n" + parts[1] + b"\n")
        return name

    def same(self, run: Run, other: Run | None = None) -> str:
        one, two = (r.output / "model.safetensors" for r in (other or self.whole, run))
        return "yes" if two.is_file() and one.read_bytes() == two.read_bytes() else "NO"

    def kept(self, run: Run) -> str:
        from mtllm_fast.jobs.checkpoint import last_complete

        last, wrong = last_complete(run.output), unreadable(run.output)
        found = ("finished model, " if (run.output / "config.json").is_file() else "") + (
            last.name if last else "nothing"
        )
        return found + (f", {len(wrong)} UNREADABLE" if wrong else "")

    def ended(self, process: subprocess.Popen[str], pattern: str) -> tuple[int, str]:
        """Exit code, and the last line of the output that matches."""
        out, err = process.communicate()
        lines = [line for line in (err + out).splitlines() if re.search(pattern, line)]
        message = lines[-1] if lines else f"NOT SAID: {(err + out)[-300:]}"
        return process.returncode, message.replace(f"{self.folder}/", "")


def wait_for(run: Run, name: str, process: subprocess.Popen[str]) -> None:
    while process.poll() is None and name not in entries(run.output):
        time.sleep(0.002)


def finite(run: Run) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in load_file(run.output / "model.safetensors").values())


def full_disk(scene: Scene, stays: bool) -> Outcome:
    name = "full-stays" if stays else "full-a-while"
    run = scene.run(name)
    run.output.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={FULL}", "tmpfs", str(run.output)], capture_output=True, check=False
    )
    tmpfs = mount.returncode == 0
    try:
        process = run.start()
        wait_for(run, "checkpoint-10", process)
        ballast = run.output / ".ballast"
        if tmpfs:
            with ballast.open("wb", buffering=0) as file:
                try:
                    while file.write(b"\0" * 4096):
                        pass
                except OSError:
                    pass
        else:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
        if not stays:
            time.sleep(1.0)  # some checkpoints fail
            ballast.unlink(missing_ok=True)
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        code, message = scene.ended(process, "could not be written")
        codes, kept = [code], scene.kept(run)
        if stays:
            ballast.unlink(missing_ok=True)
            run.finish("--resume")
            codes.append(0)
        same, kind = scene.same(run), "tmpfs" if tmpfs else "RLIMIT_FSIZE"
    finally:
        if tmpfs:
            subprocess.run(["umount", str(run.output)], check=False)
    if stays:
        outcome = "checkpoints fail, training goes on, the model cannot be written: error; space freed, resumed"
        ok = codes[0] == 1
    else:
        outcome, ok = "checkpoints fail, training goes on, later ones succeed", codes == [0]
    ok = ok and same == "yes" and "NOT SAID" not in message and "UNREADABLE" not in kept
    return Outcome(
        f"disk full ({kind}), {'until the end' if stays else 'for a second'}", outcome, codes, kept, same, message, ok
    )


def unreadable_shard(scene: Scene) -> Outcome:
    shards = scene.folder / "shards"
    shards.mkdir()
    third = len(scene.lines) // 3
    for number in range(3):
        text = "\n".join(scene.lines[number * third : (number + 1) * third]) + "\n"
        (shards / f"{number}.txt.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    whole = scene.run("shards-whole", text="shards")
    whole.finish()
    good = (shards / "1.txt.gz").read_bytes()
    (shards / "1.txt.gz").write_bytes(good[: len(good) // 2])
    run = scene.run("shards-run", text="shards")
    code, message = scene.ended(run.start(), "error:")
    kept = scene.kept(run)
    (shards / "1.txt.gz").write_bytes(good)
    run.finish("--resume")
    same = scene.same(run, whole)
    ok = code == 1 and same == "yes" and "1.txt.gz is cut or damaged" in message and "checkpoint-" in kept
    outcome = "the steps before it are saved, error that names the file; repaired and resumed"
    return Outcome("shard cut in half", outcome, [code, 0], kept, same, message, ok)


def bad_line(
    scene: Scene, fault: str, line: bytes, pattern: str, outcome: str, same: bool, inside: str = ""
) -> Outcome:
    """A run on the text with one more line, which the run must take without an error."""
    name = re.sub(r"\W+", "-", fault)
    run = scene.run(name, fault=inside, text=scene.with_line(f"{name}.txt", line))
    code, message = scene.ended(run.start(), pattern)
    equal = scene.same(run) if same else "-"
    ok = code == 0 and "NOT SAID" not in message and equal != "NO" and finite(run)
    return Outcome(fault, outcome, [code], scene.kept(run), equal, message, ok)


def nan_for_good(scene: Scene) -> Outcome:
    run = scene.run("nan-for-good", fault="nan from then on")
    code, message = scene.ended(run.start(), "error:")
    kept = scene.kept(run)
    last = load_file(run.output / kept.split(",")[0] / "model.safetensors")
    ok = code == 1 and "10 steps in a row" in message and all(bool(t.isfinite().all()) for t in last.values())
    outcome = "10 steps change nothing, then an error that names the last checkpoint, which is finite"
    return Outcome("NaN in every batch from step 26 on", outcome, [code], kept, "-", message, ok)


def dead_worker(scene: Scene) -> Outcome:
    run = scene.run("worker", workers=2)
    process = run.start()
    wait_for(run, "checkpoint-10", process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    code, message = scene.ended(process, "data worker")
    same = scene.same(run)
    ok = code == 0 and same == "yes" and f"process {children[-1]}" in message
    outcome = "new workers go on where the old ones stopped"
    return Outcome("data worker killed", outcome, [code], scene.kept(run), same, message, ok)


def crashing_row(scene: Scene) -> Outcome:
    text = scene.with_line("crash.txt", MARK.encode())
    run = scene.run("crash", fault="crash", text=text, workers=2)
    code, message = scene.ended(run.start(), "error:")
    ok = code == 1 and "was killed by SIGSEGV" in message
    outcome = "three new starts of the workers, then the steps so far are saved and an error says how to go on"
    return Outcome(
        "data worker dies at the same row again and again", outcome, [code], scene.kept(run), "-", message, ok
    )


def one_of_two_stopped(scene: Scene) -> Outcome:
    run = scene.run("two")
    launch = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0")
    run.program = (*launch, "-m", "mtllm_fast.cli")
    process = run.start()
    wait_for(run, "checkpoint-10", process)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGTERM)
    code, message = scene.ended(process, "stopped after step")
    kept = scene.kept(run)
    ok = code == 0 and re.search(r"stopped after step (\d+) .*checkpoint-\1 ", message) is not None
    return Outcome(
        "SIGTERM to one of two processes",
        "both stop after the same step, which is saved",
        [code],
        kept,
        "-",
        message,
        ok,
    )


def long_line(scene: Scene) -> Outcome:
    words = " ".join(scene.lines).split()
    line = " ".join(random.Random(1).choices(words, k=2_000_000)).encode()[: 10 * 2**20]
    pattern, outcome = "texts truncated", "cut to --max-length, counted"
    found = bad_line(scene, "one line of 10 MB", line, pattern, outcome, False)
    return found


CASES: list[Callable[[Scene], Outcome]] = [
    lambda scene: full_disk(scene, stays=False),
    lambda scene: full_disk(scene, stays=True),
    unreadable_shard,
    lambda scene: bad_line(
        scene, "invalid UTF-8", b"caf\xe9 \xff\xfe", "rows skipped", "the line is skipped and counted", True
    ),
    long_line,
    lambda scene: bad_line(
        scene, "NaN batch", f"A {MARK} at night.".encode(), "changes no weight",
        "the step changes no weight, its rows are named", False, "nan",
    ),
    nan_for_good,
    dead_worker,
    crashing_row,
    lambda scene: bad_line(
        scene, "row that the tokenizer fails on", f"A {MARK} at night.".encode(), "is left out",
        "the row is left out, named and counted", False, "tokenizer",
    ),
    lambda scene: bad_line(
        scene, "out of memory above 4 rows (injected)", b"The last line.", "done in two halves",
        "packs are split, with the same gradient", False, "memory",
    ),
    one_of_two_stopped,
]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run every fault, print the table, write; 1 where an outcome is not the expected one."""
    parser = parser_of("benchmarks.studies.faults", __doc__)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of faults, from 1")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = []
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        scene = Scene(Path(name))
        for number, case in enumerate(CASES, 1):
            if options.only and number not in options.only:
                continue
            found.append(case(scene))
            print(
                f"{number}/{len(CASES)} {found[-1].fault}: {'as expected' if found[-1].ok else 'NOT AS EXPECTED'}",
                flush=True,
            )
    columns = ("fault", "outcome", "exit code", "kept", "same result", "message")
    codes = (", resumed ".join(map(str, row.exit_codes)) for row in found)
    cells = [[row.fault, row.outcome, code, row.kept, row.same, row.message] for row, code in zip(found, codes)]
    print("", *Table(columns, cells, left=len(columns)).markdown(), sep="\n")
    good = all(row.ok for row in found)
    print("PASS" if good else "FAIL")
    if options.json:
        write(options.json, [study_record("faults", {"steps": STEPS}, good, faults=[asdict(row) for row in found])])
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
