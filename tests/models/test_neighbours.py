"""What users of peft and transformers do with a model: get_peft_model, gradient_checkpointing_enable."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model

from mtllm_fast import MTLLM, LoraSettings, TextRow
from mtllm_fast.data.collate import collate
from tests.conftest import assert_matches, relative_error
from tests.models.weights import saved_bytes, stir
from tests.tiny import LINES


@pytest.fixture
def stack(encoder_folder: str, llm_folder: str) -> MTLLM:
    return MTLLM.stack(encoder_folder, llm_folder, dtype=torch.float32).eval()


@pytest.fixture
def batch(stack: MTLLM):
    return collate([TextRow(line, "eng_Latn") for line in LINES[:4]], stack.tokenizer)


def lora(**more) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], lora_dropout=0.0, **more)


def fill(model: torch.nn.Module) -> None:
    torch.manual_seed(3)
    stir(model, 0.3, ".lora_")


@pytest.mark.parametrize("wrapped", ["llm.model", "llm"])
def test_get_peft_model_on_the_llm(stack: MTLLM, batch, tmp_path, wrapped: str) -> None:
    """peft's LoRA is the student's: off in the teacher, saved, loaded, merged, like one of `add_adapter`."""
    twin = copy.deepcopy(stack)
    with torch.no_grad():
        bare, plain = stack.teacher_states(batch.llm), stack.states(batch.mt)
    get_peft_model(stack.llm.model if wrapped == "llm.model" else stack.llm, lora())
    fill(stack)
    with torch.no_grad():
        student = stack.states(batch.mt)
        assert relative_error(student, plain) > 1e-2
        assert_matches(stack.teacher_states(batch.llm), bare, 1e-6)
        assert torch.equal(stack.states(batch.mt), student)  # on again

    twin.llm.add_adapter(LoraSettings(4, 8, 0.0, ("down_proj", "q_proj")), "default")
    fill(twin)
    with torch.no_grad():
        assert_matches(twin.states(batch.mt), student, 1e-6)
    stack.save_pretrained(tmp_path)
    loaded = MTLLM.from_pretrained(tmp_path)
    assert loaded.config.adapters == {"default": LoraSettings(4, 8, 0.0, ("down_proj", "q_proj"))}
    with torch.no_grad():
        assert_matches(loaded.states(batch.mt), student, 1e-6)
        loaded.llm.merge_adapter()
        assert_matches(loaded.states(batch.mt), student, 1e-5)


def test_a_removed_adapter_does_not_come_back(stack: MTLLM, tmp_path) -> None:
    stack.llm.add_adapter(LoraSettings(r=2), "guest")
    stack.llm.remove_adapter("guest")
    stack.save_pretrained(tmp_path)
    assert MTLLM.from_pretrained(tmp_path).config.adapters == {}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lora(use_dora=True), "peft put LORA with use_dora=True into the model; only plain LoRA"),
        (lora(bias="lora_only"), "bias='lora_only'"),
        (IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]), "peft put IA3 into"),
    ],
)
def test_what_could_not_be_saved_is_refused(stack: MTLLM, batch, tmp_path, config, message: str) -> None:
    get_peft_model(stack.llm.model, config)
    for call in (lambda: stack.save_pretrained(tmp_path / "x"), lambda: stack.teacher_states(batch.llm)):
        with pytest.raises(ValueError, match=message):
            call()
    assert not (tmp_path / "x").exists()


def test_adapters_elsewhere_are_refused(stack: MTLLM, batch) -> None:
    get_peft_model(stack.encoder.model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="encoder: peft put default into it"):
        stack.teacher_states(batch.llm)
    del stack.encoder.model.peft_config
    get_peft_model(stack, LoraConfig(target_modules=["v_proj"]))
    with pytest.raises(ValueError, match=r"the whole stack; give it the backbone, e.g. model.llm.model"):
        stack.teacher_states(batch.llm)


def kept_and_gradients(model: MTLLM, batch) -> tuple[int, dict[str, torch.Tensor]]:
    """Bytes that the forward pass keeps for the backward, and the gradients."""
    model.zero_grad()
    losses = []

    def forward() -> None:
        torch.manual_seed(3)  # of the encoder's dropout
        states = model.states(batch.mt)  # their squares would add up to a constant, behind an RMSNorm
        losses.append((states * torch.linspace(-1, 1, states.numel()).view_as(states)).sum())

    kept = saved_bytes(forward, model.parameters())
    losses[0].backward()
    return kept, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("trained", ["adapter", "encoder too"])
def test_gradient_checkpointing(encoder_folder: str, llm_folder: str, trained: str) -> None:
    """Less is kept, and the gradients are those without it; also through an encoder whose weights are trained."""
    model = MTLLM.stack(encoder_folder, llm_folder, lora=LoraSettings(r=2, dropout=0.0), dtype=torch.float32)
    fill(model)
    if trained == "encoder too":
        model.encoder.layers.requires_grad_(True)
    model.train()
    batch = collate([TextRow(line, "eng_Latn") for line in LINES], model.tokenizer)
    kept, expected = kept_and_gradients(model, batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    less, found = kept_and_gradients(model, batch)
    assert less < 0.6 * kept
    assert found.keys() == expected.keys() and any("lora_A" in name for name in found)
    assert any(name.startswith("encoder.") for name in found) is (trained == "encoder too")
    for name, gradient in found.items():
        if not name.endswith("k_proj.bias"):  # no gradient but rounding: softmax ignores a constant
            assert_matches(gradient, expected[name], 1e-5)
    with pytest.raises(ValueError, match="use_reentrant=True"):
        model.gradient_checkpointing_enable({"use_reentrant": True})
