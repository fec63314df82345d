"""Every encoder family on packed rows: what Hugging Face gives on padded ones, forward and gradients, in fp32."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn

from mtllm_fast.data import TextRow
from mtllm_fast.data.pack import PackedBatch
from mtllm_fast.data.tokenise import StackTokenizer
from mtllm_fast.models import LoraSettings, PackedEncoder
from mtllm_fast.models.encoders import FAMILIES, family_of
from tests.conftest import assert_matches
from tests.models.weights import enlarge
from tests.tiny import LINES, m2m100_config, nllb_tokenizer

LENGTHS = (1, 2, 63, 64, 65, 150)
TOLERANCE = 1e-5
BERT = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 160, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
T5 = {
    "vocab_size": 64,
    "d_model": 32,
    "num_layers": 2,
    "num_heads": 4,
    "d_kv": 12,
    "d_ff": 64,
    "dropout_rate": 0.0,
    "relative_attention_max_distance": 40,
}
CONFIGS = {
    "m2m_100": m2m100_config,
    "bert": lambda: transformers.BertConfig(**BERT),
    "xlm-roberta": lambda: transformers.XLMRobertaConfig(**BERT, pad_token_id=1),
    "modernbert": lambda: transformers.ModernBertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        local_attention=16,
        layer_types=["full_attention", "sliding_attention"],
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=3,
        cls_token_id=2,
        sep_token_id=3,
        max_position_embeddings=512,
    ),
    "mbart": lambda: transformers.MBartConfig(
        vocab_size=64,
        d_model=32,
        encoder_layers=2,
        encoder_attention_heads=4,
        encoder_ffn_dim=64,
        max_position_embeddings=160,
        dropout=0.0,
        scale_embedding=True,
    ),
    "t5": lambda: transformers.T5Config(**T5),
    "mt5": lambda: transformers.MT5Config(**T5, feed_forward_proj="gated-gelu"),
    "umt5": lambda: transformers.UMT5Config(**T5),
    "roberta": lambda: transformers.RobertaConfig(**BERT, pad_token_id=1),
}


def make(key: str) -> nn.Module:
    """A tiny encoder away from its small initialisation, so that attention matters."""
    config = CONFIGS[key]()
    torch.manual_seed(0)
    family = family_of(config)
    encoder = family.build(config).eval()
    if hasattr(encoder, "pooler"):
        encoder.pooler = None
    encoder.set_attn_implementation("eager")
    return enlarge(encoder, noise=0.1)


def batch_of(lengths: tuple[int, ...] = LENGTHS, vocab: int = 64) -> PackedBatch:
    generator = torch.Generator().manual_seed(3)
    return PackedBatch.from_sequences([torch.randint(5, vocab, (n,), generator=generator).tolist() for n in lengths])


def padded_states(encoder: nn.Module, batch: PackedBatch) -> torch.Tensor:
    ids, mask = batch.to_padded(encoder.config.pad_token_id)
    return batch.unpad_states(encoder(input_ids=ids, attention_mask=mask).last_hidden_state)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    # an element-wise bias of the keys has no gradient but rounding: softmax ignores a constant
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None and not n.endswith(KEY_BIAS)}


KEY_BIAS = ("key.bias", "k_proj.bias")


def test_every_model_type_is_tested() -> None:
    assert sorted(CONFIGS) == sorted(name for family in FAMILIES for name in family.model_types)


@pytest.mark.parametrize("key", list(CONFIGS))
def test_packed_equals_hugging_face(key: str) -> None:
    padded, batch = make(key), batch_of()
    packed = PackedEncoder(copy.deepcopy(padded))
    expected, actual = padded_states(padded, batch), packed(batch)
    assert_matches(actual, expected, TOLERANCE)
    probe = torch.randn(actual.shape, generator=torch.Generator().manual_seed(1))
    (actual * probe).sum().backward()
    (expected * probe).sum().backward()
    mine, theirs = gradients(packed.model), gradients(padded)
    assert mine.keys() == theirs.keys() and len(mine) > 10
    for name, gradient in mine.items():
        assert_matches(gradient, theirs[name], 2 * TOLERANCE)

    # the tolerance sees a position that is off by one, and a neighbour that is read across a border
    for wrong in (PackedBatch.from_sequences([[5, *s] for s in sequences(batch)]), joined(batch)):
        with torch.no_grad():
            states = packed(wrong)
        if wrong.num_tokens != batch.num_tokens:
            keep = torch.ones(wrong.num_tokens, dtype=torch.bool)
            keep[wrong.cu_seqlens[:-1].long()] = False
            states = states[keep]
        with pytest.raises(AssertionError):
            assert_matches(states, expected, TOLERANCE)


def sequences(batch: PackedBatch) -> list[list[int]]:
    return [part.tolist() for part in batch.input_ids.split(batch.lengths)]


def joined(batch: PackedBatch) -> PackedBatch:
    first, second, *rest = sequences(batch)
    return PackedBatch.from_sequences([first + second, *rest])


@pytest.mark.parametrize("key", list(CONFIGS))
def test_states_before_the_norm(key: str) -> None:
    encoder, batch = PackedEncoder(make(key)), batch_of((3, 7))
    before = encoder(batch, final_norm=False)
    if encoder.final_norm is None:
        assert torch.equal(before, encoder(batch))
    else:
        assert torch.equal(encoder.final_norm(before), encoder(batch))
        assert not torch.allclose(before, encoder(batch), atol=1e-2)
    assert before.shape == (10, encoder.hidden_size)
    assert len(encoder.layers) == encoder.num_layers == 2 and encoder.vocab_size == 64


@pytest.mark.parametrize("key", list(CONFIGS))
def test_lora_fits_the_layers_only(key: str) -> None:
    encoder, batch = PackedEncoder(make(key)), batch_of((3, 7))
    before = encoder(batch)
    encoder.add_adapter(LoraSettings(r=2, dropout=0.0))
    adapted = {name for name, module in encoder.model.named_modules() if hasattr(module, "lora_A")}
    linear = {
        name for layer in encoder.layers for name, m in layer.named_modules() if isinstance(m, nn.Linear)
        and ".lora_" not in name
    }  # fmt: skip
    assert len(adapted) == 2 * len({n.removesuffix(".base_layer") for n in linear})
    assert not any("pooler" in name or "embed" in name for name in adapted)
    assert_matches(encoder(batch), before, TOLERANCE)  # torch multiplies frozen weights in another order
    encoder(batch).square().sum().backward()
    trained = {n for n, p in encoder.model.named_parameters() if p.grad is not None}
    assert trained and all(".lora_" in n for n in trained)


@pytest.mark.parametrize("key", list(CONFIGS))
def test_saved_and_loaded(key: str, tmp_path) -> None:
    encoder, batch = PackedEncoder(make(key)), batch_of((3, 7))
    encoder.save(tmp_path)
    loaded = PackedEncoder.from_pretrained(str(tmp_path)).eval()
    assert loaded.family is encoder.family
    assert torch.equal(loaded(batch), encoder(batch))
    assert loaded.bare_state().keys() == encoder.bare_state().keys()


def test_a_tokenizer_must_be_the_encoders_own() -> None:
    """Ids beyond the embeddings and missing language codes are refused; long texts end where the positions do."""
    mt_tokenizer = nllb_tokenizer(list(LINES))
    small = PackedEncoder(make("bert"))
    with pytest.raises(ValueError, match="it belongs to another encoder"):
        small.take_tokenizer(StackTokenizer(mt_tokenizer, None))
    config = transformers.BertConfig(**{**BERT, "vocab_size": len(mt_tokenizer), "max_position_embeddings": 20})
    own, tokenizer = PackedEncoder(family_of(config).build(config)), StackTokenizer(mt_tokenizer, None)
    long = TextRow("the cat sat on the mat " * 20, "eng_Latn")
    assert len(tokenizer.mt_side([long]).ids[0]) > 20
    own.take_tokenizer(tokenizer)
    side = tokenizer.mt_side([long])
    assert (len(side.ids[0]), side.truncated) == (20, 1)
    own(PackedBatch.from_sequences([ids.tolist() for ids in side.ids]))

    plain = copy.deepcopy(mt_tokenizer)
    codeless = StackTokenizer(plain, None)
    codeless._language_ids = {}
    config = transformers.M2M100Config(vocab_size=len(mt_tokenizer), d_model=32, encoder_layers=1, decoder_layers=1,
                                       encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=32,
                                       decoder_ffn_dim=32)  # fmt: skip
    with pytest.raises(ValueError, match="has no language codes, but encoder"):
        PackedEncoder(family_of(config).build(config)).take_tokenizer(codeless)


@pytest.mark.parametrize("key", ["bert", "xlm-roberta", "roberta", "mbart"])
def test_the_last_position_is_read_and_the_one_behind_it_refused(key: str) -> None:
    """Where the table of positions ends is asked of Hugging Face itself: it fails on a longer text."""
    encoder = make(key)
    packed = PackedEncoder(copy.deepcopy(encoder))
    limit = packed.max_positions
    assert limit is not None
    batch = batch_of((limit, 3))
    with torch.no_grad():
        assert_matches(packed(batch), padded_states(encoder, batch), TOLERANCE)
        longer = batch_of((limit + 1, 3))
        with pytest.raises((IndexError, RuntimeError)):
            padded_states(encoder, longer)
        with pytest.raises(ValueError, match=f"a text of {limit + 1} tokens; the encoder has positions for {limit}"):
            packed(longer)
