"""Sequences that begin alike, read once: the states are those of the whole sequences, packed one after another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mtllm_fast.data.pack import PackedBatch
from mtllm_fast.inference.likelihood import branched
from mtllm_fast.models import PackedLLM
from mtllm_fast.models.attention import BACKENDS, Branches
from tests.conftest import assert_matches
from tests.models.weights import enlarge

# (ids of a beginning, the ids after it of each of its sequences, the last of which may be none)
GROUPS = [([5, 6, 7, 8, 9, 10, 11], [[20, 21], [22], []]), ([3], [[30, 31, 32, 33]]), ([4, 5, 6], [[7], [7, 8], [9]])]
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def tiny(family: str) -> Any:
    import transformers

    torch.manual_seed(3)
    more = {"num_key_value_heads": 2, "head_dim": 8}
    if family == "Gemma2":  # every other layer sees 3 rows; scores and logits are soft-capped
        more |= {"sliding_window": 3, "query_pre_attn_scalar": 8}
    if family == "Mistral":
        more |= {"sliding_window": 4}
    if family == "GPTNeoX":
        more = {}
    config = getattr(transformers, f"{family}Config")(**SIZES, **more, pad_token_id=0)
    return enlarge(getattr(transformers, f"{family}ForCausalLM")(config), 3.0).double().eval()


def given(groups: list[tuple[list[int], list[list[int]]]]) -> tuple[Branches, Tensor, list[list[int]]]:
    """The branches with their ids, the rows that predict, and the whole sequences."""
    branches, places = branched([len(first) for first, _ in groups], [[len(x) for x in rest] for _, rest in groups])
    ids = torch.tensor([one for first, rest in groups for one in [*first, *(x for some in rest for x in some)]])
    batch = PackedBatch(ids, branches.batch.cu_seqlens, branches.batch.positions, branches.batch.lengths)
    whole = [[*first, *some] for first, rest in groups for some in rest]
    return Branches(batch, branches.whole, branches.rows, branches.slots), places, whole


@pytest.mark.parametrize("backend", [None, "flex"])
@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Mistral", "GPTNeoX"])
@torch.no_grad()
def test_states_are_those_of_the_whole_sequences(family: str, backend: str | None) -> None:
    llm = PackedLLM(tiny(family), causal=True, attention=backend)
    if backend and BACKENDS[backend].missing(torch.device("cpu")):
        pytest.skip(f"{backend} is not here")
    if backend == "flex":
        llm.float()
    branches, places, whole = given(GROUPS)
    packed = PackedBatch.from_sequences(whole)
    states, expected = llm(branches), llm(packed)
    assert states.shape[0] == branches.batch.num_tokens == 22 < packed.num_tokens == 42
    tolerance = 1e-12 if backend is None else 1e-5
    assert_matches(states, expected[branches.slots], tolerance)
    assert_matches(states[branches.rows], expected, tolerance)
    # what predicts: the last row of the beginning, then those of the rest
    ends, rest = packed.cu_seqlens[1:].tolist(), [len(x) for _, some in GROUPS for x in some]
    predicting = [row for end, count in zip(ends, rest, strict=True) for row in range(end - count - 1, end)]
    assert_matches(states[places], expected[predicting], tolerance)
    straight = PackedBatch.from_flat(branches.batch.input_ids, branches.batch.lengths)
    wrong = llm(Branches(straight, branches.whole, branches.rows, branches.slots))
    with pytest.raises(AssertionError):  # positions that run on from one rest to the next are others
        assert_matches(wrong, expected[branches.slots], 1e-3)


@torch.no_grad()
def test_a_sequence_does_not_see_its_siblings() -> None:
    llm = PackedLLM(tiny("Llama"), causal=True)
    branches, _, _ = given(GROUPS)
    before = llm(branches)
    other = [(first, [[30 + x for x in rest[0]] if rest[0] else [], *rest[1:]]) for first, rest in GROUPS]
    moved, _, _ = given(other)
    after = llm(moved)
    own = (moved.batch.input_ids != branches.batch.input_ids).nonzero().flatten().tolist()
    same = [row for row in range(len(after)) if row not in own]
    assert own == [7, 8, 11, 12, 13, 14, 18] and torch.equal(after[same], before[same])
    assert all(not torch.allclose(after[row], before[row], atol=1e-3) for row in own)


def test_a_bidirectional_llm_is_refused() -> None:
    llm = PackedLLM(tiny("Llama"), causal=False)
    with pytest.raises(ValueError, match="sequences share rows only where these do not see what follows"):
        llm(given(GROUPS)[0])
