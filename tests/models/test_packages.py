"""The file formats that packages carry models in: tiny files written here, read back and damaged."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from mtllm_fast.models.packages.convert import smollm2
from mtllm_fast.models.packages.e5_q4 import read_e5
from mtllm_fast.models.packages.gguf import BLOCKS, numbers_of, read_gguf
from tests.tiny import e5_file


def test_e5_weights_are_those_of_the_file(tmp_path: Path) -> None:
    """Q4_0 nibbles and scales taken apart here one by one, f32 as it is; every tensor of the BERT is there."""
    from transformers import BertModel

    path = tmp_path / "e5.bin"
    written = e5_file(path)
    config, state = read_e5(path)
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (32, 2, 64)
    assert config.layer_norm_eps == pytest.approx(1e-12)
    scale, nibbles = written["l1.fi.w"]
    expected = [(b & 15) - 8 for b in nibbles[0].tolist()] + [(b >> 4) - 8 for b in nibbles[0].tolist()]
    got = state["encoder.layer.1.intermediate.dense.weight"]
    assert got.shape == (64, 32)
    assert torch.equal(got[0], torch.tensor(expected, dtype=torch.float32) * float(scale[0]))
    assert not torch.equal(got[0], got[1])
    assert np.array_equal(state["encoder.layer.0.attention.output.LayerNorm.bias"].numpy(), written["l0.aln.b"])
    assert np.array_equal(state["encoder.layer.0.output.LayerNorm.bias"].numpy(), written["l0.oln.b"])
    model = BertModel(config, add_pooling_layer=False)
    model.load_state_dict(state)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"GGUF" + data[4:], "is no E5S1 file"),
        (lambda data: data[:3], "is no E5S1 file"),
        (lambda data: data[:40], "is damaged or cut short"),
        (lambda data: data[:-1], "ends at byte"),
        (lambda data: data[:4] + struct.pack("<I", 2) + data[8:], "version 2"),
        (lambda data: data[:8] + struct.pack("<i", 64) + data[12:], "numbers, not"),
        (lambda data: data[:12] + struct.pack("<i", 3) + data[16:], "lacks the tensor encoder.layer.2"),
        (lambda data: data[:12] + struct.pack("<i", 1) + data[16:], "has 16 tensors that its BERT lacks"),
    ],
)  # fmt: skip
def test_damaged_e5_file(tmp_path: Path, damage, message: str) -> None:
    path = tmp_path / "e5.bin"
    e5_file(path)
    read_e5(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as caught:
        read_e5(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_no_gguf_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"E5S1" + bytes(100))
    with pytest.raises(ValueError, match="is no GGUF file"):
        read_gguf(path)


def gguf_file(path: Path, architecture: str = "llama", cut: str | None = "gpt-2") -> None:
    """A Llama of one layer, Q4_1 where rows are whole blocks, with a byte-level tokenizer."""
    import gguf

    rng = np.random.default_rng(0)
    tokens = ["<|endoftext|>", "<s>", "</s>", *(chr(c) for c in range(33, 33 + 58)), "Ġ", "12", "ĠĠ"]
    writer = gguf.GGUFWriter(path, architecture)
    for add, value in (
        (writer.add_block_count, 1), (writer.add_context_length, 64), (writer.add_embedding_length, 32),
        (writer.add_feed_forward_length, 64), (writer.add_head_count, 4), (writer.add_head_count_kv, 2),
        (writer.add_layer_norm_rms_eps, 1e-5), (writer.add_rope_freq_base, 100.0), (writer.add_rope_dimension_count, 8),
        (writer.add_vocab_size, 64), (writer.add_tokenizer_model, "gpt2"), (writer.add_token_list, tokens),
        (writer.add_token_types, [3, 3, 3] + [1] * 61), (writer.add_token_merges, ["1 2", "Ġ Ġ"]), (writer.add_bos_token_id, 1),
        (writer.add_eos_token_id, 2), (writer.add_unk_token_id, 0),
    ):  # fmt: skip
        add(value)
    if cut is not None:
        writer.add_tokenizer_pre(cut)
    shapes = {"token_embd": (64, 32), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}
    shapes |= {"blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32)}
    shapes |= {"blk.0.attn_output": (32, 32), "blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32)}
    shapes |= {"blk.0.ffn_down": (32, 64)}
    for name, shape in shapes.items():
        values = rng.normal(1 if len(shape) == 1 else 0, 0.3, shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", values)
        else:
            kind = gguf.GGMLQuantizationType.Q4_1
            writer.add_tensor(f"{name}.weight", gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_logits_are_those_of_another_reader(tmp_path: Path) -> None:
    """Saved and loaded, against a Llama in NumPy that reads the file itself; without positions it is far off."""
    pytest.importorskip("gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from benchmarks.real.llama_numpy import Llama

    path = tmp_path / "model.gguf"
    gguf_file(path)
    (tmp_path / "folder").mkdir()
    smollm2([path], tmp_path / "folder")
    tokenizer = read_gguf(path)[2]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "folder").eval()
    assert AutoTokenizer.from_pretrained(tmp_path / "folder")("ABC!").input_ids == tokenizer("ABC!").input_ids
    ids = [5, 17, 3, 60, 9, 9, 41]
    with torch.no_grad():
        ours = loaded(torch.tensor([ids])).logits[0].double().numpy()
    reader = Llama(path)
    assert np.abs(ours - reader.logits(ids)).max() < 1e-4
    assert np.abs(ours - reader.logits(ids, rotate=False)).max() > 1e-2


def same_as_transformers(path: Path, texts: list[str]) -> None:
    """Weights bit for bit and the tokenizer as transformers reads them out of the file by the package gguf."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    config, state, tokenizer = read_gguf(path)
    expected = LlamaForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    assert state.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(state[name], tensor), name
    for name in ("rms_norm_eps", "rope_parameters", "head_dim", "tie_word_embeddings", "bos_token_id", "eos_token_id"):
        assert getattr(config, name) == getattr(expected.config, name), name
    assert tokenizer.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    assert tokenizer.special_tokens_map == theirs.special_tokens_map
    assert tokenizer.chat_template == theirs.chat_template
    assert tokenizer(texts).input_ids == theirs(texts).input_ids


def test_gguf_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    gguf_file(path)
    same_as_transformers(path, ["ABC!", "</s>AB", "A12  1"])


def test_gguf_text_is_cut_as_its_file_says(tmp_path: Path) -> None:
    """The ids are llama.cpp's (`smollm` cuts out each digit first); a way of cutting that is not known is refused."""
    pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    for cut, pieces in (("gpt-2", ["A", "12", "Ġ", "Ġ", "1"]), ("smollm", ["A", "1", "2", "ĠĠ", "1"])):
        gguf_file(path, cut=cut)
        tokenizer = read_gguf(path)[2]
        assert tokenizer.tokenize("A12  1") == pieces
        assert tokenizer.decode(tokenizer("A12  1").input_ids) == "A12  1"
    for cut in ("qwen2", None):  # without the key, llama.cpp cuts in its own default way, which is not GPT-2's
        gguf_file(path, cut=cut)
        with pytest.raises(ValueError, match=f"'gpt2' with {cut!r}, known"):
            read_gguf(path)


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "F32"])
def test_gguf_blocks(kind: str) -> None:
    """Every value of a block, with scales of both signs, as the package gguf takes it apart."""
    gguf = pytest.importorskip("gguf")
    number = gguf.GGMLQuantizationType[kind]
    size, dtype = BLOCKS[int(number)]
    values = np.random.default_rng(0).normal(0, 3, (8, 64)).astype(np.float32)
    data = gguf.quantize(values, number)
    got = numbers_of(data.tobytes(), int(number), (8, 64), 0)
    assert data.nbytes == 8 * 64 // size * dtype.itemsize
    assert np.array_equal(got, gguf.dequantize(data, number)) and not np.array_equal(got[0], got[1])
    assert np.abs(got - values).max() < (1.0 if kind == "Q4_1" else 0.1)


def test_damaged_gguf_files(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    gguf_file(path)
    whole = path.read_bytes()
    for size in (8, 100, len(whole) // 2, len(whole) - 200):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="damaged or cut short"):
            read_gguf(path)
    path.write_bytes(whole[:4] + struct.pack("<I", 9) + whole[8:])
    with pytest.raises(ValueError, match="version 9"):
        read_gguf(path)
    path.write_bytes(whole.replace(b"blk.0.ffn_up.weight", b"blk.1.ffn_up.weight"))
    with pytest.raises(ValueError, match=r"lacks the tensor model\.layers\.0\.mlp\.up_proj\.weight, of 11"):
        read_gguf(path)
    gguf_file(path, "qwen2")
    with pytest.raises(ValueError, match="of the architecture 'qwen2'"):
        read_gguf(path)
