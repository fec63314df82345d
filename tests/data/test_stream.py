import itertools
import json
import pickle

import pytest
import torch

import mtllm_fast.data.collate as collate_module
from mtllm_fast.data import PackedDataset, PackedLoader, TextRow, read_rows
from mtllm_fast.data.balance import pack_cost
from mtllm_fast.data.collate import collate

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "looked", "at", "the", "cat"]
ROWS = [TextRow(" ".join(WORDS[i % 5 : i % 5 + 1 + i * 7 % 12]), id=str(i), label=i % 3) for i in range(150)]
OPTIONS = {"max_tokens": 96, "lookahead": 32, "shuffle_buffer": 20, "seed": 3}
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def fingerprint(batch):
    return (
        batch.ids,
        batch.weight,
        tuple(batch.mt.input_ids.tolist()),
        tuple(batch.llm.input_ids.tolist()),
        tuple(batch.mt_rows.tolist()),
        tuple(batch.llm_rows.tolist()),
        tuple(batch.labels.tolist()),
    )


def epoch(stack, workers=0, **options):
    return [fingerprint(b) for b in PackedLoader(PackedDataset(ROWS, stack, **(OPTIONS | options)), workers)]


def test_every_row_once_and_within_the_budget(stack):
    dataset = PackedDataset(ROWS, stack, **OPTIONS)
    batches = list(dataset)
    assert sorted(int(i) for b in batches for i in b.ids) == list(range(150))
    assert all(max(b.mt.num_tokens, b.llm.num_tokens) <= 96 for b in batches)
    assert all(b.weight == 1.0 for b in batches)
    by_id = {row.id: row for row in ROWS}
    assert fingerprint(batches[3]) == fingerprint(collate([by_id[i] for i in batches[3].ids], stack))


def test_order_does_not_depend_on_the_number_of_workers(stack):
    expected = epoch(stack)
    assert epoch(stack, workers=1) == expected
    assert epoch(stack, workers=4) == expected
    assert [fingerprint(b) for b in PackedDataset(ROWS, stack, **OPTIONS)] == expected


def test_order_depends_on_seed_and_epoch(stack):
    orders = [epoch(stack), epoch(stack, seed=4), epoch(stack, epoch=1), epoch(stack, shuffle_buffer=0)]
    for one, two in itertools.combinations(orders, 2):
        assert one != two
        assert sorted(i for b in one for i in b[0]) == sorted(i for b in two for i in b[0])
    dataset = PackedDataset(ROWS, stack, **OPTIONS)
    dataset.set_epoch(1)
    assert [fingerprint(b) for b in dataset] == orders[2]
    dataset.set_epoch(0)
    assert [fingerprint(b) for b in dataset] == orders[0]


def test_packs_are_not_sorted_by_length(stack):
    rows = [len(b[0]) for b in epoch(stack, lookahead=1024, shuffle_buffer=0)]
    assert rows != sorted(rows)
    assert rows != sorted(rows, reverse=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_is_exact(stack, workers):
    whole = epoch(stack)
    for start in (1, 7, len(whole) - 1, len(whole), len(whole) + 5):
        assert epoch(stack, workers, start_batch=start) == whole[start:]
    sharded = epoch(stack, rank=1, world_size=4)
    assert epoch(stack, workers, rank=1, world_size=4, start_batch=2) == sharded[2:]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 3])
def test_going_on_without_tokenising_what_lies_before(stack, monkeypatch, workers, world):
    rank = {"rank": world - 1, "world_size": world}
    dataset = PackedDataset(ROWS, stack, **OPTIONS, **rank)
    whole, places = [], []
    for number, batch in enumerate(PackedLoader(dataset)):
        whole.append(fingerprint(batch))
        places.append(dataset.read_before(number + 1))  # as a checkpoint after this batch does
    assert len({place["windows"] for place in places}) == 5
    counts = dataset.counters
    tokenised = []
    made = collate_module.tokenise_readable
    monkeypatch.setattr(collate_module, "tokenise_readable", lambda rows, *a: tokenised.extend(rows) or made(rows, *a))
    for start, place in enumerate(places, 1):
        tokenised.clear()
        dataset = PackedDataset(ROWS, stack, **OPTIONS, **rank)
        dataset.set_epoch(0, start, json.loads(json.dumps(place)))
        assert PackedLoader(dataset).count() == -(-counts.packs // world)
        if not workers:
            assert len(tokenised) == 150 - 32 * place["windows"]
        assert [fingerprint(b) for b in PackedLoader(dataset, workers)] == whole[start:]
        assert dataset.counters == counts
        assert dataset.read_before(len(whole))["windows"] == 4
    with pytest.raises(ValueError, match="packs lie behind start_batch 0"):
        dataset.set_epoch(0, 0, places[-1])


@pytest.mark.parametrize("world", [2, 3, 7])
def test_ranks_share_the_batches(stack, world):
    whole = epoch(stack)
    shards = [epoch(stack, rank=rank, world_size=world) for rank in range(world)]
    assert {len(shard) for shard in shards} == {-(-len(whole) // world)}
    interleaved = [batch for group in zip(*shards, strict=True) for batch in group]
    assert interleaved[: len(whole)] == whole
    assert all(batch[1] == 0.0 for batch in interleaved[len(whole) :])
    assert len(interleaved) - len(whole) == -len(whole) % world
    for rank, shard in enumerate(shards):
        for start in (len(shard) - 1, len(shard)):
            assert epoch(stack, rank=rank, world_size=world, start_batch=start) == shard[start:]


def test_counts(stack):
    rows = [*ROWS, TextRow("the quick brown fox " * 40, id="long", label=0)]
    dataset = PackedDataset(rows, stack, **OPTIONS)
    for workers in (0, 2):
        batches = list(PackedLoader(dataset, workers))
        counts = dataset.counters
        assert (counts.rows, counts.packs) == (151, len(batches))
        assert counts.truncated == {"mt": 1, "llm": 1}
        assert counts.tokens == {side: sum(getattr(b, side).num_tokens for b in batches) for side in ("mt", "llm")}
        assert counts.efficiency == max(counts.tokens.values()) / (96 * len(batches))
        assert 0.6 < counts.efficiency <= 1
        assert PackedLoader(dataset, workers).count() == len(batches)
    sharded = PackedDataset(rows, stack, rank=1, world_size=4, **OPTIONS)
    assert PackedLoader(sharded).count() == len(list(sharded))


def test_reader_counts_arrive_from_the_workers(stack, tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_bytes(b"".join(b"the lazy dog %d\n" % i for i in range(64)) + b"\n\xff\n")
    for workers in (0, 2):
        dataset = PackedDataset(read_rows(path), stack, max_tokens=96, lookahead=32)
        assert sum(b.num_rows for b in PackedLoader(dataset, workers)) == 64
        counts = dataset.counters.source
        assert (counts.rows, counts.empty, counts.failed) == (64, 1, 1)


def test_rows_of_which_none_can_be_read_make_no_batch(stack, caplog):
    dataset = PackedDataset([TextRow("the \ud800 cat", id="broken")], stack, max_tokens=64)
    assert list(dataset) == []
    assert dataset.counters.unreadable == 1 and "row broken is left out" in caplog.text


def test_the_global_generator_is_left_alone(stack):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for workers in (0, 1):
        next(iter(PackedLoader(PackedDataset(ROWS, stack, **OPTIONS), workers)))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unknown_language_is_one_line_from_any_process(stack, workers):
    rows = [*ROWS[:50], TextRow("x", language="ell_Latn", label=0)]
    loader = PackedLoader(PackedDataset(rows, stack, **(OPTIONS | {"shuffle_buffer": 0})), workers)
    batches = iter(loader)
    whole = PackedLoader(PackedDataset(rows[:32], stack, **(OPTIONS | {"shuffle_buffer": 0})))
    before = list(itertools.islice(batches, whole.count()))
    assert [fingerprint(b) for b in before] == [fingerprint(b) for b in whole]  # the window without it
    with pytest.raises(ValueError, match=r"^language 'ell_Latn' is unknown.*ell_Grek[^\n]*$"):
        next(batches)


def test_dataset_can_be_pickled(stack):
    dataset = pickle.loads(pickle.dumps(PackedDataset(ROWS, stack, **OPTIONS)))
    assert [fingerprint(b) for b in dataset] == epoch(stack)


def test_a_plain_dataloader_is_refused(stack, monkeypatch):
    monkeypatch.setattr("mtllm_fast.data.collate.get_worker_info", object)  # as inside a DataLoader worker
    with pytest.raises(RuntimeError, match="use PackedLoader"):
        iter(PackedDataset(ROWS, stack, **OPTIONS))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_tokens": 63}, ValueError, "max_tokens 63 is below the tokenizer's max_mt_tokens 64"),
        ({"max_rows": 0}, ValueError, "max_rows must be at least 1"),
        ({"lookahead": 0}, ValueError, "lookahead must be at least 1"),
        ({"shuffle_buffer": -1}, ValueError, "shuffle_buffer must be at least 0"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"rank": 2, "world_size": 2}, ValueError, "rank must be in"),
        ({"start_batch": -1}, ValueError, "start_batch must be at least 0"),
        ({"rows": iter(ROWS)}, TypeError, "rows must be re-iterable"),
    ],
)
def test_bad_arguments(stack, options, error, message):
    options = {"rows": ROWS} | options
    with pytest.raises(error, match=message):
        PackedDataset(options.pop("rows"), stack, **options)


def test_windows_fill_64_packs_by_default(stack):
    """The last pack of a window is half empty on average: 64 packs of a window make that less than 1 %."""
    rows = [TextRow("the lazy dog looked " * (1 + i % 3), id=str(i)) for i in range(4000)]
    options = {"max_tokens": 512, "align": False}
    dataset = PackedDataset(rows, stack, **options)
    assert len(list(dataset)) == dataset.counters.packs
    short = PackedDataset(rows, stack, lookahead=128, **options)
    packs = len(list(short))
    assert dataset.window_rows() == -(-1024 * 64 // len(dataset._window(0, rows[:1024]).packs)) > 1024
    assert dataset.counters.efficiency > 0.97 > short.counters.efficiency
    assert PackedLoader(PackedDataset(rows, stack, **options)).count() == dataset.counters.packs < packs
    assert PackedDataset(ROWS, stack, max_tokens=512, max_rows=3).window_rows() == 1024
    assert PackedDataset(rows, stack, max_tokens=2**20).window_rows() == 65536
    few = PackedDataset(rows[:1], stack, **options)
    assert [b.num_rows for b in few] == [1]


def test_max_rows(stack):
    assert max(len(b[0]) for b in epoch(stack, max_rows=3)) == 3


def test_packs_and_rows_have_an_order_of_their_own_in_every_epoch(stack):
    windows = [next(PackedDataset(ROWS, stack, epoch=epoch, **OPTIONS).windows()) for epoch in (0, 1)]
    assert set(windows[0].rows.ids) != set(windows[1].rows.ids)
    still = {**OPTIONS, "shuffle_buffer": 0}
    windows = [next(PackedDataset(ROWS, stack, epoch=epoch, **still).windows()) for epoch in (0, 1)]
    assert windows[0].rows.ids == windows[1].rows.ids
    assert windows[0].packs != windows[1].packs and sorted(windows[0].packs) == sorted(windows[1].packs)
    for window in windows:
        assert window.costs == tuple(pack_cost(window.rows.costs(), pack) for pack in window.packs)
        assert len(set(window.costs)) > 1


def test_any_row_of_the_buffer_leaves_next():
    rows = list(range(1000))
    found = list(collate_module._shuffled(rows, 50, "a"))
    assert sorted(found) == rows
    late = [place - row for place, row in enumerate(found[:900])]
    assert min(late) >= -50  # no row before it entered
    assert 30 < sum(abs(places) for places in late) / len(late) < 80
    assert len(set(found[:20]) & set(range(1, 70))) > 15  # the first rows do not wait for the end
    assert found[-50:] != sorted(found[-50:])
    assert list(collate_module._shuffled(rows, 50, "b")) != found
    assert list(collate_module._shuffled(rows[:40], 50, "a")) != rows[:40]


def test_rows_that_were_cut_add_up_over_windows(stack):
    long = "the quick brown fox " * 40
    rows = [TextRow(long if i % 20 == 0 else "the fox", id=str(i)) for i in range(80)]
    dataset = PackedDataset(rows, stack, **OPTIONS)
    assert sum(batch.num_rows for batch in dataset) == 80
    assert dataset.counters.windows > 1
    assert dataset.counters.truncated == {"mt": 4, "llm": 4}
