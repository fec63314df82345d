"""Epoch after epoch, and on from any batch: the same batches, and what lies before is not made again."""

from __future__ import annotations

import json
from itertools import islice

import pytest

import mtllm_fast.data.collate as collate_module
from mtllm_fast.data import PackedDataset, StackTokenizer, TextRow
from mtllm_fast.training.epochs import EpochLoader
from tests.tiny import LINES, llm_tokenizer, nllb_tokenizer

ROWS = [TextRow(LINES[i % len(LINES)][: 10 + i % 40], id=str(i)) for i in range(60)]


@pytest.fixture(scope="module")
def tokenizer() -> StackTokenizer:
    lines = list(LINES)
    return StackTokenizer(nllb_tokenizer(lines), llm_tokenizer(lines), max_mt_tokens=32, max_llm_tokens=32)


def dataset(tokenizer: StackTokenizer, rank: int, world: int) -> PackedDataset:
    options = {"max_tokens": 64, "lookahead": 16, "shuffle_buffer": 8, "rank": rank, "world_size": world}
    return PackedDataset(ROWS, tokenizer, **options)


def ids(batches) -> list[tuple[tuple[str | None, ...], float]]:
    return [(batch.ids, batch.weight) for batch in batches]


@pytest.mark.parametrize("world", [1, 2])
def test_goes_on_from_any_batch(tokenizer, monkeypatch, world) -> None:
    size = len(list(dataset(tokenizer, 0, world)))
    loader = EpochLoader(dataset(tokenizer, world - 1, world), 0, 0)
    whole, places = [], []
    for number, batch in enumerate(islice(iter(loader), 3 * size - 1), 1):
        whole.append((batch.ids, batch.weight))
        places.append(json.dumps(loader.place_of(number)))
    assert whole[:size] != whole[size : 2 * size]  # shuffled anew
    epochs = [len(json.loads(place)["epoch_packs"]) for place in places]
    assert epochs[0] == 0
    assert epochs[-1] == 2
    tokenised = []
    made = collate_module.tokenise_rows
    monkeypatch.setattr(collate_module, "tokenise_rows", lambda rows, *a: tokenised.extend(rows) or made(rows, *a))
    for start in range(1, 3 * size - 1):
        tokenised.clear()
        again = EpochLoader(dataset(tokenizer, world - 1, world), 0, start, json.loads(places[start - 1]))
        rest = ids(islice(iter(again), 3 * size - 1 - start))
        assert rest == whole[start:]
        windows = json.loads(places[start - 1])["stream"]["windows"]
        assert len(tokenised) <= (3 - epochs[start - 1]) * len(ROWS) - 16 * windows
        assert json.dumps(again.place_of(3 * size - 1)) == places[-1]


def test_a_place_serves_any_number_of_processes(tokenizer) -> None:
    two = EpochLoader(dataset(tokenizer, 0, 2), 0, 0)
    packs = len(list(dataset(tokenizer, 0, 1)))
    per_rank = -(-packs // 2)
    list(islice(iter(two), per_rank + 3))
    place = json.loads(json.dumps(two.place_of(per_rank + 3)))
    assert place["epoch_packs"] == [packs]
    one = EpochLoader(dataset(tokenizer, 0, 1), 0, packs + 6, place)
    plain = EpochLoader(dataset(tokenizer, 0, 1), 0, packs + 6)
    assert ids(islice(iter(one), 5)) == ids(islice(iter(plain), 5))


def test_a_place_may_be_asked_for_when_more_has_been_read(tokenizer) -> None:
    """A checkpoint is of the step that is over, while the loader is batches ahead; also in a later epoch."""
    size = len(list(dataset(tokenizer, 0, 1)))
    loader = EpochLoader(dataset(tokenizer, 0, 1), 0, 0)
    whole = ids(islice(iter(loader), 2 * size - 1))
    for start in range(size + 1, 2 * size - 1):
        place = json.loads(json.dumps(loader.place_of(start)))
        assert place["epoch_packs"] == [size]
        assert place["stream"]["packs"] <= start - size
        again = EpochLoader(dataset(tokenizer, 0, 1), 0, start, place)
        assert ids(islice(iter(again), 2 * size - 1 - start)) == whole[start:]
