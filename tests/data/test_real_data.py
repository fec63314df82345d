"""The published files of real benchmarks, each with its own traps; skipped where they are not at hand."""

import hashlib

import pytest

from mtllm_fast.data import PackedDataset, StackTokenizer, read_rows

TOPICS = ["science/technology", "travel", "politics", "sports", "health", "entertainment", "geography"]
NLI = ["entailment", "neutral", "contradiction"]


def test_sib200_rows_are_the_same_sentences_in_every_language(data_root):
    options = {"label_column": "category", "labels": TOPICS, "id_column": "index_id"}
    keys = set()
    for code in ("eng_Latn", "shn_Mymr", "cat_Latn", "nqo_Nkoo", "arb_Arab", "zho_Hans"):
        stream = read_rows(data_root / "sib200" / code / "train.tsv", **options)
        rows = list(stream)
        assert (len(rows), stream.counts.empty, stream.counts.failed) == (701, 0, 0)
        keys.add(tuple((row.id, row.label) for row in rows))
    assert len(keys) == 1
    counts = [sum(label == k for _, label in next(iter(keys))) for k in range(7)]
    assert counts == [176, 138, 102, 85, 77, 65, 58]


def test_nusax_texts_with_newlines(data_root):
    options = {"label_column": "label", "labels": ["negative", "neutral", "positive"], "id_column": "id"}
    rows = list(read_rows(data_root / "nusax_senti" / "toba_batak" / "train.csv", **options))
    assert len(rows) == 500
    assert sum("\n" in row.text for row in rows) == 19
    assert [sum(row.label == k for row in rows) for k in range(3)] == [192, 119, 189]


@pytest.mark.parametrize(
    ("split", "columns", "count"), [("dev", ["p", "h", "label"], 2490), ("test", ["p", "h"], 5010)]
)
def test_xnli_greek_and_hindi(data_root, split, columns, count):
    for code in ("el", "hi", "zh", "en"):
        source = data_root / "xnli" / code / f"{split}.tsv.gz"
        options = {"label_column": "label", "labels": NLI} if split == "dev" else {}
        stream = read_rows(source, text_column="p", pair_column="h", columns=columns, quoting=False, **options)
        assert sum(1 for _ in stream) == count
        assert stream.counts.failed == 0


def test_americasnli_and_its_blank_premises(data_root):
    options = {"text_column": "premise", "pair_column": "hypothesis", "label_column": "label", "labels": NLI}
    stream = read_rows(data_root / "americasnli" / "nah" / "test.tsv", id_column="id", **options)
    ids = {row.id for row in stream}
    assert (len(ids), stream.counts.empty) == (735, 3)
    assert not ids & {"25576", "25577", "25578"}


def test_parquet_and_jsonl_hold_the_same_rows(data_root):
    folder = data_root / "amnli_nllb600m"
    options = {"text_column": "premise", "pair_column": "hypothesis", "label_column": "label"}
    for code, first in (("aym", "validation"), ("gn", "validation"), ("quy", "validation")):
        one = [(r.text, r.text_pair) for r in read_rows(folder / code / f"{first}.parquet", **options)]
        two = [(r.text, r.text_pair) for r in read_rows(folder / "derived" / code / "dev.jsonl", labels=NLI, **options)]
        assert len(one) == 743
        assert one == two


def test_real_languages_through_both_tokenizers(data_root, nllb, llama_like):
    """Scripts, combining marks and byte-level pieces of real text: every pair of rows ends at one character."""
    stack = StackTokenizer(nllb, llama_like, max_mt_tokens=512, max_llm_tokens=512)
    digest = hashlib.sha256()
    for code in ("eng_Latn", "tha_Thai", "shn_Mymr", "hin_Deva", "arb_Arab"):
        rows = list(read_rows(data_root / "sib200" / code / "test.tsv", language=code, limit=40))
        for row, mt, llm in zip(rows, stack.mt_side(rows).ends, stack.llm_side(rows).ends, strict=True):
            for ends in (mt, llm):
                real = ends[ends >= 0]
                assert (real[1:] >= real[:-1]).all()
                assert real.max() <= len(row.text)
        dataset = PackedDataset(rows, stack, max_tokens=1024)
        for batch in dataset:
            assert batch.num_pairs >= batch.num_rows
            digest.update(batch.mt_rows.numpy().tobytes())
        assert dataset.counters.efficiency > 0.5
