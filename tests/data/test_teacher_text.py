"""A row with another text for the teacher: read from a column, tokenised on the llm side, never aligned or stored."""

import json
from dataclasses import replace

import pytest

from mtllm_fast.data import PackedDataset, TextRow, read_rows
from mtllm_fast.data.batch import tokenise_rows
from mtllm_fast.data.collate import collate
from mtllm_fast.data.store import write_store

FRENCH = ["été", "le garçon naïve", "une phrase"]
ENGLISH = ["the summer sat on the mat", "the dog", "a cat and a dog"]
ROWS = [TextRow(text, "fra_Latn", teacher_text=other) for text, other in zip(FRENCH, ENGLISH)]


def test_the_column_is_read(tmp_path) -> None:
    lines = [{"fr": text, "en": other} for text, other in zip(FRENCH, ENGLISH)]
    lines += [{"fr": "seul", "en": " "}, {"fr": "seul", "en": None}, {"fr": "un", "en": 1}, {"fr": "seul"}]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    rows = read_rows(path, text_column="fr", language="fra_Latn", teacher_text_column="en")
    assert list(rows) == ROWS
    assert (rows.counts.empty, rows.counts.failed) == (2, 2), "a row without the teacher's text is none"
    plain = read_rows(path, text_column="fr", language="fra_Latn")
    assert [row.teacher_text for row in plain] == [None] * len(lines), "the control"
    assert rows.identity() != plain.identity()
    with pytest.raises(ValueError, match="'english'"):
        list(read_rows(path, text_column="fr", teacher_text_column="english"))
    with pytest.raises(ValueError, match="teacher_text_column='en': takes the place of a text alone, but pair_column"):
        read_rows(path, text_column="fr", pair_column="fr", teacher_text_column="en")
    pairs = read_rows(
        path, text_column="fr", pair_column="en", teacher_text_column="en", teacher_pair_column="fr", limit=3
    )
    assert [(row.text_pair, row.teacher_text, row.teacher_pair) for row in pairs] == [*zip(ENGLISH, ENGLISH, FRENCH)]
    for missing in ("teacher_text_column", "pair_column"):
        more = {"pair_column": "fr", "teacher_text_column": "en", missing: None}
        with pytest.raises(ValueError, match=f"teacher_pair_column='en': {missing} is missing"):
            read_rows(path, text_column="fr", teacher_pair_column="en", **more)


def test_the_teacher_reads_its_own_text_beside_a_student(stack) -> None:
    mixed = [*ROWS, TextRow("the lazy dog")]
    batch = collate(mixed, stack, align=False)
    theirs = [TextRow(text) for text in (*ENGLISH, "the lazy dog")]
    assert batch.mt.input_ids.tolist() == [int(t) for ids in stack.mt_side(mixed).ids for t in ids]
    assert batch.llm.input_ids.tolist() == [int(t) for ids in stack.llm_side(theirs).ids for t in ids]
    own = [int(t) for ids in stack.llm_side(mixed).ids for t in ids]
    assert batch.llm.input_ids.tolist() != own, "the control: the student's text"
    # a reader by itself is no teacher
    assert collate(mixed, stack, sides=("llm",)).llm.input_ids.tolist() == own
    assert tokenise_rows([row.for_teacher() for row in mixed], stack, ("llm",)).totals() == {
        "llm": (batch.llm.num_tokens, 0)
    }


def test_nothing_can_be_aligned(stack) -> None:
    with pytest.raises(ValueError, match="align=True: rows with a teacher_text"):
        collate(ROWS, stack)
    with pytest.raises(ValueError, match="align=True: rows with a teacher_text"):
        list(PackedDataset([TextRow("the dog"), *ROWS], stack, max_tokens=512))
    assert collate([replace(row, teacher_text=None) for row in ROWS], stack).num_pairs > 0, "the control"
    batches = list(PackedDataset(ROWS, stack, max_tokens=512, align=False))
    assert sum(batch.num_rows for batch in batches) == len(ROWS)


def test_it_takes_the_place_of_one_text_alone(stack) -> None:
    for row, other in (
        (replace(ROWS[0], text_pair="b"), "text_pair"),
        (replace(ROWS[0], choices=("a", "b")), "choices"),
    ):
        with pytest.raises(ValueError, match=f"teacher_text='the summer.*, but the row has {other}"):
            collate([row], stack, align=False)
    with pytest.raises(ValueError, match="teacher_pair='b': the row has no text_pair"):
        collate([replace(ROWS[0], teacher_pair="b")], stack, align=False)
    plain = TextRow("a", text_pair="b", label=1)
    assert plain.for_teacher() is plain
    both = replace(plain, teacher_text="c", teacher_pair="d")
    assert both.for_teacher() == replace(plain, text="c", text_pair="d")
    batch = collate([both], stack, align=False)
    theirs, own = (stack.llm_side([TextRow(*texts)]).ids[0] for texts in (("c", None, "d"), ("a", None, "b")))
    assert batch.llm.input_ids.tolist() == theirs.tolist() != own.tolist()
    assert ROWS[0].for_teacher() == TextRow(ENGLISH[0], "fra_Latn")


def test_a_token_store_refuses_it(stack, tmp_path) -> None:
    with pytest.raises(ValueError, match="teacher_text: a token store holds two tokenizations of one text"):
        write_store([TextRow("the dog"), *ROWS], stack, tmp_path / "store")
    assert not (tmp_path / "store").exists()
