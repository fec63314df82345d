"""What a run was made with: the command, package versions, the state of the checkout, devices."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

from .processes import processes

PACKAGES = (
    "mtllm-fast",
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "tokenizers",
    "datasets",
    "safetensors",
    "numpy",
    "triton",
    "liger-kernel",
    "bitsandbytes",
    "torchao",
    "deepspeed",
    "flash-attn",
    "xformers",
)


def git_state(folder: Path) -> dict[str, str | list[str]] | None:
    """Commit, branch and changed files of the checkout that holds `folder`; None outside of one, or without git."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=30, check=True)
        return done.stdout.rstrip("\n")

    try:
        changes = git("status", "--porcelain", "--untracked-files=no").splitlines()
        return {"commit": git("rev-parse", "HEAD"), "branch": git("branch", "--show-current"), "changed": changes}
    except (OSError, subprocess.SubprocessError):
        return None


def provenance() -> dict[str, object]:
    """Plain data that says what is running here and now."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    cuda = torch.cuda.is_available()
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name or "python", *sys.argv[1:]]),
        "folder": os.getcwd(),
        "git": git_state(Path.cwd()),
        "versions": versions,
        "cuda": torch.version.cuda,
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
        "machine": platform.platform(),
        "processes": processes(),
    }


def read_list(path: Path) -> list[object]:
    """The JSON list in `path`; [] where there is none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return found if isinstance(found, list) else []
