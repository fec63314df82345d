"""Fifty steps of distilling a tiny language model, with the KL computed in four ways: which of them still converge?

    python -m benchmarks.trials.kl_training [--output benchmarks/results/cpu]

Teacher and student are the same small causal transformer over one frozen head; the student has a linear map behind
its last norm, which starts at identity plus noise and is what trains (as an up-projection does). States and head are
bf16 in every run, so the runs differ only in how loss and gradient are made from them: in fp64, by linear_kl, by its
moment form with a cached teacher, or from bf16 logits. Held-out KL is always computed in fp64.
Writes kl_training.json and kl_training.png.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from mtllm_fast.kernels import linear_kl, teacher_moments
from mtllm_fast.kernels.linear_kl import reference
from torch import Tensor, nn

from .. import RESULTS
from ..common import commit, device_name, versions, write

WIDTH, VOCAB, LAYERS, HEADS = 64, 4096, 2, 4
BATCH, LENGTH = 8, 32


class TinyLM(nn.Module):
    """Embedding, causal transformer layers, final norm; `forward` gives states (B · L, D)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, LAYERS, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.body(self.embedding(tokens), mask=self.mask, is_causal=True).flatten(0, 1)


def tokens(generator: torch.Generator) -> Tensor:
    """(B, L) tokens, uniform: their states are well conditioned, so fifty steps are enough to converge."""
    return torch.randint(VOCAB, (BATCH, LENGTH), generator=generator)


def exact_loss(h: Tensor, w: Tensor, h_t: Tensor) -> Tensor:
    """fp64 arithmetic on the bf16 numbers."""
    total, count, _ = reference(h.double(), w.double(), h_t.double())
    return total / count


def fused_loss(h: Tensor, w: Tensor, h_t: Tensor) -> Tensor:
    """linear_kl, difference form."""
    total, count = linear_kl(h, w, h_t)
    return total / count


def moment_loss(h: Tensor, w: Tensor, h_t: Tensor) -> Tensor:
    """linear_kl, moment form."""
    total, count = linear_kl(h, w, teacher=teacher_moments(h_t, w))
    return total / count


def bf16_logit_loss(h: Tensor, w: Tensor, h_t: Tensor) -> Tensor:
    """bf16 logits, softmax and KL in fp32: what a trainer does that upcasts after the head."""
    teacher = F.log_softmax(F.linear(h_t, w).float(), -1)
    return F.kl_div(F.log_softmax(F.linear(h, w).float(), -1), teacher, reduction="sum", log_target=True) / len(h)


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "fp64": exact_loss,
    "linear_kl": fused_loss,
    "linear_kl, moments": moment_loss,
    "bf16 logits": bf16_logit_loss,
}


def train(
    loss: Callable[[Tensor, Tensor, Tensor], Tensor], steps: int, seed: int, rate: float
) -> tuple[list[float], list[float]]:
    """(Loss as reported in every step, fp64 KL on held-out tokens before every step and after the last one)."""
    torch.manual_seed(seed)
    teacher = TinyLM().eval().requires_grad_(False)
    head = (torch.randn(VOCAB, WIDTH) * 3 / WIDTH**0.5).bfloat16()
    projection = nn.Linear(WIDTH, WIDTH, bias=False)
    with torch.no_grad():
        projection.weight.copy_(torch.eye(WIDTH) + 0.2 * torch.randn(WIDTH, WIDTH) / WIDTH**0.5)
    optimizer = torch.optim.SGD(projection.parameters(), lr=rate, momentum=0.5)

    def student(batch: Tensor) -> Tensor:
        with torch.no_grad():
            states = teacher(batch)
        return projection(states).bfloat16()

    generator = torch.Generator().manual_seed(seed + 1)
    held_out = tokens(generator)
    with torch.no_grad():
        held_out_teacher = teacher(held_out).bfloat16()

    def evaluate() -> float:
        with torch.no_grad():
            return float(exact_loss(student(held_out), head, held_out_teacher))

    curve, reported = [], []
    for step in range(steps):
        curve.append(evaluate())
        batch = tokens(generator)
        with torch.no_grad():
            target = teacher(batch).bfloat16()
        optimizer.zero_grad()
        value = loss(student(batch), head, target)
        value.backward()
        reported.append(float(value.detach()))
        optimizer.step()
        # The rate falls to a tenth, as in any real run; gradient noise shows most where the rate is high.
        for group in optimizer.param_groups:
            group["lr"] = rate * (1.0 - (step + 1) / steps) + rate * 0.01
    return reported, [*curve, evaluate()]


def plot(reported: dict[str, list[float]], curves: dict[str, list[float]], path: Path) -> None:
    """Reported loss, held-out KL in fp64, and the distance of the latter from the fp64 run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(14, 4), constrained_layout=True)
    styles = {"fp64": ("black", "-", 4.0), "linear_kl": ("tab:blue", "-", 1.5), "bf16 logits": ("tab:red", "-", 1.5)}
    for name, curve in curves.items():
        color, line, width = styles.get(name, ("tab:cyan", "--", 1.5))
        style = {"color": color, "linestyle": line, "linewidth": width, "label": name}
        axes[0].semilogy(reported[name], **style)
        axes[1].semilogy(curve, **style)
        if name != "fp64":
            gap = [abs(a / b - 1) * 100 for a, b in zip(curve[1:], curves["fp64"][1:])]
            axes[2].semilogy(range(1, len(curve)), gap, **style)
    axes[0].set(xlabel="step", ylabel="nats per token", title="training loss, as each variant reports it")
    axes[1].set(xlabel="step", ylabel="nats per token", title="held-out KL, computed in fp64")
    axes[2].set(xlabel="step", ylabel="%", title="held-out KL: distance from the fp64 run")
    for axis in axes:
        axis.legend()
        axis.grid(alpha=0.3)
    figure.suptitle("Distilling a tiny LM with bf16 states and head; only the arithmetic of the KL differs")
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> int:
    """Train all variants, write figure and numbers; 1 when linear_kl leaves the fp64 curve by over 5 % (KL > 1e-4)."""
    parser = argparse.ArgumentParser(prog="benchmarks.trials.kl_training", description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=RESULTS / "cpu")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=2.0)
    options = parser.parse_args(argv)
    runs = {name: train(loss, options.steps, options.seed, options.rate) for name, loss in LOSSES.items()}
    reported, curves = ({name: run[k] for name, run in runs.items()} for k in (0, 1))
    exact = curves["fp64"]
    # Below 1e-4 the rounding of the states to bf16, which all runs share, decides where a run ends up.
    gaps = {name: max(abs(a / b - 1) for a, b in zip(c, exact) if b >= 1e-4) for name, c in curves.items()}
    for name, curve in curves.items():
        print(
            f"{name:20} KL {curve[0]:.4f} -> {curve[-1]:.2e}, reported at the end {reported[name][-1]:.2e}, "
            f"largest distance from fp64 above KL 1e-4: {100 * gaps[name]:.2f} %"
        )
    options.output.mkdir(parents=True, exist_ok=True)
    plot(reported, curves, options.output / "kl_training.png")
    setting = {"steps": options.steps, "seed": options.seed, "rate": options.rate, "device": device_name("cpu")}
    row = {"case": "linear_kl training", **setting, "versions": versions(), "commit": commit()}
    write(
        options.output / "kl_training.json",
        [{**row, "variant": n, "reported": reported[n], "kl": c} for n, c in curves.items()],
    )
    return int(gaps["linear_kl"] > 0.05)


if __name__ == "__main__":
    sys.exit(main())
