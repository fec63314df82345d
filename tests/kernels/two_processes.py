"""Runs a script in a process group of two on the CPU."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path


def run_two_processes(folder: Path, script: str) -> None:
    """Both processes must exit 0 and print "rank 0 ok" and "rank 1 ok"."""
    path = folder / "worker.py"
    path.write_text(script)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    workers = [
        subprocess.Popen(
            [sys.executable, str(path)],
            env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=Path(__file__).resolve().parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for rank, worker in enumerate(workers):
        output, _ = worker.communicate(timeout=180)
        assert worker.returncode == 0, output
        assert f"rank {rank} ok" in output
