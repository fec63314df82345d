"""`mtllm` in child processes of one process that has imported everything: real processes, without seconds of imports.

python -m tests.training.forked        reads a JSON line per command: {"arguments", "out"}; answers its pid, then its status
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent.parent


class Forked:
    """Use as a context manager; `start` gives the pid of a running `mtllm ARGUMENTS`, `wait` its status and output."""

    def __enter__(self) -> Forked:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.training.forked"],
            cwd=REPO, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.out = tempfile.TemporaryDirectory()
        return self

    def __exit__(self, *error: object) -> None:
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait(20)
        self.out.cleanup()

    def start(self, *arguments: object) -> int:
        assert self.server.stdin is not None and self.server.stdout is not None
        request = {"arguments": [str(argument) for argument in arguments], "out": f"{self.out.name}/out"}
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def wait(self) -> tuple[int, str]:
        """Exit code of the command, negative for the signal that ended it; what it wrote to stdout and stderr."""
        assert self.server.stdout is not None
        code = os.waitstatus_to_exitcode(int(self.server.stdout.readline()))
        return code, Path(f"{self.out.name}/out").read_text(encoding="utf-8")

    def run(self, *arguments: object) -> str:
        self.start(*arguments)
        code, out = self.wait()
        assert code == 0, out
        return out


def main() -> None:
    import torch

    import mtllm_fast.commands.train  # noqa: F401  # what the children need
    from mtllm_fast import cli

    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if not pid:
            out = os.open(request["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
            cli.main(request["arguments"])
            sys.exit(0)
        print(pid, flush=True)
        print(os.waitpid(pid, 0)[1], flush=True)


if __name__ == "__main__":
    main()
