import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtllm_fast.data import TextRow, align_rows
from mtllm_fast.data.collate import collate


def brute_force(ends_a, seq_a, ends_b, seq_b):
    pairs = []
    for i in range(len(ends_a)):
        if ends_a[i] < 0 or any((seq_a[k], ends_a[k]) == (seq_a[i], ends_a[i]) for k in range(i + 1, len(ends_a))):
            continue
        matches = [j for j in range(len(ends_b)) if (seq_b[j], ends_b[j]) == (seq_a[i], ends_a[i])]
        if matches:
            pairs.append((i, matches[-1]))
    return pairs


side = st.lists(st.lists(st.integers(-1, 9), max_size=8), min_size=1, max_size=4)


def flat(sequences):
    return [e for s in sequences for e in s], [i for i, s in enumerate(sequences) for _ in s]


@settings(max_examples=200, deadline=None)
@given(side, side)
def test_same_as_a_loop(a, b):
    rows_a, rows_b = align_rows(*flat(a), *flat(b))
    assert rows_a.dtype == rows_b.dtype == np.int64
    assert list(zip(rows_a.tolist(), rows_b.tolist(), strict=True)) == brute_force(*flat(a), *flat(b))


def test_last_token_of_a_character_wins_and_specials_never_match():
    rows_a, rows_b = align_rows([-1, 3, 3, 5, -1], [0] * 5, [-1, 3, 5, 5], [0] * 4)
    assert rows_a.tolist() == [2, 3]
    assert rows_b.tolist() == [1, 3]


def test_same_end_in_another_sequence_is_no_pair():
    rows_a, _ = align_rows([4], [0], [4], [1])
    assert rows_a.shape == (0,)


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="ends_b and seq_b"):
        align_rows([1], [0], [1, 2], [0])


TEXTS = ["The cat sat.", "été naïve", "猫が好きです", "  two  spaces ", "🙂 ok", "ﬁn e\u0301té"]


@pytest.mark.parametrize("text", TEXTS)
def test_aligned_rows_have_read_the_same_text(stack, text):
    """The text decoded up to an aligned LLM token is a prefix of the input, up to the MT token's end."""
    batch = collate([TextRow("padding sentence"), TextRow(text)], stack)
    mt_ends = np.concatenate(stack.mt_side([TextRow("padding sentence"), TextRow(text)]).ends)
    llm = stack.llm_side([TextRow("padding sentence"), TextRow(text)])
    first = len(llm.ids[0])
    seen = 0
    for mt_row, llm_row in zip(batch.mt_rows.tolist(), batch.llm_rows.tolist(), strict=True):
        if llm_row < first:
            continue
        ids = llm.ids[1][1 : llm_row - first + 1]
        assert stack.llm.decode(ids, clean_up_tokenization_spaces=False) == text[: mt_ends[mt_row]]
        seen += 1
    assert seen > 0
