"""`centre` moves a language's encoder states by the difference of two means, and says so."""

import numpy as np
import pytest
import torch
from transformers import AutoModel

from mtllm_fast.data import TextRow
from mtllm_fast.evaluation import FolderTask, evaluate
from mtllm_fast.evaluation.cells import CellStore
from mtllm_fast.evaluation.rows import TaskRows
from mtllm_fast.evaluation.tasks import Table
from mtllm_fast.inference.engine import Engine
from mtllm_fast.models import MTLLM
from mtllm_fast.models.heads import HeadConfig

LABELS = ("a", "b", "c")
TASK = FolderTask("mini", LABELS, (Table(id="id"),))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("centre") / "mini"
    words = {"eng_Latn": "river bread light", "fra_Latn": "pain lune eau", "deu_Latn": "brot mond"}
    for code, text in words.items():
        (folder / code).mkdir(parents=True)
        for split, count in (("train", 20), ("test", 9)):
            if (code, split) == ("deu_Latn", "train"):
                count = 7
            rows = [f"x{i}\t{text} {'ab ' * (i % 4)}{split} {i}\t{LABELS[i % 3]}\n" for i in range(count)]
            (folder / code / f"{split}.tsv").write_text("id\ttext\tlabel\n" + "".join(rows), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def stack(encoder_folder, llm_folder):
    return MTLLM.stack(encoder_folder, llm_folder, head=HeadConfig(labels=LABELS))


def by_hand(folder, tokenizer, rows):
    """Mean over texts of the mean encoder state, by Hugging Face's own encoder on one text at a time."""
    module, means = AutoModel.from_pretrained(folder).get_encoder().eval(), []
    for ids in tokenizer.mt_side(rows).ids:
        with torch.no_grad():
            states = module(input_ids=torch.from_numpy(ids)[None]).last_hidden_state[0]
        means.append(states.mean(0))
    return torch.stack(means).mean(0)


def test_the_mean_is_that_of_hugging_faces_states(encoder_folder, source):
    model = MTLLM.stack(encoder_folder, reader="encoder")
    rows = TASK.rows(source, "fra_Latn", "train")
    engine = Engine(model, max_tokens=48)
    expected = by_hand(encoder_folder, model.tokenizer, rows)
    assert torch.allclose(engine.encoder_mean(rows), expected, atol=1e-5)
    assert not torch.allclose(engine.encoder_mean(rows[:-1]), expected, atol=1e-5)
    model.shift = torch.ones(model.encoder.hidden_size)  # does not count itself
    assert torch.allclose(engine.encoder_mean(rows), expected, atol=1e-5) and model.shift is not None


@pytest.mark.parametrize("reader", ["stack", "encoder"])
def test_the_shift_moves_what_is_read(encoder_folder, llm_folder, source, reader):
    model = MTLLM.stack(encoder_folder, llm_folder if reader == "stack" else None, reader=reader)
    rows = TASK.rows(source, "fra_Latn", "test")
    engine, shift = Engine(model), torch.linspace(-1, 1, model.encoder.hidden_size)
    plain = np.concatenate(list(engine.encode_rows(rows)))
    model.shift = shift
    moved = np.concatenate(list(engine.encode_rows(rows)))
    if reader == "encoder":
        assert np.allclose(moved, plain + shift.numpy(), atol=1e-5)
        return
    # the same as a module whose output is moved before the projection reads it
    model.shift = None
    handle = model.projection.register_forward_pre_hook(lambda module, inputs: (inputs[0] + shift, *inputs[1:]))
    by_hook = np.concatenate(list(engine.encode_rows(rows)))
    handle.remove()
    assert np.allclose(moved, by_hook, atol=1e-5) and not np.allclose(moved, plain, atol=1e-3)


def test_a_language_is_centred_and_english_is_not(stack, source):
    plain = evaluate(stack, TASK, source, languages=["eng_Latn", "fra_Latn"], progress=False, alignment=True)
    scores = evaluate(stack, TASK, source, languages=["eng_Latn", "fra_Latn"], centre=8, progress=False, alignment=True)
    assert stack.shift is None
    assert any("centred" in line and "8 unlabelled English texts" in line for line in scores.issues)
    assert not any("centred" in line for line in plain.issues)
    data, engine = TaskRows(TASK, source, "test", None), Engine(stack)
    english, french = (data.unlabelled(code, 8) for code in ("eng_Latn", "fra_Latn"))
    assert not {row.id for row in english} & {row.id for row in french} and len(english) == len(french) == 8
    rows = TASK.rows(source, "fra_Latn", "test")
    stack.shift = engine.encoder_mean(english) - engine.encoder_mean(french)
    expected = engine.classify(rows)
    stack.shift = None
    share = np.mean(expected.argmax(1) == [row.label for row in rows])
    assert scores.models[0].languages["fra_Latn"].accuracy == share
    assert np.abs(engine.classify(rows) - expected).max() > 1e-4
    found, before = scores.models[0].languages, plain.models[0].languages
    assert found["eng_Latn"].accuracy == before["eng_Latn"].accuracy
    assert found["fra_Latn"].alignment != before["fra_Latn"].alignment


def test_cells_know_by_what_they_were_centred(stack, source, tmp_path):
    stack.save_pretrained(tmp_path / "model")
    store = CellStore(tmp_path / "cells")

    def run(**options):
        before = store.written
        evaluate({"m": tmp_path / "model"}, TASK, source, languages=["eng_Latn", "fra_Latn"], cells=store,
                 progress=False, **options)  # fmt: skip
        return store.written - before

    # two cells and the record of how the model is read; then French and the record
    assert [run(), run(), run(centre=8), run(centre=8), run(centre=9)] == [3, 0, 2, 0, 2]


def test_what_reads_no_encoder_states_is_as_before(llm_folder, source):
    teacher = MTLLM.stack(None, llm_folder, reader="llm", head=HeadConfig(labels=LABELS))
    plain = evaluate(teacher, TASK, source, languages=["fra_Latn"], progress=False)
    centred = evaluate(teacher, TASK, source, languages=["fra_Latn"], centre=8, progress=False)
    assert centred.models[0].languages["fra_Latn"].accuracy == plain.models[0].languages["fra_Latn"].accuracy
    with pytest.raises(ValueError, match="encoder_mean: reader='llm'"):
        Engine(teacher).encoder_mean([TextRow("a", "eng_Latn")])


def test_too_little_text(stack, source):
    with pytest.raises(ValueError, match="centre=-1"):
        evaluate(stack, TASK, source, centre=-1, progress=False)
    with pytest.raises(ValueError, match="centre=21: the train split of 'eng_Latn' has 20 rows"):
        evaluate(stack, TASK, source, centre=21, progress=False)
    scores = evaluate(stack, TASK, source, centre=8, progress=False)
    assert scores.models[0].skipped == {"deu_Latn": "centre=8: the train split of 'deu_Latn' has 7 rows"}
    with pytest.raises(ValueError, match="rows: no texts"):
        Engine(stack).encoder_mean([])
