"""Steps hold the same packs however many processes share them, and the processes have about the same to do."""

from __future__ import annotations

import numpy as np
import pytest

from mtllm_fast.data import PackedDataset, PackedLoader, TextRow
from mtllm_fast.data.balance import deal, pack_cost
from mtllm_fast.data.pack import token_budget_packs

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]
ROWS = [TextRow(" ".join(WORDS[i % 5 : i % 5 + 1 + i * 7 % 9]), id=str(i)) for i in range(130)]
OPTIONS = {"max_tokens": 64, "lookahead": 32, "seed": 3, "max_rows": 3}
LAYOUTS = [(1, 6), (2, 3), (3, 2), (6, 1)]  # processes, packs of each per step


def steps(stack, world, accumulation, **options) -> list[list[tuple]]:
    """Per step every pack as (place, ids, weight), over all ranks."""
    ranks = []
    for rank in range(world):
        dataset = PackedDataset(
            ROWS, stack, rank=rank, world_size=world, accumulation=accumulation, **(OPTIONS | options)
        )
        batches = list(PackedLoader(dataset))
        assert PackedLoader(dataset).count() == dataset.size(dataset.counters.packs)
        assert len(batches) == dataset.size(dataset.counters.packs) - dataset.start_batch
        made = [(batch.place, batch.ids, batch.weight) for batch in batches]
        ranks.append([made[i : i + accumulation] for i in range(0, len(made), accumulation)])
    return [sorted(pack for share in step for pack in share) for step in zip(*ranks, strict=True)]


def test_a_step_holds_the_same_packs_on_any_number_of_processes(stack):
    whole = steps(stack, *LAYOUTS[0])
    for layout in LAYOUTS[1:]:
        assert steps(stack, *layout) == whole
    assert steps(stack, 2, 2) != whole[: len(steps(stack, 2, 2))]  # another product is another run
    assert all([place for place, _, _ in step] == list(range(6)) for step in whole)
    counted = [i for step in whole for _, ids, weight in step if weight for i in ids]
    assert sorted(map(int, counted)) == list(range(130))
    fillers = [weight for step in whole for _, _, weight in step if not weight]
    assert 0 < len(fillers) < 6
    assert all(weight for step in whole[:-1] for _, _, weight in step)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resuming_on_another_number_of_processes(stack, layout):
    """Step k is the same whether an epoch is read from its start or from there, on other processes than before."""
    world, accumulation = layout
    whole = steps(stack, 3, 2)
    for step in (1, len(whole) - 1):
        assert steps(stack, world, accumulation, start_batch=step * accumulation)[0] == whole[step]


def test_resuming_within_a_step(stack):
    dataset = PackedDataset(ROWS, stack, world_size=2, rank=1, accumulation=3, **OPTIONS)
    whole = [batch.ids for batch in dataset]
    for start in range(5):
        dataset.set_epoch(0, start)
        assert [batch.ids for batch in dataset] == whole[start:]
        dataset.set_epoch(0, start, dataset.read_before(start))
        assert [batch.ids for batch in dataset] == whole[start:]


def test_deal():
    costs = [9.0, 1.0, 8.0, 2.0, 7.0, 3.0]
    shares = deal(costs, 2)
    assert sorted(i for share in shares for i in share) == list(range(6))
    assert [sum(costs[i] for i in share) for share in shares] == [14.0, 16.0]  # in turns it is 24 against 6
    assert deal(costs, 6) == [[i] for i in range(6)]
    assert deal([1.0] * 4, 2) == [[0, 2], [1, 3]]
    assert deal([1.0, 4.0, 2.0, 3.0], 2) == [[0, 1], [2, 3]]  # the numbers ascend, whatever was dealt first


def test_processes_have_about_the_same_to_do():
    """Documents as long as FineWeb's, cut at 512 tokens: the process with most to do has 1 % more than the mean."""
    rng = np.random.default_rng(0)
    tokens = np.clip(np.exp(rng.normal(6.1, 0.9, 4096)), 2, 512).astype(int)
    costs = [(int(n), int(n * 0.9) + 1) for n in tokens]
    packs = token_budget_packs(costs, 4096)
    by_pack = [pack_cost(costs, packs[i]) for i in rng.permutation(len(packs))]
    most = {"dealt": [], "in turns": []}
    for start in range(0, len(by_pack) - 63, 64):
        step = by_pack[start : start + 64]
        for name, shares in (("dealt", deal(step, 8)), ("in turns", [range(rank, 64, 8) for rank in range(8)])):
            loads = [sum(step[i] for i in share) for share in shares]
            most[name].append(max(loads) / np.mean(loads))
    assert np.mean(most["dealt"]) < 1.01
    assert np.mean(most["dealt"]) < np.mean(most["in turns"])


def test_cost_grows_with_the_squares_of_the_lengths():
    long, short = [(4096, 4096)], [(512, 512)] * 8
    assert pack_cost(long, [0]) > 1.1 * pack_cost(short, range(8))
    assert pack_cost([(100, 0)], [0]) == pytest.approx(2 * pack_cost([(0, 100)], [0]))
