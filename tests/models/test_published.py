"""MindMerger's and LangBridge's own layouts, written by hand as their code writes them, read and run as theirs run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from mtllm_fast import MTLLM, TextRow
from mtllm_fast.cli import main
from mtllm_fast.models.published import load_langbridge, load_mindmerger
from tests.conftest import assert_matches
from tests.tiny import LINES, nllb_tokenizer
from tests.training.short_runs import refused

TEXTS = list(LINES[:3])


class Mapping(nn.Module):
    """MindMerger's."""

    def __init__(self, width: int, llm_width: int) -> None:
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.linear1, self.mlp.linear2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, llm_width)
        self.end_boundary = nn.Parameter(torch.randn(1, 1, llm_width))

    def forward(self, states: Tensor) -> Tensor:
        states = self.mlp.linear2(torch.relu(self.mlp.linear1(states)))
        return torch.cat([states, self.end_boundary.expand(len(states), 1, -1)], 1)


def theirs(model: MTLLM, encoder: nn.Module, mapping: nn.Module, llm: nn.Module, text: str, prompt: str) -> list[int]:
    """What they write, greedily, one text at a time: [BOS] mapped states, boundary, prompt."""
    tokens = model.tokenizer
    ids = torch.from_numpy(tokens.mt_side([TextRow(text, "eng_Latn")], ends=False).ids[0])[None]
    table = llm.get_input_embeddings()
    prefix, suffix = (
        torch.tensor([tokens.llm_prefix], dtype=torch.long),
        torch.tensor([tokens.llm_ids(prompt)], dtype=torch.long),
    )
    with torch.no_grad():
        states = mapping(encoder(input_ids=ids, attention_mask=torch.ones_like(ids))[0])
        embeds = torch.cat([table(prefix), states, table(suffix)], 1)
        written = llm.generate(
            inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long), do_sample=False,
            max_new_tokens=6, pad_token_id=0,
        )  # fmt: skip
    return written[0].tolist()


def ours(model: MTLLM, prompt: str) -> list[list[int]]:
    from mtllm_fast.models.generate import generate_ids

    return generate_ids(model, TEXTS, "eng_Latn", after=prompt, max_new_tokens=6, do_sample=False)


@pytest.fixture
def mapping_file(encoder_folder: str, llm_folder: str, tmp_path: Path) -> tuple[Path, Mapping]:
    torch.manual_seed(3)
    mapping = Mapping(32, 48)
    torch.save({"model_state_dict": mapping.state_dict()}, tmp_path / "pytorch_model.bin")
    return tmp_path / "pytorch_model.bin", mapping


def test_mindmerger_writes_what_it_writes(mapping_file, encoder_folder, llm_folder, tmp_path) -> None:
    file, mapping = mapping_file
    model = load_mindmerger(file, encoder_folder, llm_folder, dtype=torch.float32)
    encoder = transformers.AutoModel.from_pretrained(encoder_folder, dtype=torch.float32).get_encoder().eval()
    llm = transformers.AutoModelForCausalLM.from_pretrained(llm_folder, dtype=torch.float32).eval()
    expected = [theirs(model, encoder, mapping, llm, text, "\nWords:") for text in TEXTS]
    assert ours(model, "\nWords:") == expected
    model.save_pretrained(tmp_path / "saved")
    assert ours(MTLLM.from_pretrained(tmp_path / "saved", dtype=torch.float32), "\nWords:") == expected
    with torch.no_grad():  # the control: without the boundary's values it writes something else
        model.projection.boundary.zero_()
    assert ours(model, "\nWords:") != expected


def test_mindmerger_that_does_not_fit_is_refused(mapping_file, encoder_folder, llm_folder, tmp_path) -> None:
    _, mapping = mapping_file
    state = mapping.state_dict()
    for change, said in (
        ({"mlp.linear1.bias": None}, r"1 missing: mlp\.linear1\.bias"),
        ({"mlp.linear2.weight": torch.zeros(40, 64)}, r"mlp\.linear2\.weight is \(40, 64\) instead of \(48, 64\)"),
    ):
        changed = {name: tensor for name, tensor in (state | change).items() if tensor is not None}
        torch.save({"model_state_dict": changed}, tmp_path / "other.bin")
        with pytest.raises(ValueError, match=said):
            load_mindmerger(tmp_path / "other.bin", encoder_folder, llm_folder)
    torch.save({"weights": 1}, tmp_path / "other.bin")
    with pytest.raises(ValueError, match="no 'model_state_dict'"):
        load_mindmerger(tmp_path / "other.bin", encoder_folder, llm_folder)
    (tmp_path / "other.bin").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="cannot be read as tensors"):
        load_mindmerger(tmp_path / "other.bin", encoder_folder, llm_folder)
    with pytest.raises(ValueError, match="no such file"):
        load_mindmerger(tmp_path / "none.bin", encoder_folder, llm_folder)


class Alignment(nn.Module):
    """LangBridge's, "linear" or "ffn"."""

    def __init__(self, kind: str, width: int, llm_width: int) -> None:
        super().__init__()
        if kind == "linear":
            self.linear = nn.Linear(width, llm_width)
        else:
            self.ffn = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, llm_width))
        self.layers = [self.linear if kind == "linear" else self.ffn]  # no module of its own
        self.enc_eos = nn.Parameter(torch.randn(llm_width))

    def forward(self, states: Tensor) -> Tensor:
        return torch.cat([self.layers[0](states), self.enc_eos.expand(len(states), 1, -1)], 1)


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An mT5 encoder as it lies on the hub; its tokenizer takes a language here, for want of a small one of T5's."""
    folder = tmp_path_factory.mktemp("t5")
    torch.manual_seed(4)
    tokenizer = nllb_tokenizer(list(LINES))
    config = transformers.MT5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, num_decoder_layers=1,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    transformers.MT5EncoderModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(params=["linear", "ffn"])
def langbridge(
    request, t5_folder: str, llm_folder: str, tmp_path: Path
) -> tuple[Path, nn.Module, nn.Module, nn.Module]:
    torch.manual_seed(5)
    encoder = transformers.MT5EncoderModel(transformers.AutoConfig.from_pretrained(t5_folder)).eval()  # not the base's
    llm = transformers.AutoModelForCausalLM.from_pretrained(llm_folder, dtype=torch.float32).eval()
    llm.resize_token_embeddings(llm.config.vocab_size + 3)
    alignment = Alignment(request.param, 32, 48)
    state = {f"lb.enc.{n}": t for n, t in encoder.state_dict().items() if n != "encoder.embed_tokens.weight"}
    state |= {f"lb.lm.{n}": t for n, t in llm.model.state_dict().items()}
    state |= {f"lb.alignment.{n}": t for n, t in alignment.state_dict().items()}
    state["lb.lm_head.weight"] = llm.lm_head.weight
    folder = tmp_path / "langbridge"
    folder.mkdir()
    save_file(
        {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}, folder / "model.safetensors"
    )
    config = {"enc": t5_folder, "lm": llm_folder, "dim_enc": 32, "dim_lm": 48, "alignments": request.param}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, encoder, alignment, llm


def test_langbridge_writes_what_it_writes(langbridge, tmp_path) -> None:
    folder, encoder, alignment, llm = langbridge
    model = load_langbridge(folder, dtype=torch.float32)
    expected = [theirs(model, encoder, alignment, llm, text, "") for text in TEXTS]
    assert ours(model, "") == expected
    model.save_pretrained(tmp_path / "saved")
    again = MTLLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert ours(again, "") == expected and again.llm.vocab_size == llm.config.vocab_size
    assert_matches(again.encoder.model.embed_tokens.weight, encoder.shared.weight, 1e-7)
    if hasattr(alignment, "ffn"):  # a control: the activation is in the config, and read there
        assert json.loads((tmp_path / "saved" / "config.json").read_text())["projection"]["activation"] == "gelu"
        model.projection.activation = "relu"
    else:  # the control
        with torch.no_grad():
            model.projection.boundary.neg_()
    assert ours(model, "") != expected


def test_langbridge_that_has_no_place_is_refused(langbridge, tmp_path) -> None:
    folder, *_ = langbridge
    config = json.loads((folder / "config.json").read_text())
    for change, said in (
        ({"alignments": "latent"}, "a perceiver, .*; only 'linear' and 'ffn' can be read"),
        ({"alignments": None}, "alignments=None is unknown"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=said):
            load_langbridge(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="no LangBridge model"):
        load_langbridge(folder)
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_langbridge(tmp_path)


def test_by_the_command(mapping_file, encoder_folder, llm_folder, tmp_path, capsys) -> None:
    file, _ = mapping_file
    convert = ["convert", "--model", str(file), "--from", "mindmerger", "--output", str(tmp_path / "out")]
    assert "--encoder is missing: the mapping holds no base models" in refused(capsys, convert)
    main([*convert, "--encoder", encoder_folder, "--llm", llm_folder])
    expected = ours(load_mindmerger(file, encoder_folder, llm_folder, dtype=torch.float32), "\nWords:")
    assert ours(MTLLM.from_pretrained(tmp_path / "out", dtype=torch.float32), "\nWords:") == expected
