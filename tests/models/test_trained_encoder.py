"""The encoder of a stack trained, by LoRA or whole: gradients, saving, merging, and what refuses it."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.func import functional_call

from mtllm_fast import MTLLM, Engine, LoraSettings, MTLLMConfig, ProjectionConfig, TextRow, cli
from mtllm_fast.data.collate import collate
from mtllm_fast.data.pack import PackedBatch
from mtllm_fast.models import PackedEncoder, PackedLLM
from mtllm_fast.models.config import ENCODER_ADAPTER
from mtllm_fast.models.merge import merge
from mtllm_fast.models.storage import own_state
from tests.conftest import assert_matches, relative_error
from tests.models.test_encoder_families import CONFIGS, KEY_BIAS, batch_of, make, padded_states
from tests.models.weights import saved_bytes, stir
from tests.tiny import LINES

LORA = LoraSettings(r=3, alpha=12, dropout=0.0)
LENGTHS = (1, 5, 40, 150)
TOLERANCE = 1e-6  # in float64, but T5's norms and ModernBERT's rotations are float32


def in_memory(key: str, **config) -> MTLLM:
    """A stack on a tiny encoder of the family."""
    llm = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=40, hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        )
    )
    return stir(MTLLM(MTLLMConfig(**config), PackedEncoder(make(key)), PackedLLM(llm)), 0.05).eval()


def with_lora(encoder: nn.Module, adapted: dict[str, Tensor], batch: PackedBatch) -> Tensor:
    """Padded states of a Hugging Face encoder whose weights are W + s B A, from the adapter's own A and B."""
    weights = dict(encoder.named_parameters())
    for name, lora_a in adapted.items():
        if ".lora_A." in name:
            target = name.replace(f".lora_A.{ENCODER_ADAPTER}.", ".")
            weights[target] = weights[target] + LORA.alpha / LORA.r * adapted[name.replace("lora_A", "lora_B")] @ lora_a
    ids, mask = batch.to_padded(encoder.config.pad_token_id)
    found = functional_call(encoder, weights, (), {"input_ids": ids, "attention_mask": mask})
    return batch.unpad_states(found.last_hidden_state)


@pytest.mark.parametrize("key", ["m2m_100", "xlm-roberta", "mt5"])
def test_gradients_of_the_lora_are_those_of_a_padded_encoder(key) -> None:
    model = in_memory(key, encoder_adapter=LORA)
    model.train_encoder("lora")
    model.double()  # its LoRA too, which is trained in float32
    batch, plain = batch_of(LENGTHS), make(key).double()
    projected = model.projected(batch)
    probe = torch.randn(projected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (projected * probe).sum().backward()
    own = {n: p for n, p in model.encoder.model.named_parameters() if ".lora_" in n}
    adapted = {name: p.detach().clone().requires_grad_() for name, p in own.items()}
    expected = model.projection.layers(with_lora(plain, adapted, batch))
    assert_matches(projected, expected, TOLERANCE)
    (expected * probe).sum().backward()
    assert len(own) >= 2 * 2 * 6 and not any(p.grad is not None for n, p in plain.named_parameters() if "lora" in n)
    for name, parameter in own.items():
        assert_matches(parameter.grad, adapted[name].grad, TOLERANCE)
    assert not any(p.requires_grad for n, p in model.encoder.named_parameters() if ".lora_" not in n)


@pytest.mark.parametrize("key", list(CONFIGS))
def test_gradients_of_all_weights_are_those_of_a_padded_encoder(key) -> None:
    model = in_memory(key)
    model.train_encoder("all")
    model.double()
    # padding rows outside of every window get NaN from ModernBERT in transformers
    batch, plain = batch_of((40,) * 3 if key == "modernbert" else LENGTHS), make(key).double()
    projected = model.projected(batch)
    probe = torch.randn(projected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (projected * probe).sum().backward()
    expected = model.projection.layers(padded_states(plain, batch))
    assert_matches(projected, expected, TOLERANCE)
    (expected * probe).sum().backward()
    right = {name: p.grad for name, p in plain.named_parameters()}
    assert all(p.grad is not None for p in model.encoder.parameters()), "DDP waits for every trained weight"
    for name, parameter in model.encoder.model.named_parameters():
        if not name.endswith(KEY_BIAS):
            assert_matches(parameter.grad, right[name], TOLERANCE)


@pytest.mark.parametrize("fuse", [False, True])
def test_recomputed_encoder_layers_change_no_bit(fuse) -> None:
    model = in_memory("m2m_100", encoder_adapter=LORA, projection=ProjectionConfig(fuse_layers=fuse))
    model.train_encoder("lora")
    model.train()
    batch, kept, losses = batch_of(LENGTHS), [], []

    def gradient() -> list[Tensor]:
        model.zero_grad()
        torch.manual_seed(2)
        kept.append(saved_bytes(lambda: losses.append(model.states(batch).square().sum()), model.parameters()))
        losses.pop().backward()
        return [p.grad.clone() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None]

    plain = gradient()
    model.gradient_checkpointing_enable()
    again = gradient()
    assert len(plain) == len(again) > 20 and all(map(torch.equal, plain, again))
    assert kept[1] < 0.7 * kept[0], "the control: layers are run again"


def stacked(encoder_folder: str, llm_folder: str, **options) -> MTLLM:
    return MTLLM.stack(encoder_folder, llm_folder, dtype=torch.float32, **options)


def moved(model: MTLLM, size: float = 0.05) -> None:
    """Other encoder weights, as training makes them."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.encoder.named_parameters():
            if ".lora_" not in name:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def batch_for(model: MTLLM) -> PackedBatch:
    return collate([TextRow(line, "eng_Latn") for line in LINES[:4]], model.tokenizer, sides=("mt",), align=False).mt


@torch.no_grad()
def states(model: MTLLM) -> Tensor:
    return model.eval().states(batch_for(model))


def test_a_model_with_an_encoder_lora_comes_back_bit_for_bit(encoder_folder, llm_folder, tmp_path) -> None:
    model = stacked(encoder_folder, llm_folder, lora=LoraSettings(r=2))
    model.save_pretrained(tmp_path / "plain")
    assert "encoder_adapter" not in json.loads((tmp_path / "plain/config.json").read_text())
    model.train_encoder("lora", LORA)
    stir(model, 0.05)
    model.save_pretrained(tmp_path / "model")
    again = MTLLM.from_pretrained(tmp_path / "model")
    assert again.config.encoder_adapter == LORA and list(again.config.adapters) == ["student"]
    expected = states(model)
    assert torch.equal(states(again), expected)
    assert not any(p.requires_grad for p in again.encoder.parameters()) and not again.train().encoder.training
    again.save_pretrained(tmp_path / "again", include_base=True)
    assert torch.equal(states(MTLLM.from_pretrained(tmp_path / "again")), expected)
    assert (tmp_path / "again/encoder").is_dir()
    with again.encoder.adapter(None):
        assert relative_error(states(again), expected) > 1e-2, "the control: without its adapter it is another encoder"
    half = MTLLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    lora = {n: p for n, p in half.encoder.named_parameters() if ".lora_" in n}
    assert all(
        p.dtype == torch.float32 and torch.equal(p, dict(again.encoder.named_parameters())[n]) for n, p in lora.items()
    )
    assert half.encoder.model.dtype == torch.bfloat16


def test_trained_weights_come_back_and_stay_with_the_model(encoder_folder, llm_folder, tmp_path) -> None:
    model = stacked(encoder_folder, llm_folder)
    bare = states(model)
    model.train_encoder("all")
    assert model.train().encoder.training
    moved(model)
    expected = states(model)
    assert relative_error(bare, expected) > 1e-2
    model.save_pretrained(tmp_path / "trained")
    again = MTLLM.from_pretrained(tmp_path / "trained")
    assert torch.equal(states(again), expected) and not any(p.requires_grad for p in again.encoder.parameters())
    # a LoRA over them gives the layers other names
    again.train_encoder("lora", LORA)
    stir(again, 0.05)
    with_both = states(again)
    again.save_pretrained(tmp_path / "both")
    both = MTLLM.from_pretrained(tmp_path / "both")
    assert torch.equal(states(both), with_both)
    with both.encoder.adapter(None):
        assert torch.equal(states(both), expected)
    assert relative_error(expected, with_both) > 1e-2
    merge(both).save_pretrained(tmp_path / "merged")
    assert relative_error(states(MTLLM.from_pretrained(tmp_path / "merged")), with_both) < 1e-5
    assert (tmp_path / "merged/encoder").is_dir() and not (tmp_path / "merged/llm").exists()


def test_a_frozen_llm_weight_that_was_trained_stays_under_a_new_adapter(encoder_folder, llm_folder, tmp_path) -> None:
    model = stacked(encoder_folder, llm_folder)
    with torch.no_grad():
        for parameter in model.llm.layers.parameters():
            parameter.requires_grad_(True).add_(0.05)
    model.save_pretrained(tmp_path / "model")
    again = MTLLM.from_pretrained(tmp_path / "model")
    again.llm.add_adapter(LORA, "student")
    again.config.adapters["student"] = LORA
    again.save_pretrained(tmp_path / "adapted")
    assert torch.equal(states(MTLLM.from_pretrained(tmp_path / "adapted")), states(model))


def test_weights_that_were_trained_in_fp32_over_a_bf16_model(encoder_folder, llm_folder, tmp_path) -> None:
    transformers.AutoModel.from_pretrained(encoder_folder, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    transformers.AutoTokenizer.from_pretrained(encoder_folder).save_pretrained(tmp_path / "half")
    encoder = PackedEncoder.from_pretrained(str(tmp_path / "half"), torch.float32)
    model = MTLLM.stack(encoder, llm_folder, dtype=torch.float32)
    model.train_encoder("all")
    moved(model, 1e-3)
    model.save_pretrained(tmp_path / "model")
    again = MTLLM.from_pretrained(tmp_path / "model")
    assert again.encoder.model.dtype == torch.float32 and torch.equal(states(again), states(model))
    assert MTLLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16).encoder.model.dtype == torch.bfloat16
    kept = MTLLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16, encoder_dtype=torch.float32)
    assert kept.encoder.model.dtype == torch.float32 and kept.llm.model.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(kept.encoder.parameters(), model.encoder.parameters(), strict=True))
    rounded = MTLLM.stack(str(tmp_path / "half"), llm_folder)
    with pytest.raises(ValueError, match=r"train_encoder='all': the encoder's weights are torch.bfloat16"):
        rounded.train_encoder("all")


def test_merged_folders_hold_a_plain_encoder(encoder_folder, llm_folder, tmp_path) -> None:
    for adapters, name in ((LoraSettings(r=2), "both"), (None, "encoder")):
        model = stacked(encoder_folder, llm_folder, lora=adapters)
        model.train_encoder("lora", LORA)
        stir(model, 0.05)
        expected, folder = states(model), tmp_path / name
        with model.encoder.adapter(None):
            bare = states(model)
        model.save_pretrained(folder)
        cli.main(["convert", "--model", str(folder), "--to", "merged", "--output", str(folder / "merged")])
        merged = MTLLM.from_pretrained(folder / "merged")
        assert merged.config.adapters == {} and merged.config.encoder_adapter is None
        assert not any("lora" in key for key in merged.state_dict())
        assert relative_error(states(merged), expected) < 1e-5 < 1e-2 < relative_error(bare, expected)
        alone = transformers.AutoModel.from_pretrained(folder / "merged/encoder")
        assert not any("lora" in key or "base_layer" in key for key in alone.state_dict())
        new = MTLLM.stack(str(folder / "merged/encoder"), llm_folder, dtype=torch.float32)
        batch = batch_for(model)
        with torch.no_grad():
            assert torch.equal(new.encoder_states(batch), merged.encoder_states(batch))
        with pytest.raises(ValueError, match="its adapters are none"):
            merge(merged)


def test_an_engine_merges_the_encoder_too_and_takes_it_out_again(encoder_folder, llm_folder) -> None:
    model = stacked(encoder_folder, llm_folder, lora=LoraSettings(r=2))
    model.train_encoder("lora", LORA)
    stir(model, 0.05)
    expected = Engine(model).encode(LINES, "eng_Latn")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    engine = Engine(model, merge_adapters=True)
    merged = [layer for layer in model.encoder.model.modules() if getattr(layer, "merged", False) is True]
    assert len(merged) == 2 * 6
    assert relative_error(torch.from_numpy(engine.encode(LINES, "eng_Latn")), torch.from_numpy(expected)) < 1e-5
    engine.unmerge_adapters()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_published_layout_has_no_place_for_it(encoder_folder, llm_folder, tmp_path) -> None:
    model = stacked(encoder_folder, llm_folder, lora=LoraSettings(r=2))
    model.train_encoder("lora", LORA)
    stir(model, 0.05)
    model.save_pretrained(tmp_path / "model")
    from mtllm_fast.models.nllb_llm2vec import load_nllb_llm2vec, save_nllb_llm2vec

    with pytest.raises(ValueError, match=r"a LoRA in the encoder \(merge it first: `mtllm convert --to merged`\)"):
        save_nllb_llm2vec(model, tmp_path / "published")
    assert not (tmp_path / "published").exists()
    save_nllb_llm2vec(merge(copy.deepcopy(model)), tmp_path / "published")
    assert relative_error(states(load_nllb_llm2vec(tmp_path / "published")), states(model)) < 1e-5


def test_what_cannot_be_trained(encoder_folder, llm_folder) -> None:
    model = stacked(encoder_folder, llm_folder)
    with pytest.raises(ValueError, match="train_encoder='some': expected one of no, lora, all"):
        model.train_encoder("some")
    model.train_encoder("lora", LORA)
    with pytest.raises(ValueError, match="the encoder has a LoRA; merge it before"):
        model.train_encoder("all")
    model.train_encoder("no")
    assert not any(p.requires_grad for p in model.encoder.parameters())
    with pytest.raises(ValueError, match="is no stack"):
        MTLLM.stack(None, llm_folder, reader="llm").train_encoder("lora")
    with pytest.raises(ValueError, match="encoder_adapter: is of a stack's encoder"):
        MTLLM(MTLLMConfig(reader="encoder", encoder_adapter=LORA), PackedEncoder.from_pretrained(encoder_folder), None)


def test_a_checkpoint_of_weights_that_are_frozen_now_is_read_again(encoder_folder, llm_folder, tmp_path) -> None:
    """As a run does that goes on from a model with trained encoder weights, and is resumed itself."""
    from mtllm_fast.models.storage import load_own_state

    model = stacked(encoder_folder, llm_folder)
    model.train_encoder("all")
    moved(model)
    model.save_pretrained(tmp_path / "model")
    again = MTLLM.from_pretrained(tmp_path / "model")
    names = set(own_state(again))
    load_own_state(again, tmp_path / "model")
    assert set(own_state(again)) == names and any(name.startswith("encoder.") for name in names)
    (Path(tmp_path) / "plain").mkdir()
    stacked(encoder_folder, llm_folder).save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="its weights do not fit its config"):
        load_own_state(again, tmp_path / "plain")
