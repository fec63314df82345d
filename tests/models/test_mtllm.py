"""The stack: readers, padded calls, teacher and student in one model, heads, saving and loading."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mtllm_fast import MTLLM, Engine, HeadConfig, LoraSettings, PackedBatch, ProjectionConfig, TextRow
from mtllm_fast.models import PackedLLM
from tests.conftest import assert_matches
from tests.models.weights import in_shards, stir

SEQUENCES = [[5, 6, 7, 8, 9], [10], [11, 12, 13]]


@pytest.fixture
def stack(encoder_folder: str, llm_folder: str) -> MTLLM:
    torch.manual_seed(2)
    return MTLLM.stack(encoder_folder, llm_folder, lora=LoraSettings(r=4), dtype=torch.float32).eval()


def _train_a_little(model: MTLLM) -> None:
    """Random adapters, head and projection: a model that differs from its base everywhere."""
    torch.manual_seed(4)
    stir(model, 0.1, ".lora_", "head.linear", "projection.")


@pytest.mark.parametrize("reader", ["stack", "llm", "encoder"])
def test_padded_call_equals_packed(encoder_folder, llm_folder, reader) -> None:
    head = HeadConfig(labels=("a", "b"))
    model = MTLLM.stack(
        encoder_folder, llm_folder, reader=reader, lora=LoraSettings(r=2), head=head, dtype=torch.float32
    ).eval()
    _train_a_little(model)
    batch = PackedBatch.from_sequences(SEQUENCES)
    packed = model(batch)
    right, mask = batch.to_padded(1)
    left, left_mask = (x.clone() for x in (right, mask))
    for row, sequence in enumerate(SEQUENCES):
        left[row] = torch.tensor([1] * (5 - len(sequence)) + sequence)
        left_mask[row] = torch.tensor([0] * (5 - len(sequence)) + [1] * len(sequence))
    for ids, attention in ((right, mask), (left, left_mask)):
        padded = model(ids, attention)
        assert_matches(padded.last_hidden_state[attention.bool()], packed.last_hidden_state, 1e-5)
        assert padded.last_hidden_state[~attention.bool()].abs().max() == 0
        assert_matches(padded.logits, packed.logits, 1e-5)
        assert_matches(padded.pooled, packed.pooled, 1e-5)


def test_teacher_is_the_bare_llm(stack: MTLLM, llm_folder: str) -> None:
    """Adapters act on the student and not on the teacher, in one model; the toggle restores what was on."""
    batch = PackedBatch.from_sequences(SEQUENCES)
    bare = PackedLLM.from_pretrained(llm_folder, dtype=torch.float32).eval()
    fresh = stack.llm(batch)
    assert_matches(fresh, bare(batch), 1e-6)  # a new adapter is the identity
    _train_a_little(stack)
    student, teacher = stack.llm(batch), stack.teacher_states(batch)
    assert (student - teacher).abs().max() > 1e-2
    assert torch.equal(teacher, bare(batch))
    assert torch.equal(stack.llm(batch), student)
    assert not teacher.requires_grad
    stack.train()
    stack.teacher_states(batch)
    assert stack.llm.training


def test_only_the_student_trains(stack: MTLLM) -> None:
    stack.train()
    stack.states(PackedBatch.from_sequences(SEQUENCES)).sum().backward()
    with_gradient = {name for name, p in stack.named_parameters() if p.grad is not None}
    assert with_gradient
    assert all(".lora_" in name or name.startswith("projection.") for name in with_gradient)
    assert not stack.encoder.training  # frozen: its dropout stays off


def test_projection_starts_at_the_scale_of_the_embeddings(stack: MTLLM) -> None:
    ids = torch.randint(4, stack.encoder.vocab_size, (20, 12)).tolist()
    states = stack.projection(stack.encoder(PackedBatch.from_sequences(ids)))
    assert float(states.detach().std()) == pytest.approx(stack.llm.embedding_std(), rel=0.2)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("reader", ["stack", "llm", "encoder"])
def test_save_and_load(encoder_folder, llm_folder, tmp_path, reader, kind) -> None:
    bases = encoder_folder if reader != "llm" else None, llm_folder if reader != "encoder" else None
    parts = {"projection": ProjectionConfig(kind=kind), "head": HeadConfig(labels=("no", "yes", "maybe"))}
    model = MTLLM.stack(*bases, reader=reader, lora=LoraSettings(r=4), dtype=torch.float32, **parts)
    _train_a_little(model)
    model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model" / "llm").exists()  # base models are referred to, not copied
    loaded = MTLLM.from_pretrained(tmp_path / "model")
    rows = [TextRow("A river runs.", "fra_Latn"), TextRow("Trains", text_pair="leave every hour")]
    assert_matches(
        torch.from_numpy(Engine(loaded).classify(rows)), torch.from_numpy(Engine(model).classify(rows)), 1e-6
    )
    assert loaded.config.labels == ["no", "yes", "maybe"]


def test_save_with_base_needs_nothing_else(encoder_folder, llm_folder, tmp_path, stack) -> None:
    _train_a_little(stack)
    copies = {
        name: shutil.copytree(folder, tmp_path / name) for name, folder in (("e", encoder_folder), ("l", llm_folder))
    }
    model = MTLLM.stack(str(copies["e"]), str(copies["l"]), lora=LoraSettings(r=4), dtype=torch.float32)
    _train_a_little(model)
    model.save_pretrained(tmp_path / "whole", include_base=True)
    expected = Engine(model).encode(["The mill"], "deu_Latn")
    for folder in copies.values():
        shutil.rmtree(folder)
    whole = MTLLM.from_pretrained(tmp_path / "whole")
    assert_matches(torch.from_numpy(Engine(whole).encode(["The mill"], "deu_Latn")), torch.from_numpy(expected), 1e-6)


def test_saved_means_on_the_disk(stack, tmp_path, monkeypatch) -> None:
    """Every file is there before it gets its name, and the names before the call ends."""
    done = []
    fsync, replace = os.fsync, os.replace

    def synced(handle):
        done.append(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    def replaced(source, target):
        files = [Path(source), *Path(source).rglob("*")]
        assert {str(path) for path in files} <= set(done), "it could be empty after a power cut"
        done.append(f"replace {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    stack.save_pretrained(tmp_path, include_base=True)
    assert {"replace model.safetensors", "replace llm"} < set(done)
    assert done[-2:] == ["replace config.json", str(tmp_path)]


def test_base_folders_of_an_earlier_save_are_not_read(stack, tmp_path) -> None:
    stack.save_pretrained(tmp_path, include_base=True)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["encoder"] is config["llm"] is None
    stack.save_pretrained(tmp_path)
    for role in ("encoder", "llm"):
        shutil.rmtree(tmp_path / role)
        (tmp_path / role).mkdir()
    batch = PackedBatch.from_sequences(SEQUENCES)
    assert torch.equal(MTLLM.from_pretrained(tmp_path)(batch).pooled, stack.eval()(batch).pooled)


def test_models_made_in_memory(stack, tmp_path) -> None:
    torch.manual_seed(0)
    settings = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    llm = LlamaForCausalLM(LlamaConfig(vocab_size=stack.llm.vocab_size, **settings))
    model = MTLLM.stack(stack.encoder.model, llm, tokenizer=stack.tokenizer, lora=LoraSettings(r=2))
    with pytest.raises(ValueError, match="include_base"):
        model.save_pretrained(tmp_path / "m", include_base=False)
    model.save_pretrained(tmp_path / "m")
    loaded = MTLLM.from_pretrained(tmp_path / "m")
    batch = PackedBatch.from_sequences(SEQUENCES)
    assert_matches(loaded(batch).pooled, model.eval()(batch).pooled, 1e-6)
    with pytest.raises(ValueError, match="tokenizer"):
        MTLLM.stack(stack.encoder.model, llm)


def test_sharded_weights(stack, tmp_path, monkeypatch) -> None:
    in_shards(monkeypatch, "4KB")
    _train_a_little(stack)
    stack.save_pretrained(tmp_path / "m")
    assert len(list((tmp_path / "m").glob("model-*.safetensors"))) > 1
    batch = PackedBatch.from_sequences(SEQUENCES)
    assert_matches(MTLLM.from_pretrained(tmp_path / "m")(batch).pooled, stack.eval()(batch).pooled, 1e-6)


def _damage_cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _damage_adapter(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["adapters"]["student"]["r"] = 8
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_damage_cut, "cut short"),
        (lambda folder: (folder / "model.safetensors").unlink(), "is missing"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "mtl'), "damaged"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'), "not of an MTLLM"),
        (_damage_adapter, "needs"),
        (shutil.rmtree, "no such folder"),
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
    ],
)
def test_damaged_folders_are_named(stack, tmp_path, damage, says) -> None:
    folder = tmp_path / "m"
    stack.save_pretrained(folder)
    damage(folder)
    with pytest.raises(ValueError, match=says) as caught:
        MTLLM.from_pretrained(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folders_that_are_no_models(tmp_path, llm_folder, encoder_folder) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"encoder=.*config.json"):
        MTLLM.stack(str(tmp_path / "empty"), llm_folder)
    with pytest.raises(ValueError, match=r"llm=.*no such folder"):
        MTLLM.stack(encoder_folder, str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="llama"):
        MTLLM.stack(llm_folder, llm_folder)
    with pytest.raises(ValueError, match="llm"):
        MTLLM.stack(encoder_folder, encoder_folder)
    pickled = tmp_path / "pickled"
    shutil.copytree(llm_folder, pickled)
    (pickled / "model.safetensors").unlink()
    torch.save({}, pickled / "pytorch_model.bin")
    with pytest.raises(ValueError, match="only safetensors"):
        MTLLM.stack(encoder_folder, str(pickled))
    cut = tmp_path / "cut"
    shutil.copytree(llm_folder, cut)
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(ValueError, match="llm="):
        MTLLM.stack(encoder_folder, str(cut))


def test_failed_save_leaves_the_old_model(stack, tmp_path, monkeypatch) -> None:
    stack.save_pretrained(tmp_path / "m")
    before = {p.name: p.read_bytes() for p in (tmp_path / "m").iterdir() if p.is_file()}

    def full_disk(*arguments, **settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.save_torch_state_dict", full_disk)
    _train_a_little(stack)
    with pytest.raises(OSError, match="No space"):
        stack.save_pretrained(tmp_path / "m")
    assert {p.name: p.read_bytes() for p in (tmp_path / "m").iterdir() if p.is_file()} == before


def test_choice_head(encoder_folder, llm_folder) -> None:
    """Multiple choice: one score per choice, from the states of its own tokens."""
    model = MTLLM.stack(encoder_folder, llm_folder, head=HeadConfig("choice"), dtype=torch.float32).eval()
    rows = [
        TextRow("Which one floats?", choices=("a stone", "a boat", "an anchor")),
        TextRow("Where?", choices=("here", "there", "nowhere")),
    ]
    logits = Engine(model).classify(rows)
    assert logits.shape == (2, 3)
    swapped = [TextRow(rows[0].text, choices=rows[0].choices), rows[1]]
    assert abs(Engine(model).classify(swapped[::-1])[::-1] - logits).max() < 1e-5


def test_a_model_replaces_a_larger_one_of_several_files(encoder_folder, llm_folder, tmp_path, monkeypatch):
    """What is read afterwards is the one saved last, whatever shards and index lay there."""

    def stack() -> MTLLM:
        torch.manual_seed(4)
        return stir(MTLLM.stack(encoder_folder, llm_folder, lora=LoraSettings(r=4)), 1.0)

    with monkeypatch.context() as patch:
        in_shards(patch, "20KB")
        stack().save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").is_file() and not (tmp_path / "model.safetensors").is_file()
    MTLLM.from_pretrained(tmp_path)
    last = stack()
    with torch.no_grad():
        last.projection.layers.bias.fill_(7.0)
    last.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("model*")) == ["model.safetensors"]
    again = MTLLM.from_pretrained(tmp_path)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in last.state_dict().items())
