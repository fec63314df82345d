"""`mtllm plan` against real steps: predicted and measured peak memory, and how much of the roofline a step reaches.

    python -m benchmarks.studies.plan_accuracy --json benchmarks/results/cpu/plan_accuracy.json

A small stack runs forward and backward on the CPU in fp32: packed as this library does it, and padded in two passes of
Hugging Face's eager model. Memory is what torch's CPU allocator holds at once. "Reached" is the time that the roofline
predicts with this run's own ceilings (`torch.mm`, copy) over the measured time: what `mtllm plan --efficiency` means.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, M2M100Config

from benchmarks.ceilings import measure
from benchmarks.common import commit, device_name, versions
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
    encoder = M2M100Config(
        vocab_size=VOCAB,
        d_model=WIDTH,
        encoder_layers=LAYERS,
        decoder_layers=1,
        encoder_attention_heads=8,
        decoder_attention_heads=8,
        encoder_ffn_dim=4 * WIDTH,
        decoder_ffn_dim=64,
    )
    llm = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
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
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    measured = statistics.median(times)
    return Row(
        label, name, peak / 2**20, measured_peak(step) / 2**20, 1e3 * roofline, 1e3 * measured, roofline / measured
    )


def main(argv: list[str] | None = None) -> int:
    """Print, write; 1 where a predicted peak is more than a tenth off."""
    parser = argparse.ArgumentParser(prog="benchmarks.studies.plan_accuracy", description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path)
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
    print(
        line.format(
            "step", "lengths", "predicted MiB", "measured MiB", "ratio", "roofline ms", "measured ms", "reached"
        )
    )
    for r in rows:
        print(
            line.format(
                r.step,
                r.lengths,
                f"{r.predicted_mib:.1f}",
                f"{r.measured_mib:.1f}",
                f"{r.predicted_mib / r.measured_mib:.3f}",
                f"{r.roofline_ms:.0f}",
                f"{r.measured_ms:.0f}",
                f"{r.reached:.2f}",
            )
        )
    if options.json:
        record = {
            "rows": [asdict(r) for r in rows],
            "ceilings": ceilings,
            "device": device_name("cpu"),
            "versions": versions(),
            "commit": commit(),
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return int(any(abs(r.predicted_mib / r.measured_mib - 1) > 0.1 for r in rows))


if __name__ == "__main__":
    sys.exit(main())
