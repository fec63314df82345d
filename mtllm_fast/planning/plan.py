"""From simulated micro-steps to a plan: what fits, how fast it goes, how long the whole run takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from ..data.pack import consecutive_packs
from .presets import Gpu
from .simulate import StepCost, StepSpec, authors, build, ours

USABLE = 0.94  # of the memory: the rest goes to the CUDA context, the allocator's rounding and NCCL
AUTHORS_BATCH = 32  # texts per GPU and step in the paper's code
EFFICIENCY = 0.65
"""Share of the roofline that an eager PyTorch step reaches on a GPU: an assumption, no GPU has been measured yet. Small
steps on a CPU reach 0.7 to 1.0 (`benchmarks.studies.plan_accuracy`); the paper's run needs 0.59 for its 22 h."""

Lengths = list[tuple[int, int]]


@dataclass(frozen=True)
class Column:
    """One way to run the job on one kind of GPU.

    Attributes:
        cost: of the largest micro-batch that fits; None where not even one text does.
        seconds: of this micro-step, the roofline divided by the efficiency.
        texts_per_second: of one GPU. hours: of the whole run on all GPUs.
        largest: tokens of the largest micro-batch that fits, padding included.
    """

    name: str
    cost: StepCost | None
    seconds: float = 0.0
    texts_per_second: float = 0.0
    hours: float = math.inf
    largest: int = 0


def sample_lengths(kind: str, count: int = 4096, limit: int = 512, seed: int = 0) -> Lengths:
    """(MT tokens, LLM tokens) of `count` texts.

    Args:
        kind: "web" (log-normal, median 400 tokens, as web pages are), "nli" (median 28), "fixed:N", or a file with one
            number of tokens per line, which is repeated up to `count`.
        limit: texts are cut to so many tokens.

    Raises:
        ValueError: `kind` is none of these, or the file holds no lengths.
    """
    generator = torch.Generator().manual_seed(seed)
    medians = {"web": (400.0, 1.0), "nli": (28.0, 0.5)}
    if kind in medians:
        median, sigma = medians[kind]
        drawn = torch.empty(count).log_normal_(math.log(median), sigma, generator=generator).tolist()
    elif kind.startswith("fixed:") and kind[6:].isdigit() and int(kind[6:]) > 0:
        drawn = [float(kind[6:])] * count
    else:
        try:
            with open(kind, encoding="utf-8") as handle:
                drawn = [float(line) for line in handle if line.strip()]
            if wrong := [number for number in drawn if not 0 < number < math.inf]:
                raise ValueError(f"{wrong[0]} is no number of tokens")
        except (OSError, ValueError) as error:
            raise ValueError(
                f"--lengths {kind!r}: expected web, nli, fixed:N, or a file of one token count per line; {error}"
            ) from None
        if not drawn:
            raise ValueError(f"--lengths {kind}: holds no lengths")
        drawn *= -(-count // len(drawn))
    return [(n, n) for n in (max(3, min(limit, round(x))) for x in drawn)]


def _typical(lengths: Lengths, budget: int) -> Lengths:
    """The pack whose share of squared lengths is the median one among full packs."""
    full = [[lengths[i] for i in pack] for pack in consecutive_packs(lengths, budget)]
    full = full[:-1] or full
    return sorted(full, key=lambda pack: sum(n * n for n, _ in pack))[len(full) // 2]


def largest_fitting(cost_of: Callable[[int], StepCost], memory: float, low: int, high: int) -> StepCost | None:
    """Of the largest size in [low, high] whose step fits into `memory`, memory being nearly affine in the size."""
    first = cost_of(low)
    if first.memory > memory:
        return None
    top = cost_of(high)
    if top.memory <= memory:
        return top
    good, best = low, first
    bad, bad_memory = high, top.memory
    while bad - good > max(1, high // 64):
        slope = (bad_memory - best.memory) / (bad - good)
        guess = int(good + (memory - best.memory) / max(slope, 1e-9))
        guess = min(max(guess, good + 1), bad - 1)
        cost = cost_of(guess)
        if cost.memory <= memory:
            good, best = guess, cost
            if memory - cost.memory < 0.01 * memory:
                break
        else:
            bad, bad_memory = guess, cost.memory
    return best


def plan_ours(
    spec: StepSpec, lengths: Lengths, gpu: Gpu, documents: int, gpus: int, efficiency: float, most_tokens: int = 65536
) -> Column:
    """Packed micro-steps of the largest token budget that fits."""
    longest = max(max(pair) for pair in lengths)
    name = "ours, checkpointing" if spec.checkpointing else "ours"
    model = build(spec)

    def cost_of(budget: int) -> StepCost:
        return ours(spec, _typical(lengths, budget), gpu.rates, gpu.architecture, model)

    found = largest_fitting(cost_of, USABLE * gpu.memory, longest, most_tokens)
    return _column(name, found, documents, gpus, efficiency)


def plan_authors(spec: StepSpec, lengths: Lengths, gpu: Gpu, documents: int, gpus: int, efficiency: float) -> Column:
    """The paper's code: nf4 LLM, 8-bit AdamW, padded batches of 32 texts, in the largest micro-batches that fit."""
    spec = replace(spec, base="nf4", eight_bit_optimizer=True, offloaded_optimizer=False, checkpointing=False)
    found, texts = None, AUTHORS_BATCH
    while texts and found is None:
        batches = [lengths[i : i + texts] for i in range(0, len(lengths) - texts + 1, texts)]
        padded = sorted(batches, key=lambda b: max(n for n, _ in b))[len(batches) // 2]
        cost = authors(spec, padded, gpu.rates)
        found = cost if cost.memory <= USABLE * gpu.memory else None
        texts //= 2  # accumulation takes a divisor of the batch
    return _column("the paper's code", found, documents, gpus, efficiency)


def _column(name: str, cost: StepCost | None, documents: int, gpus: int, efficiency: float) -> Column:
    if cost is None:
        return Column(name, None)
    seconds = sum(cost.seconds.values()) / efficiency
    rate = cost.texts / seconds
    return Column(name, cost, seconds, rate, documents / (rate * gpus) / 3600, max(cost.slots))


def table(columns: Sequence[Column], gpu: Gpu, gpus: int) -> list[tuple[str, ...]]:
    """Rows of text: a header, memory by part in GB, seconds by part, throughput, hours."""
    rows: list[tuple[str, ...]] = [("", *(c.name for c in columns))]
    found = [c.cost for c in columns]

    def row(label: str, value: Callable[[Column, StepCost], str]) -> None:
        cells = [value(c, c.cost) if c.cost is not None else "does not fit" for c in columns]
        if any(cell not in ("-", "does not fit") for cell in cells):
            rows.append((label, *cells))

    row("micro-batch, texts", lambda c, x: f"{x.texts}")
    row("micro-batch, tokens (with padding)", lambda c, x: f"{max(x.tokens):,} ({max(x.slots):,})")
    static = list(dict.fromkeys(part for cost in found if cost for part in cost.static))
    for part in static:
        row(f"GB, {part}", lambda c, x, p=part: f"{x.static[p] / 1e9:.2f}")  # type: ignore[misc]
    names = list(dict.fromkeys(part for cost in found if cost for part in cost.peak_parts))
    for part in names:
        row(f"GB at the peak, {part}", lambda c, x, p=part: f"{x.peak_parts.get(p, 0) / 1e9:.2f}")  # type: ignore[misc]
    row(f"GB, all (of {gpu.memory / 1e9:.0f})", lambda c, x: f"{x.memory / 1e9:.1f}")
    parts = list(dict.fromkeys(part for cost in found if cost for part in cost.seconds))
    for part in parts:
        row(
            f"ms, {part}",
            lambda c, x, p=part: f"{1e3 * x.seconds.get(p, 0) / sum(x.seconds.values()) * c.seconds:.1f}",  # type: ignore[misc]
        )
    row("ms, micro-step", lambda c, x: f"{1e3 * c.seconds:.0f}")
    row("TFLOP, micro-step", lambda c, x: f"{sum(x.flops.values()) / 1e12:.0f}")
    row("FLOP/s utilisation", lambda c, x: f"{sum(x.flops.values()) / c.seconds / gpu.flops:.0%}")
    row("texts per second and GPU", lambda c, x: f"{c.texts_per_second:.1f}")
    row("tokens per second and GPU (MT side)", lambda c, x: f"{x.tokens[0] / c.seconds:,.0f}")
    row(f"hours on {gpus} GPU{'s' if gpus > 1 else ''}", lambda c, x: f"{c.hours:.1f}")
    return rows
