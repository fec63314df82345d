"""What the fp8 base costs in accuracy, on real weights and real text: rounding, loss, gradients, a training curve.

    python -m benchmarks.trials.fp8 --encoder E5 --llm SMOLLM2 --text english.tsv --valid held_out.tsv \
        --folder runs/fp8 [--json benchmarks/results/cpu/fp8.json] [--parts "curve fp8"]

Models are folders as `mtllm fetch` makes them. On the CPU the products are emulated: the same roundings, sums in fp32.
Three parts: the rounding of weights, activations and gradients with the scales that are used (powers of two) and with
exact ones; loss and gradients of all that is trained on a few packs, as training starts and after it, against fp32,
with bf16 for comparison; and two runs of `mtllm adapt` of the same start, texts and seed, over bf16 and over fp8.
Pooled and paired MSE are divided by the variance of the teacher's states.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest.mock import patch

import torch
from mtllm_fast.kernels import fp8_linear
from torch import Tensor

from mtllm_fast import MTLLM
from mtllm_fast.data import read_rows
from mtllm_fast.data.batch import Batch
from mtllm_fast.data.collate import collate
from mtllm_fast.losses import DistillationLoss, DistillationWeights
from mtllm_fast.models import LoraSettings
from mtllm_fast.models.frozen import Fp8Linear, dequantised, quantize_frozen
from mtllm_fast.training import AdaptConfig, OptimSettings, adapt, trainer
from mtllm_fast.training.adapt import starting_model
from mtllm_fast.training.stage import Stage

from ..common import made_here, parser_of, relative_error, write

WEIGHTS = DistillationWeights(pooled_mse=1.0, paired_mse=1.0, kl=1.0)
BASES = ("bf16", "fp8")
PARTS = ("rounding", "gradients at start", "curve bf16", "curve fp8", "validation", "gradients when trained")
GROUPS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@contextmanager
def training_over(base: str) -> Iterator[None]:
    """Inside the block, a training run has the linear layers of its LLM in `base`; `mtllm adapt` refuses fp8 on a CPU.

    The emulation keeps the weights that it has widened to bf16: the same numbers, sooner.
    """
    switches, widened = trainer.apply_switches, fp8_linear._widened
    kept: dict[int, Tensor] = {}  # by address, which belongs to the weights as long as the model lives

    def apply(student: MTLLM, optim: OptimSettings, device: torch.device, *rest: Any) -> None:
        if base == "fp8":
            fp8_base(student)
            for layer in student.backbone.layers_root.modules():
                if isinstance(layer, Fp8Linear):
                    kept.update({q.data_ptr(): widened(q) for q in (layer.weights.w, layer.weights.wt)})
        switches(student, optim, device, *rest)

    def once(q: Tensor) -> Tensor:
        found = kept.get(q.data_ptr())
        return widened(q) if found is None else found

    with patch.object(trainer, "apply_switches", apply), patch.object(fp8_linear, "_widened", once):
        yield


def e5m2_backward(dy: Tensor, wt: Tensor, scale_t: Tensor) -> Tensor:
    """dy W with dy in e5m2: wider, one bit of mantissa less."""
    scale = dy.abs().amax(1, keepdim=True).float().clamp_min(1e-30) / 57344
    q = (dy.float() / scale).to(torch.float8_e5m2)
    w = fp8_linear.dequantised_rows(wt.view(fp8_linear.FP8), scale_t).float()
    return ((q.float() * scale) @ w.t()).bfloat16().to(dy.dtype)


def dense_backward(dy: Tensor, wt: Tensor, scale_t: Tensor) -> Tensor:
    """dy W with dy as it is."""
    w = fp8_linear.dequantised_rows(wt.view(fp8_linear.FP8), scale_t).to(dy.dtype)
    return dy @ w.t()


def over_dequantised(student: MTLLM) -> None:
    """The weights of fp8 in layers that multiply in bf16."""
    own = dict(student.backbone.layers_root.named_modules())
    dense = {name: own[name].weight for name in own if name.endswith(".base_layer")}
    quantize_frozen(student.backbone.layers_root, "fp8", "cpu")
    own = dict(student.backbone.layers_root.named_modules())
    for name, weight in dense.items():
        weight.data.copy_(dequantised(own[name]))
        parent, _, last = name.rpartition(".")
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = weight
        setattr(own[parent], last, layer)


def fp8_base(student: MTLLM) -> None:
    quantize_frozen(student.backbone.layers_root, "fp8", "cpu")


def e5m2() -> AbstractContextManager[Any]:
    return patch("mtllm_fast.models.lora.fp8_backward", e5m2_backward)


def bf16_backward() -> AbstractContextManager[Any]:
    """The gradient of the same forward, not rounded to fp8."""
    return patch("mtllm_fast.models.lora.fp8_backward", dense_backward)


def exact_scales() -> AbstractContextManager[Any]:
    return patch.object(fp8_linear, "row_scales", lambda x: (x.abs().amax(1).float() / 448).clamp_min(1e-37))


# (dtype of the frozen weights and of autocast, what is done to the model, what is changed while it is made and runs)
KINDS: dict[str, tuple[torch.dtype, Callable[[MTLLM], None] | None, Callable[[], AbstractContextManager[Any]]]] = {
    "fp32": (torch.float32, None, nullcontext),
    "bf16": (torch.bfloat16, None, nullcontext),
    "fp8 weights alone": (torch.bfloat16, over_dequantised, nullcontext),
    "fp8": (torch.bfloat16, fp8_base, nullcontext),
    "fp8, backward in bf16": (torch.bfloat16, fp8_base, bf16_backward),
    "fp8, gradients in e5m2": (torch.bfloat16, fp8_base, e5m2),
    "fp8, exact scales": (torch.bfloat16, fp8_base, exact_scales),
}


def loaded(options: Any, folder: Path, dtype: torch.dtype, change: Callable[[MTLLM], None] | None) -> MTLLM:
    """The model in `folder` as a training run has it."""
    config = AdaptConfig(model=str(folder), encoder=options.encoder, llm=options.llm)
    student = starting_model(config, dtype)
    if change is not None:
        change(student)
    return student.train()


@torch.no_grad()
def variances(student: MTLLM, batch: Batch) -> dict[str, float]:
    """Of the teacher's states, by the term that is divided by it."""
    assert batch.llm_rows is not None
    packed = batch.side("llm")
    states = student.teacher_states(packed).double()
    pooled = student.pool(states, packed).double()
    return {"pooled_mse": float(pooled.var(0).mean()), "paired_mse": float(states[batch.llm_rows].var(0).mean())}


def losses_of(step: Stage, batch: Batch, dtype: torch.dtype) -> tuple[dict[str, float], Tensor]:
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        terms = step(batch)
    found = {name: float(term.sum.detach() / term.count) for name, term in terms.items()}
    return found, step.loss.total(terms, step.counts(batch))


def measured(options: Any, folder: Path, kind: str, batches: list[Batch], variance: dict[str, float]) -> dict[str, Any]:
    """Losses, gradients by name and the teacher's states on every batch."""
    dtype, change, patching = KINDS[kind]
    losses, gradients, states = [], [], []
    with patching():
        student = loaded(options, folder, dtype, change)
        step = Stage(student, DistillationLoss(WEIGHTS))
        step.loss.variance = variance
        for batch in batches:
            student.zero_grad()
            found, total = losses_of(step, batch, dtype)
            total.backward()
            losses.append(found)
            gradients.append({n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None})
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                states.append(student.teacher_states(batch.llm).float())  # type: ignore[arg-type]
    return {"losses": losses, "gradients": gradients, "states": states}


def grouped(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients in one vector by group: each kind of layer's A and B, the projection, all of it."""
    groups: dict[str, list[Tensor]] = {}
    for name, value in gradients.items():
        kind = next((g for g in GROUPS if f".{g}." in name), "projection")
        part = {"lora_A": " A", "lora_B": " B"}.get(next((p for p in ("lora_A", "lora_B") if p in name), ""), "")
        groups.setdefault(kind + part, []).append(value.double().flatten())
        groups.setdefault("all", []).append(value.double().flatten())
    return {name: torch.cat(values) for name, values in groups.items()}


def compared(got: list[dict[str, Tensor]], right: list[dict[str, Tensor]]) -> dict[str, dict[str, float]]:
    """Cosine and relative error by group, means over the batches; a group whose gradient is zero is left out."""
    found: dict[str, list[tuple[float, float]]] = {}
    for mine, other in zip(got, right):
        theirs = grouped(other)
        for name, value in grouped(mine).items():
            if theirs[name].any():
                cosine = float(torch.cosine_similarity(value, theirs[name], dim=0))
                found.setdefault(name, []).append((cosine, relative_error(value, theirs[name])))
    return {n: {"cosine": fmean(c for c, _ in v), "error": fmean(e for _, e in v)} for n, v in found.items()}


def gradient_table(
    options: Any, point: str, folder: Path, batches: list[Batch], variance: dict[str, float]
) -> list[Any]:
    """Every kind against fp32 and bf16, those of fp8 also against fp8 with the backward in bf16, and bf16 against
    itself on another batch, which is the noise of a step."""
    results = {kind: measured(options, folder, kind, batches, variance) for kind in KINDS}
    records = []
    for kind, got in results.items():
        losses = {name: fmean(one[name] for one in got["losses"]) for name in got["losses"][0]}
        record = {"part": "gradients", "point": point, "kind": kind, "losses": losses}
        for other in ("fp32", "bf16", "fp8, backward in bf16"):
            if kind not in ("fp32", other) and (other in ("fp32", "bf16") or kind.startswith("fp8")):
                right = results[other]
                record[f"against {other}"] = compared(got["gradients"], right["gradients"])
                pairs = zip(got["states"], right["states"])
                record[f"teacher states against {other}"] = fmean(relative_error(a, b) for a, b in pairs)
        records.append(record)
    own = results["bf16"]["gradients"]
    noise = compared(own, [*own[1:], own[0]])
    return [*records, {"part": "gradients", "point": point, "kind": "bf16, another batch", "against bf16": noise}]


@torch.no_grad()
def rounding(student: MTLLM, batch: Batch) -> dict[str, Any]:
    """Relative error of rounding to e4m3 by powers of two and by exact scales: weights, and what layers read."""

    def errors(x: Tensor) -> tuple[float, float]:
        exact = x.abs().amax(1, keepdim=True).float() / fp8_linear.LARGEST
        q = (x.float() / exact.clamp_min(1e-30)).to(fp8_linear.FP8).float() * exact
        return relative_error(fp8_linear.dequantised_rows(*fp8_linear.reference_rows(x)), x), relative_error(q, x)

    found: dict[str, list[tuple[float, float]]] = {"weights": [], "transposed weights": [], "activations": []}
    handles = []
    for name, layer in student.backbone.layers_root.named_modules():
        if name.endswith(".base_layer"):
            found["weights"].append(errors(layer.weight))  # type: ignore[arg-type]
            found["transposed weights"].append(errors(layer.weight.t().contiguous()))  # type: ignore[operator,union-attr]
            handles.append(
                layer.register_forward_pre_hook(lambda _, args: found["activations"].append(errors(args[0][0])))
            )
    student.teacher_states(batch.llm)  # type: ignore[arg-type]
    for handle in handles:
        handle.remove()
    return {
        "part": "rounding",
        **{n: {"power of two": fmean(a for a, _ in v), "exact": fmean(b for _, b in v)} for n, v in found.items()},
    }


@torch.no_grad()
def validated(
    options: Any, folder: Path, base: str, batches: list[Batch], variance: dict[str, float]
) -> dict[str, float]:
    """Losses on held-out texts, means over the batches."""
    dtype, change, _ = KINDS[base]
    student = loaded(options, folder, dtype, change).eval()
    step = Stage(student, DistillationLoss(WEIGHTS))
    step.loss.variance = variance
    found = [losses_of(step, batch, dtype)[0] for batch in batches]
    return {name: fmean(one[name] for one in found) for name in found[0]}


def train(options: Any, start: Path, output: Path, base: str) -> list[dict[str, float]]:
    """Steps and losses of a run of `mtllm adapt` from `start` over `base`; one that was stopped goes on."""
    optim = OptimSettings(
        max_steps=options.steps,
        tokens=options.tokens,
        max_length=min(128, options.tokens),
        lr=2e-4,
        bf16=True,
        base_weights="bf16",
        log_steps=10,
        save_steps=10**6,
        progress=False,
        report_to="none",
        device="cpu",
    )
    config = AdaptConfig(
        model=str(start),
        encoder=options.encoder,
        llm=options.llm,
        output=str(output),
        loss=WEIGHTS,
        over_variance=True,
        train=optim,
        resume=(output / "run.json").exists(),
    )
    with training_over(base):
        adapt(config, read_rows(options.text, language="eng_Latn"))
    log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{"step": entry["step"], "loss": entry["loss"]} for entry in log if "loss" in entry]


def begin(options: Any, folder: Path) -> None:
    """Put the model as training starts into `folder`: the projection fitted, fresh adapters."""
    untrained = OptimSettings(max_steps=0, device="cpu", progress=False, report_to="none", tokens=512)
    config = AdaptConfig(
        encoder=options.encoder,
        llm=options.llm,
        output=str(folder),
        causal=True,
        lora=LoraSettings(dropout=0.0),
        init="ridge",
        init_rows=options.init_rows,
        loss=WEIGHTS,
        train=untrained,
    )
    adapt(config, read_rows(options.text, language="eng_Latn"))


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write."""
    parser = parser_of("benchmarks.trials.fp8", __doc__)
    for name in ("encoder", "llm", "text", "valid"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=256, help="of a step")
    parser.add_argument("--batches", type=int, default=2, help="of 16 texts, for gradients and for validation")
    parser.add_argument("--init-rows", type=int, default=400)
    parser.add_argument("--folder", type=Path, required=True, help="where the runs go, and what later parts read")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all, in this order")
    options = parser.parse_args(argv)
    rows = list(read_rows(options.valid, language="eng_Latn", limit=16 * options.batches))
    about = made_here() | {name: getattr(options, name) for name in ("steps", "tokens", "batches")}
    records: list[Any] = []

    def add(*more: Any) -> None:
        records.extend({**about, **one} for one in more)
        print(*map(json.dumps, more), sep="\n", flush=True)
        if options.json:
            write(options.json, records)

    root = options.folder
    if not (root / "start" / "config.json").exists():
        begin(options, root / "start")
    student = loaded(options, root / "start", torch.float32, None)
    tokenizer = student.require_tokenizer()
    batches = [collate(rows[i : i + 16], tokenizer) for i in range(0, len(rows), 16)]
    variance = variances(student, collate(rows, tokenizer))
    if "rounding" in options.parts:
        add(rounding(student, batches[0]))
    del student
    if "gradients at start" in options.parts:
        add(*gradient_table(options, "start", root / "start", batches, variance))
    for base in BASES:
        if f"curve {base}" in options.parts:
            add({"part": "curve", "base": base, "curve": train(options, root / "start", root / base, base)})
    if "validation" in options.parts:
        for trained in ("start", *BASES):
            for base in BASES:
                found = validated(options, root / trained, base, batches, variance)
                add({"part": "validation", "trained over": trained, "read over": base, "losses": found})
    if "gradients when trained" in options.parts:
        add(*gradient_table(options, "trained", root / "bf16", batches, variance))
    return 0


if __name__ == "__main__":
    sys.exit(main())
