"""The published NLLB-LLM2Vec layout, through real files: read as Hugging Face's modules compute it, and written back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel, NllbTokenizer
from transformers.models.m2m_100.modeling_m2m_100 import M2M100Encoder

from mtllm_fast import MTLLM, Engine, HeadConfig, LoraSettings, ProjectionConfig
from mtllm_fast.models.nllb_llm2vec import load_nllb_llm2vec, save_nllb_llm2vec
from tests.conftest import assert_matches
from tests.models.weights import stir
from tests.tiny import LINES, m2m100_config, nllb_tokenizer
from tests.training.short_runs import refused

TEXTS = [*LINES, "Trains"]
LANGUAGES = ["eng_Latn", "fra_Latn", "swh_Latn", "eng_Latn", "deu_Latn", "zho_Hans", "fra_Latn"]


class Published(nn.Module):
    """The module tree of the published model, made of transformers' own parts."""

    def __init__(self, tokenizer: NllbTokenizer) -> None:
        super().__init__()
        torch.manual_seed(3)
        settings = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
        self.nllb_encoder = M2M100Encoder(m2m100_config(len(tokenizer)))
        self.up_proj = nn.Linear(32, 48)
        self.llm2vec: Any = LlamaModel(LlamaConfig(vocab_size=100, num_key_value_heads=2, **settings))
        self.configs = self.nllb_encoder.config, self.llm2vec.config
        self.tokenizer = tokenizer
        self.eval()

    def write(self, folder: Path, state: dict[str, Tensor] | None = None, shards: int = 1) -> Path:
        """A folder as the published one: config, weights in one file or several, NLLB's tokenizer."""
        folder.mkdir(parents=True, exist_ok=True)
        encoder, llm = (config.to_diff_dict() | {"model_type": config.model_type} for config in self.configs)
        config = {"model_type": "nllb-llm2vec", "nllb_config": encoder, "llm2vec_config": llm}
        (folder / "config.json").write_text(json.dumps(config, default=str))
        state = {name: tensor.contiguous() for name, tensor in (state or self.state_dict()).items()}
        if shards == 1:
            save_file(state, folder / "model.safetensors")
        else:
            files = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(state)}
            for file in set(files.values()):
                save_file({name: tensor for name, tensor in state.items() if files[name] == file}, folder / file)
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
        self.tokenizer.save_pretrained(folder)
        return folder

    @torch.no_grad()
    def embeddings(self, texts: list[str] = TEXTS, languages: list[str] = LANGUAGES) -> Tensor:
        """Mean of the bidirectional LLM's states, one text at a time."""
        rows = []
        for text, language in zip(texts, languages):
            self.tokenizer.src_lang = language
            states = self.up_proj(self.nllb_encoder(**self.tokenizer(text, return_tensors="pt")).last_hidden_state)
            everything = torch.zeros(1, 1, states.shape[1], states.shape[1])
            states = self.llm2vec(inputs_embeds=states, attention_mask=everything).last_hidden_state
            rows.append(states[0].mean(0))
        return torch.stack(rows)


@pytest.fixture
def published() -> Published:
    return Published(nllb_tokenizer(list(LINES)))


def _encode(model: MTLLM) -> Tensor:
    return torch.from_numpy(Engine(model).encode(TEXTS, LANGUAGES))


def _with_lora(published: Published) -> dict[str, Any]:
    """peft's own LoRA in the LLM, with weights that matter; its settings."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=3, lora_alpha=12, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.05)
    published.llm2vec = get_peft_model(published.llm2vec, config).eval()
    stir(published, 0.2, ".lora_")
    return {"peft_type": "LORA", "r": 3, "lora_alpha": 12, "lora_dropout": 0.05}


def _adapted(encoder_folder: str, llm_folder: str) -> MTLLM:
    torch.manual_seed(2)
    model = MTLLM.stack(encoder_folder, llm_folder, lora=LoraSettings(r=4), dtype=torch.float32).eval()
    return stir(model, 0.03, ".lora_")


@pytest.mark.parametrize("shards", [1, 3])
def test_reads_what_hugging_face_computes(published: Published, tmp_path: Path, shards: int) -> None:
    model = load_nllb_llm2vec(published.write(tmp_path, shards=shards))
    assert_matches(_encode(model), published.embeddings(), 1e-5)
    assert not model.config.causal and not model.config.adapters


def test_reads_lora_under_pefts_names(published: Published, tmp_path: Path) -> None:
    bare = published.embeddings()
    settings = _with_lora(published)
    expected = published.embeddings()
    assert (expected - bare).abs().max() > 0.1
    inside = published.write(tmp_path / "inside")
    (inside / "adapter_config.json").write_text(json.dumps(settings))
    model = load_nllb_llm2vec(inside)
    assert_matches(_encode(model), expected, 1e-5)
    assert model.config.adapters == {"student": LoraSettings(3, 12, 0.05, ("down_proj", "q_proj", "v_proj"))}

    state = {name.replace("base_model.model.", ""): tensor for name, tensor in published.state_dict().items()}
    base = {name.replace(".base_layer.", "."): t for name, t in state.items() if ".lora_" not in name}
    lora = {f"base_model.model.{n.replace('.default.', '.')}": t for n, t in state.items() if ".lora_" in n}
    beside = published.write(tmp_path / "beside", base)
    save_file({name: tensor.contiguous() for name, tensor in lora.items()}, beside / "adapter_model.safetensors")
    (beside / "adapter_config.json").write_text(json.dumps(settings))
    assert_matches(_encode(load_nllb_llm2vec(beside)), expected, 1e-5)

    (beside / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"no adapter_config\.json, which says their alpha"):
        load_nllb_llm2vec(beside)
    (beside / "adapter_config.json").write_text(json.dumps(settings | {"use_dora": True}))
    with pytest.raises(ValueError, match="use_dora=True"):
        load_nllb_llm2vec(beside)


@pytest.mark.parametrize("shard", ["5GB", "60KB"])
def test_round_trip(encoder_folder: str, llm_folder: str, tmp_path: Path, shard: str) -> None:
    """Ours, with trained LoRA, out and in again: the same embeddings to 1e-6, and the same files the second time."""
    model = _adapted(encoder_folder, llm_folder)
    expected = _encode(model)
    with model.llm.adapter(None):
        assert (_encode(model) - expected).abs().max() > 0.01
    save_nllb_llm2vec(model, tmp_path / "out", max_shard_size=shard)
    assert torch.equal(_encode(model), expected)  # the model itself is as it was
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert (len(files) > 1) == (shard == "60KB")
    names = {name for file in files for name in load_file(tmp_path / "out" / file)}
    assert {name.split(".")[0] for name in names} == {"nllb_encoder", "up_proj", "llm2vec"}
    assert not any("lora" in name or "base_layer" in name for name in names)

    back = load_nllb_llm2vec(tmp_path / "out")
    assert_matches(_encode(back), expected, 1e-6)
    save_nllb_llm2vec(back, tmp_path / "again", max_shard_size=shard)
    for file in files:
        once, twice = (load_file(tmp_path / folder / file) for folder in ("out", "again"))
        assert once.keys() == twice.keys() and all(torch.equal(once[name], twice[name]) for name in once)


def test_merged_adapters_are_not_added_twice(encoder_folder: str, llm_folder: str, tmp_path: Path) -> None:
    model = _adapted(encoder_folder, llm_folder)
    expected = _encode(model)
    model.llm.merge_adapter()
    save_nllb_llm2vec(model, tmp_path)
    assert_matches(_encode(load_nllb_llm2vec(tmp_path)), expected, 1e-6)


def test_dtype_is_kept_or_chosen(published: Published, tmp_path: Path) -> None:
    rounded = {name: tensor.bfloat16() for name, tensor in published.state_dict().items()}
    folder = published.write(tmp_path, rounded)
    assert load_nllb_llm2vec(folder).llm.model.dtype == torch.bfloat16
    model = load_nllb_llm2vec(folder, dtype=torch.float32)
    assert {model.llm.model.dtype, model.encoder.model.dtype} == {torch.float32}
    published.load_state_dict(rounded)
    assert_matches(_encode(model), published.embeddings(), 1e-5)


def test_every_weight_that_does_not_fit_is_named(published: Published, tmp_path: Path) -> None:
    state = dict(published.state_dict())
    gone = ["llm2vec.norm.weight", "nllb_encoder.layers.1.fc1.bias", "up_proj.bias"]
    for name in gone:
        del state[name]
    state["score.weight"] = state["llm2vec.lm_head.weight"] = torch.zeros(3, 48)
    state["up_proj.weight"] = torch.zeros(48, 31)
    state["llm2vec.layers.0.self_attn.k_proj.weight"] = torch.zeros(48, 48)
    with pytest.raises(ValueError) as error:
        load_nllb_llm2vec(published.write(tmp_path, {name: t.clone() for name, t in state.items()}))
    message = str(error.value)
    assert f"3 missing: {', '.join(gone)}" in message
    assert "2 unexpected: llm2vec.lm_head.weight, score.weight" in message
    assert "2 of the wrong shape: " in message
    assert "up_proj.weight is (48, 31) instead of (48, 32)" in message
    assert "llm2vec.layers.0.self_attn.k_proj.weight is (48, 48) instead of (24, 48)" in message


def test_folders_of_another_kind(published: Published, tmp_path: Path, llm_folder: str) -> None:
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        load_nllb_llm2vec(tmp_path / "nothing")
    with pytest.raises(ValueError, match="'llama' model, expected 'nllb-llm2vec'"):
        load_nllb_llm2vec(llm_folder)
    folder = published.write(tmp_path)
    (folder / "config.json").write_text(json.dumps({"model_type": "nllb-llm2vec", "nllb_config": {"model_type": "t5"}}))
    with pytest.raises(ValueError, match=r"found: nllb_config \(t5\)"):
        load_nllb_llm2vec(folder)
    published.write(folder)
    for path in folder.glob("*token*"):
        path.unlink()
    with pytest.raises(ValueError, match="pass tokenizer="):
        load_nllb_llm2vec(folder)


def test_what_the_layout_cannot_hold(encoder_folder: str, llm_folder: str, tmp_path: Path) -> None:
    parts = {"projection": ProjectionConfig("mlp"), "head": HeadConfig(labels=("a", "b"))}
    model = MTLLM.stack(encoder_folder, llm_folder, causal=True, **parts)
    with pytest.raises(ValueError, match=r"mlp.*causal=True.*task head"):
        save_nllb_llm2vec(model, tmp_path / "out")
    with pytest.raises(ValueError, match="reader='encoder'"):
        save_nllb_llm2vec(MTLLM.stack(encoder_folder, reader="encoder"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_command(published: Published, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mtllm_fast.cli import main

    theirs, ours, back = published.write(tmp_path / "theirs"), tmp_path / "ours", tmp_path / "back"
    main(["convert", "--from", "nllb-llm2vec", "--model", str(theirs), "--output", str(ours)])
    assert_matches(_encode(MTLLM.from_pretrained(ours)), published.embeddings(), 1e-5)
    main(["convert", "--to", "nllb-llm2vec", "--model", str(ours), "--output", str(back)])
    assert_matches(_encode(load_nllb_llm2vec(back)), published.embeddings(), 1e-5)
    assert f"convert: {ours} -> {back} (to nllb-llm2vec)" in capsys.readouterr().out
    convert = ["convert", "--model", str(theirs), "--output", str(tmp_path / "x")]
    for directions in (["--from", "nllb-llm2vec", "--to", "nllb-llm2vec"], []):
        assert "exactly one" in refused(capsys, [*convert, *directions])
    convert = ["convert", "--to", "nllb-llm2vec", "--model", str(ours), "--output", str(back)]
    assert "--overwrite" in refused(capsys, convert)
