"""Where the time of one training or encode step goes, by part, on real text and the real device."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as torch_profile

from ..data.batch import Batch, tokenise_rows
from ..data.pack import token_budget_packs
from ..data.read import TextRow
from ..losses import DistillationLoss, DistillationWeights
from ..models import MTLLM
from ..training.stage import Stage
from .parts import forward_parts

ORDER = (
    "tokenise",
    "pack",
    "transfer",
    "encoder",
    "projection",
    "LLM teacher",
    "LLM student",
    "LLM",
    "loss",
    "pooling",
    "backward",
    "optimizer",
    "other",
)


@dataclass
class StepProfile:
    """Seconds by part of every timed step, and what the steps held.

    Attributes:
        seconds: part -> seconds per step; their sum is the whole step, "other" being what no part has.
        texts, mt_tokens, llm_tokens: per step.
    """

    mode: str
    device: str
    seconds: dict[str, list[float]] = field(default_factory=dict)
    texts: list[int] = field(default_factory=list)
    mt_tokens: list[int] = field(default_factory=list)
    llm_tokens: list[int] = field(default_factory=list)

    def medians(self) -> dict[str, float]:
        """Median seconds of every part that took any, in the order of a step."""
        found = {part: float(torch.tensor(values).median()) for part, values in self.seconds.items()}
        return {part: found[part] for part in ORDER if part in found}


class _Clock:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.spent: defaultdict[str, float] = defaultdict(float)
        self.unused = 0.0

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = self.now()
        with record_function(name):
            yield
        self.spent[name] += self.now() - start


def profile_steps(
    model: MTLLM,
    rows: Sequence[TextRow],
    *,
    mode: str = "adapt",
    loss: DistillationWeights | None = None,
    tokens: int = 4096,
    steps: int = 5,
    bf16: bool = False,
    trace: str | Path | None = None,
) -> StepProfile:
    """Time `steps` steps on packs of `rows`, after one that warms up.

    Every part ends with a device synchronisation, so on a GPU the sum is more than an undisturbed step takes.

    Args:
        model: on the device that is to be timed; "adapt" trains its trainable weights (their values change).
        rows: at least one text; they are repeated where the steps need more.
        mode: "adapt": teacher, student, loss, backward and AdamW of general adaptation; "encode": pooled states.
        tokens: token budget of a pack. bf16: autocast.
        trace: also write a Chrome trace of one further step, its parts labelled, to this file.

    Raises:
        ValueError: `mode` is unknown, the model is no stack, or there are no rows.
    """
    if mode not in ("adapt", "encode"):
        raise ValueError(f"mode={mode!r}: expected adapt or encode")
    if not rows or steps < 1:
        raise ValueError(f"rows, steps: need at least one of each, got {len(rows)} rows and steps={steps}")
    if mode == "adapt" and model.config.reader != "stack":
        raise ValueError(f"model: reader={model.config.reader!r} cannot be adapted; give a stack or mode='encode'")
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError("model: has no tokenizer; load it with MTLLM.from_pretrained or stack it from folders")
    device = next(model.parameters()).device
    clock = _Clock(device)
    stage = Stage(model, DistillationLoss(loss))
    sides = stage.sides if mode == "adapt" else (model.side,)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5) if mode == "adapt" and trained else None
    model.train(mode == "adapt")
    autocast: AbstractContextManager[object] = torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()
    sample = tokenise_rows(rows[:64], tokenizer, sides).costs()
    count = math.ceil(1.5 * tokens * len(sample) / max(1, sum(max(cost) for cost in sample))) + 8
    position = 0

    def part(name: str) -> AbstractContextManager[None]:
        return clock.part("LLM" if mode == "encode" and name.startswith("LLM") else name)

    def one_step() -> Batch:
        nonlocal position
        taken = [rows[(position + i) % len(rows)] for i in range(count)]
        position += count
        start = clock.now()
        tokenised = tokenise_rows(taken, tokenizer, sides)
        between = clock.now()
        packs = token_budget_packs(tokenised.costs(), tokens)
        batch = tokenised.batch(packs[0], align=mode == "adapt" and stage.align)
        # more rows than one pack holds were tokenised, so that it could be filled: their share is not this step's
        share = len(packs[0]) / count
        clock.spent["tokenise"] += share * (between - start)
        clock.spent["pack"] += clock.now() - between
        clock.unused += (1 - share) * (between - start)
        with clock.part("transfer"):
            batch = batch.to(device)
        with autocast:
            if mode == "encode":
                packed = batch.side(model.side)
                with torch.no_grad():
                    states = model.states(packed)
                    with clock.part("pooling"):
                        model.pool(states, packed).float().cpu()
                return batch
            terms = stage(batch)
            with clock.part("loss"):
                total = stage.loss.total(terms, stage.counts(batch))
        with clock.part("backward"):
            total.backward()
        with clock.part("optimizer"):
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()
        return batch

    result = StepProfile(mode, str(device))
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    with forward_parts(model, part, stage.loss):
        one_step()
        for _ in range(steps):
            clock.spent.clear()
            clock.unused = 0.0
            start = clock.now()
            batch = one_step()
            whole = clock.now() - start - clock.unused
            for name, value in clock.spent.items():
                seconds[name].append(value)
            seconds["other"].append(max(0.0, whole - sum(clock.spent.values())))
            result.texts.append(batch.num_rows)
            result.mt_tokens.append(batch.mt.num_tokens if batch.mt is not None else 0)
            result.llm_tokens.append(batch.llm.num_tokens if batch.llm is not None else 0)
        if trace is not None:
            activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
            with torch_profile(activities=activities) as profiler:
                one_step()
            profiler.export_chrome_trace(str(trace))
    result.seconds = dict(seconds)
    return result
