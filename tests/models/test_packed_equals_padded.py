"""Packed rows equal Hugging Face's own padded rows, forward and gradients, in fp32."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn

from mtllm_fast.data.pack import PackedBatch
from mtllm_fast.models import PackedEncoder, PackedLLM
from tests.conftest import assert_matches
from tests.models.weights import enlarge
from tests.tiny import m2m100_config

LENGTHS = (1, 2, 63, 64, 65, 150)
TOLERANCE = 1e-5
COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "attention_dropout": 0.0,
}
DECODERS = {
    "llama": ("Llama", {}),
    "llama_mha": ("Llama", {"num_key_value_heads": 4}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral_window": ("Mistral", {"sliding_window": 20}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "gemma": ("Gemma", {}),
    "gemma2": ("Gemma2", {"sliding_window": 20, "query_pre_attn_scalar": 8}),
    "gemma3": (
        "Gemma3",
        {"sliding_window": 20, "query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
}


def _random_batch(vocab: int, first: int = 4) -> tuple[PackedBatch, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    sequences = [torch.randint(first, vocab, (n,), generator=generator).tolist() for n in LENGTHS]
    batch = PackedBatch.from_sequences(sequences)
    ids, mask = batch.to_padded(1)
    return batch, ids, mask


def _make_decoder(key: str) -> nn.Module:
    family, changes = DECODERS[key]
    config_name = f"{family}TextConfig" if family == "Gemma3" else f"{family}Config"
    config = getattr(transformers, config_name)(**{**COMMON, **changes}, attn_implementation="eager")
    torch.manual_seed(0)
    return enlarge(getattr(transformers, f"{family}ForCausalLM")(config)).eval()


def _gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: p.grad for name, p in model.named_parameters() if p.grad is not None and float(p.grad.abs().max()) > 0
    }


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("key", list(DECODERS))
def test_decoder(key: str, causal: bool) -> None:
    padded = _make_decoder(key)
    packed = PackedLLM(copy.deepcopy(padded), causal=causal)
    padded.config.is_causal = causal
    batch, ids, mask = _random_batch(64)
    expected = padded.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    actual = packed(batch)
    assert_matches(actual, batch.unpad_states(expected), TOLERANCE)
    probe = torch.randn(actual.shape, generator=torch.Generator().manual_seed(1))
    (actual * probe).sum().backward()
    (batch.unpad_states(expected) * probe).sum().backward()
    mine, theirs = _gradients(packed.model), _gradients(padded)
    assert mine.keys() == theirs.keys() and len(mine) > 5
    for name, gradient in mine.items():
        if not name.endswith("k_proj.bias"):  # no gradient but rounding: softmax ignores a constant
            assert_matches(gradient, theirs[name], 2 * TOLERANCE)


@pytest.mark.parametrize("key", ["llama", "gemma3", "mistral_window"])
def test_bidirectional_by_behaviour(key: str) -> None:
    """Changing the last token moves the first row of its own sequence, and of no other, unless attention is causal."""
    first, second = [5, 6, 7, 8], [9, 10, 11]
    base = PackedBatch.from_sequences([first, second])
    changed = PackedBatch.from_sequences([first[:-1] + [40], second])
    for causal in (True, False):
        llm = PackedLLM(_make_decoder(key), causal=causal)
        with torch.no_grad():
            moved = (llm(base) - llm(changed)).abs().amax(-1)
        assert bool(moved[0] > 1e-3) is not causal
        assert float(moved[4:].max()) == 0.0


def _fresh_encoder(positions: int, attention: str | None = None) -> nn.Module:
    torch.manual_seed(0)
    config = m2m100_config(max_position_embeddings=positions, attn_implementation=attention)
    return transformers.M2M100Model(config).eval().encoder


@pytest.mark.parametrize("length", [*range(13, 20), 40])
def test_encoder_positions_about_the_end_of_the_table(length: int) -> None:
    """A table for 16 tokens has 18 rows, and position p sits at row p + 2: the last one is read, none after it, and
    the table grows with the texts, as in Hugging Face."""
    batch = PackedBatch.from_sequences([list(range(4, 4 + length)), [5, 6]])
    ids, mask = batch.to_padded(1)
    with torch.no_grad():
        expected = _fresh_encoder(16, "eager")(input_ids=ids, attention_mask=mask).last_hidden_state
        assert_matches(PackedEncoder(_fresh_encoder(16))(batch), batch.unpad_states(expected), TOLERANCE)


SCALED = {
    "dynamic": (transformers.LlamaConfig, {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0}),
    "dynamic qwen": (transformers.Qwen3Config, {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0}),
    "longrope": (
        transformers.Phi3Config,
        {
            "rope_type": "longrope", "rope_theta": 100.0, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4,
            "original_max_position_embeddings": 16, "factor": 4.0,
        },
    ),
    "by layer type": (
        transformers.Gemma3TextConfig,
        {
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0},
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("key", list(SCALED))
def test_scaled_positions_do_not_depend_on_pack_mates(key: str) -> None:
    """Up to the limit a text has the states that transformers gives it alone; above it a pack is refused."""
    config_class, rope = SCALED[key]
    longest = 64 if key == "longrope" else 16
    settings = {**COMMON, "max_position_embeddings": longest, "rope_parameters": rope, "pad_token_id": 0}
    torch.manual_seed(0)
    if key == "longrope":
        settings["original_max_position_embeddings"] = 16
    if key == "by layer type":
        settings["layer_types"] = ["sliding_attention", "full_attention"]
    config = config_class(**settings, attn_implementation="eager")
    model = enlarge(transformers.AutoModelForCausalLM.from_config(config)).eval()
    texts = [list(range(4, 20)), [30, 31, 32], list(range(10, 21))]
    with torch.no_grad():
        decoder = model.get_decoder()
        alone = torch.cat([decoder(input_ids=torch.tensor([text])).last_hidden_state[0] for text in texts])
        together, positions = torch.tensor([[30, 31, 32], [4, 5, 6]]), torch.tensor([[0, 1, 2], [37, 38, 39]])
        beside = decoder(input_ids=together, position_ids=positions)
        moved = (beside.last_hidden_state[0] - alone[16:19]).abs().max() / alone.abs().max()
        assert float(moved) > 1e-4  # control: one large position of a call changes the others
        decoder(input_ids=torch.tensor([[5]]))  # "dynamic" forgets
        llm = PackedLLM(model, causal=True)
        assert_matches(llm(PackedBatch.from_sequences(texts)), alone, TOLERANCE)
        with pytest.raises(ValueError, match=r"a text has 17 tokens; .*(dynamic|longrope).* above 16; cut texts to 16"):
            llm(PackedBatch.from_sequences([*texts, list(range(17))]))
        assert_matches(llm(PackedBatch.from_sequences(texts)), alone, TOLERANCE)


def test_unscaled_positions_have_no_limit() -> None:
    assert PackedLLM(_make_decoder("llama")).length_limit is None
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 100.0, "original_max_position_embeddings": 16}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**COMMON, rope_parameters=yarn))
    assert PackedLLM(model).length_limit is None


def test_empty_sequences_and_order() -> None:
    """A sequence of length 0 takes no rows, and the others are what they are alone."""
    llm = PackedLLM(_make_decoder("llama"), causal=False)
    together = llm(PackedBatch.from_sequences([[], [5, 6, 7], [], [8], [9, 10]]))
    alone = torch.cat([llm(PackedBatch.from_sequences([s])) for s in ([5, 6, 7], [8], [9, 10])])
    assert_matches(together, alone, TOLERANCE)
