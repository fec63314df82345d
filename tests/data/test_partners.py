"""Rows with a partner, what is read beside a text: from tokens to packs, counts, halves and windows."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from mtllm_fast.data import PackedBatch, PackedDataset, StackTokenizer, TextRow
from mtllm_fast.data.batch import tokenise_rows
from mtllm_fast.data.collate import collate
from mtllm_fast.data.split import halves
from mtllm_fast.inference.windows import WindowReader
from tests.tiny import LINES, nllb_tokenizer


def tokenizer(partners: bool = True, limit: int = 32) -> StackTokenizer:
    made = StackTokenizer(nllb_tokenizer(list(LINES)), None, max_mt_tokens=limit)
    made.partners = partners
    return made


def rows(count: int = 24) -> list[TextRow]:
    """Texts of many lengths, two of three with a partner."""
    rng, words = random.Random(0), " ".join(LINES).split()
    texts = [" ".join(rng.choices(words, k=rng.randint(1, 9))) for _ in range(2 * count)]
    return [
        TextRow(texts[2 * i], "fra_Latn", label=i, id=str(i), teacher_text=texts[2 * i + 1] if i % 3 else None)
        for i in range(count)
    ]


# ---- packed
def test_a_pair_is_the_same_tokens_as_one_sequence() -> None:
    batch = PackedBatch.from_sequences([[1, 2], [3], [4], [], [5], [6, 7, 8]], partners=True)
    assert (batch.num_sequences, batch.num_rows, batch.per_row, batch.num_tokens) == (6, 3, 2, 8)
    pairs = batch.pairs
    right = PackedBatch.from_sequences([[1, 2, 3], [4], [5, 6, 7, 8]])
    assert pairs.lengths == right.lengths and not pairs.partners and pairs.input_ids is batch.input_ids
    for name in ("cu_seqlens", "positions"):
        assert torch.equal(getattr(pairs, name), getattr(right, name))
        assert getattr(pairs, name).dtype == getattr(right, name).dtype
    assert batch.positions.tolist() == [0, 1, 0, 0, 0, 0, 1, 2], "of each text"
    alone = PackedBatch.from_sequences([[1, 2], [3]])
    assert alone.pairs is alone and (alone.num_rows, alone.per_row) == (2, 1)
    moved = batch.to("meta")
    assert moved.partners and moved.pairs.lengths == (3, 1, 4), "without a look at the device"
    with pytest.raises(ValueError, match="a partner for every text, got 3 sequences"):
        PackedBatch.from_sequences([[1], [2], [3]], partners=True)


# ---- tokens
def test_a_partner_is_the_teachers_text_in_english() -> None:
    given, own = rows(), tokenizer()
    side = own.mt_side(given)
    beside = [
        [] if row.teacher_text is None else own.mt_side([TextRow(row.teacher_text, "eng_Latn")]).ids[0].tolist()
        for row in given
    ]
    assert [ids.tolist() for ids in side.partners] == beside
    plain = tokenizer(partners=False).mt_side(given)
    assert plain.partners is None and all((a == b).all() for a, b in zip(plain.ids, side.ids))
    assert side.lengths == [len(a) + len(b) for a, b in zip(plain.ids, beside)] and plain.lengths == [
        *map(len, plain.ids)
    ]
    alone = own.mt_side([TextRow("The river.", "fra_Latn")])
    assert [len(ids) for ids in alone.partners] == [0], "none"
    nobody = StackTokenizer(nllb_tokenizer(list(LINES)), None)
    nobody.partners = True
    nobody._language_ids = {"fra_Latn": nobody.language_id("fra_Latn")}
    with pytest.raises(ValueError, match="teacher_text: is read as English, which the MT tokenizer has no code for"):
        nobody.mt_side(given)


def test_partners_are_cut_by_themselves_and_counted() -> None:
    long = " ".join(LINES)
    given = [TextRow(long, "fra_Latn", teacher_text="a"), TextRow("a", "fra_Latn", teacher_text=long)]
    given += [TextRow(long, "fra_Latn", teacher_text=long), TextRow("a", "fra_Latn")]
    tokens = tokenise_rows(given, tokenizer(limit=16), ("mt",))
    side = tokens.sides["mt"]
    assert [len(ids) for ids in side.ids] == [16, len(side.ids[1]), 16, len(side.ids[3])]
    assert [len(ids) for ids in side.partners] == [len(side.partners[0]), 16, 16, 0]
    assert tokens.totals() == {"mt": (sum(side.lengths), 4)}
    assert tokens.costs() == [(n,) for n in side.lengths]
    alone = tokenise_rows(given, tokenizer(False, 16), ("mt",))
    assert alone.totals()["mt"][1] == 2 and sum(map(len, side.ids)) == alone.totals()["mt"][0], "the control"


# ---- batches
def test_a_batch_has_a_partner_after_every_text() -> None:
    given, own = rows(), tokenizer()
    batch = collate(given, own, sides=("mt",), align=False)
    assert batch.num_rows == len(given) == len(batch.ids) == len(batch.labels)
    packed, side = batch.side("mt"), own.mt_side(given)
    parts = [part.tolist() for part in packed.input_ids.split(packed.lengths)]
    assert parts[::2] == [ids.tolist() for ids in side.ids] and parts[1::2] == [ids.tolist() for ids in side.partners]
    assert batch.pin_memory().side("mt").partners if torch.cuda.is_available() else batch.to("cpu").side("mt").partners
    assert not collate(given, tokenizer(False), sides=("mt",), align=False).side("mt").partners


def test_choices_are_found_beside_empty_partners() -> None:
    given = [TextRow(line, "eng_Latn", choices=("yes", "or no"), label=0) for line in LINES]
    spans = collate(given, tokenizer(), sides=("mt",), align=False).mt_spans
    assert torch.equal(spans, collate(given, tokenizer(False), sides=("mt",), align=False).mt_spans)


def test_halves_keep_texts_with_their_partners() -> None:
    given, own = rows(), tokenizer()
    batch = collate(given, own, sides=("mt",), align=False)
    first, second = halves(batch)
    assert first.num_rows + second.num_rows == len(given)
    for part, mine in ((first, given[: first.num_rows]), (second, given[first.num_rows :])):
        alone = collate(mine, own, sides=("mt",), align=False)
        assert part.ids == alone.ids and torch.equal(part.labels, alone.labels)
        assert part.mt.partners and part.mt.lengths == alone.mt.lengths
        for name in ("input_ids", "cu_seqlens", "positions"):
            assert torch.equal(getattr(part.mt, name), getattr(alone.mt, name))
    tokens = batch.side("mt").pairs.lengths
    apart = [abs(sum(tokens[:cut]) - sum(tokens[cut:])) for cut in range(1, len(tokens))]
    assert apart[first.num_rows - 1] == min(apart)


def test_packs_hold_the_budget_of_texts_and_partners() -> None:
    given = rows(60)
    dataset = PackedDataset(given, tokenizer(), max_tokens=64, max_rows=5, sides=("mt",), align=False)
    batches = list(dataset)
    assert sorted(int(name) for batch in batches for name in batch.ids) == list(range(60))
    assert all(batch.side("mt").num_tokens <= 64 and batch.num_rows <= 5 for batch in batches)
    assert any(batch.side("mt").num_tokens > 48 for batch in batches) and any(batch.num_rows == 5 for batch in batches)
    assert dataset.counters.tokens["mt"] == sum(batch.side("mt").num_tokens for batch in batches)
    by_text = PackedDataset(given, tokenizer(False), max_tokens=64, max_rows=5, sides=("mt",), align=False)
    assert sum(batch.side("mt").num_tokens for batch in by_text) < dataset.counters.tokens["mt"], "the control"
    with pytest.raises(
        ValueError, match="max_tokens 63 is below the tokenizer's max_mt_tokens, for a text and its tran"
    ):
        PackedDataset(given, tokenizer(), max_tokens=63, sides=("mt",), align=False)
    PackedDataset(given, tokenizer(False), max_tokens=63, sides=("mt",), align=False)


# ---- windows of the engine
def test_a_window_knows_equal_rows_by_both_texts() -> None:
    a, b = "The river runs.", "A teacher explains how."
    pairs = [(a, b), (a, None), (a, a), (a, b), (b, a), (a, "The river"), (a, None)]
    given = [TextRow(text, "eng_Latn", teacher_text=beside) for text, beside in pairs]
    own = tokenizer()
    reader = WindowReader(own, "mt", 64, 1000, 0, False)
    (window,) = reader.read(given, "fail")
    assert sum(batch.num_rows for batch in window.batches) == 5
    assert window.place[0] == window.place[3] and window.place[1] == window.place[6]
    assert len(set(window.place.tolist())) == 5
    sequences = [part.tolist() for batch in window.batches for part in batch.mt.input_ids.split(batch.mt.lengths)]
    side = own.mt_side(given)
    for place, ids, beside in zip(window.place.tolist(), side.ids, side.partners):
        assert sequences[2 * place] == ids.tolist() and sequences[2 * place + 1] == beside.tolist()
    own.partners = False
    (window,) = reader.read(given, "fail")
    assert sum(batch.num_rows for batch in window.batches) == 2, "the control"


def test_tokens_of_a_text_and_its_partner_cannot_be_confused() -> None:
    """The same tokens, divided otherwise."""
    own = tokenizer()
    reader = WindowReader(own, "mt", 64, 1000, 0, False)
    given = [
        TextRow("The river", "eng_Latn", teacher_text="runs"),
        TextRow("The river", "eng_Latn", teacher_text="runs"),
    ]
    side = own.mt_side(given)
    whole = [*side.ids[0], *side.partners[0]]
    moved = dataclasses.replace(
        side,
        ids=[side.ids[0], torch.tensor(whole[: len(side.ids[0]) + 1]).numpy()],
        partners=[side.partners[0], torch.tensor(whole[len(side.ids[0]) + 1 :]).numpy()],
    )
    own.side = lambda *args, **more: moved  # type: ignore[method-assign]
    (window,) = reader.read(given, "fail")
    assert sum(batch.num_rows for batch in window.batches) == 2


def test_bad_partners_are_those_of_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row without tokens goes, and the others keep their partners."""
    own = tokenizer()
    given = rows(4)
    side = own.mt_side(given)
    empty = dataclasses.replace(side, ids=[side.ids[0], side.ids[1][:0], *side.ids[2:]])
    monkeypatch.setattr(own, "side", lambda *args, **more: empty)
    (window,) = WindowReader(own, "mt", 64, 1000, 0, False).read(given, "nan")
    assert window.place[1] == -1
    sequences = [part.tolist() for batch in window.batches for part in batch.mt.input_ids.split(batch.mt.lengths)]
    for row in (0, 2, 3):
        assert sequences[2 * int(window.place[row]) + 1] == side.partners[row].tolist()
