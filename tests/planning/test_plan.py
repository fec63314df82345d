"""The plan: predicted memory against a real step, the paper's run against its published hours, and the command."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaConfig, M2M100Config

from mtllm_fast import planning
from mtllm_fast.cli import main
from mtllm_fast.losses import DistillationLoss, DistillationWeights
from mtllm_fast.planning.accounting import SCRATCH, Accounting
from mtllm_fast.planning.simulate import build, make_batch
from mtllm_fast.training.stage import Stage

ENCODER = M2M100Config(
    vocab_size=4000, d_model=192, encoder_layers=3, decoder_layers=1, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=768, decoder_ffn_dim=64,
)  # fmt: skip
LLM = LlamaConfig(
    vocab_size=8000, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip
LENGTHS = [(10, 12), (200, 220), (33, 30), (77, 80), (77, 80)]


def measured(spec, lengths):
    """Peak bytes of a second real step on the CPU."""
    stage, batch = Stage(build(spec, "cpu"), DistillationLoss(spec.loss)), make_batch(lengths, "cpu")

    def step():
        stage.step(batch).backward()

    step()
    return planning.measured_peak(step)


@pytest.mark.parametrize("checkpointing", [False, 2, True])
@pytest.mark.parametrize(
    "weights",
    [DistillationWeights(), DistillationWeights(kl=1.0, paired_mse=1.0), DistillationWeights(0.5, contrast=1.0)],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_predicted_memory_is_within_a_tenth_of_a_real_step(weights, checkpointing):
    spec = planning.StepSpec(ENCODER, LLM, weights, dtype=torch.float32, checkpointing=checkpointing)
    real = measured(spec, LENGTHS)
    assert planning.ours(spec, LENGTHS, architecture="cpu").peak == pytest.approx(real, rel=0.1)
    fewer = planning.ours(spec, LENGTHS[:2], architecture="cpu").peak  # negative control: other texts, other memory
    assert fewer != pytest.approx(real, rel=0.1)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_contrast_is_planned_and_what_stage_1_lacks_is_named():
    plain, contrast = (planning.StepSpec(ENCODER, LLM, DistillationWeights(contrast=weight)) for weight in (0.0, 1.0))
    lengths = LENGTHS * 4
    flops = [planning.ours(spec, lengths).flops for spec in (plain, contrast)]
    product = 2 * len(lengths) ** 2 * LLM.hidden_size  # of the cosines; one more for the gradient of the student's
    assert flops[1]["loss"] - flops[0].get("loss", 0) == pytest.approx(product, rel=0.01)
    assert flops[1]["backward"] - flops[0]["backward"] == pytest.approx(product, rel=0.01)
    for name, what in (("task", "task > 0 needs task_head"), ("head_kl", "head_kl > 0 needs task_head")):
        with pytest.raises(ValueError, match=what):
            planning.ours(planning.StepSpec(ENCODER, LLM, DistillationWeights(**{name: 1.0})), LENGTHS)


def test_products_that_are_added_in_place_count():
    y, a, b = (torch.empty(*shape, device="meta") for shape in ((6, 5), (6, 4), (4, 5)))
    with Accounting() as acc:
        y.addmm_(a, b)
        torch.addmm(y, a, b)
    assert acc.flops["other"] == 2 * (2 * 6 * 4 * 5)


def test_static_memory_counts_every_weight():
    spec = planning.StepSpec(ENCODER, LLM, dtype=torch.float32)
    static = planning.ours(spec, LENGTHS).static
    model = build(spec, "cpu")
    real = sum(p.numel() * p.element_size() for p in model.parameters())
    assert static["encoder weights"] + static["LLM weights"] + static["trained weights"] == real
    layers = [m for n, m in model.llm.layers_root.named_modules() if n.endswith(".base_layer")]
    assert len(layers) == 7 * LLM.num_hidden_layers
    weights = sum(layer.weight.numel() for layer in layers)
    for base, saved in {"nf4": 4 - 0.516, "int8": 3.0, "fp8": 2.0}.items():
        spec = planning.StepSpec(ENCODER, LLM, dtype=torch.float32, base=base, offloaded_optimizer=True)
        other = planning.ours(spec, LENGTHS).static
        assert static["LLM weights"] - other["LLM weights"] == pytest.approx(saved * weights, rel=1e-3)
        assert other["optimizer state"] == 0 < static["optimizer state"]


def test_fp8_halves_the_time_of_frozen_products_alone():
    """With endless bandwidth only the FLOPs of the LLM's base layers go at twice the rate."""
    rates = planning.Rates(1e12, 1e30)
    dense, fp8 = (
        planning.ours(planning.StepSpec(ENCODER, LLM, base=base), LENGTHS, rates) for base in ("dense", "fp8")
    )
    assert fp8.flops == dense.flops
    assert fp8.seconds["encoder"] == pytest.approx(dense.seconds["encoder"])
    layers = build(planning.StepSpec(ENCODER, LLM)).llm.layers_root
    base = sum(m.weight.numel() for n, m in layers.named_modules() if n.endswith(".base_layer"))
    saved = 2 * base * sum(m for _, m in LENGTHS) / 2 / 1e12
    assert dense.seconds["LLM teacher"] - fp8.seconds["LLM teacher"] == pytest.approx(saved, rel=1e-6)
    # with endless FLOPs: weights are half the bytes, what is multiplied is read once more and written in fp8
    slow, plain = (
        planning.ours(planning.StepSpec(ENCODER, LLM, base=base), LENGTHS, planning.Rates(1e30, 1e12))
        for base in ("fp8", "dense")
    )
    widths = sum(m.in_features for n, m in layers.named_modules() if n.endswith(".base_layer"))
    more = (widths * sum(m for _, m in LENGTHS) * (2 + 1 + 1 - 2) - base) / 1e12
    assert slow.seconds["LLM teacher"] - plain.seconds["LLM teacher"] == pytest.approx(more, rel=1e-6)


def test_flops_are_those_of_the_gemms():
    spec = planning.StepSpec(ENCODER, LLM, DistillationWeights(kl=1.0))
    cost = planning.ours(spec, LENGTHS)
    layer = sum(p.numel() for p in build(spec).llm.decoder.layers[0].parameters() if not p.requires_grad)
    linear = layer - 2 * LLM.hidden_size  # without the two norms
    tokens = sum(m for _, m in LENGTHS)
    scores = 4 * sum(m * m for _, m in LENGTHS) * LLM.hidden_size
    # transformers 5.17 makes the rotary angles by a product, 1e-5 of it all; control: the scores count for more
    assert cost.flops["LLM teacher"] == pytest.approx((2 * tokens * linear + scores) * LLM.num_hidden_layers, rel=2e-5)
    assert scores > 1e-3 * 2 * tokens * linear
    pairs = sum(min(n - 2, m - 1) for n, m in LENGTHS)
    assert cost.flops["loss"] == 3 * 2 * pairs * LLM.hidden_size * LLM.vocab_size


def test_the_papers_run_takes_about_22_hours():
    """The one published figure: 10,000 steps of 256 web texts on 8 x A100-80GB, about 22 h, within a quarter."""
    spec = planning.StepSpec(planning.config("NLLB-600M"), planning.config("Llama-3-8B"))
    lengths = planning.sample_lengths("web")
    job = (lengths, planning.gpu("A100-80GB"), 2_560_000, 8, planning.EFFICIENCY)
    column = planning.plan_authors(spec, *job)
    assert column.hours == pytest.approx(22, rel=0.25)
    assert column.cost.memory < 80e9
    spec.llm.num_hidden_layers = 2
    fewer = planning.plan_authors(spec, *job)
    assert fewer.hours != pytest.approx(22, rel=0.25)  # negative control: the model matters


def test_the_papers_code_keeps_its_optimizer_on_the_gpu():
    job = (LENGTHS * 8, planning.gpu("A100-80GB"), 1000, 1, 1.0)
    kept, moved = (
        planning.plan_authors(planning.StepSpec(ENCODER, LLM, offloaded_optimizer=offloaded), *job)
        for offloaded in (False, True)
    )
    assert kept == moved
    assert kept.cost.static["optimizer state"] > 0


def test_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mtllm_fast.planning.config", lambda name, role="": ENCODER if name == "e" else LLM)
    (tmp_path / "lengths.txt").write_text("40\n60\n")
    file = tmp_path / "plan.json"
    main(["plan", "--encoder", "e", "--llm", "l", "--lengths", str(tmp_path / "lengths.txt"), "--json", str(file)])
    assert "hours on 1 GPU" in capsys.readouterr().out
    columns = json.loads(file.read_text())["columns"]
    assert [c["name"] for c in columns] == ["ours", "ours, checkpointing", "the paper's code"]
    assert all(c["hours"] > 0 for c in columns)


def test_does_not_fit():
    large, small = (planning.Gpu(312e12, 1.5e12, memory, "sm_80") for memory in (8e9, 8e6))
    job = (planning.StepSpec(ENCODER, LLM), [(512, 512)] * 64)
    found = [plan(*job, small, 1000, 1, 1.0) for plan in (planning.plan_ours, planning.plan_authors)]
    assert [column.cost for column in found] == [None, None]
    assert ("micro-batch, texts", "does not fit") not in planning.table(found[:1], small, 1)
    assert planning.plan_ours(*job, large, 1000, 1, 1.0).cost is not None  # control


@pytest.mark.parametrize(
    ("name", "memory", "planned"),
    [
        ("NVIDIA H200", 150e9, "H200"),
        ("NVIDIA H100 80GB HBM3", 85e9, "H100"),
        ("NVIDIA A100-SXM4-40GB", 42e9, "A100-40GB"),
        ("NVIDIA A100-SXM4-80GB", 85e9, "A100-80GB"),
        ("NVIDIA GeForce RTX 4090", 25e9, "H200"),
        ("", 0, "H200"),
    ],
)
def test_the_gpu_of_a_plan_is_this_machines(monkeypatch, name: str, memory: float, planned: str) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: bool(name))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda *_: name)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda *_: type("P", (), {"total_memory": memory}))
    assert planning.this_gpu() == planned


@pytest.mark.parametrize("cached", [False, True])
def test_scratch_grows_with_the_vocabulary_as_the_launchers_buffers_do(cached, monkeypatch):
    """What `linear_kl`'s launcher allocates on a GPU, without its kernels and products; rows of logits are padded."""
    pytest.importorskip("triton")
    from mtllm_fast.kernels import linear_kl_launch as launch
    from mtllm_fast.kernels import linear_kl_ops as ops

    for kernel in ("kl_rows", "exp_rows", "finish_moments"):
        monkeypatch.setattr(launch, kernel, {(24,): lambda *_, **__: None})
    monkeypatch.setattr(launch, "mm_f32", lambda a, b, out: out)
    states, rows, one = torch.zeros(30, 8, dtype=torch.bfloat16), torch.arange(24), torch.zeros(30)

    def of_launcher(vocab: int) -> int:
        head = torch.zeros(vocab, 8, dtype=torch.bfloat16)
        common = {"h_s": states, "w_s": head, "rows_s": rows, "rows_t": rows, "need_dh": True}
        if not cached:
            return planning.measured_peak(lambda: launch.difference_triton(ops.Difference(**common, h_t=states)))
        moments = {"m": torch.zeros(30, 8), "entropy": one, "bias_mean": one}
        return planning.measured_peak(lambda: launch.moment_step_triton(ops.MomentStep(**common, **moments)))

    def predicted(vocab: int) -> float:
        head = torch.empty(vocab, 8, dtype=torch.bfloat16, device="meta")
        arguments = {"head": head, "m": one if cached else None, "rows_s": rows, "need_dx": True}
        return SCRATCH["mtllm_fast::distillation_loss"](architecture="default", **arguments)

    assert of_launcher(65) - of_launcher(64) == (1 if cached else 2) * 24 * 64 * 4
    for vocab in (17, 65, 1000, 1025):
        assert predicted(vocab) - predicted(64) == of_launcher(vocab) - of_launcher(64)
    assert of_launcher(1000) == pytest.approx(predicted(1000), rel=0.05)
