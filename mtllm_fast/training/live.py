"""What a run says of itself while it trains: documents and tokens per second, FLOPs, time left; scores to watch."""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from ..data.batch import Batch
from ..jobs.durable import write_text
from ..losses.term import Term
from ..models import MTLLM, PackedEncoder, PackedLLM

if TYPE_CHECKING:
    from .trainer import PackedTrainer

Scores = dict[str, float]
BF16_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}  # dense FLOP/s, by the datasheets


@dataclass(frozen=True)
class Watch:
    """Scores of the student while it trains, looked at and never used to choose a checkpoint.

    Fields:
        steps: optimizer steps between two looks.
        score: the student in eval mode -> name and score, e.g. {"swh_Latn_accuracy": 0.61}.
    """

    steps: int
    score: Callable[[MTLLM], Scores]

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}: must be >= 1")


def linear_weights(module: nn.Module) -> tuple[int, int]:
    """(weights of all linear layers, of those that are trained); embeddings multiply nothing and do not count."""
    everything = trained = 0
    layer: Any
    for layer in module.modules():
        if hasattr(layer, "in_features") and hasattr(layer, "out_features") and not any(layer.children()):
            size = layer.in_features * layer.out_features
            everything += size
            trained += size * any(parameter.requires_grad for parameter in layer.parameters())
    return everything, trained


class ModelFlops:
    """FLOPs that the method asks for, however it is computed: recomputed layers and padding are not in it.

    Per token: 2 per weight forward, 2 for the gradient of the input, 2 per trained weight for its own. Attention: 4
    times length, width and layers forward, twice that backward, half of both where it is causal.

    Args:
        student: the model in training. terms: of its loss; those that read the LM head have products of their own.
        beside: an encoder that reads the student's texts too, to teach.
    """

    def __init__(self, student: MTLLM, terms: Iterable[Term] = (), beside: PackedEncoder | None = None) -> None:
        self.student, self.terms = student, [term for term in terms if term.lm_head_products]
        self.encoder = self._part(student.encoder.model, student.encoder) if student.encoder is not None else None
        self.beside = self._part(beside.model, beside) if beside is not None else None
        self.llm = self._part(student.llm.decoder, student.llm) if student.llm is not None else None
        self.head = 0
        if self.terms and student.llm is not None:
            self.head = student.llm.vocab_size * student.llm.hidden_size

    @staticmethod
    def _part(model: nn.Module, part: PackedEncoder | PackedLLM) -> tuple[int, int, int]:
        """(weights, trained ones, width times layers of the attention)."""
        return *linear_weights(model), part.hidden_size * len(part.layers)

    def __call__(self, batch: Batch) -> float:
        reader = self.student.config.reader
        flops = 0.0
        if batch.mt is not None and self.encoder is not None:
            flops += self._pass(self.encoder, batch.mt.lengths, backward=self.encoder[1] > 0)
            if (fusion := self.student.config.fusion) is not None and batch.mt.partners:
                across = sum(2 * one * other for one, other in zip(batch.mt.lengths[::2], batch.mt.lengths[1::2]))
                flops += 4 * self.student.hidden_size * fusion.layers * across * (3 if self.encoder[1] else 1)
        if batch.mt is not None and self.beside is not None:
            flops += self._pass(self.beside, batch.mt.lengths, backward=False)
        if batch.mt is not None and reader == "stack" and self.llm is not None:
            flops += self._pass(self.llm, batch.stack_lengths, backward=True)
        if batch.llm is not None and self.llm is not None:
            flops += self._pass(self.llm, batch.llm.lengths, backward=reader == "llm")
        return flops + 2.0 * self.head * sum(term.lm_head_products * term.count(batch) for term in self.terms)

    def _pass(self, part: tuple[int, int, int], lengths: Sequence[int], backward: bool) -> float:
        weights, trained, width = part
        causal = self.student.config.causal and part is self.llm
        attention = 4 * width * sum(length * length for length in lengths) / (2 if causal else 1)
        if not backward:  # a teacher has its adapters off
            return 2.0 * (weights - trained) * sum(lengths) + attention
        return 2.0 * (2 * weights + trained) * sum(lengths) + 3 * attention


def bf16_peak(device: torch.device) -> float | None:
    """FLOP/s of a GPU that is known, by its datasheet; None for any other device."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for gpu, flops in BF16_FLOPS.items() if gpu in name), None)


class Throughput:
    """Counts what the steps of this process hold, and gives the rates over all processes at every log.

    Args:
        flops: of a batch. peak: FLOP/s of one device, None where it is not known.
    """

    def __init__(self, flops: Callable[[Batch], float], peak: float | None = None) -> None:
        self.flops, self.peak = flops, peak
        self.counts = torch.zeros(4, dtype=torch.float64)  # documents, MT tokens, LLM tokens, FLOPs
        self._since: float | None = None
        self._step = 0
        self._pace: deque[tuple[float, int]] = deque(maxlen=10)  # (seconds, steps) of the latest logs

    def add(self, batches: Iterable[Batch], step: int) -> None:
        """The batches of a step that is about to begin after `step` steps."""
        if self._since is None:
            self._since, self._step = time.perf_counter(), step
        for batch in batches:
            if batch.weight:
                tokens = [side.num_tokens if side is not None else 0 for side in (batch.mt, batch.llm)]
                self.counts += torch.tensor([batch.num_rows, *tokens, self.flops(batch)], dtype=torch.float64)

    def rates(self, step: int, steps: int, total: Callable[[Tensor], Tensor], processes: int = 1) -> Scores:
        """Rates since the last call; {} before the first step has ended.

        Args:
            step, steps: done, and of the whole run. total: sum over all processes, which all must call.
        """
        if self._since is None or step <= self._step:
            return {}
        documents, mt, llm, flops = total(self.counts).tolist()
        now = time.perf_counter()
        seconds = max(now - self._since, 1e-9)
        self._pace.append((seconds, step - self._step))
        self.counts, self._since, self._step = torch.zeros_like(self.counts), now, step
        pace = sum(s for s, _ in self._pace) / sum(n for _, n in self._pace)
        found = {
            "documents_per_s": documents / seconds,
            "tokens_per_s": (mt + llm) / seconds,
            "model_tflops_per_s": flops / seconds / 1e12,
            "seconds_left": pace * (steps - step),
        }
        if self.peak:
            found["utilisation"] = flops / seconds / processes / self.peak
        return {name: float(f"{value:.4g}") for name, value in found.items()}


LOG_FILE = "log.jsonl"


def rewind_log(folder: Path, step: int) -> None:
    """Drop from the log what a run logged after the step that it goes on from, and a line that a kill cut off."""
    path = folder / LOG_FILE
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept = [line for line in lines if (at := _step_of(line)) is not None and at <= step]
    if kept != lines:
        write_text(path, "".join(kept))


def _step_of(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"]) if line.endswith("\n") else None
    except (ValueError, KeyError, TypeError):
        return None


class Live(TrainerCallback):
    """Keeps the metrics of the run in `log.jsonl`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_log(
        self, args: object, state: TrainerState, control: object, logs: Scores | None = None, **kwargs: object
    ) -> None:
        if state.is_world_process_zero and logs:
            with (self.folder / LOG_FILE).open("a", encoding="utf-8") as handle:
                handle.write(json.dumps({"step": state.global_step, **logs}) + "\n")


class LiveProgress(ProgressCallback):
    """The Trainer's progress bar, with loss and speed behind it in place of a line per log."""

    def on_log(
        self, args: object, state: TrainerState, control: object, logs: Scores | None = None, **kwargs: object
    ) -> None:
        if self.training_bar is None or not logs:
            return
        if "loss" in logs:
            self.training_bar.set_postfix_str(bar_text(logs))
        elif "train_runtime" not in logs:
            self.training_bar.write(f"step {state.global_step}: {bar_text(logs)}")


class PlainProgress(TrainerCallback):
    """A line per log on stderr, for files and pipes, where a bar would be noise."""

    def on_log(
        self, args: object, state: TrainerState, control: object, logs: Scores | None = None, **kwargs: object
    ) -> None:
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        print(f"step {state.global_step} of {state.max_steps}: {bar_text(logs)}", file=sys.stderr, flush=True)


def bar_text(logs: Scores) -> str:
    """Loss and speed in one line, or the scores where there is no loss."""
    if "loss" not in logs:
        return ", ".join(f"{name} {value:.4g}" for name, value in logs.items() if name not in ("epoch", "total_flos"))
    parts = [f"loss {logs['loss']:.4g}"]
    if "documents_per_s" in logs:
        parts.append(f"{logs['documents_per_s']:.3g} documents/s, {logs['tokens_per_s']:,.0f} tokens/s")
    if "utilisation" in logs:
        parts.append(f"{100 * logs['utilisation']:.0f} % of peak")
    return ", ".join(parts)


class Watching(TrainerCallback):
    """Asks for the scores of `watch` after every so many steps and logs them; the run computes what it would without.

    Args:
        trainer: its student is put into eval mode for the while.
    """

    def __init__(self, trainer: PackedTrainer, watch: Watch) -> None:
        self.trainer, self.watch = trainer, watch

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if state.global_step % self.watch.steps or self.trainer.stopping:
            return
        step = self.trainer.step_module
        training = step.training
        step.eval()
        devices = [args.device] if args.device.type == "cuda" else []
        as_trained = torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16)
        with torch.random.fork_rng(devices), self.trainer.outside_of_forward(), as_trained:
            scores = self.watch.score(step.student)
        step.train(training)
        wanted = control.should_log  # the Trainer takes any log for the one that it asked for
        self.trainer.log({f"watch_{name}": value for name, value in scores.items()})
        control.should_log = wanted
