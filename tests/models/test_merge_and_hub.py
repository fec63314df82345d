"""LoRA merged into one folder that plain from_pretrained reads, and what goes to the hub (a fake one)."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import filter_repo_objects
from transformers import AutoModelForCausalLM, AutoTokenizer

from mtllm_fast import MTLLM, TextRow, cli
from mtllm_fast.data.collate import collate
from mtllm_fast.models import LoraSettings
from mtllm_fast.models.merge import merge, save_merged
from tests.conftest import relative_error
from tests.models.weights import stir
from tests.tiny import LINES
from tests.training.short_runs import refused

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def adapted(encoder_folder: str, llm_folder: str) -> MTLLM:
    """A stack whose adapter changes what it computes."""
    torch.manual_seed(3)
    return stir(MTLLM.stack(encoder_folder, llm_folder, lora=LoraSettings(), dtype=torch.float32), 0.2).eval()


@pytest.fixture(scope="module")
def batch(adapted: MTLLM):
    return collate([TextRow(line) for line in LINES[:4]], adapted.tokenizer)


def test_merged_folder(adapted, batch, tmp_path, capsys, llm_folder) -> None:
    adapted.save_pretrained(tmp_path / "run")
    cli.main(["convert", "--model", str(tmp_path / "run"), "--to", "merged", "--output", str(tmp_path / "merged")])
    assert "(to merged)" in capsys.readouterr().out
    merged = MTLLM.from_pretrained(tmp_path / "merged")
    assert merged.config.adapters == {}
    assert not any("lora" in name for name in merged.state_dict())
    with torch.no_grad():
        expected = adapted.states(batch.mt)
        assert relative_error(merged.states(batch.mt), expected) <= TOLERANCE
        with adapted.llm.adapter(None):
            bare = adapted.states(batch.mt)
    assert relative_error(bare, expected) > 1000 * TOLERANCE  # control: the adapter matters
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert config["encoder"] is None and config["llm"] is None

    llm = AutoModelForCausalLM.from_pretrained(tmp_path / "merged/llm").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged/llm")
    base = AutoModelForCausalLM.from_pretrained(llm_folder).eval()
    ids = tokenizer(LINES[0], return_tensors="pt")["input_ids"]
    packed = collate([TextRow(LINES[0])], adapted.tokenizer).llm
    assert packed.input_ids.tolist() == ids[0].tolist()
    with torch.no_grad():
        adapted.llm.causal = True
        expected = adapted.llm(packed)
        adapted.llm.causal = False
        assert relative_error(llm.model(ids).last_hidden_state[0], expected) <= TOLERANCE
        assert relative_error(base.model(ids).last_hidden_state[0], expected) > 1000 * TOLERANCE


def test_what_cannot_be_merged(encoder_folder, llm_folder) -> None:
    with pytest.raises(ValueError, match="its adapters are none"):
        merge(MTLLM.stack(encoder_folder, llm_folder))
    model = MTLLM.stack(encoder_folder, llm_folder, lora=LoraSettings())
    model.config.adapters["second"] = LoraSettings()
    with pytest.raises(ValueError, match="student, second; expected exactly one"):
        save_merged(model, "/nowhere")


class FakeHub:
    """Stands for huggingface_hub.HfApi; keeps what it is given."""

    calls: ClassVar[list[tuple[str, dict]]] = []
    error: ClassVar[Exception | None] = None

    def create_repo(self, name: str, **options):
        type(self).calls.append((name, options))
        if self.error:
            raise self.error

        class Url(str):
            repo_id = f"me/{name}"

        return Url(f"https://hub/me/{name}")

    def upload_folder(self, **options) -> None:
        folder = Path(options["folder_path"])
        options["files"] = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*.*")}
        type(self).calls.append(("upload", options))


@pytest.fixture
def hub(monkeypatch):
    FakeHub.calls, FakeHub.error = [], None
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "token")
    return FakeHub


def test_push(hub, adapted, tmp_path, capsys) -> None:
    folder = tmp_path / "merged"
    adapted.save_pretrained(folder, include_base=True)
    (folder / "checkpoint-10").mkdir()
    for name in ("checkpoint-10/model.safetensors", "run.json", "versions.json", "log.jsonl", ".left.safetensors"):
        (folder / name).write_text("{}")
    cli.main(["convert", "--model", str(folder), "--push-to-hub", "mine"])
    assert f"convert: {folder} -> https://hub/me/mine" in capsys.readouterr().out
    (name, made), (_, sent) = hub.calls
    assert (name, made) == ("mine", {"private": True, "exist_ok": True})
    assert sent["repo_id"] == "me/mine"
    every = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    patterns = {key: sent[key] for key in ("allow_patterns", "ignore_patterns")}
    pushed = set(filter_repo_objects(every, **patterns))
    left = {"checkpoint-10/model.safetensors", "run.json", "versions.json", "log.jsonl", ".left.safetensors"}
    assert pushed == set(every) - left
    assert {"config.json", "model.safetensors", "llm/model.safetensors", "encoder/config.json"} <= pushed
    assert "mt_tokenizer/tokenizer.json" in pushed


def test_push_from_python(hub, monkeypatch, adapted, llm_folder, encoder_folder) -> None:
    """The model goes there whole, with its base models, from a folder that is gone afterwards."""
    assert adapted.push_to_hub("mine", private=False) == "https://hub/me/mine"
    (name, made), (_, sent) = hub.calls
    assert (name, made) == ("mine", {"private": False, "exist_ok": True}) and sent["repo_id"] == "me/mine"
    assert not Path(sent["folder_path"]).exists()
    whole = {"config.json", "model.safetensors", "encoder/model.safetensors", "llm/model.safetensors"}
    assert whole | {"stack_tokenizer.json"} <= set(sent["files"])
    assert sent["files"]["llm/model.safetensors"] == (Path(llm_folder) / "model.safetensors").stat().st_size

    def never(*_, **__):
        raise AssertionError("saved what cannot be pushed")

    hub.calls.clear()
    monkeypatch.setattr(MTLLM, "save_pretrained", never)
    with pytest.raises(ValueError, match="'a/b/c': expected a repository"):
        adapted.push_to_hub("a/b/c")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ValueError, match="no access token"):
        adapted.push_to_hub("mine")
    assert not hub.calls


def test_what_is_not_pushed(hub, monkeypatch, adapted, tmp_path, capsys) -> None:
    adapted.save_pretrained(tmp_path / "run")  # names its base models by this machine's folders
    (tmp_path / "empty").mkdir()
    for folder, name, message in (
        ("run", "mine", "names its encoder by the local folder"),
        ("empty", "mine", "holds no config.json"),
        ("run", "a/b/c", "expected a repository, NAME or ORGANISATION/NAME"),
    ):
        assert message in refused(capsys, ["convert", "--model", str(tmp_path / folder), "--push-to-hub", name])
    assert hub.calls == []
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    text = tmp_path / "t.txt"
    text.write_text("a\n")
    adapt = ["adapt", "--encoder", "e", "--llm", "l", "--text", str(text), "--output", str(tmp_path / "x")]
    assert "no access token" in refused(capsys, [*adapt, "--push-to-hub", "mine"])  # before the run, not after it
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "token")
    (tmp_path / "local").mkdir()
    said = refused(capsys, [*adapt[:3], *adapt[5:], "--llm", str(tmp_path / "local"), "--push-to-hub", "mine"])
    assert "names its llm by the local folder" in said
    assert not (tmp_path / "x").exists()


def test_a_hub_that_refuses(hub, adapted, tmp_path, capsys) -> None:
    adapted.save_pretrained(tmp_path / "run", include_base=True)
    hub.error = HfHubHTTPError("403 Forbidden\nmore", response=SimpleNamespace(headers={}, request=None))
    with pytest.raises(SystemExit):
        cli.main(["convert", "--model", str(tmp_path / "run"), "--push-to-hub", "mine"])
    error = capsys.readouterr().err
    assert "--push-to-hub mine: 403 Forbidden; the model is complete in" in error


@pytest.mark.parametrize("reader", ["encoder", "llm"])
def test_a_bare_model_as_a_reader(reader, encoder_folder, llm_folder, tmp_path) -> None:
    """Its pooled states are the model's own, for a probe to read."""
    folder = {"encoder": encoder_folder, "llm": llm_folder}[reader]
    cli.main(["convert", "--model", folder, "--from", reader, "--output", str(tmp_path / "reader")])
    model = MTLLM.from_pretrained(tmp_path / "reader")
    assert (model.config.reader, model.config.head, model.config.adapters) == (reader, None, {})
    batch = collate([TextRow(line) for line in LINES], model.tokenizer, sides=(model.side,), align=False)
    packed = getattr(batch, model.side)
    with torch.no_grad():
        pooled = model(packed).pooled
        bare = MTLLM.stack(reader=reader, **{reader: folder}).eval()
        assert torch.equal(pooled, bare(packed).pooled)
    assert (tmp_path / "reader" / "config.json").stat().st_size < 10_000
    assert not (tmp_path / "reader" / reader).exists(), "the base model is named, not copied"
