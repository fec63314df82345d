"""What a model writes after a row is what Hugging Face's generate writes, and sampling is a row's own affair."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from mtllm_fast import MTLLM, LoraSettings, PackedBatch, TextRow
from mtllm_fast.data.prompt import Prompt
from mtllm_fast.models.generate import soft_prompts
from mtllm_fast.models.writing import Prompts, check_writer, write
from tests.models.test_generate import SCALED, _plain_model, _scaled, llm_with_bos
from tests.tiny import LINES

ROWS = [
    TextRow(text, language)
    for text, language in zip(
        (LINES[0], "Trains", *LINES[2:5], "She bought"),
        ("eng_Latn", "fra_Latn", "swh_Latn", "eng_Latn", "deu_Latn", "zho_Hans"),
    )
]
PROMPT = Prompt("Text: ", "\nSummary:")
NEW = 12


def _model(reader: str, encoder: str, llm: str) -> MTLLM:
    torch.manual_seed(2)
    stack = encoder if reader == "stack" else None
    model = MTLLM.stack(stack, llm, reader=reader, causal=True, lora=LoraSettings(r=4), dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.llm.named_parameters():
            if ".lora_" in name:
                parameter.normal_(0, 0.1)
            elif parameter.ndim > 1:
                parameter.mul_(4.0)  # as initialised it says nearly the same to everything
    return model


@pytest.fixture(params=["stack", "llm"])
def model(request: pytest.FixtureRequest, encoder_folder: str, llm_folder: str) -> MTLLM:
    return _model(request.param, encoder_folder, llm_folder)


def _own_prompts(model: MTLLM, rows: list[TextRow], prompt: Prompt) -> list[torch.Tensor]:
    """Embeddings (L, D) of each prompt, by the tokenizers themselves and the module that `test_generate` checks."""
    if model.side == "mt":
        texts, languages = [row.text for row in rows], [row.language for row in rows]
        return soft_prompts(model, texts, languages, before=prompt.before, after=prompt.after)
    llm, table = model.tokenizer.llm, model.llm.model.get_input_embeddings()
    found = []
    for row in rows:
        ids = [llm(text, add_special_tokens=False).input_ids for text in (prompt.before, row.text, prompt.after)]
        found.append(table(torch.tensor([*model.tokenizer.llm_prefix, *ids[0], *ids[1], *ids[2]])))
    return found


def _write(model: MTLLM, rows: list[TextRow] = ROWS, prompt: Prompt = PROMPT, **options: Any) -> list[Any]:
    prompts = Prompts.of(model, rows, prompt)
    return write(model, prompts, **{"max_new_tokens": NEW, "max_tokens": 4096, **options})


@pytest.mark.parametrize("max_tokens", [1, 90, 4096])
def test_greedy_answers_are_hugging_faces(model: MTLLM, tmp_path: Path, max_tokens: int) -> None:
    """Tokens and log probabilities of a plain model with the adapters merged, one prompt at a time, without cache."""
    plain = _plain_model(model, tmp_path / "plain")
    prompts = _own_prompts(model, ROWS, PROMPT)
    assert Prompts.of(model, ROWS, PROMPT).lengths.tolist() == [len(prompt) for prompt in prompts]
    options = {"max_new_tokens": NEW, "do_sample": False}
    expected = [plain.generate(inputs_embeds=prompt[None], **options)[0].tolist() for prompt in prompts]
    written = _write(model, max_tokens=max_tokens)
    assert [one.ids for (one,) in written] == expected and len(set(map(tuple, expected))) > 4
    for (one,), prompt in zip(written, prompts, strict=True):
        whole = torch.cat([prompt, plain.get_input_embeddings()(torch.tensor(one.ids))])[None]
        with torch.no_grad():
            logs = plain(inputs_embeds=whole).logits[0].log_softmax(-1)
        ids, places = torch.tensor(one.ids), torch.arange(len(prompt) - 1, len(prompt) - 1 + len(one.ids))
        assert one.score == pytest.approx(float(logs[places, ids].mean()), abs=1e-5)
        assert one.score != pytest.approx(float(logs[places + 1, ids].mean()), abs=1e-2)  # control: one token off
    with model.llm.adapter(None):  # the adapters were part of it
        assert [one.ids for (one,) in _write(model)] != expected


def test_ends_at_the_end_token(model: MTLLM) -> None:
    rows, own = [row for row, (one,) in zip(ROWS, _write(model)) if not one.finished], model.tokenizer.llm.eos_token_id
    first = [one.ids for (one,) in _write(model, rows)]
    assert len(rows) > 2 and not any(own in ids for ids in first)
    end = first[0][3]
    model.llm.model.generation_config.eos_token_id = end
    cut = [one for (one,) in _write(model, rows)]
    assert [one.ids for one in cut] == [ids[: ids.index(end) + 1] if end in ids else ids for ids in first]
    assert [one.finished for one in cut] == [end in ids for ids in first] and not all(one.finished for one in cut)
    model.llm.model.generation_config.eos_token_id = None
    model.tokenizer.llm.eos_token = model.tokenizer.llm.convert_ids_to_tokens(end)  # the tokenizer's own ends one, too
    assert [one.ids for (one,) in _write(model, rows)] == [one.ids for one in cut]
    short = [one for (one,) in _write(model, rows, max_new_tokens=4)]
    assert short[0].ids == first[0][:4] and short[0].finished  # the end token is the last that there is room for
    assert not _write(model, rows, max_new_tokens=3)[0][0].finished


def test_settings_of_the_folder_change_nothing(model: MTLLM) -> None:
    plain = [one.ids for (one,) in _write(model)]
    own = GenerationConfig(
        do_sample=True, temperature=3.0, top_k=2, repetition_penalty=5.0, no_repeat_ngram_size=1, min_new_tokens=11
    )
    own.eos_token_id = model.llm.model.generation_config.eos_token_id
    model.llm.model.generation_config = own
    assert [one.ids for (one,) in _write(model)] == plain
    assert model.llm.model.generation_config is own
    assert any(len(set(ids)) < len(ids) for ids in plain)  # control: no_repeat_ngram_size=1 forbids that


def _uniforms(count: int, copies: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((count, copies, NEW))


def test_sampling_does_not_depend_on_what_stands_beside(model: MTLLM) -> None:
    numbers = _uniforms(len(ROWS), 3)
    whole = [[one.ids for one in some] for some in _write(model, temperature=1.3, uniforms=numbers)]
    assert [len(some) for some in whole] == [3] * len(ROWS)
    assert len({tuple(ids) for some in whole for ids in some}) == 3 * len(ROWS)
    for max_tokens in (1, 120):
        again = _write(model, temperature=1.3, uniforms=numbers, max_tokens=max_tokens)
        assert [[one.ids for one in some] for some in again] == whole
    order = [4, 0, 5]
    some = _write(model, [ROWS[k] for k in order], temperature=1.3, uniforms=numbers[order][:, 1:2])
    assert [one.ids for (one,) in some] == [whole[k][1] for k in order]
    other = _write(model, temperature=1.3, uniforms=_uniforms(len(ROWS), 3, seed=1))
    assert not any(one.ids == ids for some, kept in zip(other, whole) for one, ids in zip(some, kept))
    assert all(some[0].score < -0.1 for some in other)
    cold = _write(model, temperature=1e-6, uniforms=numbers)
    assert [some[0].ids for some in cold] == [one.ids for (one,) in _write(model)]


def test_sampled_tokens_have_the_models_probabilities(model: MTLLM, tmp_path: Path) -> None:
    """Evenly spread numbers give every token in proportion to its probability at that temperature, to one draw."""
    draws, temperature = 3000, 0.4
    levels = (np.arange(draws) + 0.5) / draws
    uniforms = np.broadcast_to(levels[None, :, None], (1, draws, 1))
    written = _write(model, ROWS[:1], max_new_tokens=1, max_tokens=2**17, temperature=temperature, uniforms=uniforms)
    counts = np.bincount([one.ids[0] for one in written[0]], minlength=model.llm.vocab_size)
    plain = _plain_model(model, tmp_path / "plain")
    with torch.no_grad():
        logits = plain(inputs_embeds=_own_prompts(model, ROWS[:1], PROMPT)[0][None]).logits[0, -1].double()
    expected = (logits / temperature).softmax(-1).numpy() * draws
    assert np.abs(counts - expected).max() <= 1 + 1e-3
    assert np.abs(counts - logits.softmax(-1).numpy() * draws).max() > 5  # control: without the temperature
    scores = logits.log_softmax(-1)  # noted at temperature 1
    assert all(one.score == pytest.approx(float(scores[one.ids[0]]), abs=1e-5) for one in written[0])


def test_one_bos(encoder_folder: str, tmp_path: Path) -> None:
    """A chat template that writes the BOS which the tokenizer writes, too, gives no second one."""
    llm = llm_with_bos(tmp_path / "llm")
    model = _model("llm", encoder_folder, str(tmp_path / "llm"))
    bos = llm.bos_token_id
    assert model.tokenizer.llm_prefix == [bos]

    def read(before: str) -> list[list[int]]:
        return [ids.tolist() for ids in Prompts.of(model, ROWS, Prompt(before, "!")).inputs(model, range(len(ROWS)))]

    user = llm("user: ").input_ids
    assert user[0] == bos
    expected = [[*user, *llm(row.text + "!").input_ids[1:]] for row in ROWS]
    assert [ids[: len(user)] for ids in read("user: ")] == [user] * len(ROWS)
    assert read("user: ") == read("<|begin|>user: ")
    assert all(ids.count(bos) == 1 for ids in (*expected, *read("<|begin|>user: ")))
    assert llm("<|begin|>user: ").input_ids[:2] == [bos, bos]  # control: what the plain tokenizer makes of it
    special = read("<|end|>")[0]
    assert special[:2] == [bos, llm.eos_token_id]  # a special token in a prompt counts as one
    assert llm.eos_token_id not in Prompts.of(model, [TextRow("<|end|>")], Prompt("", "")).text[0]  # in a text not


def test_packed_attention_is_back_afterwards(model: MTLLM) -> None:
    batch = PackedBatch.from_sequences([[5, 6, 7, 8], [9, 10]])
    before, settings = model.states(batch), model.llm.model.generation_config
    model.train()
    _write(model)
    assert model.training and model.llm.model.generation_config is settings
    model.eval()
    assert torch.equal(model.states(batch), before)
    with pytest.raises(IndexError):
        _write(model, temperature=1.0, uniforms=np.zeros((len(ROWS), 1, 2)), max_new_tokens=3)  # too few numbers
    assert torch.equal(model.states(batch), before) and model.llm.model.generation_config is settings


@pytest.mark.parametrize("kind", list(SCALED))
def test_rows_beyond_scaled_positions_stand_alone(
    encoder_folder: str, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _scaled(encoder_folder, kind, tmp_path / "llm")
    rows = [TextRow(text, "eng_Latn") for text in ("Trains between", " ".join(LINES), "She bought")]
    lengths = Prompts.of(model, rows, Prompt("", "")).lengths
    assert lengths[0] + 8 <= 16 < lengths[1]

    def ids(some: list[TextRow]) -> list[list[int]]:
        return [one.ids for (one,) in _write(model, some, Prompt("", ""), max_new_tokens=8)]

    alone = [ids([row])[0] for row in rows]
    assert ids(rows) == alone
    monkeypatch.setattr("mtllm_fast.models.writing._check_lengths", lambda *_: None)
    model.llm.length_limit = None
    assert ids(rows) != alone  # control: in one batch they change each other


def test_what_cannot_write(encoder_folder: str, llm_folder: str, model: MTLLM) -> None:
    with pytest.raises(ValueError, match="reader='encoder' has no LLM"):
        check_writer(MTLLM.stack(encoder_folder, reader="encoder"))
    with pytest.raises(ValueError, match="is bidirectional; writing needs a causal one"):
        check_writer(MTLLM.stack(llm=llm_folder, reader="llm"))
    with pytest.raises(ValueError, match=r"max_new_tokens=1020: behind a prompt of \d+ tokens .* the 1024 positions"):
        _write(model, max_new_tokens=1020)
    if model.side == "llm":
        with pytest.raises(ValueError, match=r"rows\[1\]: neither its text nor the prompt has a token"):
            _write(model, [ROWS[0], TextRow("")], Prompt("", ""))
    with torch.no_grad():
        model.llm.model.get_output_embeddings().weight[3] = torch.nan
    with pytest.raises(ValueError, match="gives NaN or infinite numbers"):
        _write(model)
    model.llm.model.generation_config.eos_token_id = model.tokenizer.llm.eos_token = None
    with pytest.raises(ValueError, match="has no eos_token, so nothing says where an answer ends"):
        _write(model)


def test_pairs_and_texts_in_the_prompt(model: MTLLM) -> None:
    """{text} and {pair} put the row's own texts into the LLM's tokens; what a row lacks is named."""
    row = TextRow("The river", "eng_Latn", text_pair="the mill")
    prompt = Prompt("Q: {text} / {pair}\n", "\nA:")
    plain, filled = Prompts.of(model, [row], PROMPT), Prompts.of(model, [row], prompt)
    llm = model.tokenizer.llm
    expected = [*llm("Q: ").input_ids, *llm("The river").input_ids, *llm(" / ").input_ids, *llm("the mill").input_ids]
    assert filled.before[0][len(model.tokenizer.llm_prefix) :] == [*expected, *llm("\n").input_ids]
    assert plain.lengths[0] != filled.lengths[0] == len(filled.inputs(model, [0])[0])
    with pytest.raises(ValueError, match=r"prompt\.before: {pair}, but a row has no text_pair"):
        Prompts.of(model, [replace(row, text_pair=None)], prompt)


def test_saved_and_loaded_it_writes_the_same(model: MTLLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model", include_base=True)
    again = MTLLM.from_pretrained(tmp_path / "model")
    assert [one.ids for (one,) in _write(again)] == [one.ids for (one,) in _write(model)]
