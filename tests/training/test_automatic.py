"""What a run chooses by its device: as before on a CPU, on a GPU by what it has, and what a resumed run keeps."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from mtllm_fast.kernels.gemms import has_fast_bf16
from transformers import LlamaConfig

from mtllm_fast import planning
from mtllm_fast.planning.presets import config as preset
from mtllm_fast.training import OptimSettings, automatic
from mtllm_fast.training.automatic import Settled, needed, settled

AUTO = ("bf16", "tokens", "workers", "compile", "liger")


def values(optim: OptimSettings) -> tuple:
    return tuple(getattr(optim, name) for name in AUTO)


@pytest.fixture
def gpu(monkeypatch):
    """An H200 by its answers, 16 cores, a C compiler, no Liger, an 8B Llama."""
    state = SimpleNamespace(memory=141e9, liger=False, triton=True, bf16=True, config=preset("Llama-3-8B"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda *_: "NVIDIA H200")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda *_: SimpleNamespace(total_memory=state.memory))
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **_: state.bf16)
    monkeypatch.setattr(
        automatic, "find_spec", lambda name: {"liger_kernel": state.liger, "triton": state.triton}[name] or None
    )
    monkeypatch.setattr(automatic, "_liger_knows", lambda config: config.model_type == "llama")
    monkeypatch.setattr(automatic, "_cores", lambda: 16)
    monkeypatch.setattr(automatic, "_config", lambda *_: state.config)
    monkeypatch.setenv("CC", "cc")
    return state


def test_a_cpu_has_what_it_had(caplog) -> None:
    """Also what is recorded: a run of before goes on."""
    got = settled(OptimSettings(device="cpu"))
    assert values(got) == (False, 4096, 0, False, False)
    assert caplog.records == []
    assert values(settled(OptimSettings(device="cpu", bf16=True, tokens=600, compile=True))) == (
        True,
        600,
        0,
        True,
        False,
    )
    assert asdict(got).keys() == asdict(OptimSettings()).keys()
    assert settled(got) is got
    assert settled(OptimSettings(device="cpu", max_length=5000)).tokens == 5000
    with pytest.raises(ValueError, match="tokens=100: must be at least max_length"):
        OptimSettings(tokens=100, max_length=600)
    assert isinstance(replace(got, lr=1.0), Settled)


def test_a_gpu_chooses_and_says_so_once(gpu, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        got = settled(OptimSettings(), llm="an/llm")
        assert settled(got) is got
    assert values(got) == (True, 8192, 4, True, False)
    (record,) = caplog.records
    assert record.getMessage() == "auto: bf16, 8192 tokens a pack, 4 workers, compiled layers (NVIDIA H200)"
    given = OptimSettings(bf16=False, tokens=1024, workers=1, compile=False, liger=False)
    caplog.clear()
    assert values(settled(given)) == (False, 1024, 1, False, False)
    assert caplog.records == []
    assert values(settled(OptimSettings(device="cpu"))) == (False, 4096, 0, False, False)
    gpu.bf16 = False
    assert settled(OptimSettings()).bf16 is False


@pytest.mark.parametrize("fast", [False, True])
def test_bf16_on_a_processor_that_is_slower_by_it_is_said_once(monkeypatch, caplog, fast) -> None:
    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, probe, lambda: fast)
    has_fast_bf16.cache_clear()
    with caplog.at_level(logging.WARNING):
        got = settled(OptimSettings(device="cpu", bf16=True))
        assert settled(got).bf16
        assert not settled(OptimSettings(device="cpu")).bf16
    has_fast_bf16.cache_clear()
    slower = "bf16: this processor has no bf16 instructions and multiplies it slower than fp32, the default"
    assert [record.getMessage() for record in caplog.records] == [slower] * (not fast)


@pytest.mark.parametrize(
    ("state", "options", "layers"),
    [
        ({"liger": True}, {}, (False, True)),
        ({"liger": True, "config": LlamaConfig(model_type="unheard_of")}, {}, (True, False)),
        ({"liger": True}, {"liger": False}, (True, False)),
        ({"liger": True}, {"compile": True}, (True, False)),
        ({"liger": True}, {"compile": False}, (False, True)),
        ({"liger": True}, {"compile": True, "liger": True}, (True, True)),
        ({}, {"liger": True}, (False, True)),
        ({"liger": True}, {"base_weights": "fp8"}, (False, True)),
        ({"triton": False}, {}, (False, False)),
        ({}, {"compile": False}, (False, False)),
        ({}, {"parallel": "fsdp2"}, (False, False)),
    ],
)
def test_layers(gpu, monkeypatch, state, options, layers) -> None:
    vars(gpu).update(state)
    if options.get("parallel"):
        monkeypatch.setenv("WORLD_SIZE", "2")
    if isinstance(gpu.config, LlamaConfig) and state.get("config"):
        gpu.config.model_type = "unheard_of"
    got = settled(OptimSettings(**options))
    assert (got.compile, got.liger) == layers


def test_tokens_are_those_that_fit(gpu) -> None:
    gpu.memory = 80e9
    a100 = settled(OptimSettings()).tokens
    assert a100 % 1024 == 0
    weights, per_token = needed(gpu.config)
    assert weights + a100 * per_token <= 0.75 * 80e9 < weights + (a100 + 1024) * per_token
    assert settled(OptimSettings(checkpointing="full")).tokens == 8192
    gpu.config = None
    assert settled(OptimSettings()).tokens == 8192


def test_the_estimate_is_near_the_plans() -> None:
    """Per token, of a Llama's layers and its MLP's scratch; control: another model's is not."""
    llm = LlamaConfig(
        vocab_size=2000, hidden_size=512, intermediate_size=1792, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=2,
    )  # fmt: skip
    encoder = preset("NLLB-600M")
    encoder.encoder_layers = 1
    few, many = (planning.ours(planning.StepSpec(encoder, llm), [(256, 256)] * n).peak for n in (4, 16))
    traced = (many - few) / (12 * 256)
    assert needed(llm)[1] == pytest.approx(traced, rel=0.25)
    llm.num_hidden_layers = 4
    assert needed(llm)[1] != pytest.approx(traced, rel=0.25)
    parameters = 6 * (4 * 512 * 512 + 3 * 512 * 1792) + 2 * 2000 * 512
    llm.num_hidden_layers = 6
    assert needed(llm)[0] == 2 * parameters


def test_a_resumed_run_keeps_what_it_has(gpu, tmp_path) -> None:
    train = {"bf16": False, "tokens": 600, "workers": 0, "compile": False, "liger": True}
    (tmp_path / "run.json").write_text(json.dumps({"train": train}))
    new, again = (settled(OptimSettings(), str(tmp_path), resume) for resume in (False, True))
    assert values(new) == (True, 8192, 4, True, False)
    assert values(again) == (False, 600, 4, False, False)  # Liger is not installed here
    gpu.liger = True
    assert settled(OptimSettings(), str(tmp_path), True).liger
    given = settled(OptimSettings(tokens=700, bf16=True), str(tmp_path), True)
    assert (given.tokens, given.bf16) == (700, True)  # which the run's folder refuses
    cpu = settled(OptimSettings(device="cpu"), str(tmp_path), True)
    assert values(cpu) == (False, 600, 0, False, False)
    for damaged in ("", "[]", '{"train": 3}'):
        (tmp_path / "run.json").write_text(damaged)
        assert settled(OptimSettings(device="cpu"), str(tmp_path), True).tokens == 4096


def test_workers_are_of_the_cores_of_a_process(gpu, monkeypatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert settled(OptimSettings()).workers == 1
    assert torch.cuda.device_count() == 1
