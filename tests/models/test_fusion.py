"""Texts read together with their translations (FILTER): states by hand, and what changes nothing or is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

from mtllm_fast import MTLLM, Engine, HeadConfig, LoraSettings, TextRow
from mtllm_fast.data.collate import collate
from mtllm_fast.data.pack import PackedBatch
from mtllm_fast.models import FusionSettings, PackedEncoder
from mtllm_fast.models.checkpointing import recompute_layers
from mtllm_fast.models.compile import compile_layers
from mtllm_fast.models.encoders import family_of
from mtllm_fast.models.fusion import check_fusion
from tests.conftest import assert_matches
from tests.models.weights import enlarge, stir
from tests.tiny import m2m100_config

# text, partner, text, partner, ...: one has no partner, one is longer than its text, one shorter
LENGTHS = (5, 7, 3, 0, 9, 2, 4, 4)
LAYERS = 4
FUSION = FusionSettings(1, 2)
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 40,
}  # fmt: skip
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CONFIGS: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    "bert": lambda: transformers.BertConfig(**SIZES, **QUIET),
    "xlm-roberta": lambda: transformers.XLMRobertaConfig(**SIZES, **QUIET, pad_token_id=1),
    "m2m_100": lambda: m2m100_config(encoder_layers=LAYERS, attention_dropout=0.0),
    "mbart": lambda: transformers.MBartConfig(
        vocab_size=64, d_model=32, encoder_layers=LAYERS, encoder_attention_heads=4, encoder_ffn_dim=48, dropout=0.0,
        max_position_embeddings=40,
    ),
    "modernbert": lambda: transformers.ModernBertConfig(
        **SIZES, local_attention=4, pad_token_id=1, bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3,
        layer_types=["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
    ),
    "t5": lambda: transformers.T5Config(vocab_size=64, d_model=32, num_layers=LAYERS, num_heads=4, d_kv=8, d_ff=48),
}  # fmt: skip
FUSES = [key for key in CONFIGS if key != "t5"]


def make(key: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A tiny encoder away from its small initialisation, so that attention matters."""
    torch.manual_seed(0)
    config = CONFIGS[key]()
    return enlarge(family_of(config).build(config).eval(), noise=0.1).to(dtype)


def batch_of(lengths: tuple[int, ...] = LENGTHS) -> PackedBatch:
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(5, 64, (n,), generator=generator).tolist() for n in lengths]
    return PackedBatch.from_sequences(ids, partners=True)


def blocks(lengths: list[int], within: int | None = None) -> Tensor:
    """(1, 1, T, T), what is added to the scores: 0 within a sequence, and there to rows that near, else -inf."""
    number = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    steps = torch.arange(len(number))
    seen = number[:, None] == number
    if within is not None:
        seen &= (steps[:, None] - steps).abs() <= within
    return torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -torch.inf)[None, None]


def doubled(encoder: nn.Module) -> nn.Module:
    encoder = copy.deepcopy(encoder).double()
    encoder.set_attn_implementation("eager")
    return encoder


def dense(encoder: nn.Module, batch: PackedBatch, fused: range, positions: Tensor | None = None) -> Tensor:
    """Hugging Face's own layers in float64, called one by one on all texts at once, with the mask of each layer.

    encoder: from `doubled`. positions: (T,), by default those of each text.
    """
    kind, ids = encoder.config.model_type, batch.input_ids[None]
    own = torch.cat([torch.arange(n) for n in batch.lengths])
    positions = (own if positions is None else positions)[None]
    more: list[dict[str, object]] = [{}] * LAYERS
    window: list[int | None] = [None] * LAYERS
    if kind in ("bert", "xlm-roberta"):
        shift = 2 if kind == "xlm-roberta" else 0
        hidden, layers = encoder.embeddings(input_ids=ids, position_ids=positions + shift), encoder.encoder.layer
    elif kind == "m2m_100":
        table = encoder.embed_positions.weights.double()
        hidden, layers = encoder.embed_tokens(ids) + table[positions + 2], encoder.layers
    elif kind == "mbart":
        hidden = encoder.embed_tokens(ids) + encoder.embed_positions.weight[positions + 2]
        hidden, layers = encoder.layernorm_embedding(hidden), encoder.layers
    else:
        hidden, layers = encoder.embeddings(input_ids=ids), encoder.layers
        kinds = encoder.config.layer_types
        more = [{"position_embeddings": encoder.rotary_emb(hidden, positions, one)} for one in kinds]
        window = [2 if one == "sliding_attention" else None for one in kinds]
    apart = list(batch.lengths)
    together = [a + b for a, b in zip(apart[::2], apart[1::2])]
    for number, layer in enumerate(layers):
        mask = blocks(together if number in fused else apart, window[number])
        hidden = layer(hidden, mask, **more[number])
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    return hidden[0]


def packed_states(encoder: nn.Module, batch: PackedBatch, fusion: FusionSettings | None, **options: str) -> Tensor:
    return PackedEncoder(copy.deepcopy(encoder), **options)(batch, fusion=fusion, final_norm=False)


# ---- states
@pytest.mark.parametrize("key", FUSES)
def test_states_are_those_of_layers_called_by_hand(key: str) -> None:
    encoder, batch, tolerance = make(key), batch_of(), 2e-5
    double = doubled(encoder)
    with torch.no_grad():
        mine = packed_states(encoder, batch, FUSION)
        right = dense(double, batch, FUSION.numbers)
        assert_matches(mine.double(), right, tolerance)
        # the controls: the texts apart, one layer more, one less, other ones
        for fused in (range(0), range(1, 4), range(1, 2), range(2, 4)):
            with pytest.raises(AssertionError):
                assert_matches(mine.double(), dense(double, batch, fused), tolerance)
        with pytest.raises(AssertionError):  # positions that go on through the pair
            assert_matches(mine.double(), dense(double, batch, FUSION.numbers, batch.pairs.positions), tolerance)
        assert_matches(packed_states(encoder, batch, None).double(), dense(double, batch, range(0)), tolerance)


@pytest.mark.parametrize("attention", ["sdpa", "flex"])
@pytest.mark.parametrize("key", ["bert", "m2m_100"])
def test_every_backend_of_the_cpu(key: str, attention: str) -> None:
    encoder, batch = make(key), batch_of()
    with torch.no_grad():
        right = dense(doubled(encoder), batch, FUSION.numbers)
        assert_matches(packed_states(encoder, batch, FUSION, attention=attention).double(), right, 2e-5)


def test_long_and_many_texts_take_the_other_paths_of_sdpa() -> None:
    """Neighbours of one length in place, and padded buckets."""
    encoder = make("bert")
    double = doubled(encoder)
    for lengths in ((30, 9, 30, 9), (30, 9, 1, 40, 17, 0, 2, 3) * 4):
        batch = batch_of(lengths)
        with torch.no_grad():
            mine = packed_states(encoder, batch, FUSION, attention="sdpa")
            assert_matches(mine.double(), dense(double, batch, FUSION.numbers), 2e-5)


def test_bfloat16() -> None:
    encoder, batch = make("bert"), batch_of()
    double = doubled(encoder)
    with torch.no_grad():
        right = dense(double, batch, FUSION.numbers)
        mine = packed_states(encoder.to(torch.bfloat16), batch, FUSION).double()
        apart = dense(double, batch, range(0))
    assert (mine - right).norm() < 0.05 * right.norm() < (apart - right).norm()


# ---- what changes nothing
@pytest.mark.parametrize("key", FUSES)
def test_no_layers_and_no_partner_are_the_plain_model_bit_for_bit(key: str) -> None:
    encoder, batch = make(key), batch_of()
    alone = replace(batch, partners=False)
    with torch.no_grad():
        plain = packed_states(encoder, alone, None)
        assert torch.equal(packed_states(encoder, batch, FusionSettings(1, 0)), plain)
        assert torch.equal(packed_states(encoder, alone, FUSION), plain)
        lonely = batch_of((5, 0, 3, 0))
        texts = PackedBatch.from_flat(lonely.input_ids, (5, 3))
        assert torch.equal(packed_states(encoder, lonely, FUSION), packed_states(encoder, texts, None))
        assert not torch.equal(packed_states(encoder, batch, FUSION), plain), "the control"


@pytest.mark.parametrize("key", FUSES)
def test_a_text_beside_itself_is_read_as_it_is_alone(key: str) -> None:
    """Every token is then seen twice, which softmax cannot tell from once."""
    encoder = make(key, torch.float64)
    ids = [7, 8, 9, 10, 11, 12]
    twice = PackedBatch.from_sequences([ids, ids], partners=True)
    with torch.no_grad():
        plain = packed_states(encoder, PackedBatch.from_sequences([ids]), None)
        assert_matches(packed_states(encoder, twice, FUSION)[: len(ids)], plain, 1e-6)
        other = PackedBatch.from_sequences([ids, ids[::-1]], partners=True)
        with pytest.raises(AssertionError):
            assert_matches(packed_states(encoder, other, FUSION)[: len(ids)], plain, 1e-6)


@pytest.mark.parametrize("key", FUSES)
@pytest.mark.parametrize("place", [0, 5, 12])  # of a text, of its partner, of a text without one
def test_a_row_sees_no_other(key: str, place: int) -> None:
    encoder, batch = make(key), batch_of()
    ids = batch.input_ids.clone()
    ids[place] = 63 if ids[place] != 63 else 62
    with torch.no_grad():
        before, after = (packed_states(encoder, one, FUSION) for one in (batch, replace(batch, input_ids=ids)))
    moved = (before != after).any(-1)
    own = batch.pairs.sequence_ids == batch.pairs.sequence_ids[place]
    assert not moved[~own].any()
    assert moved[own].all(), "its own text and partner see it"


# ---- gradients
def gradients(packed: PackedEncoder, batch: PackedBatch, probe: Tensor) -> dict[str, Tensor]:
    packed.zero_grad()
    (packed(batch, fusion=FUSION, final_norm=False) * probe.to(packed.model.dtype)).sum().backward()
    return {n: p.grad.clone() for n, p in packed.named_parameters() if p.grad is not None and "key.bias" not in n}


def test_gradients_are_those_of_the_dense_computation() -> None:
    encoder, batch = make("bert"), batch_of()
    probe = torch.randn(batch.num_tokens, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mine = gradients(PackedEncoder(copy.deepcopy(encoder)), batch, probe)
    theirs = []
    for fused in (FUSION.numbers, range(0)):
        double = doubled(encoder)
        (dense(double, batch, fused) * probe).sum().backward()
        theirs.append({f"model.{name}": p.grad for name, p in double.named_parameters() if p.grad is not None})
    assert len(mine) > 20
    for name, gradient in mine.items():
        assert_matches(gradient.double(), theirs[0][name], 2e-4)
    name = "model.encoder.layer.1.attention.self.value.weight"
    with pytest.raises(AssertionError):
        assert_matches(mine[name].double(), theirs[1][name], 2e-4)


def test_layers_that_are_run_again_or_compiled_fuse_too() -> None:
    """A plan that only the first pass has would give other gradients, in silence."""
    batch = batch_of()
    probe = torch.randn(batch.num_tokens, 32, generator=torch.Generator().manual_seed(1))
    plain = gradients(PackedEncoder(make("bert")).train(), batch, probe)
    again = PackedEncoder(make("bert")).train()
    recompute_layers(again)
    assert all(layer.gradient_checkpointing for layer in again.layers)
    found = [gradients(again, batch, probe)]
    torch.compiler.reset()
    compile_layers(again.layers, backend="eager")
    found.append(gradients(again, batch, probe))
    compiled = PackedEncoder(make("bert")).train()
    compile_layers(compiled.layers, backend="eager")
    found.append(gradients(compiled, batch, probe))
    torch.compiler.reset()
    for mine in found:
        assert mine.keys() == plain.keys()
        for name, gradient in mine.items():
            assert torch.allclose(gradient, plain[name], rtol=1e-4, atol=1e-5 * float(plain[name].abs().max())), name
    unfused = PackedEncoder(make("bert")).train()
    apart = gradients(unfused, replace(batch, partners=False), probe)
    assert any(not torch.allclose(apart[name], plain[name], rtol=1e-2) for name in plain), "the control"


# ---- models
ROWS = [
    TextRow("The river runs.", "fra_Latn", teacher_text="A teacher explains how plants turn light.", label=0),
    TextRow("She bought three apples.", "swh_Latn", label=1),
    TextRow("The river runs.", "fra_Latn", teacher_text="Nobody knew why.", label=1),
    TextRow("She bought three apples.", "swh_Latn", teacher_text="She bought three apples.", label=0),
]


@pytest.fixture
def model(encoder_folder: str) -> MTLLM:
    torch.manual_seed(0)
    parts = {"head": HeadConfig(labels=("a", "b")), "lora": LoraSettings(r=2)}
    model = stir(MTLLM.stack(encoder_folder, reader="encoder", dtype=torch.float32, **parts), 1.0)
    model.set_fusion(FusionSettings(1, 1))
    return model


def test_rows_are_read_as_one_pack_or_one_by_one(model: MTLLM) -> None:
    """A row with a partner fused, one without it alone; equal texts with other partners are not one."""
    together = torch.from_numpy(Engine(model).classify(ROWS))
    for index, row in enumerate(ROWS):
        (one,) = torch.from_numpy(Engine(model).classify([row]))
        assert torch.allclose(one, together[index], atol=1e-5)
    model.set_fusion(FusionSettings())
    plain = torch.from_numpy(Engine(model).classify(ROWS))
    apart = [not torch.allclose(a, b, atol=1e-4) for a, b in zip(plain, together)]
    assert apart == [True, False, True, True]
    assert not torch.allclose(together[0], together[2], atol=1e-4) and torch.equal(plain[0], plain[2])


def test_a_partner_is_read_as_english(model: MTLLM) -> None:
    packed = collate(ROWS, model.require_tokenizer(), sides=("mt",), align=False).side("mt")
    english = model.require_tokenizer().language_id("eng_Latn")
    starts = packed.cu_seqlens.tolist()
    first = [int(packed.input_ids[starts[i]]) if n else None for i, n in enumerate(packed.lengths)]
    assert first[1::2] == [english, None, english, english]
    assert english not in first[::2], "the control: the texts are not"


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_embeddings_are_of_the_texts(model: MTLLM, pooling: str) -> None:
    (window,) = Engine(model).encode_rows(ROWS, pooling=pooling)
    packed = collate(ROWS, model.require_tokenizer(), sides=("mt",), align=False).side("mt")
    with torch.no_grad():
        parts = model.eval().states(packed).split(packed.lengths)[::2]
        right = torch.stack(
            [part.mean(0) if pooling == "mean" else part[0 if pooling == "first" else -1] for part in parts]
        )
    assert_matches(torch.from_numpy(window), right, 1e-5)


def test_saved_and_loaded(model: MTLLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "fused")
    assert json.loads((tmp_path / "fused" / "config.json").read_text())["fusion"] == {"first": 1, "layers": 1}
    again = MTLLM.from_pretrained(tmp_path / "fused")
    assert again.config.fusion == FusionSettings(1, 1)
    right = Engine(model).classify(ROWS)
    assert torch.equal(torch.from_numpy(Engine(again).classify(ROWS)), torch.from_numpy(right))
    again.set_fusion(FusionSettings())
    again.save_pretrained(tmp_path / "plain")
    assert "fusion" not in json.loads((tmp_path / "plain" / "config.json").read_text()), "as files were before"
    plain = MTLLM.from_pretrained(tmp_path / "plain")
    assert plain.config.fusion is None and not plain.require_tokenizer().partners
    assert not torch.allclose(torch.from_numpy(Engine(plain).classify(ROWS)), torch.from_numpy(right), atol=1e-4)


# ---- refusals
@pytest.mark.parametrize(
    ("key", "first", "layers", "said"),
    [
        ("bert", 1, 4, r"fusion.first=1, fusion.layers=4: bert has 4 layers, numbered from 0"),
        ("t5", 1, 1, r"fusion.first=1, fusion.layers=1: t5 reads no two texts end to end"),
        ("modernbert", 0, 2, r"no more than a window of a text; modernbert can read two texts in the layers 1, 2$"),
        ("modernbert", 2, 2, r"fusion.first=2, fusion.layers=2: a layer among them sees no more than a window"),
    ],
)
def test_layers_that_cannot_are_refused(key: str, first: int, layers: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_fusion(FusionSettings(first, layers), CONFIGS[key]())


@pytest.mark.parametrize(("first", "layers", "name"), [(-1, 1, "first=-1"), (0, -1, "layers=-1")])
def test_settings_out_of_range(first: int, layers: int, name: str) -> None:
    with pytest.raises(ValueError, match=rf"fusion.{name}: must be >= 0"):
        FusionSettings(first, layers)


def test_only_an_encoder_alone(encoder_folder: str, llm_folder: str, model: MTLLM) -> None:
    for other in (MTLLM.stack(encoder_folder, llm_folder), MTLLM.stack(llm=llm_folder, reader="llm")):
        with pytest.raises(ValueError, match=r"fusion.layers=1: is for an encoder alone, not for reader='(stack|llm)'"):
            other.set_fusion(FusionSettings(1, 1))
    with pytest.raises(ValueError, match=r"has 2 layers"):
        model.set_fusion(FusionSettings(1, 2))
    assert model.config.fusion == FusionSettings(1, 1), "as it was"


def test_pairs_are_read_with_pairs(model: MTLLM) -> None:
    row = TextRow("The river.", "fra_Latn", "She bought.", teacher_text="A teacher.", teacher_pair="Nobody knew.")
    packed = collate([row], model.require_tokenizer(), sides=("mt",), align=False).side("mt")
    english = model.require_tokenizer().mt_side([TextRow("A teacher.", "eng_Latn", "Nobody knew.")]).ids[0]
    assert packed.input_ids[packed.lengths[0] :].tolist() == english.tolist()
    found = [Engine(model).classify([one]) for one in (row, replace(row, teacher_pair="A teacher."))]
    assert not torch.allclose(*map(torch.from_numpy, found), atol=1e-4)


def test_a_row_of_several_texts_has_no_partner_of_one(model: MTLLM) -> None:
    for more in ({"text_pair": "b"}, {"choices": ("a", "b")}):
        with pytest.raises(ValueError, match=r"teacher_text='A teacher.*takes the place of a text alone"):
            Engine(model).classify([replace(ROWS[0], **more)])
