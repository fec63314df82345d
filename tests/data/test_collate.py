import numpy as np
import pytest
import torch

from mtllm_fast.data import StackTokenizer, TextRow, align_rows
from mtllm_fast.data.collate import collate

ROWS = [
    TextRow("The cat sat.", label=2, id="a"),
    TextRow("été", language="fra_Latn", label=0, id="b"),
    TextRow("the lazy dog", text_pair="naïve?", label=1),
]


def test_batch_holds_the_rows_in_order(stack):
    batch = collate(ROWS, stack)
    for name, side in (("mt", stack.mt_side(ROWS)), ("llm", stack.llm_side(ROWS))):
        packed = getattr(batch, name)
        assert packed.lengths == tuple(len(ids) for ids in side.ids)
        assert packed.input_ids.tolist() == [int(t) for ids in side.ids for t in ids]
    assert batch.labels.tolist() == [2, 0, 1]
    assert batch.labels.dtype == torch.int64
    assert batch.ids == ("a", "b", None)
    assert (batch.num_rows, batch.weight) == (3, 1.0)
    assert batch.num_pairs == batch.mt_rows.shape[0] == batch.llm_rows.shape[0] > 0
    assert batch.mt_spans is None


def test_pairs_are_those_of_each_row_alone(stack):
    batch = collate(ROWS, stack)
    expected = []
    for i, row in enumerate(ROWS):
        mt, llm = stack.mt_side([row]), stack.llm_side([row])
        zeros = [np.zeros(len(e), dtype=int) for e in (mt.ends[0], llm.ends[0])]
        pairs = align_rows(mt.ends[0], zeros[0], llm.ends[0], zeros[1])
        starts = batch.mt.cu_seqlens[i].item(), batch.llm.cu_seqlens[i].item()
        expected += [(a + starts[0], b + starts[1]) for a, b in zip(*(p.tolist() for p in pairs), strict=True)]
    assert list(zip(batch.mt_rows.tolist(), batch.llm_rows.tolist(), strict=True)) == expected


def test_one_side(stack):
    batch = collate(ROWS, stack, sides=("llm",))
    assert batch.mt is None
    assert batch.mt_rows is None
    assert (batch.num_rows, batch.num_pairs) == (3, 0)
    assert collate(ROWS, stack, align=False).mt_rows is None
    only = StackTokenizer(stack.mt, None)
    assert collate(ROWS, only, sides=("mt",)).num_rows == 3


def test_spans_point_into_the_packed_rows(stack):
    rows = [TextRow("Where?", choices=("the mat", "été")), TextRow("Who sat there?", choices=("dog", "the fox"))]
    batch = collate(rows, stack)
    for name in ("mt", "llm"):
        packed, spans = getattr(batch, name), getattr(batch, f"{name}_spans")
        assert spans.shape == (2, 2, 2)
        assert spans.dtype == torch.int64
        for row, row_spans in zip(rows, spans.tolist(), strict=True):
            for choice, (start, end) in zip(row.choices, row_spans, strict=True):
                assert getattr(stack, name).decode(packed.input_ids[start:end]).strip() == choice


def test_moving_keeps_everything(stack):
    batch = collate([TextRow("Where?", choices=("mat", "dog"), label=1, id="x")], stack)
    moved = batch.to("meta")
    for name in ("mt_rows", "llm_rows", "labels", "mt_spans", "llm_spans"):
        assert getattr(moved, name).device.type == "meta"
    assert moved.mt.lengths == batch.mt.lengths
    assert moved.ids == ("x",)
    again = batch.to("cpu")
    assert torch.equal(again.llm.input_ids, batch.llm.input_ids)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "at least one TextRow"),
        ([TextRow("a", label=1), TextRow("b")], {}, "1 of 2 rows have a label"),
        ([TextRow("a", choices=("b",)), TextRow("a", choices=("b", "c"))], {}, "same number of choices"),
        ([TextRow("a", choices=("b",)), TextRow("a")], {}, "same number of choices"),
        (ROWS, {"sides": ()}, "sides must be"),
        (ROWS, {"sides": "mt"}, "sides must be"),
        (ROWS, {"sides": ("mt", "tm")}, "sides must be"),
    ],
)
def test_rows_that_make_no_batch(stack, rows, options, message):
    with pytest.raises(ValueError, match=message):
        collate(rows, stack, **options)


def test_a_side_without_a_tokenizer(nllb):
    with pytest.raises(ValueError, match="has no llm tokenizer"):
        collate(ROWS, StackTokenizer(nllb, None))
