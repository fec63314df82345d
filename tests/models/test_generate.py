"""Generation behind the encoder gives the tokens that Hugging Face's own generate gives on the same embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    M2M100ForConditionalGeneration,
    Phi3Config,
)

from mtllm_fast import MTLLM, LoraSettings, PackedBatch, TextRow
from mtllm_fast.models.generate import generate, generate_ids, left_padded, soft_prompts
from tests.conftest import assert_matches
from tests.data.conftest import train_llm
from tests.models.weights import enlarge, stir
from tests.tiny import LINES, llm_tokenizer

TEXTS = [LINES[0], "Trains", *LINES[2:5], "She bought"]
LANGUAGES = ["eng_Latn", "fra_Latn", "swh_Latn", "eng_Latn", "deu_Latn", "zho_Hans"]
BEFORE, AFTER = "Text: ", "\nSummary:"
OPTIONS: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}


def _model(encoder_folder: str, llm: Any) -> MTLLM:
    torch.manual_seed(2)
    model = MTLLM.stack(encoder_folder, llm, causal=True, lora=LoraSettings(r=4), dtype=torch.float32).eval()
    return stir(model, 0.1, ".lora_")


@pytest.fixture
def model(encoder_folder: str, llm_folder: str) -> MTLLM:
    return _model(encoder_folder, llm_folder)


def _plain_model(model: MTLLM, folder: Path, attention: str = "sdpa") -> Any:
    from mtllm_fast.models.nllb_llm2vec import merged_decoder

    folder.mkdir(exist_ok=True)
    model.llm.save(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()
    plain.get_decoder().load_state_dict(merged_decoder(model.llm, "student"))
    return plain


def _plain(
    model: MTLLM, prompts: list[torch.Tensor], folder: Path, attention: str = "sdpa", **options: Any
) -> list[list[int]]:
    """Hugging Face's generate in a model of its own that has the adapters merged, one prompt at a time."""
    plain = _plain_model(model, folder, attention)
    return [plain.generate(inputs_embeds=prompt[None], **options)[0].tolist() for prompt in prompts]


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_tokens_are_hugging_faces(model: MTLLM, tmp_path: Path, batch_size: int) -> None:
    prompts = soft_prompts(model, TEXTS, LANGUAGES, before=BEFORE, after=AFTER)
    assert len({len(prompt) for prompt in prompts}) > 3  # so that batches are padded
    expected = _plain(model, prompts, tmp_path / "plain", **OPTIONS)
    got = generate_ids(model, TEXTS, LANGUAGES, before=BEFORE, after=AFTER, batch_size=batch_size, **OPTIONS)
    assert got == expected
    assert len({tuple(ids) for ids in expected}) > 1
    with model.llm.adapter(None):  # the adapters were part of it
        assert generate_ids(model, TEXTS, LANGUAGES, before=BEFORE, after=AFTER, **OPTIONS) != expected


def test_prompt_is_what_the_encoder_and_the_llm_say(model: MTLLM, encoder_folder: str) -> None:
    """BOS, `before`, projected states of Hugging Face's own encoder, `after`."""
    nllb, llm = model.tokenizer.mt, model.tokenizer.llm
    nllb.src_lang = "fra_Latn"
    encoder = M2M100ForConditionalGeneration.from_pretrained(encoder_folder).get_encoder().eval()
    with torch.no_grad():
        states = encoder(**nllb(TEXTS[0], return_tensors="pt")).last_hidden_state[0]
        mapped = torch.nn.functional.linear(states, *model.projection.layers.parameters())
        table = model.llm.model.get_input_embeddings()
        start = [llm.bos_token_id] * int(bool(model.tokenizer.llm_prefix)) + llm(
            BEFORE, add_special_tokens=False
        ).input_ids
        end = llm(AFTER, add_special_tokens=False).input_ids
        expected = torch.cat([table(torch.tensor(start)), mapped, table(torch.tensor(end))])
    got = soft_prompts(model, TEXTS[:1], "fra_Latn", before=BEFORE, after=AFTER)[0]
    assert_matches(got, expected, 1e-5)
    assert len(soft_prompts(model, TEXTS[:1], bos=False)[0]) == len(states)


def llm_with_bos(folder: Path) -> Any:
    """A Llama whose tokenizer writes a BOS before every text; returns the tokenizer."""
    tokenizer = train_llm()
    settings = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **settings)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def test_one_bos(encoder_folder: str, tmp_path: Path) -> None:
    """A prompt that brings the BOS which the tokenizer writes gets no second one; by the plain tokenizer's own ids."""
    llm = llm_with_bos(tmp_path / "llm")
    model = _model(encoder_folder, str(tmp_path / "llm"))
    bos = llm.bos_token_id
    assert model.tokenizer.llm_prefix == [bos]
    nllb, table = model.tokenizer.mt, model.llm.model.get_input_embeddings()
    nllb.src_lang = "eng_Latn"
    texts = LINES[:2]

    def openings(before: str | list[str], **options: Any) -> list[list[int]]:
        prompts = soft_prompts(model, texts, "eng_Latn", before=before, **options)
        rows = [prompt[: len(prompt) - len(nllb(text).input_ids)] for prompt, text in zip(prompts, texts)]
        return [[int((table.weight == row).all(1).nonzero()[0]) for row in part] for part in rows]

    user, system = llm("user: ").input_ids, llm("A system. ").input_ids
    assert user[0] == system[0] == bos and bos not in user[1:] and len(user) > 2
    assert llm("<|begin|>user: ").input_ids == [bos, *user]  # what the plain tokenizer makes of it: two
    assert openings("user: ") == openings("<|begin|>user: ") == [user, user]
    assert openings(["<|begin|>user: ", "A system. "]) == [user, system]
    assert openings("<|begin|>") == openings("") == [[bos], [bos]]
    assert openings("<|begin|>user: ", bos=False) == [user, user]
    assert openings("user: ", bos=False) == [user[1:], user[1:]]
    assert openings("", bos=False) == [[], []]

    encoder = M2M100ForConditionalGeneration.from_pretrained(encoder_folder).get_encoder().eval()
    with torch.no_grad():
        states = [encoder(**nllb(text, return_tensors="pt")).last_hidden_state[0] for text in texts]
        mapped = [torch.nn.functional.linear(one, *model.projection.layers.parameters()) for one in states]

        def behind(ids: list[int]) -> list[torch.Tensor]:
            return [torch.cat([table(torch.tensor(ids)), one]) for one in mapped]

        expected = _plain(model, behind(user), tmp_path / "plain", **OPTIONS)
        twice = _plain(model, behind([bos, *user]), tmp_path / "plain", **OPTIONS)
    for before in ("user: ", "<|begin|>user: ", ["<|begin|>user: ", "user: "]):
        assert generate_ids(model, texts, "eng_Latn", before=before, **OPTIONS) == expected
    assert all(one != other for one, other in zip(expected, twice))  # control: a second BOS would show


def test_packed_attention_is_back_afterwards(model: MTLLM) -> None:
    batch = PackedBatch.from_sequences([[5, 6, 7, 8], [9, 10]])
    before = model.states(batch)
    model.train()
    generate_ids(model, TEXTS, **OPTIONS)
    assert model.training
    model.eval()
    assert torch.equal(model.states(batch), before)
    with pytest.raises(RuntimeError):
        generate_ids(model, TEXTS, max_new_tokens=4, prefix_allowed_tokens_fn=_fails)
    assert torch.equal(model.states(batch), before)


def _fails(*_: Any) -> list[int]:
    raise RuntimeError("in the middle")


def test_texts_prompts_per_text_and_generation_config(model: MTLLM) -> None:
    config = GenerationConfig(max_new_tokens=5, num_beams=3, num_return_sequences=2)
    texts = model.generate(TEXTS, LANGUAGES, after=[f"\n{i}" for i in range(6)], generation_config=config)
    ids = generate_ids(model, TEXTS, LANGUAGES, after=[f"\n{i}" for i in range(6)], generation_config=config)
    assert texts == model.tokenizer.llm.batch_decode(ids, skip_special_tokens=True)
    assert len(texts) == 12 and all(len(row) <= 5 for row in ids)
    single = generate_ids(model, [TEXTS[2]], [LANGUAGES[2]], after="\n2", generation_config=config)
    assert single == ids[4:6]
    special = soft_prompts(model, ["A"], before="<|begin|>")[0]  # a special token in a prompt counts as one
    assert len(special) == len(soft_prompts(model, ["A"])[0]) + 1
    assert len(soft_prompts(model, ["A</s>"])[0]) > len(soft_prompts(model, ["A"])[0]) + 1  # in a text it is text


def test_stops_at_the_end_token(model: MTLLM) -> None:
    """Rows that end early are cut there, and their padding is not part of the result."""
    first = generate_ids(model, TEXTS, LANGUAGES, **OPTIONS)
    end = first[0][3]
    cut = generate_ids(model, TEXTS, LANGUAGES, eos_token_id=end, **OPTIONS)
    assert cut == [ids[: ids.index(end) + 1] if end in ids else ids for ids in first]
    assert len({len(ids) for ids in cut}) > 1


def test_a_config_of_ones_own_ends_where_the_models_does(model: MTLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GenerationConfig leaves open is the model's: end token and padding."""
    own = model.llm.model.generation_config
    own.eos_token_id = generate_ids(model, TEXTS, LANGUAGES, **OPTIONS)[0][3]
    expected = generate_ids(model, TEXTS, LANGUAGES, **OPTIONS)
    assert len({len(ids) for ids in expected}) > 1  # some end early, and are padded
    passed: list[Any] = []
    whole = model.llm.model.generate
    monkeypatch.setattr(
        model.llm.model, "generate", lambda **options: passed.append(options.get("pad_token_id")) or whole(**options)
    )
    config = GenerationConfig(**OPTIONS)
    assert generate_ids(model, TEXTS, LANGUAGES, generation_config=config) == expected
    own.pad_token_id = None
    assert generate_ids(model, TEXTS, LANGUAGES, generation_config=config) == expected
    assert passed == [None, model.tokenizer.llm.pad_token_id]  # the model's own, then the tokenizer's


def test_soft_capped_attention(encoder_folder: str, tmp_path: Path) -> None:
    """Gemma 2 caps its attention scores, which SDPA cannot do."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    tokenizer = llm_tokenizer(list(LINES))
    settings = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    capped = Gemma2Config(
        vocab_size=len(tokenizer), num_key_value_heads=2, head_dim=8, attn_logit_softcapping=0.5, **settings
    )
    Gemma2ForCausalLM(capped).save_pretrained(tmp_path / "gemma")
    tokenizer.save_pretrained(tmp_path / "gemma")
    model = _model(encoder_folder, str(tmp_path / "gemma"))
    prompts = soft_prompts(model, TEXTS, LANGUAGES, bos=False)
    expected = _plain(model, prompts, tmp_path / "plain", "eager", **OPTIONS)
    assert generate_ids(model, TEXTS, LANGUAGES, bos=False, **OPTIONS) == expected
    assert _first_tokens_of_the_packed_path(model) == [ids[0] for ids in expected]
    for layer in model.llm.decoder.layers:  # without the cap it would be other tokens
        layer.self_attn.attn_logit_softcapping = None
    assert generate_ids(model, TEXTS, LANGUAGES, bos=False, **OPTIONS) != expected


SCALED: dict[str, Any] = {
    "dynamic": (
        LlamaConfig,
        {"max_position_embeddings": 16, "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0}},
    ),
    "longrope": (
        Phi3Config,
        {
            "max_position_embeddings": 64, "original_max_position_embeddings": 16,
            "rope_parameters": {
                "rope_type": "longrope", "rope_theta": 100.0, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4,
                "original_max_position_embeddings": 16, "factor": 4.0,
            },
        },
    ),
}  # fmt: skip


def _scaled(encoder_folder: str, kind: str, folder: Path) -> MTLLM:
    config_class, changes = SCALED[kind]
    tokenizer = llm_tokenizer(list(LINES))
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    settings = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, **tokens}
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(config_class(vocab_size=len(tokenizer), **{**settings, **changes}))
    enlarge(llm, 8.0).save_pretrained(folder)  # so that positions matter
    tokenizer.save_pretrained(folder)
    return _model(encoder_folder, str(folder))


@pytest.mark.parametrize("kind", list(SCALED))
def test_scaled_positions(encoder_folder: str, tmp_path: Path, kind: str) -> None:
    """Above the limit of the scaling, prompts are generated one at a time: each as transformers does it by itself."""
    model = _scaled(encoder_folder, kind, tmp_path / "llm")
    texts = ["Trains between", LINES[0] + " Trains", " ".join(LINES), "She bought"]
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    prompts = soft_prompts(model, texts, "eng_Latn")
    lengths = [len(prompt) for prompt in prompts]
    assert max(lengths[0], lengths[3]) + 8 <= 16 and 16 - 8 < lengths[1] <= 16 < lengths[2]
    alone = [_plain(model, [prompt], tmp_path / "plain", **options)[0] for prompt in prompts]  # a model for each
    assert all(len(set(ids)) > 1 for ids in alone)
    batch = PackedBatch.from_sequences([list(range(5, 21)), [30, 31]])  # one of 16 tokens: at the limit
    states = model.states(batch)

    def run(*chosen: int, **more: Any) -> list[list[int]]:
        length = {} if "max_length" in more else options
        return generate_ids(model, [texts[k] for k in chosen], "eng_Latn", **{**length, **more})

    for long, size in ((2, 2), (1, 16)):  # a prompt above the limit; one that gets there with its new tokens
        message = (
            rf"batch_size: a prompt of {lengths[long]} tokens and 8 new ones pass 16, where '{kind}' .*batch_size=1"
        )
        with pytest.raises(ValueError, match=message) as refusal:
            run(0, long, batch_size=size)
        assert "\n" not in str(refusal.value)
    with pytest.raises(ValueError, match="and 13 new ones pass 16"):
        run(0, 3, max_length=17)
    with pytest.raises(ValueError, match="and 20 new ones pass 16"):  # transformers' default
        generate_ids(model, [texts[0], texts[3]], "eng_Latn")
    assert run(0, 3, max_length=12, do_sample=False) == [alone[0], alone[3]]
    assert run(0, 3) == [alone[0], alone[3]]  # within the limit a batch is as ever
    assert run(0, 1, 2, 3, batch_size=1) == alone
    assert run(2, 1, batch_size=1) == run(1, 2, batch_size=1)[::-1] == [alone[2], alone[1]]
    run(2)
    assert torch.equal(model.states(batch), states)  # nothing is left of the longer positions

    plain = _plain_model(model, tmp_path / "plain")
    embeds, mask = left_padded([prompts[0], prompts[2]])
    beside = plain.generate(inputs_embeds=embeds, attention_mask=mask, **options)
    assert beside[0].tolist() != alone[0]  # control: what is refused would be other tokens


def test_first_token_is_the_packed_paths(model: MTLLM) -> None:
    """The two attention paths agree on what comes next."""
    expected = _first_tokens_of_the_packed_path(model)
    assert [ids[0] for ids in generate_ids(model, TEXTS, LANGUAGES, bos=False, **OPTIONS)] == expected
    assert len(set(expected)) > 1


@torch.no_grad()
def _first_tokens_of_the_packed_path(model: MTLLM) -> list[int]:
    rows = [TextRow(text, language) for text, language in zip(TEXTS, LANGUAGES)]
    batch = PackedBatch.from_sequences(model.tokenizer.mt_side(rows).ids)
    last = model.states(batch)[batch.cu_seqlens[1:].long() - 1]
    return (last @ model.llm.lm_head.weight.T).argmax(-1).tolist()


def test_errors_say_what_would_be_right(model: MTLLM, encoder_folder: str, llm_folder: str) -> None:
    with pytest.raises(ValueError, match="causal=True"):
        generate(MTLLM.stack(encoder_folder, llm_folder), TEXTS)
    with pytest.raises(ValueError, match="needs 'stack'"):
        generate(MTLLM.stack(None, llm_folder, reader="llm", causal=True), TEXTS)
    with pytest.raises(ValueError, match="languages: 1 values for 6 texts"):
        generate(model, TEXTS, ["eng_Latn"])
    with pytest.raises(ValueError, match=r"texts\[1\] is empty"):
        generate(model, ["A", " "])
    with pytest.raises(ValueError, match="nearest valid codes"):
        generate(model, TEXTS, "xx_Latn")
    with pytest.raises(TypeError, match="got one str"):
        generate(model, "A")
    with pytest.raises(ValueError, match="batch_size=0"):
        generate(model, TEXTS, batch_size=0)
