"""One run on one process and on two, with DDP and with FSDP2, and resumed from each to another: the same run.

    python -m benchmarks.studies.parallel --json benchmarks/results/cpu/parallel.json

Every line is `mtllm adapt` on the demo's models and text (dropout 0.05, three loss terms, clipping, several epochs),
started as a user starts it. It is compared with one process that takes both packs of a step: the loss of every step,
absolutely, and the final weights, by relative L2 distance over all of them and of the single tensor where it is
largest. Controls, which must be far off: packs weighted alike whatever is in them, dropout that depends on the process,
another seed. Where DeepSpeed is installed (on CPUs: DS_BUILD_OPS=0 pip install deepspeed), ZeRO-2 is compared too.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from .. import REPO
from ..common import parser_of, relative_error, study_record, write

LOSS, WEIGHTS = 1e-5, 1e-4  # what the comparison is held to
FAR = 30  # a control is at least so many times beyond
# DeepSpeed clips by a norm that it sums in float32 and by parts, which early steps amplify; controls are beyond
DEEPSPEED = 1e-3


@dataclass(frozen=True)
class Inputs:
    """Folders of the models, a text file, and how many steps to take; checkpoints after every fifth of them."""

    encoder: str
    llm: str
    text: str
    steps: int
    tokens: int = 512


@dataclass(frozen=True)
class Distance:
    """How far a run is from another: the loss of its steps, and its final weights."""

    steps: int
    loss: float
    weights: float
    worst_tensor: float

    @property
    def same(self) -> bool:
        return self.loss <= LOSS and self.weights <= WEIGHTS and self.worst_tensor <= WEIGHTS

    @property
    def near(self) -> bool:
        return max(self.loss, self.weights, self.worst_tensor) <= DEEPSPEED

    @property
    def far(self) -> bool:
        return self.loss >= max(FAR * LOSS, 2 * DEEPSPEED) and self.weights >= max(FAR * WEIGHTS, 2 * DEEPSPEED)


def command(inputs: Inputs, output: Path, processes: int, engine: str, *more: str, control: str = "") -> list[str]:
    """`mtllm adapt` on so many processes."""
    options = {
        "--encoder": inputs.encoder,
        "--llm": inputs.llm,
        "--text": inputs.text,
        "--output": str(output),
        "--max-steps": str(inputs.steps),
        "--save-steps": str(max(inputs.steps // 5, 1)),
        "--keep": "9",
        "--log-steps": "1",
        "--tokens": str(inputs.tokens),
        "--max-length": "64",
        "--lookahead": "64",
        "--lr": "1e-3",
        "--warmup": "0.1",
        "--loss.paired-mse": "0.5",
        "--loss.kl": "0.5",
        "--loss.temperature": "2",
        "--report-to": "none",
        "--device": "cpu",
        "--parallel": engine,
    }
    module = ["benchmarks.studies.parallel", "--control", control] if control else ["mtllm_fast.cli"]
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--rdzv-backend=c10d"]
        launcher += ["--rdzv-endpoint=localhost:0"]
    flat = [word for pair in options.items() for word in pair]
    return [*launcher, "-m", *module, "adapt", *flat, "--no-progress", *more]


def train(inputs: Inputs, output: Path, processes: int, engine: str, *more: str, control: str = "") -> Path:
    """Run `command` to its end. Raises RuntimeError with what it said where it fails."""
    path = os.pathsep.join([str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    environment["DS_ACCELERATOR"] = "cpu"
    started = command(inputs, output, processes, engine, *more, control=control)
    done = subprocess.run(started, cwd=REPO, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(started)} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return output


def interrupted(run: Path, step: int, copy: Path) -> Path:
    """A copy of a run's folder as it was after the checkpoint of `step`."""
    shutil.copytree(run, copy)
    for path in copy.iterdir():
        late = path.name.startswith("checkpoint-") and int(path.name.removeprefix("checkpoint-")) > step
        if late:
            shutil.rmtree(path)
        elif path.name in ("model.safetensors", "config.json", "metrics.json", "result.json"):
            path.unlink()
    return copy


def losses(run: Path) -> dict[int, float]:
    """The loss of every step, from the run's log."""
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {entry["step"]: entry["loss"] for entry in entries if "loss" in entry}


def distance(run: Path, reference: Path) -> Distance:
    """Compare two runs. Raises ValueError where they did not take the same steps or train the same weights."""
    one, other = losses(run), losses(reference)
    mine, theirs = (load_file(folder / "model.safetensors") for folder in (run, reference))
    if one.keys() != other.keys() or mine.keys() != theirs.keys():
        raise ValueError(f"{run} and {reference} took other steps or trained other weights")
    squares = sum(float((mine[name].double() - theirs[name].double()).square().sum()) for name in theirs)
    size = sum(float(tensor.double().square().sum()) for tensor in theirs.values())
    return Distance(
        steps=len(one),
        loss=max(abs(one[step] - other[step]) for step in other),
        weights=(squares / size) ** 0.5,
        worst_tensor=max(relative_error(mine[name], theirs[name]) for name in theirs),
    )


def demonstrate(inputs: Inputs, folder: Path, say: Any = print) -> tuple[dict[str, Distance], dict[str, Distance]]:
    """All runs, into `folder`; (those that must be the same as one process, the controls that must not)."""
    fifth = max(inputs.steps // 5, 1)
    both = ("--gradient-accumulation", "2")
    one = train(inputs, folder / "one", 1, "auto", *both)
    same: dict[str, Distance] = {}
    controls: dict[str, Distance] = {}

    def compare(into: dict[str, Distance], name: str, run: Path) -> None:
        into[name] = distance(run, one)
        say(f"{name}: {into[name]}")

    def resumed(name: str, before: Path, step: int, processes: int, engine: str, *more: str) -> Path:
        copy = interrupted(before, step, folder / name.replace(" ", "_").replace(",", ""))
        run = train(inputs, copy, processes, engine, "--resume", *more)
        compare(same, name, run)
        return run

    ddp = train(inputs, folder / "ddp", 2, "ddp")
    compare(same, "2 processes, DDP", ddp)
    fsdp2 = train(inputs, folder / "fsdp2", 2, "fsdp2")
    compare(same, "2 processes, FSDP2", fsdp2)
    back = resumed("DDP on 2, then 1", ddp, 2 * fifth, 1, "auto")
    resumed("DDP on 2, then 1, then DDP on 2", back, 3 * fifth, 2, "ddp")
    resumed("DDP on 2, then FSDP2 on 2", ddp, 2 * fifth, 2, "fsdp2")
    single = resumed("FSDP2 on 2, then 1", fsdp2, 2 * fifth, 1, "auto")
    resumed("FSDP2 on 2, then 1, then FSDP2 on 2", single, 3 * fifth, 2, "fsdp2")
    resumed("1, then FSDP2 on 2", one, 2 * fifth, 2, "fsdp2", *both)
    if find_spec("deepspeed"):
        zero2 = train(inputs, folder / "zero2", 2, "deepspeed")
        compare(same, "2 processes, DeepSpeed ZeRO-2", zero2)
        resumed("DeepSpeed on 2, resumed", zero2, 2 * fifth, 2, "deepspeed")
    for name in CONTROLS:
        compare(controls, f"control: {name}", train(inputs, folder / name, 2, "ddp", control=name))
    compare(controls, "control: seed", train(inputs, folder / "seed", 1, "auto", *both, "--seed", "43"))
    return same, controls


def _pack_means(trainer: Any) -> None:
    original = trainer.PackedTrainer.compute_loss

    def compute_loss(self: Any, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None):
        packs = self.packs.step_size
        own = {name: count * packs for name, count in self.step_module.counts(inputs).items()}
        return original(self, model, inputs, return_outputs, own)

    trainer.PackedTrainer.compute_loss = compute_loss


def _dropout_by_process(trainer: Any) -> None:
    rank = int(os.environ.get("RANK", "0"))
    original = trainer.pack_seed
    trainer.pack_seed = lambda seed, step, place: original(seed + 1 + rank, step, 0)


CONTROLS = {"pack means": _pack_means, "dropout by process": _dropout_by_process}


def small_inputs(folder: Path, steps: int) -> Inputs:
    """The demo's models, and 600 lines of its English."""
    from mtllm_fast.miniworld.demo import base_models
    from mtllm_fast.miniworld.files import write_world
    from mtllm_fast.miniworld.world import World

    world = World(seed=0)
    write_world(world, folder / "world", texts=600, unlabelled=8, train=8, dev=8, test=8)
    mt, llm = base_models(world, folder / "models", seed=0, from_scratch=False, say=lambda _: None)
    return Inputs(mt, llm, str(folder / "world" / "adapt" / "train.txt"), steps)


def main(argv: list[str] | None = None) -> int:
    """Run, print a table, write; 1 where something is not as it must be."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--control"]:
        from mtllm_fast.cli import main as mtllm
        from mtllm_fast.training import trainer

        CONTROLS[argv[1]](trainer)
        sys.argv[1:] = argv[2:]
        return mtllm() or 0
    parser = parser_of("benchmarks.studies.parallel", __doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--keep", type=Path, help="keep the runs in this new folder")
    options = parser.parse_args(argv)
    if options.steps < 5:
        parser.error("--steps: at least 5")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="parallel-") as name:
        folder = options.keep or Path(name)
        folder.mkdir(parents=True, exist_ok=not options.keep)
        same, controls = demonstrate(small_inputs(folder, options.steps), folder, lambda text: None)
    good = all(d.near if "DeepSpeed" in run else d.same for run, d in same.items())
    good &= all(d.far for d in controls.values())
    print(f"{'against 1 process with both packs of a step':46} {'steps':>5} {'loss':>9} {'weights':>9} {'tensor':>9}")
    for run, d in (same | controls).items():
        print(f"{run:46} {d.steps:5} {d.loss:9.1e} {d.weights:9.1e} {d.worst_tensor:9.1e}")
    print(f"{'held to':52} {LOSS:9.0e} {WEIGHTS:9.0e} {WEIGHTS:9.0e}   (DeepSpeed: {DEEPSPEED:.0e})")
    print(f"{'PASS' if good else 'FAIL'} in {time.perf_counter() - started:.0f} s")
    if options.json:
        found = {"limits": {"loss": LOSS, "weights": WEIGHTS, "deepspeed": DEEPSPEED}}
        for part, distances in (("runs", same), ("controls", controls)):
            found[part] = {run: asdict(distance) for run, distance in distances.items()}
        write(options.json, [study_record("parallel", {"steps": options.steps}, good, **found)])
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
