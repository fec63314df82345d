"""What a file system needs to be told before a new name in a folder survives a crash."""

from __future__ import annotations

import os
from pathlib import Path


def sync_folder(path: Path) -> None:
    """Bring the names in `path` to the disk: a rename is otherwise only in memory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
