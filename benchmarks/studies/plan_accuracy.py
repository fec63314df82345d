"""`mtllm plan` against real steps: predicted and measured peak memory, and how much of the roofline a step reaches.

    python -m benchmarks.studies.plan_accuracy --json benchmarks/results/cpu/plan_accuracy.json

A small stack runs forward and backward on the CPU in fp32: packed as this library does it, and padded in two passes of
Hugging Face's eager model. Memory is what torch's CPU allocator holds at once. "Reached" is the time that the roofline
predicts with this run's own ceilings (`torch.mm`, copy) over the measured time: what `mtllm plan --efficiency` means.
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
import warnings
from dataclasses import asdict, dataclass

import torch
from torch import nn

from benchmarks.ceilings import measure
from benchmarks.common import device_name, made_here, parser_of, timed_once
from benchmarks.models import llama, m2m100
from mtllm_fast.losses import DistillationLoss, DistillationWeights
from mtllm_fast.planning import Rates, StepSpec, measured_peak, ours
from mtllm_fast.planning.accounting import Accounting
from mtllm_fast.planning.simulate import build, make_batch
from mtllm_fast.training.stage import Stage

WIDTH, LAYERS, VOCAB = 512, 4, 16000
LENGTHS = {
    "sentences": [(12 + 3 * i, 14 + 3 * i) for i in range(16)],
    "documents": [(200 + 40 * i, 210 + 40 * i) for i in range(4)],
}


@dataclass
class Row:
    """One step: MiB and milliseconds, predicted and measured; `reached` is predicted over measured time."""

    step: str
    lengths: str
    predicted_mib: float
    measured_mib: float
    roofline_ms: float
    measured_ms: float
    reached: float


def spec(kl: bool, checkpointing: bool = False) -> StepSpec:
    encoder = m2m100(WIDTH, LAYERS, 4 * WIDTH, VOCAB, heads=8)
    llm = llama(WIDTH, LAYERS, 3 * WIDTH, VOCAB, heads=8, num_key_value_heads=4)
    weights = DistillationWeights(kl=float(kl))
    return StepSpec(encoder, llm, weights, dtype=torch.float32, checkpointing=checkpointing)


def packed_step(settings: StepSpec, name: str, rates: Rates, repeats: int) -> Row:
    """This library's step."""
    lengths = LENGTHS[name]
    stage, batch = Stage(build(settings, "cpu"), DistillationLoss(settings.loss)), make_batch(lengths, "cpu")

    def step() -> None:
        stage.step(batch).backward()

    predicted = ours(settings, lengths, rates, "cpu")
    label = f"packed{', KL' if settings.loss.kl else ''}{', checkpointing' if settings.checkpointing else ''}"
    return _row(label, name, predicted.peak, sum(predicted.seconds.values()), step, repeats)


def padded_step(settings: StepSpec, name: str, rates: Rates, repeats: int) -> Row:
    """Two padded passes of Hugging Face's own model, pooled MSE, the same weights trained: the eager baseline."""
    lengths = LENGTHS[name]
    model = build(settings, "cpu")
    encoder, llm, projection = (copy.deepcopy(m) for m in (model.encoder.model, model.llm.model, model.projection))
    for part in (encoder, llm):
        part.set_attn_implementation("eager")
    longest = [max(pair[side] for pair in lengths) for side in (0, 1)]

    def run(parts: tuple[nn.Module, nn.Module, nn.Module], device: str) -> None:
        mt, lm, up = parts
        ids = [torch.ones(len(lengths), n, dtype=torch.int64, device=device) for n in longest]
        masks = [torch.zeros(len(lengths), 1, n, n, device=device) for n in longest]
        with torch.no_grad():
            teacher = lm.get_decoder()(input_ids=ids[1], attention_mask=masks[1], use_cache=False).last_hidden_state
            states = mt(input_ids=ids[0], attention_mask=masks[0]).last_hidden_state
        embeds = nn.functional.linear(states, up.layers.weight, up.layers.bias)
        student = lm.get_decoder()(inputs_embeds=embeds, attention_mask=masks[0], use_cache=False).last_hidden_state
        (student.mean(1) - teacher.mean(1)).square().mean().backward()

    parts = (encoder, llm, projection)
    on_meta = tuple(copy.deepcopy(m).to("meta") for m in parts)
    for module in on_meta:
        for parameter in module.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
    accounting = Accounting(rates, "cpu")
    with accounting:
        run(on_meta, "meta")  # type: ignore[arg-type]
    seconds = sum(accounting.seconds.values())
    return _row("padded, eager", name, accounting.peak, seconds, lambda: run(parts, "cpu"), repeats)


def _row(label: str, name: str, peak: int, roofline: float, step, repeats: int) -> Row:  # type: ignore[no-untyped-def]
    step()
    measured = statistics.median(timed_once(step, "cpu") for _ in range(repeats))
    peaks = peak / 2**20, measured_peak(step) / 2**20
    return Row(label, name, *peaks, 1e3 * roofline, measured, 1e3 * roofline / measured)


def main(argv: list[str] | None = None) -> int:
    """Print, write; 1 where a predicted peak is more than a tenth off."""
    parser = parser_of("benchmarks.studies.plan_accuracy", __doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, help="CPU threads; default: all")
    options = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    if options.threads:
        torch.set_num_threads(options.threads)
    ceilings = measure("cpu")
    rates = Rates(ceilings["gemm_fp32_torch"], ceilings["copy"])
    print(
        f"{device_name('cpu')}: {rates.flops / 1e9:,.0f} GFLOP/s of torch.mm, {rates.bytes / 1e9:,.1f} GB/s of a copy"
    )
    rows = []
    for name in LENGTHS:
        for kl, checkpointing in ((False, False), (True, False), (False, True)):
            rows.append(packed_step(spec(kl, checkpointing), name, rates, options.repeats))
        rows.append(padded_step(spec(False), name, rates, options.repeats))
    line = "{:24} {:10} {:>13} {:>12} {:>7} {:>12} {:>12} {:>8}"
    header = ("step", "lengths", "predicted MiB", "measured MiB", "ratio", "roofline ms", "measured ms", "reached")
    print(line.format(*header))
    for r in rows:
        mib = f"{r.predicted_mib:.1f}", f"{r.measured_mib:.1f}", f"{r.predicted_mib / r.measured_mib:.3f}"
        print(line.format(r.step, r.lengths, *mib, f"{r.roofline_ms:.0f}", f"{r.measured_ms:.0f}", f"{r.reached:.2f}"))
    if options.json:
        record = {"rows": [asdict(r) for r in rows], "ceilings": ceilings, **made_here()}
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return int(any(abs(r.predicted_mib / r.measured_mib - 1) > 0.1 for r in rows))


if __name__ == "__main__":
    sys.exit(main())
