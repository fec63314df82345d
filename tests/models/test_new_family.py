"""An encoder family that the library does not know, added from outside: one file, and one line that registers it."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
import transformers

from mtllm_fast import MTLLM, Engine, LoraSettings, PackedBatch
from mtllm_fast.data.tokenise import StackTokenizer
from mtllm_fast.models import PackedEncoder, encoders
from mtllm_fast.models.encoder import describe_encoder
from tests.conftest import assert_matches
from tests.models.weights import enlarge
from tests.tiny import LINES, llm_tokenizer

# ELECTRA: narrower embeddings than layers, layers under another name, no norm at the end
FILE = '''
"""ELECTRA: BERT's layers behind a projection of narrower embeddings."""

from typing import Any

from torch import Tensor, nn

from mtllm_fast.data import PackedBatch
from mtllm_fast.models.attention import AttentionPlan
from mtllm_fast.models.encoders import EncoderFamily


class Electra(EncoderFamily):
    model_types = ("electra",)
    about = "ELECTRA"

    def encoder_class(self, config: Any) -> Any:
        from transformers import ElectraModel

        return ElectraModel

    def run(self, encoder: Any, batch: PackedBatch, plan: AttentionPlan) -> Tensor:
        hidden = encoder.embeddings(input_ids=batch.input_ids[None], position_ids=batch.positions[None])
        hidden = encoder.embeddings_project(hidden)
        for layer in encoder.encoder.layer:
            hidden = layer(hidden, None, plan=plan)
        return hidden[0]

    def layers(self, encoder: Any) -> Any:
        return encoder.encoder.layer

    def final_norm(self, encoder: Any) -> nn.Module | None:
        return None

    def layers_root(self, encoder: Any) -> nn.Module:
        return encoder.encoder

    def max_positions(self, config: Any) -> int:
        return int(config.max_position_embeddings)
'''


@pytest.fixture
def electra_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A tiny ELECTRA with a tokenizer, and its family registered for this test."""
    torch.manual_seed(0)
    tokenizer = llm_tokenizer(list(LINES))
    config = transformers.ElectraConfig(
        vocab_size=len(tokenizer), embedding_size=16, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=40, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = enlarge(transformers.ElectraModel(config).eval(), noise=0.1)
    folder = tmp_path / "electra"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match="'electra' is not supported; supported: m2m_100"):
        PackedEncoder.from_pretrained(str(folder))

    (tmp_path / "electra_family.py").write_text(FILE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(encoders, "FAMILIES", list(encoders.FAMILIES))
    monkeypatch.setattr(encoders, "MODEL_TYPES", dict(encoders.MODEL_TYPES))
    encoders.register(import_module("electra_family").Electra())
    monkeypatch.delitem(sys.modules, "electra_family")
    return str(folder)


def test_a_family_from_outside(electra_folder: str, llm_folder: str, tmp_path: Path) -> None:
    encoder = PackedEncoder.from_pretrained(electra_folder).eval()
    plain = transformers.AutoModel.from_pretrained(electra_folder, attn_implementation="eager").eval()
    sequences = [[5, 6, 7, 8, 9, 5], [6], list(range(4, 40))]
    batch = PackedBatch.from_sequences(sequences)
    with torch.no_grad():
        alone = [plain(input_ids=torch.tensor([ids])).last_hidden_state[0] for ids in sequences]
        assert_matches(encoder(batch), torch.cat(alone), 1e-5)
    assert (encoder.hidden_size, encoder.num_layers, encoder.max_positions) == (32, 2, 40)
    assert encoder.final_norm is None and encoder.all_states(batch).shape == (2, batch.num_tokens, 32)
    assert describe_encoder(electra_folder)[:2] == [
        f"{electra_folder}: family electra (ELECTRA)", "states: 2 layers of width 32; texts of at most 40 tokens",
    ]  # fmt: skip

    model = MTLLM.stack(electra_folder, llm_folder, lora=LoraSettings(r=2), dtype=torch.float32)
    assert isinstance(model.tokenizer, StackTokenizer) and model.tokenizer.mt_limit == 40
    model.save_pretrained(tmp_path / "stack")
    expected = torch.from_numpy(Engine(model).encode(LINES))
    assert_matches(torch.from_numpy(Engine(MTLLM.from_pretrained(tmp_path / "stack")).encode(LINES)), expected, 1e-6)
    Engine(MTLLM.stack(electra_folder, reader="encoder"), compile=True)  # finds the layers under their own name
    model.states(batch).square().sum().backward()
    assert model.projection.layers.weight.grad.abs().max() > 0


def test_families_are_told_apart_by_their_model_types() -> None:
    with pytest.raises(ValueError, match="model type 'bert' is another family's"):
        encoders.register(type(encoders.FAMILIES[1])())
