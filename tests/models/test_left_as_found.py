"""The teacher behind a merged student, modes, weights that training changed, weights that are not finite, adapters."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, M2M100ForConditionalGeneration

from mtllm_fast import MTLLM, Engine, HeadConfig, LoraSettings, PackedBatch, TextRow
from mtllm_fast.models.adapters import check_settings
from mtllm_fast.models.generate import soft_prompts
from tests.conftest import assert_matches, relative_error
from tests.models.weights import in_shards, stir
from tests.tiny import LINES

SEQUENCES = [[5, 6, 7, 8, 9], [10], [11, 12, 13]]


def _stack(encoder_folder: str, llm_folder: str, dtype: torch.dtype = torch.float32, **options) -> MTLLM:
    torch.manual_seed(2)
    return stir(MTLLM.stack(encoder_folder, llm_folder, lora=LoraSettings(r=4), dtype=dtype, **options)).eval()


def _bare_states(llm_folder: str, dtype: torch.dtype) -> torch.Tensor:
    """The causal LLM's states by transformers alone, one text at a time."""
    decoder = AutoModelForCausalLM.from_pretrained(llm_folder, dtype=dtype, attn_implementation="sdpa").eval().model
    with torch.no_grad():
        return torch.cat([decoder(input_ids=torch.tensor([ids])).last_hidden_state[0] for ids in SEQUENCES])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_teacher_behind_a_merged_student(encoder_folder, llm_folder, dtype) -> None:
    """Other adapters and the bare model run as if nothing were merged, and what is merged stays so, bit for bit."""
    model = _stack(encoder_folder, llm_folder, dtype, causal=True)
    batch = PackedBatch.from_sequences(SEQUENCES)
    bare = model.teacher_states(batch)
    if dtype == torch.float32:
        assert_matches(bare, _bare_states(llm_folder, dtype), 1e-5)
    model.llm.add_adapter(LoraSettings(r=2), "teacher")
    stir(model.llm, 0.1, "lora_B.teacher")
    task = model.teacher_states(batch, "teacher")
    model.llm.train_adapter("student")
    engine = Engine(model, merge_adapters=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        merged = model.llm(batch)
        assert float((merged - bare).abs().max()) > 1e-2 * float(bare.abs().max())  # control: the student matters
        for _ in range(2):
            assert torch.equal(model.teacher_states(batch), bare)
            assert torch.equal(model.teacher_states(batch, "teacher"), task)
            with model.llm.adapter("student"):
                assert torch.equal(model.llm(batch), merged)
        with pytest.raises(RuntimeError, match="stop"), model.llm.adapter(None):
            raise RuntimeError("stop")
        assert torch.equal(model.llm(batch), merged)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for refused in (
        lambda: model.llm.add_adapter(LoraSettings(r=2), "third"),
        lambda: model.llm.remove_adapter("student"),
        lambda: model.llm.train_adapter("teacher"),
    ):
        with pytest.raises(ValueError, match="'student' is merged into the base weights; unmerge it before"):
            refused()
    assert list(model.llm.adapters) == ["student", "teacher"]
    engine.unmerge_adapters()
    assert torch.equal(model.teacher_states(batch), bare)


def test_teacher_behind_a_merged_student_in_bf16(encoder_folder, llm_folder) -> None:
    """By Hugging Face in fp32 on the rounded weights; after unmerging, the base weights are those of the file."""
    dtype = torch.bfloat16
    model = _stack(encoder_folder, llm_folder, dtype, causal=True)
    engine = Engine(model, merge_adapters=True)
    batch = PackedBatch.from_sequences(SEQUENCES)
    found = [model.teacher_states(batch) for _ in range(2)]
    merged = model.llm(batch).detach()
    rounded = AutoModelForCausalLM.from_pretrained(llm_folder, dtype=dtype).float().eval().model
    with torch.no_grad():
        exact = torch.cat([rounded(torch.tensor([ids])).last_hidden_state[0] for ids in SEQUENCES])

    def error(states: torch.Tensor) -> float:
        return float((states.double() - exact.double()).norm() / exact.double().norm())

    limit = 1.2 * error(_bare_states(llm_folder, dtype))
    assert 0 < limit < 0.02
    assert all(states.dtype == dtype and error(states) <= limit for states in found)
    assert error(merged) > 5 * limit  # control: what the student computes
    file = {name: tensor.to(dtype) for name, tensor in load_file(f"{llm_folder}/model.safetensors").items()}

    def base() -> dict[str, torch.Tensor]:
        state = {name.replace(".base_layer.", "."): tensor for name, tensor in model.llm.model.state_dict().items()}
        return {name: tensor for name, tensor in state.items() if ".lora_" not in name}

    assert base().keys() == file.keys()
    changed = {name for name, tensor in base().items() if not torch.equal(tensor, file[name])}
    assert changed == {name for name in file if "_proj." in name}  # control: merged weights are others
    engine.unmerge_adapters()
    assert all(torch.equal(tensor, file[name]) for name, tensor in base().items())
    assert error(model.teacher_states(batch)) <= limit


def test_merged_for_good_has_no_teacher(encoder_folder, llm_folder) -> None:
    model = _stack(encoder_folder, llm_folder)
    model.llm.merge_adapter(keep=False)
    batch = PackedBatch.from_sequences(SEQUENCES)
    before = model.llm(batch)
    with pytest.raises(ValueError, match="merged for good"):
        model.teacher_states(batch)
    assert torch.equal(model.llm(batch), before)


def test_modes_are_left_as_found(encoder_folder, llm_folder) -> None:
    """Also where modules differ, where an iterator is dropped half-way, and where a run fails."""
    model = _stack(encoder_folder, llm_folder, causal=True, head=HeadConfig(labels=("a", "b")))
    model.llm.train()
    model.llm.decoder.layers[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    assert len(set(modes.values())) == 2

    def as_found() -> bool:
        return modes == {name: module.training for name, module in model.named_modules()}

    engine = Engine(model, window=2)
    rows = [TextRow(line) for line in LINES]
    engine.encode(LINES)
    assert as_found()
    engine.classify(rows)
    assert as_found()
    next(iter(engine.encode_rows(rows)))
    assert as_found()
    soft_prompts(model, LINES[:2])
    model.generate(LINES[:2], max_new_tokens=2)
    assert as_found()
    model.teacher_states(PackedBatch.from_sequences(SEQUENCES))
    assert as_found()
    with pytest.raises(ValueError):
        engine.encode(["text", " "])
    with pytest.raises(ValueError):
        engine.encode(LINES, "zzz_Latn")
    assert as_found()


def test_dropout_is_off_while_encoding(encoder_folder, llm_folder) -> None:
    model = stir(MTLLM.stack(encoder_folder, llm_folder, lora=LoraSettings(r=4, dropout=0.5), dtype=torch.float32))
    expected = Engine(model.eval()).encode(LINES)
    model.train()
    engine = Engine(model, window=2)
    first = engine.encode_rows([TextRow(line) for line in LINES])
    got = [next(first)]
    engine.encode(LINES[:1])  # another run in between ends, and the first one goes on
    got += list(first)
    assert_matches(torch.from_numpy(np.concatenate(got)), torch.from_numpy(expected), 1e-5)


def test_a_refused_engine_changes_nothing(encoder_folder, llm_folder, monkeypatch) -> None:
    model = _stack(encoder_folder, llm_folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    monkeypatch.setattr("mtllm_fast.inference.quantize.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs torchao"):
        Engine(model, quantize="int8")
    with pytest.raises(ValueError, match="quantize='int3'"):
        Engine(model, quantize="int3", merge_adapters=True)
    with pytest.raises(ValueError, match="window=0"):
        Engine("no/such/folder", window=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.llm._unmerged == []


UNFROZEN = {
    "the encoder": lambda name: name.startswith("encoder."),
    "norms": lambda name: "norm" in name and "lora" not in name,
    "the embeddings of the LLM": lambda name: name == "llm.model.model.embed_tokens.weight",
    "one bias": lambda name: name == "encoder.model.layers.0.fc1.bias",
    "the LM head": lambda name: name == "llm.model.lm_head.weight",
    "the embeddings of the encoder": lambda name: name == "encoder.model.embed_tokens.weight",
}
UNREAD = ("the embeddings of the LLM", "the LM head")  # a stack reads through the encoder, and embeds states


def _unfrozen(encoder_folder: str, llm_folder: str, what: str) -> tuple[MTLLM, list[str]]:
    """A stack with other values in `what`, which trains, and the names of those parameters."""
    model = _stack(encoder_folder, llm_folder)
    chosen = [name for name, _ in model.named_parameters() if UNFROZEN[what](name)]
    assert chosen
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in chosen:
                parameter.requires_grad_(True)
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model, chosen


@pytest.mark.parametrize("what", list(UNFROZEN))
def test_unfrozen_weights_come_back(encoder_folder, llm_folder, tmp_path, what) -> None:
    """Once and again: saved, read, saved and read anew, the embeddings are those of the model in memory."""
    model, chosen = _unfrozen(encoder_folder, llm_folder, what)
    expected = Engine(model).encode(LINES)
    plain = Engine(_stack(encoder_folder, llm_folder)).encode(LINES)
    assert bool(np.abs(expected - plain).max() > 1e-3) is (what not in UNREAD)
    model.save_pretrained(tmp_path / "first")
    loaded = MTLLM.from_pretrained(tmp_path / "first")
    assert not any(p.requires_grad for name, p in loaded.named_parameters() if name in chosen)
    loaded.save_pretrained(tmp_path / "second")
    again = MTLLM.from_pretrained(tmp_path / "second")
    for other in (loaded, again):
        assert np.array_equal(Engine(other).encode(LINES), expected)
        state = other.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def _saved_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder's files; the base models that lie in it under the names that the model gives them."""
    prefixes = {"": folder, "encoder.model.": folder / "encoder", "llm.model.": folder / "llm"}
    return {
        prefix + name: tensor
        for prefix, place in prefixes.items()
        for path in sorted(place.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


class ByHand:
    """Hugging Face's own models with `tensors` in the places that their names say, LoRA as W + alpha / r * B A."""

    def __init__(self, encoder_folder: str, llm_folder: str, tensors: dict[str, torch.Tensor]) -> None:
        eager = {"dtype": torch.float32, "attn_implementation": "eager"}
        self.tokenizer = AutoTokenizer.from_pretrained(encoder_folder, src_lang="eng_Latn")
        self.encoder = M2M100ForConditionalGeneration.from_pretrained(encoder_folder, **eager).get_encoder().eval()
        self.bare, self.adapted = (AutoModelForCausalLM.from_pretrained(llm_folder, **eager).eval() for _ in range(2))
        self.projection = torch.nn.Linear(32, 48)
        left = dict(tensors)
        for prefix, modules in {
            "encoder.model.": [self.encoder], "llm.model.": [self.bare, self.adapted],
            "projection.layers.": [self.projection],
        }.items():  # fmt: skip
            own = {name for name in left if name.startswith(prefix) and ".lora_" not in name}
            state = {name.removeprefix(prefix): left.pop(name) for name in own}
            assert all(not module.load_state_dict(state, strict=False).unexpected_keys for module in modules)
        places, weights = [name for name in left if ".lora_A." in name], self.adapted.state_dict()
        assert len(left) == 2 * len(places) > 0
        for name in places:
            place = name.removeprefix("llm.model.").replace(".lora_A.student.", ".")
            weights[place] += 32 / 4 * left[name.replace(".lora_A.", ".lora_B.")] @ left[name]

    @torch.no_grad()
    def embeddings(self) -> torch.Tensor:
        """Mean of the bidirectional LLM's states, one text at a time."""
        rows = []
        for line in LINES:
            states = self.projection(self.encoder(**self.tokenizer(line, return_tensors="pt")).last_hidden_state)
            everything = torch.zeros(1, 1, states.shape[1], states.shape[1])
            states = self.adapted.model(inputs_embeds=states, attention_mask=everything).last_hidden_state
            rows.append(states[0].mean(0))
        return torch.stack(rows)

    @torch.no_grad()
    def logits(self) -> torch.Tensor:
        """Of the bare LLM on its own tokens, bidirectional."""
        masks = [torch.zeros(1, 1, len(ids), len(ids)) for ids in SEQUENCES]
        parts = [self.bare(torch.tensor([ids]), attention_mask=mask).logits[0] for ids, mask in zip(SEQUENCES, masks)]
        return torch.cat(parts)


@pytest.mark.parametrize(
    ("what", "how"),
    [
        *((what, how) for what in UNFROZEN for how in ("plainly", "with its base")),
        ("the encoder", "in shards"),  # where its weights lie is the same for all of them
        ("the LM head", "in shards with its base"),
    ],
)
def test_unfrozen_weights_by_hand(encoder_folder, llm_folder, tmp_path, monkeypatch, what, how) -> None:
    """What is saved gives, in Hugging Face's own models, the embeddings and logits of the model that is loaded."""
    model, chosen = _unfrozen(encoder_folder, llm_folder, what)
    if "shards" in how:
        in_shards(monkeypatch, "8KB")
    model.save_pretrained(tmp_path, include_base="base" in how)
    assert len(list(tmp_path.glob("model*.safetensors"))) == 1 or "shards" in how
    assert (tmp_path / "model.safetensors.index.json").is_file() is ("shards" in how)
    assert (tmp_path / "llm").is_dir() is (tmp_path / "encoder").is_dir() is ("base" in how)
    tensors = _saved_tensors(tmp_path)
    assert all(torch.equal(tensors[name], model.state_dict()[name]) for name in chosen)
    saved = ByHand(encoder_folder, llm_folder, tensors)
    loaded = MTLLM.from_pretrained(tmp_path)
    found = torch.from_numpy(Engine(loaded).encode(LINES, "eng_Latn"))
    assert_matches(found, saved.embeddings(), 1e-5)
    states = loaded.teacher_states(PackedBatch.from_sequences(SEQUENCES))
    logits = states @ loaded.llm.lm_head.weight.detach().T
    assert_matches(logits, saved.logits(), 1e-5)
    # control: the base models' own values in these places are not taken for the saved ones
    untrained = ByHand(encoder_folder, llm_folder, {
        name: tensor for name, tensor in tensors.items() if ".lora_" in name or name.startswith("projection.")
    })  # fmt: skip
    moved = [relative_error(untrained.embeddings(), saved.embeddings()) > 1e-3,
             relative_error(untrained.logits(), saved.logits()) > 1e-3]  # fmt: skip
    assert moved == [what not in UNREAD, any(name.startswith("llm.") for name in chosen)]


def test_weights_of_another_model_are_still_refused(encoder_folder, llm_folder, tmp_path) -> None:
    _stack(encoder_folder, llm_folder).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({**load_file(path), "llm.model.model.layers.7.mlp.up_proj.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(ValueError, match=r"do not fit its config: 0 missing .* 1 unexpected"):
        MTLLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["encoder", "llm", "model"])
def test_weights_that_are_not_finite(encoder_folder, llm_folder, tmp_path, where, value) -> None:
    _stack(encoder_folder, llm_folder).save_pretrained(tmp_path / "run", include_base=True)
    folder = tmp_path / "run" if where == "model" else tmp_path / "run" / where
    path = folder / "model.safetensors"
    state = load_file(path)
    name = max(state, key=lambda key: state[key].numel())
    state[name].view(-1)[7] = value
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.safetensors: .* holds 1 NaN or infinite of") as refusal:
        MTLLM.from_pretrained(tmp_path / "run")
    assert str(refusal.value).startswith(f"{where}=") and "\n" not in str(refusal.value)


def test_shard_with_a_nan_is_named(llm_folder, tmp_path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llm_folder, dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = math.nan
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    holds = [
        path.name for path in tmp_path.glob("*.safetensors") if "model.layers.1.mlp.up_proj.weight" in load_file(path)
    ]
    with pytest.raises(ValueError, match=rf"{holds[0]}: model\.layers\.1\.mlp\.up_proj\.weight holds 1 NaN"):
        MTLLM.stack(None, str(tmp_path), reader="llm")


def test_rows_that_are_not_finite(encoder_folder, llm_folder, monkeypatch) -> None:
    """The row is named by its place in the stream and its id, whatever the window; probabilities likewise."""
    model = _stack(encoder_folder, llm_folder, head=HeadConfig(labels=("a", "b")))
    rows = [TextRow(line, id=f"r{k}") for k, line in enumerate(LINES)]
    real = MTLLM.states

    def broken(self, batch):
        states = real(self, batch)
        at = max(range(batch.num_sequences), key=lambda k: batch.lengths[k])
        if batch.lengths[at] == longest_tokens:
            states = states.clone()
            states[int(batch.cu_seqlens[at])] = math.nan
        return states

    longest_tokens = max(len(ids) for ids in model.tokenizer.mt_side(rows).ids)
    longest = int(np.argmax([len(ids) for ids in model.tokenizer.mt_side(rows).ids]))
    monkeypatch.setattr(MTLLM, "states", broken)
    for window in (1, 4, 100):
        engine = Engine(model, window=window)
        message = rf"row {longest} \(id 'r{longest}'\): .*NaN or infinite"
        with pytest.raises(ValueError, match=message):
            list(engine.encode_rows(rows))
        with pytest.raises(ValueError, match=message):
            engine.classify(rows)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (LoraSettings(r=0), r"lora\.r=0: must be >= 1"),
        (LoraSettings(alpha=-1), r"lora\.alpha=-1: must be > 0"),
        (LoraSettings(dropout=1.0), r"lora\.dropout=1\.0: must be in \[0, 1\)"),
        (LoraSettings(dropout=-0.1), r"lora\.dropout=-0\.1"),
        (LoraSettings(target_modules=("q_proj", "wq")), r"no linear layer \['wq'\]; there are down_proj, .*v_proj"),
        (LoraSettings(target_modules=()), r"lora\.target_modules=\[\]"),
        (LoraSettings(target_modules=r".*\.wq"), r"matches no linear layer; there are down_proj"),
        (LoraSettings(target_modules="(q_proj"), "no regular expression"),
        (LoraSettings(target_modules=("embed_tokens",)), r"no linear layer \['embed_tokens'\]"),
    ],
)
def test_adapters_that_cannot_be(encoder_folder, llm_folder, settings, message) -> None:
    model = MTLLM.stack(encoder_folder, llm_folder)
    names = set(model.state_dict())
    with pytest.raises(ValueError, match=message) as refusal:
        model.llm.add_adapter(settings, "new")
    assert "\n" not in str(refusal.value)
    assert set(model.state_dict()) == names and model.llm.adapters == {}
    check_settings(LoraSettings())
