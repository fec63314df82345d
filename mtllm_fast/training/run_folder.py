"""The folder of a training run, and what made it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..models.sharded import is_sharded
from .checkpoint import said_in_bytes
from .processes import packs_per_process, processes
from .provenance import provenance, read_list

if TYPE_CHECKING:
    from ..models import MTLLM

RUN_FILE = "run.json"
VERSIONS_FILE = "versions.json"  # of every start: command, package versions, state of the checkout, devices
RESULT = "result.json"

# Settings that may differ between a run and its continuation without changing what it computes.
_FREE = {"resume", "output", "save_steps", "log_steps", "keep", "workers", "progress", "report_to", "device"}
_FREE |= {"checkpointing", "activation_memory_gib"}
_FREE |= {"async_save", "bad_steps", "parallel"}
# Settings whose product is what may not differ.
_STEP = ("train.gradient_accumulation", "processes")


def write_json(path: Path, data: Any) -> None:
    """Write JSON so that a reader sees the old file or the whole new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(data, indent=2, default=str) + "\n", encoding="utf-8")
    os.replace(temporary, path)


class RunFolder:
    """A run's output folder, checked at once and created only when training starts.

    Args:
        output: the folder. settings: everything that made the run. resume: continue the run that is there, if one is.

    Attributes:
        packs_per_process: what gradient_accumulation is to be for a run that is resumed; None for a new one.

    Raises:
        ValueError: the folder holds another run or other files, or `resume` meets other settings.
    """

    def __init__(self, output: str, settings: dict[str, Any], resume: bool) -> None:
        self.folder, self.settings, self.resume = Path(output), {**settings, "processes": processes()}, resume
        self.packs_per_process: int | None = None
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"output={output!r}: is a file, not a folder")
        record = self.folder / RUN_FILE
        # a hidden file is what a run left that was killed while it wrote its first one
        used = self.folder.is_dir() and any(not path.name.startswith(".") for path in self.folder.iterdir())
        if used and not resume:
            held = "holds another run" if record.is_file() else "is not empty"
            raise ValueError(f"output={output!r}: {held}; continue it with --resume or name a new folder")
        if used and not record.is_file():
            raise ValueError(f"output={output!r}: holds files but no {RUN_FILE}, so there is no run to resume")
        if used:
            now, before = (
                _flatten(json.loads(json.dumps(self.settings, default=str))),
                _flatten(json.loads(record.read_text())),
            )
            for name in sorted(set(now) | set(before)):
                if name.rsplit(".", 1)[-1] not in _FREE and name not in _STEP and now.get(name) != before.get(name):
                    raise ValueError(
                        f"--resume: {name.removeprefix('train.')}={now.get(name)!r}, "
                        f"but the run in {output!r} was started with {before.get(name)!r}"
                    )
            if all(name in now and name in before for name in _STEP):
                self.packs_per_process = packs_per_process(now[_STEP[0]], *(before[name] for name in _STEP))

    def start(self) -> None:
        """Create the folder, record the settings, and add to `versions.json` what this start was made with."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / RUN_FILE).is_file() and not int(os.environ.get("RANK", "0")):
            write_json(self.folder / RUN_FILE, self.settings)
        if not int(os.environ.get("RANK", "0")):
            starts = read_list(self.folder / VERSIONS_FILE)
            write_json(self.folder / VERSIONS_FILE, [*starts, provenance()])

    def save(self, student: MTLLM, *, include_base: bool) -> None:
        """Write the finished model into the folder, once."""
        if is_sharded(student) or not int(os.environ.get("RANK", "0")):
            own = (p for p in student.parameters() if p.requires_grad or include_base)
            with said_in_bytes("the model", self.folder, sum(p.numel() * p.element_size() for p in own)):
                student.save_pretrained(self.folder, include_base=include_base or None)

    def finish(self, student: MTLLM, metrics: dict[str, Any], *, include_base: bool) -> None:
        """Write the finished model, then its metrics: a folder with them is finished."""
        self.save(student, include_base=include_base)
        if not int(os.environ.get("RANK", "0")):
            write_json(self.folder / RESULT, metrics)

    def finished(self) -> dict[str, Any] | None:
        """The metrics of the finished run that is to be resumed, None where there is something left to do."""
        path = self.folder / RESULT
        return json.loads(path.read_text(encoding="utf-8")) if self.resume and path.is_file() else None


def _flatten(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
