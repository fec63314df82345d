"""A run's folder says what made it, and is continued whatever made it."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import pytest

from mtllm_fast import TextRow
from mtllm_fast.losses import DistillationWeights
from mtllm_fast.training import STAGES, AdaptConfig, adapt
from mtllm_fast.training.provenance import git_state, provenance
from mtllm_fast.training.run_folder import RunFolder, as_by_default
from tests.tiny import LINES
from tests.training.short_runs import optim


def _git(folder: Path, *arguments: str) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


def test_every_start_is_recorded_and_none_prevents_a_resume(tmp_path, monkeypatch) -> None:
    settings = {"stage": "adapt", "train": {"lr": 1e-3}}
    folder = tmp_path / "run"
    monkeypatch.setattr("sys.argv", ["/usr/bin/mtllm", "adapt", "--text", "my file.txt"])
    RunFolder(str(folder), settings, False).start()
    monkeypatch.setattr("sys.argv", ["/usr/bin/mtllm", "adapt", "--text", "my file.txt", "--resume"])
    monkeypatch.setattr("mtllm_fast.training.provenance.PACKAGES", ("torch",))  # other versions than at the first start
    RunFolder(str(folder), settings, True).start()
    first, second = json.loads((folder / "versions.json").read_text())
    assert first["command"] == "mtllm adapt --text 'my file.txt'"
    assert second["command"].endswith("--resume")
    assert {"python", "torch", "transformers", "accelerate", "numpy"} <= set(first["versions"])
    assert set(second["versions"]) == {"python", "torch"}
    assert first["folder"] == str(Path.cwd())
    assert first["started"] <= second["started"]
    assert first["processes"] == 1
    with pytest.raises(ValueError, match=r"lr=0\.01"):
        RunFolder(str(folder), {"stage": "adapt", "train": {"lr": 1e-2}}, True)


# ---- settings that there were not when a run was started
@dataclass
class Inner:
    scale: float = 1.0
    names: tuple[str, ...] = ("a", "b")


@dataclass
class Settings:
    lr: float = 1e-3
    wide: bool = False
    chosen: int | None = None
    inner: Inner = field(default_factory=Inner)


def _of(settings: Settings, **chosen) -> dict:
    """What a run records: the settings as the machine has settled them."""
    return {"stage": "x", **asdict(replace(settings, **chosen))}


NEW = [("wide", True), ("inner.scale", 2.0), ("inner.names", ("b",)), ("lr", 1e-2)]


@pytest.mark.parametrize(("name", "value"), NEW)
def test_a_setting_that_the_record_lacks_had_its_default(name, value, tmp_path) -> None:
    RunFolder(str(tmp_path / "run"), _of(Settings()), False).start()
    path, short = tmp_path / "run/run.json", name.rsplit(".", 1)[-1]
    record = json.loads(path.read_text())
    del (record["inner"] if "." in name else record)[short]
    path.write_text(json.dumps(record))
    before = path.read_bytes()

    def resumed(settings: Settings) -> RunFolder:
        return RunFolder(
            str(tmp_path / "run"), _of(settings), True, by_default=as_by_default(asdict(settings), asdict(Settings()))
        )

    resumed(Settings()).start()
    assert path.read_bytes() == before
    changed = replace(Settings(), **({"inner": Inner(**{short: value})} if "." in name else {name: value}))
    with pytest.raises(ValueError, match=rf"--resume: {re.escape(name)}=.*, but the run in .* was started without it"):
        resumed(changed)
    with pytest.raises(ValueError, match=f"--resume: {re.escape(name)}="):  # the control: defaults that nobody named
        RunFolder(str(tmp_path / "run"), _of(Settings()), True)


def test_what_the_record_has_is_compared_default_or_not(tmp_path) -> None:
    RunFolder(str(tmp_path / "run"), _of(Settings(wide=True)), False).start()
    default = as_by_default(asdict(Settings()), asdict(Settings()))
    assert default == {"lr", "wide", "chosen", "inner.scale", "inner.names"}
    with pytest.raises(ValueError, match=r"--resume: wide=False, but the run in .* was started with True"):
        RunFolder(str(tmp_path / "run"), _of(Settings()), True, by_default=default)


def test_what_the_machine_chooses_is_by_default_too(tmp_path) -> None:
    """An older run had no such choice to make."""
    RunFolder(str(tmp_path / "run"), _of(Settings()), False).start()
    path = tmp_path / "run/run.json"
    record = json.loads(path.read_text())
    del record["chosen"]
    path.write_text(json.dumps(record))
    for given, fits in ((None, True), (8, False)):
        default = as_by_default(asdict(Settings(chosen=given)), asdict(Settings()))
        make = partial(RunFolder, str(tmp_path / "run"), _of(Settings(), chosen=8), True, by_default=default)
        if fits:
            make()
        else:
            with pytest.raises(ValueError, match="--resume: chosen=8"):
                make()


def test_a_run_from_before_the_last_settings_goes_on(encoder_folder, llm_folder, tmp_path) -> None:
    """What a run recorded before there were `contrast`, `task` and `rank_weights`."""
    rows = [TextRow(line) for line in LINES]

    def config(steps: int, **changes) -> AdaptConfig:
        train = optim(max_steps=steps)
        return AdaptConfig(encoder_folder, llm_folder, str(tmp_path / "run"), train=train, **changes)

    adapt(config(2), rows)
    path = tmp_path / "run/run.json"
    record = json.loads(path.read_text())
    new = ("divergence", "beta", "contrast", "contrast_temperature", "contrast_layer", "task", "rank_weights")
    record["loss"] = {name: value for name, value in record["loss"].items() if name not in new}
    assert set(record["loss"]) == {"pooled_mse", "paired_mse", "kl", "head_kl", "temperature"}
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"--resume: loss\.contrast=1\.0, but the run in .* was started without it"):
        adapt(config(3, resume=True, loss=DistillationWeights(contrast=1.0)), rows)
    with pytest.raises(ValueError, match=r"--resume: loss\.contrast_temperature=0\.2"):
        adapt(config(3, resume=True, loss=DistillationWeights(contrast_temperature=0.2)), rows)
    adapt(config(3, resume=True), rows)
    assert json.loads(path.read_text())["train"]["max_steps"] == 3
    adapt(config(4, resume=True), rows)  # the extended record lacks them too
    assert json.loads(path.read_text())["train"]["max_steps"] == 4


def test_every_stage_has_defaults_to_compare_with() -> None:
    for kind in STAGES.values():
        plain = asdict(kind.config())
        names = as_by_default(plain, asdict(kind.config()))
        assert len(names) > 20 and names >= {"output", "train.lr", "resume"}, kind.name


def test_a_damaged_record_does_not_prevent_a_start(tmp_path) -> None:
    run = RunFolder(str(tmp_path / "run"), {"stage": "adapt"}, False)
    run.start()
    (tmp_path / "run/versions.json").write_text("{cut")
    run.start()
    assert len(json.loads((tmp_path / "run/versions.json").read_text())) == 1


def test_other_processes_write_nothing(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "1")
    RunFolder(str(tmp_path / "run"), {"stage": "adapt"}, False).start()
    assert list((tmp_path / "run").iterdir()) == []


def test_state_of_the_checkout(tmp_path, monkeypatch) -> None:
    assert git_state(tmp_path) is None
    _git(tmp_path, "init", "-b", "trunk")
    (tmp_path / "a.txt").write_text("one\n")
    _git(tmp_path, "add", "a.txt")
    _git(tmp_path, "commit", "-m", "first")
    clean = git_state(tmp_path)
    assert clean["branch"] == "trunk"
    assert clean["changed"] == []
    assert len(clean["commit"]) == 40
    (tmp_path / "a.txt").write_text("two\n")
    monkeypatch.chdir(tmp_path)
    assert provenance()["git"] == {**clean, "changed": [" M a.txt"]}
    monkeypatch.setenv("PATH", "")
    assert git_state(tmp_path) is None
