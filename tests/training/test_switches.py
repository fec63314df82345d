"""The switches of a training step: what they save, that they change no result, and what refuses them."""

from __future__ import annotations

import importlib.util
import shutil

import pytest
import torch
from torch import Tensor

from mtllm_fast import MTLLM, TextRow
from mtllm_fast.data.batch import tokenise_rows
from mtllm_fast.data.pack import PackedBatch
from mtllm_fast.losses import DistillationLoss, DistillationWeights
from mtllm_fast.models import LoraSettings
from mtllm_fast.models.checkpointing import kept_bytes_per_token, layers_within, recompute_layers
from mtllm_fast.models.compile import compile_layers
from mtllm_fast.training import AdaptConfig, adapt
from mtllm_fast.training.stage import Stage
from mtllm_fast.training.switches import apply_liger, apply_switches, base_dtype, check_switches, optimizer_name
from tests.models.weights import saved_bytes, stir
from tests.tiny import LINES, build_llm_folder
from tests.training.short_runs import optim, same_weights

CPU = torch.device("cpu")
WEIGHTS = DistillationWeights(pooled_mse=1.0, paired_mse=0.5, kl=0.3)


def _student(encoder: str, llm: str, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> MTLLM:
    torch.manual_seed(0)
    return stir(MTLLM.stack(encoder, llm, lora=LoraSettings(r=4, dropout=dropout), dtype=dtype), 0.05).train()


def _batch(student: MTLLM, lines=LINES):
    rows = [TextRow(line) for line in lines]
    return tokenise_rows(rows, student.tokenizer, ("mt", "llm")).batch(range(len(rows)), align=True)


def _gradient(student: MTLLM, batch, seed: int = 3) -> dict[str, Tensor]:
    """Gradient of one step, dropout drawn from `seed`."""
    step = Stage(student, DistillationLoss(WEIGHTS))
    student.zero_grad()
    torch.manual_seed(seed)
    terms = step(batch)
    step.loss.total(terms, step.counts(batch)).backward()
    return {name: p.grad.clone() for name, p in student.named_parameters() if p.requires_grad}


# ---- checkpointing


@pytest.mark.parametrize("count", [None, 3])
def test_recomputed_layers_change_no_bit_of_the_gradient(encoder_folder, tmp_path, count) -> None:
    student = _student(encoder_folder, build_llm_folder(tmp_path, num_hidden_layers=5), dropout=0.1)
    batch = _batch(student)
    plain = _gradient(student, batch)
    runs = {"recomputed": 0}
    layers = student.llm.layers_root.layers
    layers[0].input_layernorm.register_forward_hook(lambda *_: runs.__setitem__("recomputed", runs["recomputed"] + 1))
    recompute_layers(student.llm, count)
    assert [layer.gradient_checkpointing for layer in layers] == [i < (5 if count is None else count) for i in range(5)]
    again = _gradient(student, batch)
    assert runs["recomputed"] == 3  # teacher, student, once more in backward
    assert all(torch.equal(again[name], plain[name]) for name in plain)
    other = _gradient(student, batch, seed=4)  # control: dropout is on and matters
    assert not all(torch.equal(other[name], plain[name]) for name in plain)


def test_budget_is_kept_and_used(encoder_folder, tmp_path) -> None:
    student = _student(encoder_folder, build_llm_folder(tmp_path, num_hidden_layers=6))
    llm, layers = student.llm, student.llm.layers_root.layers
    tokens = 96
    kept, recomputed = kept_bytes_per_token(llm)
    assert 4 * llm.hidden_size == recomputed < kept / 10
    batch = PackedBatch.from_sequences([list(range(5, 5 + tokens // 4))] * 4)

    def saved() -> int:
        embeds = torch.zeros(tokens, llm.hidden_size, requires_grad=True)
        return saved_bytes(lambda: llm(batch, embeds=embeds), student.parameters())

    outside = saved() - 6 * kept * tokens  # embeddings, final norm, position tables
    budget = 3.5 * kept * tokens
    settings = optim(checkpointing="budget", activation_memory_gib=budget / 2**30, tokens=tokens)
    apply_switches(student, settings, CPU)
    count = sum(layer.gradient_checkpointing for layer in layers)
    assert count == 3
    used = saved() - outside
    assert 0.75 * budget < used < 1.02 * budget
    recompute_layers(llm, count - 1)  # control: one layer more does not fit
    assert saved() - outside > 1.02 * budget


def test_budget_arithmetic() -> None:
    assert layers_within(1000, 10, 10, kept=20.0, recomputed=1.0) == 6  # 6 * 10 + 4 * 200 = 860, one more: 1050
    assert layers_within(1e9, 10, 10, kept=20.0, recomputed=1.0) == 0
    assert layers_within(100, 10, 10, kept=20.0, recomputed=1.0) == 10
    with pytest.raises(ValueError, match="activation_memory_gib"):
        layers_within(99, 10, 10, kept=20.0, recomputed=1.0)


def test_a_run_may_change_its_checkpointing(encoder_folder, llm_folder, tmp_path) -> None:
    """Checkpointing changes no result, so a run goes on with another one: the same weights, bit for bit."""
    rows = [TextRow(line) for line in LINES]

    def run(name: str, resume: bool = False, **changes) -> None:
        train = optim(max_steps=4, save_steps=2, warmup=0.0, **changes)
        adapt(AdaptConfig(encoder_folder, llm_folder, str(tmp_path / name), train=train, resume=resume), rows)

    run("whole")
    run("full", checkpointing="full")
    assert same_weights(tmp_path / "full", tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "changed")
    shutil.rmtree(tmp_path / "changed" / "checkpoint-4")
    (tmp_path / "changed" / "model.safetensors").unlink()
    run("changed", resume=True, checkpointing="budget", activation_memory_gib=1.0)
    assert same_weights(tmp_path / "changed", tmp_path / "whole")


# ---- what a step never keeps


def test_teacher_keeps_nothing_and_no_pass_has_a_cache(encoder_folder, llm_folder) -> None:
    student = _student(encoder_folder, llm_folder)
    batch = _batch(student)
    caches = []
    student.llm.decoder.register_forward_hook(lambda m, a, out: caches.append(out.past_key_values))
    assert saved_bytes(lambda: student.teacher_states(batch.llm)) == 0
    assert saved_bytes(lambda: student.states(batch.mt)) > 0
    assert caches == [None, None]


def test_pooled_loss_keeps_no_states(encoder_folder, llm_folder) -> None:
    """Pooling after the final norm keeps nothing of (T, D): the gradient of a mean needs only lengths."""
    student = _student(encoder_folder, llm_folder)
    batch = _batch(student)
    teacher, states = student.teacher_states(batch.llm), student.states(batch.mt)
    size = states.numel() * states.element_size()
    loss = DistillationLoss(DistillationWeights(pooled_mse=1.0))
    pooled = saved_bytes(lambda: loss(states, teacher, batch))
    assert pooled < size / 2
    unfused = saved_bytes(lambda: ((states - states.mean()) ** 2).mean())  # control: the count sees states
    assert unfused >= size


def test_bf16_base_has_a_bf16_residual_stream_and_head(encoder_folder, llm_folder) -> None:
    dtype = base_dtype(optim(base_weights="bf16", bf16=True))
    assert dtype == torch.bfloat16
    student = _student(encoder_folder, llm_folder, dtype=dtype)
    seen = []
    for layer in student.llm.layers_root.layers:
        layer.register_forward_hook(
            lambda m, a, out: seen.append(out.dtype if isinstance(out, Tensor) else out[0].dtype)
        )
    with torch.autocast("cpu", torch.bfloat16):
        _gradient(student, _batch(student))
    assert set(seen) == {torch.bfloat16}
    assert student.llm.lm_head.weight.dtype == torch.bfloat16
    assert {p.dtype for p in student.parameters() if p.requires_grad} == {torch.float32}


# ---- compile


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_other_lengths_compile_nothing_anew(encoder_folder, llm_folder) -> None:
    from torch._dynamo.utils import counters

    student = _student(encoder_folder, llm_folder)
    batches = [_batch(student, lines) for lines in (LINES, LINES[:2], LINES[1:], [LINES[0]] * 9, LINES[:1], LINES[5:])]
    plain = [_gradient(student, batch) for batch in batches]
    torch.compiler.reset()
    counters.clear()
    for part in (student.encoder, student.llm):
        compile_layers(part.layers_root.layers, backend="aot_eager")
    compiled = [_gradient(student, batch) for batch in batches[:2]]
    _gradient(student, batches[4])  # one sequence alone has a graph of its own
    graphs = counters["stats"]["unique_graphs"]
    assert 0 < graphs <= 24  # kinds of layers and passes, not layers and lengths
    compiled += [_gradient(student, batch) for batch in batches[2:]]
    assert counters["stats"]["unique_graphs"] == graphs
    for mine, right in zip(compiled, plain):
        for name in right:
            assert torch.allclose(mine[name], right[name], rtol=1e-4, atol=1e-6 * right[name].abs().max().item()), name
    assert not torch.allclose(plain[0]["projection.layers.weight"], plain[1]["projection.layers.weight"], rtol=1e-4)
    torch.compiler.reset()


@pytest.mark.parametrize("again", [False, True])
def test_only_attention_is_outside_of_the_graphs(encoder_folder, llm_folder, again) -> None:
    """Adapters, dropout and autocast are inside, also of layers that are run again in backward."""
    from torch._dynamo.utils import counters

    student = _student(encoder_folder, llm_folder, dropout=0.1)
    batch = _batch(student)

    def gradient() -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return _gradient(student, batch)

    plain = gradient()
    if again:
        recompute_layers(student.llm)
    torch.compiler.reset()
    counters.clear()
    compile_layers(student.llm.layers, backend="eager")
    compiled = gradient()
    assert counters["stats"]["unique_graphs"] > 4
    assert all("packed_attention" in reason for reason in counters["graph_break"]), counters["graph_break"]
    assert all(torch.allclose(compiled[name], plain[name], rtol=1e-2) for name in plain)
    torch.compiler.reset()


# ---- Liger


def test_liger_goes_into_the_llm_alone(encoder_folder, llm_folder, monkeypatch) -> None:
    rms = pytest.importorskip("liger_kernel.transformers.rms_norm")
    swiglu = pytest.importorskip("liger_kernel.transformers.swiglu")
    from transformers.models.llama import modeling_llama

    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):  # put back what Liger replaces in the family
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    before = modeling_llama.apply_rotary_pos_emb
    student = _student(encoder_folder, llm_folder)
    forward = type(student.llm.model).forward
    apply_liger(student)
    decoder = student.llm.decoder
    norms = [decoder.norm, *(n for l in decoder.layers for n in (l.input_layernorm, l.post_attention_layernorm))]
    assert all(norm.forward.__func__ is rms.LigerRMSNorm.forward for norm in norms)
    assert all(layer.mlp.forward.__func__ is swiglu.LigerSwiGLUMLP.forward for layer in decoder.layers)
    assert modeling_llama.apply_rotary_pos_emb is not before
    assert type(student.llm.model).forward is forward and "forward" not in vars(student.llm.model)
    assert any(".lora_" in name for name, _ in decoder.layers[0].mlp.named_parameters())  # over the adapters
    student.llm.model.config.model_type = "unheard_of"
    with pytest.raises(ValueError, match="liger: has no layers for 'unheard_of'"):
        apply_liger(student)
    alone = MTLLM.stack(encoder_folder, reader="encoder", lora=LoraSettings())
    with pytest.raises(ValueError, match="liger: reader='encoder' has no LLM"):
        apply_liger(alone)


# ---- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_weights": "fp8"}, "base_weights='fp8': needs a GPU"),
        ({"liger": True}, "liger: its layers are Triton kernels and need a GPU"),
        ({"offload_optimizer": True}, "offload_optimizer: on the CPU the optimizer's state is in host memory"),
        ({"optim": "paged_adamw_8bit"}, "optim='paged_adamw_8bit': on the CPU"),
        ({"optim": "adamw"}, "optim='adamw': expected a name that transformers knows"),
        ({"offload_optimizer": True, "optim": "sgd"}, "offload_optimizer with optim='sgd'"),
    ],
)
def test_what_a_cpu_cannot_do(changes, message, monkeypatch) -> None:
    monkeypatch.setattr("mtllm_fast.training.switches.find_spec", lambda name: object())  # every package is there
    with pytest.raises(ValueError, match=message):
        check_switches(optim(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_weights": "nf4"}, r"base_weights='nf4' needs bitsandbytes: pip install 'mtllm-fast\[quant\]'"),
        ({"base_weights": "int8"}, r"base_weights='int8' needs torchao: pip install 'mtllm-fast\[quant\]'"),
        ({"optim": "adamw_8bit"}, r"optim='adamw_8bit' needs bitsandbytes: pip install 'mtllm-fast\[quant\]'"),
        ({"optim": "adamw_torch_8bit"}, r"needs torchao: pip install 'mtllm-fast\[quant\]'"),
        ({"liger": True}, r"liger needs liger_kernel: pip install 'mtllm-fast\[liger\]'"),
    ],
)
def test_missing_packages_are_named_before_anything_is_loaded(changes, message, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("mtllm_fast.training.switches.find_spec", lambda name: None)
    config = AdaptConfig(encoder="no/encoder", llm="no/llm", output=str(tmp_path / "run"), train=optim(**changes))
    with pytest.raises(ValueError, match=message):
        adapt(config, [TextRow(LINES[0])])
    assert not (tmp_path / "run").exists()


def test_other_refusals(monkeypatch) -> None:
    with pytest.raises(ValueError, match=r"activation_memory_gib=0\.0: must be > 0"):
        optim(checkpointing="budget")
    with pytest.raises(ValueError, match="not given with checkpointing='full'"):
        optim(checkpointing="full", activation_memory_gib=1.0)
    monkeypatch.setattr("mtllm_fast.training.switches.find_spec", lambda name: object())
    with pytest.raises(ValueError, match="include_base with base_weights='nf4'"):
        check_switches(optim(base_weights="nf4"), include_base=True)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ValueError, match=r"C\+\+ compiler"):
        check_switches(optim(compile=True))


def test_fp8_needs_the_hardware_and_nothing_else(monkeypatch) -> None:
    """No package, no `compile`; an older GPU or another maker's is refused."""
    monkeypatch.setattr("mtllm_fast.training.switches.find_spec", lambda name: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a card")
    fp8 = optim(base_weights="fp8", device="cuda", bf16=True)
    for capability, fits in (((8, 0), False), ((8, 9), True), ((9, 0), True)):
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda found=capability: found)
        if fits:
            assert base_dtype(fp8) == torch.bfloat16
        else:
            with pytest.raises(ValueError, match=r"base_weights='fp8': needs compute capability 8\.9, a card has less"):
                check_switches(fp8)
    with pytest.raises(ValueError, match="include_base with base_weights='fp8'"):
        check_switches(fp8, include_base=True)
    monkeypatch.setattr("torch.version.hip", "6.4")
    with pytest.raises(ValueError, match="base_weights='fp8': needs a GPU of NVIDIA's"):
        check_switches(fp8)


def test_names_and_dtypes() -> None:
    assert optimizer_name(optim(offload_optimizer=True)) == "paged_adamw_32bit"
    assert optimizer_name(optim(offload_optimizer=True, optim="adamw_8bit")) == "paged_adamw_8bit"
    assert optimizer_name(optim(optim="adafactor")) == "adafactor"
    assert base_dtype(optim()) == base_dtype(optim(bf16=True)) == torch.float32  # auto, on the CPU
    if importlib.util.find_spec("bitsandbytes"):
        assert base_dtype(optim(base_weights="nf4", bf16=True)) == torch.bfloat16
