"""Log-likelihoods of given texts are those of Hugging Face's logits on the same input, row by row."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from mtllm_fast import MTLLM, LoraSettings, ProjectionConfig, TextRow, cli
from mtllm_fast.data.prompt import Prompt
from mtllm_fast.inference.likelihood import Labeller, check_labels, log_likelihoods
from mtllm_fast.inference.respond import Output, label_file
from mtllm_fast.models.generate import soft_prompts
from tests.inference.test_translate_file import Killed, stop_after
from tests.models.test_generate import _plain_model
from tests.tiny import LINES

PROMPT = Prompt("Text: ", "\nTopic:")
ROWS = [TextRow(text, code) for text, code in zip((*LINES, "Trains"), ("eng_Latn", "fra_Latn", "swh_Latn") * 3)]
CANDIDATES = [[" sports", " the river", " a", "science/technology"][: 2 + k % 3] for k in range(len(ROWS))]


def make(reader: str, encoder: str, llm: str, **options: Any) -> MTLLM:
    torch.manual_seed(2)
    stack = encoder if reader == "stack" else None
    model = MTLLM.stack(stack, llm, reader=reader, causal=True, lora=LoraSettings(r=4), dtype=torch.float32, **options)
    with torch.no_grad():
        for name, parameter in model.llm.named_parameters():
            if ".lora_" in name:
                parameter.normal_(0, 0.1)
            elif parameter.ndim > 1:
                parameter.mul_(4.0)  # as initialised it says nearly the same to everything
    return model.eval()


@pytest.fixture(params=["stack", "llm"])
def model(request: pytest.FixtureRequest, encoder_folder: str, llm_folder: str) -> MTLLM:
    return make(request.param, encoder_folder, llm_folder)


def reference(model: MTLLM, plain: Any, prompts: list[Tensor], shift: int = 0, end: bool = True) -> list[list[float]]:
    """By a plain model of transformers with the adapters merged: the prompt's embeddings, then the candidate's."""
    llm, table = model.tokenizer.llm, plain.get_input_embeddings()
    found = []
    for prompt, candidates in zip(prompts, CANDIDATES, strict=True):
        found.append([])
        for candidate in candidates:
            ids = torch.tensor([*llm(candidate, add_special_tokens=False).input_ids, *[llm.eos_token_id] * end])
            with torch.no_grad():
                whole = torch.cat([prompt, table(ids), prompt[-1:]])
                logs = plain(inputs_embeds=whole[None]).logits[0].log_softmax(-1)
            places = torch.arange(len(prompt) - 1, len(prompt) - 1 + len(ids)) + shift
            found[-1].append(float(logs[places, ids].sum()))
    return found


def prompts_of(model: MTLLM, plain: Any) -> list[Tensor]:
    llm, table = model.tokenizer.llm, plain.get_input_embeddings()
    if model.side == "mt":
        texts, languages = [row.text for row in ROWS], [row.language for row in ROWS]
        return soft_prompts(model, texts, languages, before=PROMPT.before, after=PROMPT.after)
    prefix = model.tokenizer.llm_prefix
    whole = [[llm(t, add_special_tokens=False).input_ids for t in (PROMPT.before, r.text, PROMPT.after)] for r in ROWS]
    return [table(torch.tensor([*prefix, *(token for part in parts for token in part)])).detach() for parts in whole]


def error(found: list[Any], expected: list[list[float]]) -> float:
    assert [len(one) for one in found] == [len(one) for one in expected]
    return max(float(np.abs(np.array(a) - np.array(b)).max()) for a, b in zip(found, expected))


@pytest.mark.parametrize("max_tokens", [1, 100, None])
def test_sums_are_those_of_hugging_faces_logits(model: MTLLM, tmp_path: Path, max_tokens: int | None) -> None:
    plain = _plain_model(model, tmp_path / "plain")
    prompts = prompts_of(model, plain)
    expected = reference(model, plain, prompts)
    found, truncated = log_likelihoods(model, ROWS, CANDIDATES, PROMPT, max_tokens=max_tokens)
    assert error(found, expected) < 1e-4 and truncated == 0
    assert min(abs(a - b) for one in expected for a in one for b in one if a is not b) > 0.05
    for control in ({"shift": 1}, {"shift": -1}, {"end": False}):
        assert error(found, reference(model, plain, prompts, **control)) > 0.5
    with model.llm.adapter(None):  # the adapters were part of it
        assert error(log_likelihoods(model, ROWS, CANDIDATES, PROMPT)[0], expected) > 0.1
    moved = log_likelihoods(model, ROWS, [one[::-1] for one in CANDIDATES], PROMPT)[0]
    assert error([one[::-1] for one in moved], expected) < 1e-4 < error(moved, expected)


def test_in_double_precision(llm_folder: str, encoder_folder: str, tmp_path: Path) -> None:
    model = make("llm", encoder_folder, llm_folder).double()
    plain = _plain_model(model, tmp_path / "plain").double()
    expected = reference(model, plain, prompts_of(model, plain))
    assert (
        error(log_likelihoods(model, ROWS, CANDIDATES, PROMPT)[0], expected) < 1e-5
    )  # the plain one was merged in fp32


def test_with_a_boundary_and_a_capped_head(encoder_folder: str, tmp_path: Path) -> None:
    """The trained embedding behind the text is read, and Gemma 2's soft-capped logits are capped."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    from tests.tiny import llm_tokenizer

    torch.manual_seed(0)
    tokenizer = llm_tokenizer(list(LINES))
    settings = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    capped = Gemma2Config(
        vocab_size=len(tokenizer), num_key_value_heads=2, head_dim=8, final_logit_softcapping=1.0, **settings
    )
    Gemma2ForCausalLM(capped).save_pretrained(tmp_path / "gemma")
    tokenizer.save_pretrained(tmp_path / "gemma")
    model = make("stack", encoder_folder, str(tmp_path / "gemma"), projection=ProjectionConfig(boundary=True))
    bare = log_likelihoods(model, ROWS, CANDIDATES, PROMPT)[0]
    with torch.no_grad():
        model.projection.boundary.normal_(0, 1.0)
    plain = _plain_model(model, tmp_path / "plain", "eager")
    texts, languages = [row.text for row in ROWS], [row.language for row in ROWS]
    prompts = soft_prompts(model, texts, languages, before=PROMPT.before, after=PROMPT.after)
    table = model.llm.model.get_input_embeddings()
    last = table(torch.tensor([model.tokenizer.llm_ids(PROMPT.after)]))[0]
    assert torch.equal(prompts[0][-len(last) - 1], model.projection.boundary)
    # Gemma scales what it is given as embeddings, so that the module's own are given unscaled
    found = log_likelihoods(model, ROWS, CANDIDATES, PROMPT)[0]
    assert error(found, reference(model, plain, prompts)) < 1e-4
    assert error(bare, reference(model, plain, prompts)) > 1e-2
    plain.config.final_logit_softcapping = None
    assert error(found, reference(model, plain, prompts)) > 0.1


def test_what_is_wrong_is_named(model: MTLLM, llm_folder: str) -> None:
    with pytest.raises(ValueError, match="candidates: 1 lists for 7 rows"):
        log_likelihoods(model, ROWS, CANDIDATES[:1], PROMPT)
    with pytest.raises(ValueError, match=r"candidates\[1\]: has none"):
        log_likelihoods(model, ROWS[:2], [["a"], []], PROMPT)
    assert log_likelihoods(model, [], [], PROMPT) == ([], 0)
    with pytest.raises(ValueError, match="is bidirectional; writing needs a causal one"):
        log_likelihoods(MTLLM.stack(llm=llm_folder, reader="llm"), ROWS, CANDIDATES, PROMPT)
    for labels in (["a"], ["a", "a"], ["a", " "]):
        with pytest.raises(ValueError, match="expected at least two different names"):
            check_labels(labels)
    tokenizer = model.tokenizer
    tokenizer.max_mt_tokens = tokenizer.max_llm_tokens = 6
    assert log_likelihoods(model, ROWS, CANDIDATES, PROMPT)[1] == sum(
        len(ids) > 6 for ids in (tokenizer.mt or tokenizer.llm)([row.text for row in ROWS]).input_ids
    )
    with torch.no_grad():
        model.llm.model.get_output_embeddings().weight[3] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite likelihoods"):
        log_likelihoods(model, ROWS, CANDIDATES, PROMPT)


def test_labels_into_a_file(model: MTLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = ["a", "b", "c", "d"]
    rows = [replace(row, id=f"r{k}") for k, row in enumerate(ROWS * 3)]

    def write(name: str, **options: Any) -> Any:
        labeller = Labeller(model, PROMPT, labels, max_tokens=200)
        return label_file(labeller, rows, Output(tmp_path / name, {"model": "tiny"}, window=5, **options))

    report = write("a.jsonl")
    records = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert list(records[0]) == ["id", "language", "text", "label", "log_likelihoods"]
    direct, _ = log_likelihoods(model, rows, [labels] * len(rows), PROMPT)
    assert error([record["log_likelihoods"] for record in records], [list(one) for one in direct]) < 1e-4
    assert [record["label"] for record in records] == [labels[int(one.argmax())] for one in direct]
    assert sum(report.counts.values()) == len(rows) and len(set(report.counts.values())) > 1
    assert json.loads((tmp_path / "a.jsonl.run.json").read_text())["labels"] == labels
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Killed):
            write("b.parquet")
    assert write("b.parquet").resumed == 10
    write("c.parquet")
    assert (tmp_path / "b.parquet").read_bytes() == (tmp_path / "c.parquet").read_bytes()
    assert pq.read_table(tmp_path / "c.parquet").to_pylist() == records


def test_command(model: MTLLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model.config.prompt = PROMPT
    model.save_pretrained(tmp_path / "model", include_base=True)
    (tmp_path / "in.txt").write_text("".join(row.text + "\n" for row in ROWS))
    files = ["--text", str(tmp_path / "in.txt"), "--output", str(tmp_path / "a.jsonl"), "--language", "eng_Latn"]
    options = ["--labels", " sports", " travel", "--device", "cpu", "--no-progress"]
    cli.main(["respond", "--model", str(tmp_path / "model"), *files, *options])
    out = capsys.readouterr().out
    assert "respond: 7 texts -> " in out and "label ' sports'" in out
    records = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    rows = [replace(row, language="eng_Latn") for row in ROWS]
    direct, _ = log_likelihoods(model, rows, [[" sports", " travel"]] * 7, PROMPT)
    assert error([record["log_likelihoods"] for record in records], [list(one) for one in direct]) < 1e-4
