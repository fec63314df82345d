import dataclasses
import errno
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from mtllm_fast.data.read import TextRow
from mtllm_fast.evaluation.cells import Cell, CellStore, of_rows
from mtllm_fast.evaluation.runs import Run
from mtllm_fast.evaluation.settings import Settings
from mtllm_fast.evaluation.systems import System
from mtllm_fast.evaluation.tasks import FolderTask
from mtllm_fast.jobs import fingerprint
from mtllm_fast.models import MTLLM
from mtllm_fast.models.heads import HeadConfig
from tests.evaluation.fakes import write_folder
from tests.reporting.made import cell

KEY = {"model": "m", "data": "d", "settings": "s"}
NAME = ("a/b model", "seed 1", "swh_Latn")


def test_a_cell_comes_back_whole(tmp_path):
    store = CellStore(tmp_path)
    assert store.read_cell(NAME, KEY) is None
    made = cell(7, mapped=True, blank=2, counts={"truncated": 3})
    store.write_cell(NAME, KEY, made)
    found = store.read_cell(NAME, KEY)
    for one in dataclasses.fields(Cell):
        a, b = getattr(made, one.name), getattr(found, one.name)
        assert np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b, one.name
    assert (store.reused, store.written, store.stale) == (1, 1, {})
    skipped = Cell.without_rows("no MT code")
    store.write_cell(NAME, KEY, skipped)
    assert store.read_cell(NAME, KEY).skipped == "no MT code"
    infinite = dataclasses.replace(made, logits=np.full((2, 3), -np.inf, np.float32))
    store.write_cell(NAME, KEY, infinite)
    assert np.isneginf(store.read_cell(NAME, KEY).logits).all()
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["swh_Latn.safetensors"]


@pytest.mark.parametrize("part", ["model", "data", "settings"])
def test_a_stale_cell_is_named_and_not_used(tmp_path, part):
    CellStore(tmp_path).write_cell(NAME, KEY, cell(7))
    store = CellStore(tmp_path)
    assert store.read_cell(NAME, {**KEY, part: "other"}) is None
    assert store.notes() == [f"1 parts computed again: {part} changed"]
    store.write_record(NAME, KEY, {"x": 1})
    assert store.read_record(NAME, {**KEY, part: "other"}) is None
    assert store.read_record(NAME, KEY) == {"x": 1}


@pytest.mark.parametrize("damage", ["cut", "empty", "noise"])
def test_a_damaged_cell_is_computed_again(tmp_path, damage):
    store = CellStore(tmp_path)
    store.write_cell(NAME, KEY, cell(7))
    store.write_record(NAME, KEY, {"x": 1})
    for path in [path for path in tmp_path.rglob("*") if path.is_file()]:
        content = path.read_bytes()
        path.write_bytes({"cut": content[:-20], "empty": b"", "noise": os.urandom(len(content))}[damage])
    assert store.read_cell(NAME, KEY) is None
    assert store.read_record(NAME, KEY) is None
    assert store.stale == {"file damaged": 2}


def test_names_stay_inside_the_folder(tmp_path):
    store = CellStore(tmp_path / "cells")
    store.write_cell(("../../out", "..", "/etc/x"), KEY, cell(1))
    assert store.read_cell(("../../out", "..", "/etc/x"), KEY) is not None
    assert [path.name for path in tmp_path.iterdir()] == ["cells"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cells=.*expected a folder"):
        CellStore(tmp_path / "file")


def test_disk_full_leaves_the_old_cell_and_no_rubbish(tmp_path, monkeypatch):
    store = CellStore(tmp_path)
    store.write_cell(NAME, KEY, cell(7))

    def full(self, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(
        OSError, match=r"cannot write .*swh_Latn\.safetensors: No space left on device; everything .* kept"
    ):
        store.write_cell(NAME, KEY, cell(9))
    monkeypatch.undo()
    assert store.read_cell(NAME, KEY).predictions.tolist() == cell(7).predictions.tolist()
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1


def test_a_disk_that_is_really_full(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs is not allowed here")
    try:
        store = CellStore(folder)

        def fill():
            for index in range(100):
                store.write_cell(("m", "seed 1", f"l{index}"), KEY, cell(7, rows=200))

        with pytest.raises(OSError, match="No space left on device") as caught:
            fill()
        written = store.written
        assert caught.value.errno == errno.ENOSPC
        assert written >= 2
        assert all(store.read_cell(("m", "seed 1", f"l{i}"), KEY) is not None for i in range(written))
        assert not [path for path in folder.rglob(".*") if path.is_file()]
    finally:
        subprocess.run(["umount", folder], check=True)


def model_folder(path, weights=b"weights", **config):
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps({"model_type": "x", **config}))
    (path / "model.safetensors").write_bytes(weights)
    return path


def test_model_fingerprints(tmp_path):
    a, b = model_folder(tmp_path / "a"), model_folder(tmp_path / "b")
    assert fingerprint.of_model(a) == fingerprint.of_model(str(b))  # where it lies does not matter
    (b / "checkpoint-5").mkdir()
    (b / "checkpoint-5/x.safetensors").write_bytes(b"1")
    (b / "evaluation").mkdir()
    (b / "run.json").write_text("{}")
    assert fingerprint.of_model(a) == fingerprint.of_model(b)  # nor what does not belong to it
    before = fingerprint.of_model(b)
    model_folder(b, b"weightt")
    assert fingerprint.of_model(b) != before
    base = model_folder(tmp_path / "base")
    stack = model_folder(tmp_path / "stack", encoder=str(base), llm="org/llm")
    before = fingerprint.of_model(stack)
    model_folder(base, b"other")
    assert fingerprint.of_model(stack) != before
    (stack / "encoder").mkdir()  # left by an earlier save: the base that is named counts
    before = fingerprint.of_model(stack)
    model_folder(base, b"a third")
    assert fingerprint.of_model(stack) != before
    with pytest.raises(ValueError, match=r"config\.json"):
        fingerprint.of_model(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        fingerprint.of_model(tmp_path / "none")


def test_a_hub_name_counts_as_its_commit(tmp_path, hub_cache, monkeypatch):
    """The first start downloads it, and must leave the key that the second one finds."""
    unknown = fingerprint.of_model("me/model")
    folder = model_folder(tmp_path / "m")
    with monkeypatch.context() as online:
        online.setattr("huggingface_hub.hf_hub_download", lambda *_: str(hub_cache(folder, "me/model") / "config.json"))
        first = fingerprint.of_model("me/model")
    assert fingerprint.of_model("me/model") == first != unknown
    with monkeypatch.context() as newer:
        newer.setattr("huggingface_hub.hf_hub_download", lambda *_: f"/hub/{'d' * 40}/config.json")
        assert fingerprint.of_model("me/model") != first

    def refused(*_):
        raise OSError("no access")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refused)
    assert fingerprint.of_model("me/model") == first


TASK = FolderTask("mini", ("a", "b", "c"))


def settings(model, source, **changes):
    store = CellStore(source.parent / "cells")
    return Run(System("one", [model]), 0, Settings(TASK, source, device="cpu", store=store, **changes)).key["settings"]


def test_what_a_probe_depends_on_is_part_of_the_key(tmp_path, hub_cache, encoder_folder, llm_folder):
    source = write_folder(tmp_path / "data")
    MTLLM.stack(encoder_folder, llm_folder).save_pretrained(tmp_path / "adapted")
    head = HeadConfig(labels=("a", "b", "c"))
    MTLLM.stack(encoder_folder, llm_folder, head=head).save_pretrained(tmp_path / "tuned")
    hub_cache(tmp_path / "adapted", "me/adapted")
    hub_cache(tmp_path / "tuned", "me/tuned")
    probed, read = (tmp_path / "adapted", "me/adapted", "me/unknown"), (tmp_path / "tuned", "me/tuned")

    def keys():
        changes = {}, {"probe_rows": 5}, {"language_map": {"eng_Latn": "fra_Latn"}}
        return {model: [settings(model, source, **one) for one in changes] for model in (*probed, *read)}

    before = keys()
    train = source / "eng_Latn/train.tsv"
    train.write_text(train.read_text().replace("word1", "another"))
    after = keys()
    for model in probed:
        assert len({*before[model], *after[model]}) == 6, model
    for model in read:
        assert len({*before[model], *after[model]}) == 1, model
    train.unlink()  # a model that may have a head is not refused for it
    assert len({settings("me/unknown", source, probe_rows=n) for n in (5, 6)}) == 2
    with pytest.raises(ValueError, match="'one' has no task head"):
        settings("me/adapted", source)


def test_large_files_are_sampled(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(fingerprint, "BLOCK_BYTES", 16)
    content = np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8)
    seen = {fingerprint.of_model(model_folder(tmp_path / "a", content.tobytes()))}
    for index, place in enumerate((0, 4999)):
        changed = content.copy()
        changed[place] ^= 1
        seen.add(fingerprint.of_model(model_folder(tmp_path / f"b{index}", changed.tobytes())))
    assert len(seen) == 3


def test_row_fingerprints():
    rows = [TextRow("a", "eng_Latn", label=1, id="1")]
    same = [TextRow("a", "fra_Latn", label=1, id="1")]
    assert of_rows(rows, ("x",)) == of_rows(same, ("x",))
    for changes in ({"text": "b"}, {"label": 0}, {"id": "2"}, {"text_pair": "c"}, {"choices": ("p", "q")}):
        assert of_rows([dataclasses.replace(rows[0], **changes)], ("x",)) != of_rows(rows, ("x",))
    assert of_rows(rows, ("y",)) != of_rows(rows, ("x",))
    assert (
        fingerprint.of_settings(a=1, b=None)
        == fingerprint.of_settings(b=None, a=1)
        != fingerprint.of_settings(a=2, b=None)
    )
