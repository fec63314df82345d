"""`mtllm adapt` killed with SIGKILL at random moments, resumed each time: the weights of the run that was left alone.

    python -m benchmarks.studies.survive --kills 30 --json benchmarks/results/cpu/survive.json

Tiny models, LoRA dropout, two packs a step, two data workers, a checkpoint every few steps. A third of the kills aims
at a checkpoint that is being written, a sixth at the start of the process, the rest at any moment of training. After
every kill each folder named checkpoint-N must be whole and readable. Two resumes find their newest checkpoint damaged
(one byte changed, one file cut) and must refuse it. A second run is stopped with SIGTERM instead: exit code 0 and a
complete checkpoint.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks import REPO
from benchmarks.common import parser_of, study_record, write


@dataclass
class Run:
    """A run of `mtllm adapt` that can be started again and again."""

    inputs: Path
    output: Path
    steps: int
    save_steps: int
    workers: int = 2
    program: tuple[str, ...] = ("-m", "mtllm_fast.cli")
    text: str = "text.txt"

    def start(self, *more: str) -> subprocess.Popen[str]:
        options = {
            "--encoder": self.inputs / "encoder",
            "--llm": self.inputs / "llm",
            "--text": self.inputs / self.text,
            "--output": self.output,
            "--max-steps": self.steps,
            "--save-steps": self.save_steps,
            "--tokens": 96,
            "--max-length": 48,
            "--gradient-accumulation": 2,
            "--loss.paired-mse": 1,
            "--workers": self.workers,
            "--lookahead": 64,
            "--log-steps": 5,
            "--report-to": "none",
            "--device": "cpu",
        }
        arguments = [str(part) for pair in options.items() for part in pair]
        return subprocess.Popen(
            [sys.executable, *self.program, "adapt", *arguments, "--no-progress", *more],
            cwd=REPO,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, *more: str) -> tuple[str, str]:
        process = self.start(*more)
        out, err = process.communicate()
        if process.returncode:
            raise RuntimeError(f"mtllm adapt failed with {process.returncode}: {err[-3000:]}")
        return out, err


def make_inputs(folder: Path, lines: int = 3000) -> Path:
    """Tiny encoder, LLM and a text of short lines, in `folder`."""
    from tests.tiny import build_encoder_folder, build_llm_folder

    build_encoder_folder(folder / "encoder")
    build_llm_folder(folder / "llm")
    write_lines(folder / "text.txt", lines, longest=16)
    return folder


def write_lines(path: Path, lines: int, longest: int) -> None:
    """Lines of 3 to `longest` words, each with its number."""
    from tests.tiny import LINES

    rng, words = random.Random(0), " ".join(LINES).split()
    with path.open("w", encoding="utf-8") as file:
        for number in range(lines):
            file.write(" ".join(rng.choices(words, k=rng.randint(3, longest))) + f" {number}\n")


def entries(folder: Path) -> set[str]:
    return {entry.name for entry in os.scandir(folder)} if folder.is_dir() else set()


def kill(run: Run, process: subprocess.Popen[str], where: str, rng: random.Random, startup_s: float) -> tuple[str, str]:
    """Send SIGKILL at a random moment of the kind `where`; what the run was doing, and its stderr."""
    before = entries(run.output)
    began = time.monotonic()
    if where == "start":
        time.sleep(rng.uniform(0, startup_s))
    else:
        while process.poll() is None and not any("checkpoint-" in name for name in entries(run.output) - before):
            time.sleep(0.001)
        if where == "any":
            time.sleep(rng.expovariate(1 / 0.5))
        else:
            while process.poll() is None and not any(name.startswith(".checkpoint-") for name in entries(run.output)):
                pass
            time.sleep(rng.uniform(0, 0.015))
    if process.poll() is not None:
        raise RuntimeError(f"the run ended after {time.monotonic() - began:.0f} s, before it was killed: raise --steps")
    process.send_signal(signal.SIGKILL)
    _, said = process.communicate()
    left = entries(run.output)
    if any(name.startswith(".checkpoint-") and not name.endswith(".old") for name in left):
        return "saving", said
    return "training" if any("checkpoint-" in name for name in left - before) else "starting", said


def unreadable(folder: Path) -> list[str]:
    """What is wrong with each folder named checkpoint-N."""
    from mtllm_fast.jobs.checkpoint import checkpoints, damage

    wrong = []
    for path in checkpoints(folder):
        if (why := damage(path)) is not None:
            wrong.append(f"{path.name}: {why}")
            continue
        load_file(path / "model.safetensors")
        for name in ("optimizer.pt", "scheduler.pt"):
            torch.load(path / name, weights_only=True)
        for state in path.glob("rng_state*.pth"):
            torch.load(state, weights_only=False)
    return wrong


def spoil(folder: Path, how: str, rng: random.Random) -> str:
    """Change a byte of the newest checkpoint, or cut one of its files; its name."""
    from mtllm_fast.jobs.checkpoint import last_complete

    checkpoint = last_complete(folder)
    assert checkpoint is not None
    path = checkpoint / "optimizer.pt"
    data = bytearray(path.read_bytes())
    if how == "byte":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    else:
        del data[rng.randrange(len(data)) :]
    path.write_bytes(data)
    return checkpoint.name


def differences(whole: Path, other: Path, steps: int) -> list[str]:
    """Files of the finished models, and tensors of the last checkpoints, that are not the same bit for bit."""
    names = sorted(p.relative_to(whole) for p in whole.rglob("*") if p.is_file())
    ours = [n for n in names if not n.parts[0].startswith("checkpoint-")]
    ours = [n for n in ours if n.name not in ("run.json", "metrics.json", "result.json", "log.jsonl", "versions.json")]
    wrong = [str(n) for n in ours if not (other / n).is_file() or (whole / n).read_bytes() != (other / n).read_bytes()]
    for name, load in (
        ("model.safetensors", load_file),
        ("optimizer.pt", lambda p: torch.load(p, weights_only=True)),
        ("scheduler.pt", lambda p: torch.load(p, weights_only=True)),
        ("rng_state.pth", lambda p: torch.load(p, weights_only=False)),
    ):
        one, two = (load(folder / f"checkpoint-{steps}" / name) for folder in (whole, other))
        if not _same(one, two):
            wrong.append(f"checkpoint-{steps}/{name}")
    return wrong


def _same(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(_same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(_same, one, two))
    return bool((one == two).all()) if hasattr(one, "all") else one == two


def killed_often(run: Run, kills: int, startup_s: float, rng: random.Random) -> dict[str, Any]:
    """Kill and resume the run so many times, twice with its newest checkpoint damaged between, then let it finish."""
    plan = [("start", "saving", "any", "saving", "any", "any")[number % 6] for number in range(kills)]
    rng.shuffle(plan)
    spoiled = {kills // 2: "byte", kills * 3 // 4: "cut"} if kills > 3 else {}
    found, damaged, wrong = [], [], []
    for number, where in enumerate(plan):
        more = ["--resume"] * (number > 0) + ["--no-async-save"] * (number % 2)
        during, _ = kill(run, run.start(*more), where, rng, startup_s)
        # one that was damaged stays until its step comes again
        broken = [
            what for what in unreadable(run.output) if what.split(":")[0] not in {d["checkpoint"] for d in damaged}
        ]
        wrong += [f"kill {number + 1}: {what}" for what in broken]
        newest = max((n for n in entries(run.output) if n.startswith("checkpoint-")), key=_step, default="none")
        found.append({"kill": number + 1, "aimed_at": where, "during": during, "newest": newest})
        print(f"kill {number + 1}: aimed at {where}, {during}; newest {newest}, {len(broken)} unreadable", flush=True)
        if number in spoiled and newest != "none":
            name = spoil(run.output, spoiled[number], rng)
            during, said = kill(run, run.start("--resume"), "any", rng, startup_s)
            refused = f"{name} is not a complete checkpoint" in said
            damaged.append({"checkpoint": name, "damage": spoiled[number], "refused": refused})
            print(f"{name}: {spoiled[number]}; {'refused' if refused else 'NOT REFUSED'}, killed again", flush=True)
    run.finish("--resume")
    return {"kills": found, "damaged": damaged, "unreadable": wrong}


def stopped_often(run: Run, stops: int, rng: random.Random) -> list[dict[str, Any]]:
    """Stop the run with SIGTERM at random moments of training and resume it, then let it finish."""
    found = []
    for number in range(stops):
        before = entries(run.output)
        process = run.start(*(["--resume"] * (number > 0)))
        while process.poll() is None and not any("checkpoint-" in name for name in entries(run.output) - before):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.5))
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate()
        line = (out.strip() or err.strip()).splitlines()[-1]
        said = re.search(r"(checkpoint-\d+) is complete", line)
        complete = bool(said and said[1] in entries(run.output) and not unreadable(run.output))
        found.append({"exit_code": process.returncode, "complete": complete, "said": line.replace(str(run.inputs), "")})
        print(f"SIGTERM {number + 1}: exit code {process.returncode}: {line}", flush=True)
    run.finish("--resume")
    return found


def main(argv: list[str] | None = None) -> int:
    """Run, print the verdict, write; 1 when it fails."""
    parser = parser_of("benchmarks.studies.survive", __doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--stops", type=int, default=3, help="with SIGTERM")
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--save-steps", type=int, default=5)
    parser.add_argument("--seed", type=int, default=None, help="of the moments; default: others each time")
    options = parser.parse_args(argv)
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="survive-") as name:
        inputs = make_inputs(Path(name))
        outputs = [Path(name) / folder for folder in ("whole", "killed", "stopped")]
        whole, killed, stopped = (Run(inputs, output, options.steps, options.save_steps) for output in outputs)
        began = time.monotonic()
        out, _ = whole.finish()
        seconds = time.monotonic() - began
        trained = re.search(r"adapt: ([\d.]+) s", out)
        startup_s = seconds - (float(trained[1]) if trained else 0.0)
        print(f"left alone: {seconds:.0f} s, of which {startup_s:.0f} s before the first step", flush=True)
        result = killed_often(killed, options.kills, startup_s, rng)
        apart = differences(whole.output, killed.output, options.steps)
        stops = stopped_often(stopped, options.stops, rng)
        apart_stopped = differences(whole.output, stopped.output, options.steps)
    good = not (result["unreadable"] or apart or apart_stopped)
    good = good and all(entry["refused"] for entry in result["damaged"])
    good = good and all(entry["complete"] and entry["exit_code"] == 0 for entry in stops)
    during = Counter(entry["during"] for entry in result["kills"])

    def verdict(names: list[str]) -> str:
        return "final model and last checkpoint " + (f"DIFFER: {', '.join(names)}" if names else "bitwise equal")

    print(
        f"{options.kills} kills in {options.steps} steps ({', '.join(f'{n} {what}' for what, n in during.items())}): "
        f"{len(result['unreadable'])} unreadable checkpoints, {sum(e['refused'] for e in result['damaged'])} of "
        f"{len(result['damaged'])} damaged ones refused, {verdict(apart)}\n"
        f"{options.stops} stops with SIGTERM: exit codes {[entry['exit_code'] for entry in stops]}, "
        f"{sum(entry['complete'] for entry in stops)} complete checkpoints, {verdict(apart_stopped)}\n"
        f"{'PASS' if good else 'FAIL'}"
    )
    if options.json:
        shape = {"steps": options.steps, "save_steps": options.save_steps, "kills": options.kills}
        found = {**result, "during": dict(during), "differences": apart, "sigterm": stops}
        found |= {"sigterm_differences": apart_stopped, "seconds_left_alone": seconds}
        write(options.json, [study_record("survive", shape, good, **found)])
    return 0 if good else 1


def _step(name: str) -> int:
    return int(name.rsplit("-", 1)[1])


if __name__ == "__main__":
    sys.exit(main())
