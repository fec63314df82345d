"""LLM tokens around the encoder's text, packed: against a loop that concatenates, forward, gradients and losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtllm_fast import MTLLM, LoraSettings, PackedBatch, ProjectionConfig
from mtllm_fast.models.inputs import LLMInputs, compose
from tests.conftest import assert_matches

TEXTS = [[5, 6, 7, 8, 9], [10], [11, 12, 13]]
CASES: dict[str, tuple[list[list[int]] | None, list[list[int]] | None]] = {
    "nothing": (None, None),
    "shared": ([[3, 4]], [[7, 8, 9]]),
    "shared, one side": (None, [[7]]),
    "one each": ([[3, 4], [5, 6], [7, 8]], [[9], [10], [11]]),
    "ragged": ([[3, 4, 5], [], [6]], [[9], [10, 11], [12, 13, 14, 15]]),
    "shared and ragged": ([[3, 4]], [[], [10, 11], [12]]),
    "no tokens": ([[], [], []], [[]]),
}


@pytest.fixture(scope="module", params=["linear", "mlp"])
def model(request: pytest.FixtureRequest, encoder_folder: str, llm_folder: str) -> MTLLM:
    torch.manual_seed(2)
    model = MTLLM.stack(
        encoder_folder, llm_folder, causal=True, lora=LoraSettings(r=2), dtype=torch.float32,
        projection=ProjectionConfig(kind=request.param),
    )  # fmt: skip
    for part in (model.encoder, model.llm):  # so that every input of the composition has a gradient
        part.requires_grad_(True)
    return model.eval()


def pack(sequences: list[list[int]] | None) -> PackedBatch | None:
    return None if sequences is None else PackedBatch.from_sequences(sequences)


def looped(model: MTLLM, before: list[list[int]] | None, after: list[list[int]] | None) -> list[Tensor]:
    """The embeddings of each sequence, one after the other, by plain torch."""
    table = model.llm.model.get_input_embeddings()

    def embedded(sequences: list[list[int]] | None, index: int) -> Tensor:
        ids = [] if sequences is None else sequences[index if len(sequences) > 1 else 0]
        return table(torch.tensor(ids, dtype=torch.int64))

    found = []
    for index, ids in enumerate(TEXTS):
        states = model.encoder.final_norm(model.encoder(PackedBatch.from_sequences([ids]), final_norm=False))
        text = model.projection.layers(states)
        found.append(torch.cat([embedded(before, index), text, embedded(after, index)]))
    return found


def composed(model: MTLLM, before: list[list[int]] | None, after: list[list[int]] | None) -> LLMInputs:
    return compose(model.require_stack(), PackedBatch.from_sequences(TEXTS), pack(before), pack(after))


def gradients(model: MTLLM, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    # softmax ignores a constant: an element-wise bias of the keys has no gradient but rounding
    trained = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    return {name: grad for name, grad in trained if grad.abs().max() > 0 and not name.endswith("k_proj.bias")}


@pytest.mark.parametrize("case", CASES)
def test_rows_and_gradients_are_those_of_a_loop(model: MTLLM, case: str) -> None:
    inputs, expected = composed(model, *CASES[case]), looped(model, *CASES[case])
    assert inputs.batch.lengths == tuple(map(len, expected))
    assert_matches(inputs.embeds, torch.cat(expected), 1e-5)
    probe = torch.randn(inputs.embeds.shape, generator=torch.Generator().manual_seed(1))
    ours = gradients(model, (inputs.embeds * probe).sum())
    theirs = gradients(model, (torch.cat(expected) * probe).sum())
    assert ours.keys() == theirs.keys() and len(ours) > 10
    for name, gradient in theirs.items():
        assert_matches(ours[name], gradient, 2e-5)


@pytest.mark.parametrize("case", CASES)
def test_the_packing_says_what_stands_where(model: MTLLM, case: str) -> None:
    before, after = CASES[case]
    inputs = composed(model, before, after)
    kinds = torch.full((inputs.batch.num_tokens,), -1)
    for kind, rows in enumerate((inputs.before_rows, inputs.text_rows, inputs.after_rows)):
        assert (rows.diff() > 0).all()
        kinds[rows] = kind
    ids, parts = inputs.batch.input_ids.split(inputs.batch.lengths), kinds.split(inputs.batch.lengths)
    for index, text in enumerate(TEXTS):
        around = [[] if tokens is None else tokens[index if len(tokens) > 1 else 0] for tokens in (before, after)]
        assert ids[index].tolist() == [*around[0], *[0] * len(text), *around[1]]
        assert parts[index].tolist() == [0] * len(around[0]) + [1] * len(text) + [2] * len(around[1])


def test_a_loss_on_the_tokens_after_the_text(model: MTLLM) -> None:
    """Next-token loss on the packed rows before `after_rows`, against transformers on each sequence alone."""
    before, after = CASES["ragged"]
    inputs = composed(model, before, after)
    head = model.llm.lm_head.weight
    states = model.llm(inputs.batch, inputs.embeds)
    targets = inputs.batch.input_ids[inputs.after_rows]
    loss = F.cross_entropy(states[inputs.after_rows - 1] @ head.T, targets, reduction="sum")

    plain: Any = model.llm.model
    plain.set_attn_implementation("eager")
    try:
        expected = torch.zeros(())
        for embeds, ids in zip(looped(model, before, after), after):
            logits = plain(inputs_embeds=embeds[None]).logits[0]
            expected = expected + F.cross_entropy(logits[-len(ids) - 1 : -1], torch.tensor(ids), reduction="sum")
        theirs = gradients(model, expected)
    finally:
        plain.set_attn_implementation("mtllm_packed")
    ours = gradients(model, loss)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    names = [name for name in theirs if name.startswith("projection.")]
    assert names
    for name in names:
        assert_matches(ours[name], theirs[name], 1e-4)
    wrong = F.cross_entropy(states[inputs.after_rows] @ head.T, targets, reduction="sum")
    assert wrong.item() != pytest.approx(expected.item(), rel=1e-3)  # control: one row on


def test_another_number_of_prompts_is_refused(model: MTLLM) -> None:
    with pytest.raises(ValueError, match="after: 2 sequences for 3 texts"):
        composed(model, None, [[1], [2]])
