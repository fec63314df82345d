"""The suite over real (tiny, random) models: packed engine, heads, probe and translate-test together."""

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from mtllm_fast.evaluation import FolderTask, Translator, evaluate
from mtllm_fast.evaluation.cells import CellStore
from mtllm_fast.evaluation.rows import sample
from mtllm_fast.inference.engine import Engine
from mtllm_fast.models import MTLLM
from mtllm_fast.models.adapters import LoraSettings
from mtllm_fast.models.heads import HeadConfig
from tests.evaluation.fakes import write_folder

TASK = FolderTask("mini", ("a", "b", "c"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "mini"
    return write_folder(folder, ("eng_Latn", "fra_Latn", "xxx_Latn"), words=("river", "bread", "light"))


@pytest.fixture(scope="module")
def stack(encoder_folder, llm_folder):
    return MTLLM.stack(encoder_folder, llm_folder)


def test_headless_folder_with_probe(stack, source, tmp_path):
    stack.save_pretrained(tmp_path / "adapted")
    scores = evaluate(tmp_path / "adapted", TASK, source, progress=False, device="cpu")
    (model,) = scores.models
    assert model.method == "linear probe"
    assert model.name == str(tmp_path / "adapted")
    assert set(model.languages) == {"eng_Latn", "fra_Latn"}
    assert model.skipped == {"xxx_Latn": "MT code xxx_Latn unknown to the model"}
    assert model.languages["eng_Latn"].accuracy > 0.9  # the class is a word of the text, and the probe saw such texts
    small = evaluate(stack, TASK, source, progress=False, max_tokens=64)
    assert small.models[0].languages["fra_Latn"].accuracy == model.languages["fra_Latn"].accuracy
    mapped = evaluate(stack, TASK, source, language_map={"xxx_Latn": "fra_Latn"}, progress=False)
    assert mapped.models[0].languages["xxx_Latn"].mapped


def test_head_and_translate_test(encoder_folder, llm_folder, source):
    stack = MTLLM.stack(encoder_folder, llm_folder, head=HeadConfig(labels=("c", "a", "b")))
    teacher = MTLLM.stack(None, llm_folder, reader="llm", head=HeadConfig(labels=("a", "b", "c")))
    translator = Translator.from_pretrained(encoder_folder, device="cpu")
    scores = evaluate({"stack": stack}, TASK, source, translator=translator, teacher=teacher, limit=6, progress=False)
    found, test = scores.models
    every = TASK.rows(source, "fra_Latn")
    drawn = sample(every, 6)  # without ids, rows are drawn by number: the same in every language
    rows = [every[i] for i in drawn]
    logits = Engine(stack).classify(rows)
    names = ["c", "a", "b"]
    predicted = [TASK.labels.index(names[i]) for i in logits.argmax(1)]
    assert found.languages["fra_Latn"].accuracy == np.mean([p == row.label for p, row in zip(predicted, rows)])
    translated = translator.translate_rows(rows)
    expected = Engine(teacher).classify(translated).argmax(1)
    assert test.languages["fra_Latn"].accuracy == np.mean([p == row.label for p, row in zip(expected, rows)])
    english = TASK.rows(source, "eng_Latn")
    guesses = Engine(teacher).classify([english[i] for i in drawn]).argmax(1)
    assert test.languages["eng_Latn"].accuracy == np.mean([p == i % 3 for i, p in zip(drawn, guesses)])
    assert test.skipped["xxx_Latn"] == "MT code xxx_Latn unknown to the model"
    assert "unfinished_translations" in test.counts


def test_dtype_and_merged_adapters(stack, source, tmp_path):
    """Models that are read from a folder run merged where that loses nothing, and in the dtype that was asked for."""
    model = MTLLM.stack(
        None, stack.config.llm, reader="llm", head=HeadConfig(labels=("a", "b", "c")), lora=LoraSettings(r=4)
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.2, generator=generator)
    model.save_pretrained(tmp_path / "model")
    texts = TASK.rows(source, "eng_Latn")
    exact, cells = Engine(model).classify(texts), {}
    for dtype in (None, "float32", "bfloat16"):
        store = CellStore(tmp_path / str(dtype))
        evaluate(
            tmp_path / "model",
            TASK,
            source,
            languages=["eng_Latn"],
            dtype=dtype,
            cells=store,
            progress=False,
            device="cpu",
        )
        (cell,) = (tmp_path / str(dtype)).rglob("eng_Latn.safetensors")
        cells[dtype] = load_file(cell)["logits"]
    spread = np.abs(exact).max()
    assert np.abs(cells[None] - exact).max() < 1e-5 * spread
    assert np.array_equal(cells[None], cells["float32"])
    assert 1e-5 * spread < np.abs(cells["bfloat16"] - exact).max() < 0.1 * spread
    store = CellStore(tmp_path / "None")  # another dtype is another result
    evaluate(
        tmp_path / "model",
        TASK,
        source,
        languages=["eng_Latn"],
        dtype="bfloat16",
        cells=store,
        progress=False,
        device="cpu",
    )
    assert store.reused == 0 and store.stale
    with pytest.raises(ValueError, match="dtype='half'"):
        evaluate(tmp_path / "model", TASK, source, dtype="half")
