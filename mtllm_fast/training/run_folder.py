"""The folder of a training run, and what made it."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..jobs.checkpoint import explained_failure
from ..jobs.durable import FolderLock, check_folder_above, write_json
from ..jobs.ledger import differing
from ..models.sharded import is_sharded
from .inputs import changed, identity
from .processes import is_first, packs_per_process, processes
from .provenance import provenance, read_list
from .record import Metrics

if TYPE_CHECKING:
    from ..models import MTLLM

RUN_FILE = "run.json"
VERSIONS_FILE = "versions.json"  # of every start: command, package versions, state of the checkout, devices
RESULT = "result.json"

# Settings that may differ between a run and its continuation without changing what it computes.
FREE = {"resume", "output", "save_steps", "log_steps", "keep", "workers", "progress", "report_to", "device"}
FREE |= {"checkpointing", "activation_memory_gib", "compile", "liger", "async_save", "bad_steps", "parallel"}
# Settings whose product is what may not differ.
_STEP = ("train.gradient_accumulation", "processes")
# What may grow when a run is resumed; what the record says besides the settings; paths of a source of rows.
_MORE = ("train.max_steps", "train.epochs")
_RECORDED = ("inputs", "extended")
_PATHS = ("text", "data", "valid", "store")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a run's folder. Raises ValueError, naming the file, where it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: is damaged ({error}), so the run cannot be continued; name a new folder") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: is damaged (no JSON object), so the run cannot be continued; name a new folder")
    return found


def _is_more(before: object, now: object) -> bool:
    return isinstance(before, int) and isinstance(now, int) and 0 <= before < now


class RunFolder:
    """A run's output folder, checked at once and created only when training starts.

    Args:
        output: the folder. settings: everything that made the run. resume: continue the run that is there, if one is.
        inputs: what the run reads, by the name of the argument (see `inputs.identity`). It is known by content: another
            path to the same is no other setting, and the same path to another content is.
        by_default: names of settings, nested ones with a dot, that nobody changed; see `as_by_default`. A record that
            lacks one was written before there was such a setting, and the run did what its default does.

    Attributes:
        packs_per_process: what gradient_accumulation is to be for a run that is resumed; None for a new one.
        extended: steps or epochs that a resumed run has more than before: name -> (before, now).

    Raises:
        ValueError: the folder holds another run or other files, another process is writing it, or `resume` meets other
            settings or inputs.
    """

    def __init__(
        self,
        output: str,
        settings: dict[str, Any],
        resume: bool,
        inputs: Mapping[str, object] | None = None,
        by_default: Collection[str] = (),
    ) -> None:
        self.folder, self.resume, self.by_default = Path(output), resume, by_default
        self.settings = {**settings, "processes": processes()}
        self.packs_per_process: int | None = None
        self.extended: dict[str, tuple[int, int]] = {}
        self._lock, self._first = FolderLock(self.folder), is_first()
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"output={output!r}: is a file, not a folder")
        check_folder_above("--output", self.folder)
        record = self.folder / RUN_FILE
        # a hidden file is what a run left that was killed while it wrote its first one
        used = self.folder.is_dir() and any(not path.name.startswith(".") for path in self.folder.iterdir())
        self._new = not used
        if used and not resume:
            self._refuse_others(if_there=True)
            held = "holds another run" if record.is_file() else "is not empty"
            raise ValueError(f"output={output!r}: {held}; continue it with --resume or name a new folder")
        if used and not record.is_file():
            raise ValueError(f"output={output!r}: holds files but no {RUN_FILE}, so there is no run to resume")
        if used:
            self._refuse_others()
        if inputs is not None and self._first:
            self.settings["inputs"] = {name: identity(source) for name, source in inputs.items()}
        if used:
            self._compare(read_json(record))

    def _refuse_others(self, *, if_there: bool = False) -> None:
        """Take the folder for this process. `if_there`: only ask, and make no file."""
        if not self._first or (if_there and not self._lock.path.exists()):
            return
        if not self._lock.take():
            raise ValueError(
                f"output={str(self.folder)!r}: another process ({self._lock.holder()}) is training in it; wait for it, "
                "or name a new folder"
            )
        if if_there:
            self._lock.release()

    def _compare(self, record: dict[str, Any]) -> None:
        """Refuse other settings and inputs than those of the run that is to be resumed."""
        known = {name for name in record.get("inputs", {}) if record["inputs"][name]}
        for name, now in self.settings.get("inputs", {}).items():
            if name in known and (what := changed(record["inputs"][name], now)) is not None:
                raise ValueError(f"--resume: {name} has changed since the run in {str(self.folder)!r} started: {what}")
        same = known & {name for name, now in self.settings.get("inputs", {}).items() if now}
        now, before = _as_recorded(self.settings), _flatten(record)
        for name in sorted(differing(before, now)):
            short = name.rsplit(".", 1)[-1]
            if short in FREE or name in _STEP or name.split(".")[0] in _RECORDED:
                continue
            if name not in before and (name in self.by_default or name == "labels"):  # labels: not recorded at first
                continue
            # a folder that moved, its content the same
            if name in same or (name.startswith("source.") and short in _PATHS and "rows" in same):
                continue
            if name in _MORE and _is_more(before.get(name), now.get(name)):
                self.extended[name] = (before[name], now[name])
                continue
            hint = "; a run can be extended, not cut" if name in _MORE else ""
            then = f"with {before[name]!r}" if name in before else "without it"
            raise ValueError(
                f"--resume: {name.removeprefix('train.')}={now.get(name)!r}, "
                f"but the run in {str(self.folder)!r} was started {then}{hint}"
            )
        if all(name in now and name in before for name in _STEP):
            self.packs_per_process = packs_per_process(now[_STEP[0]], *(before[name] for name in _STEP))
        if self.extended:
            more = {name: list(values) for name, values in self.extended.items()}
            self.settings = {**record, "extended": [*record.get("extended", []), more]}
            for name, (_, value) in self.extended.items():
                self.settings["train"] = {**self.settings["train"], name.removeprefix("train."): value}

    def start(self) -> None:
        """Create the folder, record the settings, and add to `versions.json` what this start was made with.

        Raises:
            ValueError: another process has begun a run here meanwhile.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._first:
            return
        self._refuse_others()
        record = self.folder / RUN_FILE
        if self._new and record.is_file():
            raise ValueError(f"output={str(self.folder)!r}: holds another run by now; name a new folder")
        if self._new or self.extended:
            write_json(record, self.settings)
        if self.extended:  # the run is finished no more
            (self.folder / RESULT).unlink(missing_ok=True)
        self._new = False
        starts = read_list(self.folder / VERSIONS_FILE)
        write_json(self.folder / VERSIONS_FILE, [*starts, provenance()])

    def release(self) -> None:
        """Let other processes write into the folder."""
        self._lock.release()

    def finish(self, student: MTLLM, metrics: Metrics, *, include_base: bool) -> None:
        """Write the finished model, then its metrics: a folder with them is finished."""
        if is_sharded(student) or self._first:
            own = (p for p in student.parameters() if p.requires_grad or include_base)
            with explained_failure("the model", self.folder, sum(p.numel() * p.element_size() for p in own)):
                student.save_pretrained(self.folder, include_base=include_base or None)
        if self._first:
            write_json(self.folder / RESULT, metrics)
        self.release()

    def finished(self) -> Metrics | None:
        """The metrics of the finished run that is to be resumed, None where there is something left to do, such as a
        model that was removed."""
        path = self.folder / RESULT
        if not self.resume or self.extended or not path.is_file():
            return None
        metrics = read_json(path)
        if not any(self.folder.glob("model*.safetensors")):
            return None
        self.release()
        return metrics


def as_by_default(settings: dict[str, Any], defaults: dict[str, Any]) -> set[str]:
    """The names of the settings, nested ones with a dot, that are as in `defaults`."""
    own, plain = _as_recorded(settings), _as_recorded(defaults)
    return {name for name in own.keys() & plain.keys() if own[name] == plain[name]}


def _as_recorded(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as their record has them once it is read again."""
    return _flatten(json.loads(json.dumps(settings, default=str)))


def _flatten(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in data.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
