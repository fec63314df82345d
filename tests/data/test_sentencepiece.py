"""Pieces and pairs against sentencepiece itself, over real text in all languages where it is present.

Every row of every language, in minutes: MTLLM_ROWS=204 pytest tests/data/test_sentencepiece.py
"""

import csv
import io
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from transformers import NllbTokenizer
from transformers.convert_slow_tokenizer import generate_merges

from mtllm_fast.data import StackTokenizer, TextRow, align_rows

from .conftest import SENTENCES, train_llm

spm = pytest.importorskip("sentencepiece")
_PLACES = [above / "shared" / "data" / "sib200" for above in Path(__file__).parents]
SIB200 = next((place for place in _PLACES if place.is_dir()), _PLACES[0])
ROWS = int(os.environ.get("MTLLM_ROWS", 1))  # of every language


def real_texts():
    found = {}
    for path in sorted(SIB200.glob("*/test.tsv")):
        with path.open(encoding="utf-8", newline="") as file:
            found[path.parent.name] = [row[2] for row in list(csv.reader(file, delimiter="\t"))[1 : ROWS + 1]]
    return found or {"eng_Latn": [text.strip() for text in SENTENCES], "vie_Latn": ["Tiếng Việt có thanh điệu."]}


def field_of(message, number):
    """One length-delimited field of a protobuf message."""
    at, found = 0, None

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        key = varint()
        size = {0: 0, 1: 8, 5: 4}.get(key & 7)
        if size is None:
            size = varint()
        elif not size:
            varint()
        if key >> 3 == number:
            found = message[at : at + size]
        at += size
    return found


@pytest.fixture(scope="module")
def trained():
    texts = [text for rows in real_texts().values() for text in rows]
    buffer = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=buffer, vocab_size=6000, model_type="bpe", character_coverage=1.0,
        normalization_rule_name="nmt_nfkc", hard_vocab_limit=False, minloglevel=2, num_threads=1,
    )  # fmt: skip
    model = buffer.getvalue()
    reference = spm.SentencePieceProcessor(model_proto=model)
    named = [reference.id_to_piece(i) for i in range(3, reference.get_piece_size())]
    vocab = {token: i for i, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *named])}
    merges = generate_merges(vocab, [(piece, reference.get_score(i)) for i, piece in enumerate(named, 3)])
    charsmap = field_of(field_of(model, 3), 2)
    return reference, NllbTokenizer(vocab=vocab, merges=merges, _spm_precompiled_charsmap=charsmap)


def test_pieces_and_pairs_in_all_languages(trained):
    reference, tokenizer = trained
    stack = StackTokenizer(tokenizer, train_llm(), max_mt_tokens=4096, max_llm_tokens=8192)
    vocab = tokenizer.get_vocab()
    texts = [text for rows in real_texts().values() for text in rows]
    texts = [form for t in texts for form in (unicodedata.normalize("NFC", t), unicodedata.normalize("NFD", t), t)]
    texts += ["\x01ab cd", "oﬃce ab", "Ａ\u0301b", "½ a", "ㄱ각", "a\r\nb", "ab ", "ab cd.\u200e", "ab\u3000\t"]
    mt, llm = (getattr(stack, f"{side}_side")([TextRow(text) for text in texts]) for side in ("mt", "llm"))
    alone, pairs, wrong = 0, 0, []
    for text, ids, ends, llm_ids, llm_ends in zip(texts, mt.ids, mt.ends, llm.ids, llm.ends, strict=True):
        pieces = reference.encode(unicodedata.normalize("NFC", text), out_type=str)
        want = [vocab.get(piece, 3) for piece in pieces]
        if ids[1:-1].tolist() != want:
            wrong.append((text, pieces[-3:]))
            continue
        alone += tokenizer(text, add_special_tokens=False)["input_ids"] != want
        zeros = np.zeros_like(ends), np.zeros_like(llm_ends)
        for i, j in list(zip(*align_rows(ends, zeros[0], llm_ends, zeros[1]), strict=True))[::25]:
            read = stack.llm.decode(llm_ids[1 : j + 1].tolist(), clean_up_tokenization_spaces=False)
            normal = reference.normalize(unicodedata.normalize("NFC", read)).replace("▁", "").replace(" ", "")
            if "".join(pieces[:i]).replace("▁", "") != normal:
                wrong.append((text, i, j))
            pairs += 1
    assert not wrong, (len(wrong), wrong[:3])
    assert pairs > len(real_texts())
    assert alone > 0  # control: the library alone gives others
