import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtllm_fast.data import PackedBatch, token_budget_packs
from mtllm_fast.data.pack import consecutive_packs

sequences = st.lists(st.lists(st.integers(1, 1000), max_size=7), min_size=1, max_size=6)


@settings(max_examples=100, deadline=None)
@given(sequences)
def test_round_trip_through_padded_is_exact(rows):
    batch = PackedBatch.from_sequences(rows)
    ids, mask = batch.to_padded(pad_id=0)
    assert ids.shape == mask.shape == (len(rows), max(map(len, rows)))
    for i, row in enumerate(rows):
        assert ids[i, : len(row)].tolist() == row
        assert mask[i].sum() == len(row)
    if ids.numel():
        again = PackedBatch.from_padded(ids, mask)
        for name in ("input_ids", "cu_seqlens", "positions"):
            assert torch.equal(getattr(again, name), getattr(batch, name)), name
            assert getattr(again, name).dtype == getattr(batch, name).dtype, name
        assert again.lengths == batch.lengths == tuple(map(len, rows))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), max_size=3), min_size=2, max_size=12))
def test_digests_are_equal_where_sequences_are(rows):
    found = PackedBatch.from_sequences(rows).digests.tolist()
    assert len(found) == len(rows)
    for one, row in zip(found, rows):
        for other, another in zip(found, rows):
            assert (one == other) == (row == another)


def test_digests_tell_many_sequences_apart():
    """Those of every sequence of up to 5 of 8 tokens, large and small, and of all neighbours of a long one."""
    tokens = (0, 1, 2, 3, 2**10, 2**20, 2**31 - 2, 2**31 - 1)
    rows = [list(row) for n in range(1, 6) for row in itertools.product(tokens, repeat=n)]
    long = list(range(500))
    rows += [long[:i] + [token] + long[i + 1 :] for i in range(0, 500, 7) for token in (600, 601)]
    rows += [long[:i] + [long[i + 1], long[i]] + long[i + 2 :] for i in range(0, 499, 7)]
    digests = PackedBatch.from_sequences(rows).digests
    assert len(digests.unique()) == len(rows)
    again = PackedBatch.from_sequences([long, *rows[:1000], [1, 2, 3]]).digests
    assert torch.equal(again[1:1001], digests[:1000]), "wherever they stand"


@settings(max_examples=50, deadline=None)
@given(sequences)
def test_metadata_agrees_with_a_loop(rows):
    batch = PackedBatch.from_sequences(rows)
    assert batch.input_ids.tolist() == [t for row in rows for t in row]
    assert batch.positions.tolist() == [p for row in rows for p in range(len(row))]
    assert batch.sequence_ids.tolist() == [i for i, row in enumerate(rows) for _ in row]
    assert batch.cu_seqlens.tolist() == [sum(map(len, rows[:i])) for i in range(len(rows) + 1)]
    assert batch.cu_seqlens.dtype == torch.int32
    assert (batch.num_sequences, batch.num_tokens) == (len(rows), sum(map(len, rows)))
    assert batch.max_seqlen == max(map(len, rows))


def test_left_padding_and_holes_are_dropped():
    ids = torch.tensor([[0, 0, 5, 6], [7, 0, 8, 0]])
    batch = PackedBatch.from_padded(ids, torch.tensor([[0, 0, 1, 1], [1, 0, 1, 0]]))
    assert batch.input_ids.tolist() == [5, 6, 7, 8]
    assert batch.positions.tolist() == [0, 1, 0, 1]


def test_states_round_trip_and_their_gradients():
    batch = PackedBatch.from_sequences([[1, 2, 3], [], [4]])
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    padded = batch.pad_states(x, value=7.0)
    assert padded.shape == (3, 3, 5)
    assert (padded[1] == 7).all()
    assert (padded[2, 1:] == 7).all()
    assert torch.equal(batch.unpad_states(padded), x)
    longer = torch.cat([padded, torch.full((3, 2, 5), -1.0, dtype=torch.float64)], dim=1)
    assert torch.equal(batch.unpad_states(longer), x)
    assert torch.autograd.gradcheck(lambda y: batch.unpad_states(batch.pad_states(y) ** 2), (x,))
    with pytest.raises(ValueError, match="x_TD must have 4 rows"):
        batch.pad_states(x[:3])
    with pytest.raises(ValueError, match="x_BLD must be"):
        batch.unpad_states(padded[:, :2])


def test_frozen_and_movable():
    batch = PackedBatch.from_sequences([[1, 2], [3]])
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch.lengths = (3,)  # type: ignore[misc]
    meta = batch.to("meta")
    assert meta.device.type == "meta"
    assert meta.lengths == batch.lengths
    # no host read on a device: on `meta` any of them would raise
    assert meta.sequence_ids.shape == (3,)
    assert meta.pad_states(torch.empty(3, 4, device="meta")).shape == (2, 2, 4)
    assert meta.to_padded(0)[0].shape == (2, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": torch.zeros(3, dtype=torch.int32)}, "input_ids must be a 1-D torch.int64"),
        ({"cu_seqlens": torch.tensor([0, 2, 3])}, "cu_seqlens must be a 1-D torch.int32"),
        ({"cu_seqlens": torch.tensor([0, 1, 3], dtype=torch.int32)}, "does not agree with lengths"),
        ({"cu_seqlens": torch.tensor([0, 3], dtype=torch.int32)}, "cu_seqlens must have 3 entries"),
        ({"positions": torch.zeros(2, dtype=torch.int64)}, "must have sum"),
        ({"lengths": (2, 2)}, "must have sum"),
        ({"lengths": ()}, "at least one sequence"),
        ({"lengths": (4, -1)}, "no negative length"),
    ],
)
def test_fields_that_do_not_fit_are_refused(change, message):
    good = PackedBatch.from_sequences([[1, 2], [3]])
    fields = {f.name: getattr(good, f.name) for f in dataclasses.fields(good)}
    with pytest.raises(ValueError, match=message):
        PackedBatch(**(fields | change))


@pytest.mark.parametrize(
    ("rows", "message"),
    [([], "at least one sequence"), ([[1.5]], "flat list of integers"), ([[[1]]], "flat list"), ([[1, -3]], ">= 0")],
)
def test_sequences_that_do_not_fit_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        PackedBatch.from_sequences(rows)


def test_sequences_of_arrays_and_tensors():
    batch = PackedBatch.from_sequences([np.array([1, 2], dtype=np.int32), torch.tensor([3]), []])
    assert batch.input_ids.tolist() == [1, 2, 3]
    assert batch.lengths == (2, 1, 0)


def test_padded_batches_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"both be \(B, L\)"):
        PackedBatch.from_padded(torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 2))
    with pytest.raises(ValueError, match="must hold integers"):
        PackedBatch.from_padded(torch.zeros(2, 3), torch.ones(2, 3))


costs = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), max_size=60)


@settings(max_examples=150, deadline=None)
@given(costs, st.integers(50, 120), st.none() | st.integers(1, 5))
def test_packs_hold_every_row_once_within_the_budget(rows, max_tokens, max_rows):
    packs = token_budget_packs(rows, max_tokens, max_rows)
    assert sorted(i for pack in packs for i in pack) == list(range(len(rows)))
    for pack in packs:
        assert pack == sorted(pack)
        assert pack
        assert max_rows is None or len(pack) <= max_rows
        for side in range(2):
            assert sum(rows[i][side] for i in pack) <= max_tokens
    assert packs == token_budget_packs(rows, max_tokens, max_rows)


def test_packs_are_full():
    rng = np.random.default_rng(0)
    rows = [(int(n),) for n in rng.integers(10, 512, size=1024)]
    packs = token_budget_packs(rows, 4096)
    total = sum(n for (n,) in rows)
    assert len(packs) <= -(-total // 4096) + 1  # first-come-first-served needs about 6 % more
    in_order, room = 1, 4096
    for (n,) in rows:
        if n > room:
            in_order, room = in_order + 1, 4096
        room -= n
    assert in_order > len(packs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([(3,), (9,)], 8), "row 1 has 9 tokens, more than max_tokens 8"),
        (([(3,)], 0), "max_tokens must be at least 1"),
        (([(3,)], 4, 0), "max_rows must be at least 1"),
        (([(3,), (3, 4)], 8), "same number of sides"),
    ],
)
def test_impossible_packs_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        token_budget_packs(*arguments)


def test_a_row_goes_where_it_leaves_the_least_room():
    assert token_budget_packs([(7,), (5,), (3,)], 10) == [[0, 2], [1]]


def test_packs_that_are_filled_to_the_last_token():
    assert token_budget_packs([(5,), (5,)], 10) == [[0, 1]]
    assert token_budget_packs([(4,), (3,), (3,)], 10) == [[0, 1, 2]]
    assert token_budget_packs([(4, 1), (3, 8), (3, 1)], 10) == [[0, 1, 2]]


def test_padding_and_masks_of_any_kind():
    batch = PackedBatch.from_sequences([[5, 6, 7], [], [8]])
    ids, _ = batch.to_padded(pad_id=9)
    assert ids.tolist() == [[5, 6, 7], [9, 9, 9], [8, 9, 9]]
    for mask in (torch.tensor([[2, 0, 3]]), torch.tensor([[True, False, True]]), torch.tensor([[0.5, 0.0, -1.0]])):
        assert PackedBatch.from_padded(torch.tensor([[5, 6, 7]]), mask).input_ids.tolist() == [5, 7]


@settings(max_examples=150, deadline=None)
@given(costs, st.integers(20, 120))
def test_consecutive_packs_keep_the_order_and_the_budget(rows, max_tokens):
    packs = list(consecutive_packs(rows, max_tokens))
    assert [i for pack in packs for i in pack] == list(range(len(rows)))
    for pack, after in zip(packs, [*packs[1:], None]):
        sizes = [sum(rows[i][side] for i in pack) for side in range(2)]
        assert max(sizes) <= max_tokens or len(pack) == 1
        if after:  # the next row had no room
            assert max(size + n for size, n in zip(sizes, rows[after[0]])) > max_tokens or max(sizes) == max_tokens


def test_padded_packs_stay_in_the_budget():
    lengths = sorted([5, 1, 9, 30, 2, 2, 7], reverse=True)
    packs = list(consecutive_packs([(n,) for n in lengths], 18, padded=True))
    assert packs == [[0], [1, 2], [3, 4, 5], [6]]  # the first is longer than the budget: alone
    assert list(consecutive_packs([(6,), (3,), (3,)], 18, padded=True)) == [[0, 1, 2]]
    assert list(consecutive_packs([(3,), (3,), (6,), (6,)], 18, padded=True)) == [[0, 1, 2], [3]]  # in any order


def test_packs_of_about_equal_size():
    lengths = sorted((3 + 7 * k % 23 for k in range(500)), reverse=True)
    packs = list(consecutive_packs([(n,) for n in lengths], 300, even=True))
    sizes = [sum(lengths[k] for k in pack) for pack in packs]
    assert [k for pack in packs for k in pack] == list(range(500))
    assert max(sizes) <= 300
    assert len(sizes) == -(-sum(lengths) // 300)
    assert min(sizes) > 0.85 * max(sizes)
    assert [len(pack) for pack in consecutive_packs([(3,)] * 110, 300, even=True)] == [55, 55]
    assert [len(pack) for pack in consecutive_packs([(3,)] * 110, 300)] == [100, 10]


def test_rows_of_different_kinds_share_no_pack():
    assert list(consecutive_packs([(3,)] * 5, 6, kinds=[2, 2, 2, 3, 3])) == [[0, 1], [2], [3, 4]]
    assert list(consecutive_packs([], 6, even=True)) == []
