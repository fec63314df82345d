"""LLMs whose packed rows would not be their own are refused, whatever they are called; the others are left alone."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path

import pytest
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.studies import llm_families
from mtllm_fast import MTLLM, PackedBatch, cli
from mtllm_fast.models import PackedLLM, gate
from tests.conftest import assert_matches
from tests.models.test_packed_equals_padded import COMMON
from tests.models.weights import enlarge

SMALL = {name: COMMON[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
# mixing rows by a convolution, a recurrence or a shift; finding positions by themselves; attending in chunks; sinks
REFUSED = {
    "lfm2": (
        transformers.Lfm2Config,
        {**COMMON, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    ),
    "jamba": (
        transformers.JambaConfig,
        {**COMMON, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "use_mamba_kernels": False},
    ),
    "mamba2": (transformers.Mamba2Config, {**SMALL, "num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 8}),
    "rwkv": (transformers.RwkvConfig, {**SMALL, "attention_hidden_size": 32}),
    "recurrent_gemma": (transformers.RecurrentGemmaConfig, {**SMALL, "num_hidden_layers": 3, "lru_width": 32}),
    "bart": (transformers.BartConfig, {"vocab_size": 64, "d_model": 32, "decoder_layers": 2, "decoder_ffn_dim": 48}),
    "mpt": (transformers.MptConfig, {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4}),
    "bloom": (transformers.BloomConfig, {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "gptj": (transformers.GPTJConfig, {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}),
    "gpt_oss": (transformers.GptOssConfig, {**COMMON, "num_local_experts": 2, "num_experts_per_tok": 1}),
    "bert": (transformers.BertConfig, {**SMALL, "intermediate_size": 48}),
    "electra": (transformers.ElectraConfig, {**SMALL, "intermediate_size": 48, "embedding_size": 32}),
}


def _model(config: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("family", list(REFUSED))
def test_refused_in_one_sentence(family: str, causal: bool) -> None:
    config_class, settings = REFUSED[family]
    model = _model(config_class(**settings))
    with pytest.raises(ValueError) as refusal:
        PackedLLM(model, causal=causal)
    message = str(refusal.value)
    assert message.startswith(f"llm: {type(model).__name__} cannot be read on packed") and "\n" not in message
    assert ("masked language model" in message) is (family in ("bert", "electra"))
    # nothing of the model was touched: it runs as before
    assert model.config._attn_implementation == "eager"
    assert not any(module.training for module in model.modules())


class Shifting(transformers.LlamaModel):
    """A Llama with a token shift between its layers: each row gets a share of the one before it."""

    share = 1.0

    def __init__(self, config):
        super().__init__(config)
        self.layers[0].register_forward_pre_hook(lambda _, args: (self._shifted(args[0]), *args[1:]))

    def _shifted(self, hidden):  # (B, L, D)
        return hidden + self.share * torch.nn.functional.pad(hidden, (0, 0, 1, 0))[:, :-1]


@pytest.mark.parametrize(("share", "refused"), [(1.0, True), (3e-5, True), (2e-7, False), (0.0, False)])
def test_unknown_family_is_judged_by_what_it_does(share: float, refused: bool) -> None:
    """Under Llama's own name and config only running it can tell, down to 1e-5 of the largest element."""
    decoder = type("Decoder", (Shifting,), {"share": share})
    config = transformers.LlamaConfig(**COMMON)
    found = gate.judge(decoder, config, True).refusal
    assert ("only attention knows" in (found or "")) is refused
    if share != 3e-5:
        return
    torch.manual_seed(0)  # what transformers itself says of such a share: a text alone against behind another
    model = decoder(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
        first, text = torch.arange(5, 10)[None], torch.arange(20, 26)[None]
        mask = torch.full((11, 11), float("-inf")).triu(1)
        mask[5:, :5] = float("-inf")
        positions = torch.cat([torch.arange(5), torch.arange(6)])[None]
        behind = model(torch.cat([first, text], 1), attention_mask=mask[None, None], position_ids=positions)
        alone = model(text).last_hidden_state[0]
        apart = (behind.last_hidden_state[0, 5:] - alone).abs().max() / alone.abs().max()
    assert 1e-5 < apart < 1e-4


def test_the_committed_table_of_families() -> None:
    """Nothing accepted is different, nothing is left out, and what the gate says today is what the table says."""
    record = json.loads((Path(__file__).parents[2] / "benchmarks/results/cpu/llm_families.json").read_text())
    rows = {(row["family"], row.get("reading")): row for row in record["rows"]}
    assert {row["verdict"] for row in rows.values()} == {"equal", "refused", "not built"}
    assert all(row["difference"] <= max(1e-5, 10 * row["rounding"]) for row in rows.values() if "difference" in row)
    if record["versions"]["transformers"] == transformers.__version__:
        assert {family for family, _ in rows} == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    for family in ("llama", "gemma4_text", "falcon", "stablelm", "bamba", "qwen3_next", "bloom", "lfm2"):
        for row in llm_families.judged(family):
            assert row["verdict"] == rows[family, row["reading"]]["verdict"], family


def test_asked_for_what_the_model_is_not() -> None:
    """A decoder that stays causal whatever it is asked, and one that looks both ways by itself."""

    class Stubborn(transformers.LlamaModel):
        def forward(self, *args, plan=None, **kwargs):
            if plan is not None:
                plan.causal = True
            else:
                self.config.is_causal = True
            return super().forward(*args, plan=plan, **kwargs)

    config = transformers.LlamaConfig(**COMMON)
    assert gate.judge(Stubborn, config, False).refusal == "it stays causal"
    assert gate.judge(Stubborn, config, True).refusal is None
    both_ways = transformers.Gemma3TextConfig(**COMMON, use_bidirectional_attention=True)
    with pytest.raises(ValueError, match="causal=False"):
        PackedLLM(_model(both_ways), causal=True)


@pytest.mark.parametrize("window", [2, 5, 20])
@pytest.mark.parametrize("family", ["gemma3", "embedding_gemma", "gemma2", "t5gemma_like", "mistral", "cohere2"])
def test_windows_are_the_familys_own(family: str, window: int) -> None:
    """Windows that look both ways count as in transformers' eager attention, which sees one text at a time."""
    classes = {
        "gemma3": transformers.Gemma3TextConfig,
        "embedding_gemma": transformers.Gemma3TextConfig,
        "gemma2": transformers.Gemma2Config,
        "t5gemma_like": transformers.Qwen3Config,
        "mistral": transformers.MistralConfig,
        "cohere2": transformers.Cohere2Config,
    }
    config = classes[family](**COMMON)
    own = family == "embedding_gemma"
    if own:
        config.use_bidirectional_attention = True
    config.sliding_window = window
    if family != "mistral":
        config.layer_types = ["sliding_attention"] * 2
    padded = enlarge(_model(config))
    packed = PackedLLM(copy.deepcopy(padded), causal=False)
    padded.config.is_causal = own  # transformers' switch for families that do not look both ways by themselves
    batch = PackedBatch.from_sequences([list(range(3, 33)), [40, 41], list(range(20, 31))])
    with torch.no_grad():
        expected = torch.cat(
            [
                padded.get_decoder()(input_ids=one[None]).last_hidden_state[0]
                for one in batch.input_ids.split(batch.lengths)
            ]
        )
        assert_matches(packed(batch), expected, 1e-5)
        packed._verdict = gate.Verdict(exclusive=not packed._verdict.exclusive)  # control: the other convention
        assert float((packed(batch) - expected).abs().max() / expected.abs().max()) > 1e-2


def test_the_verdict_is_kept(monkeypatch) -> None:
    config = transformers.LlamaConfig(**{**COMMON, "intermediate_size": 56})
    made = []
    original = gate._judged
    monkeypatch.setattr(gate, "_judged", lambda *a: made.append(a) or original(*a))
    state = torch.random.get_rng_state()
    for _ in range(3):
        gate.judge(transformers.LlamaModel, config, False)
    assert len(made) == 1
    assert torch.equal(torch.random.get_rng_state(), state)
    gate.judge(transformers.LlamaModel, config, True)
    config.rope_parameters = {**config.rope_parameters, "rope_theta": 5e5}
    gate.judge(transformers.LlamaModel, config, True)
    assert len(made) == 3


def test_large_models_cost_a_layer_of_each_kind() -> None:
    """The twins of an 8B Llama, a 27B Gemma 3 and Mixtral hold a few layers and a small vocabulary."""
    llama = transformers.LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8,
    )  # fmt: skip
    gemma = transformers.Gemma3TextConfig(hidden_size=1024, num_attention_heads=4, num_hidden_layers=62)
    mixtral = transformers.MixtralConfig(hidden_size=1024)
    started = time.monotonic()
    sizes = []
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for decoder, config in (
            (transformers.LlamaModel, llama),
            (transformers.Gemma3TextModel, gemma),
            (transformers.MixtralModel, mixtral),
        ):
            twin, why = gate._twin(decoder, config)
            assert why == ""
            sizes.append(len(twin.layers))
            assert sum(p.numel() for p in twin.parameters()) < 60_000_000
    assert sizes == [1, 6, 1]
    assert time.monotonic() - started < 60


def test_refused_before_weights_are_read(tmp_path) -> None:
    """The folder of a refused family holds a config and no usable weights: the answer is about the family."""
    config_class, settings = REFUSED["lfm2"]
    config_class(**settings, architectures=["Lfm2ForCausalLM"]).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="only attention knows"):
        PackedLLM.from_pretrained(str(tmp_path))
    transformers.T5Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a 't5' model is no causal LM"):
        PackedLLM.from_pretrained(str(tmp_path))


def test_doctor_says_the_verdict(tmp_path, llm_folder, capsys) -> None:
    cli.main(["doctor", "--llm", llm_folder])
    out = capsys.readouterr().out
    assert "LlamaForCausalLM (llama)" in out and out.count("packed rows equal those of each text alone") == 2
    config_class, settings = REFUSED["bert"]
    config_class(**settings).save_pretrained(tmp_path)
    cli.main(["doctor", "--llm", str(tmp_path)])
    assert capsys.readouterr().out.count("'bert' is a masked language model, no causal one") == 2


def test_a_stack_is_refused_likewise(encoder_folder) -> None:
    config_class, settings = REFUSED["jamba"]
    with pytest.raises(ValueError, match="llm: JambaForCausalLM cannot be read on packed bidirectional rows"):
        MTLLM.stack(encoder_folder, _model(config_class(**settings)), tokenizer=object())
