"""`mtllm` in child processes of one process that has imported everything: real processes, without seconds of imports.

python -m tests.forked        reads a JSON line per command: {"arguments", "code", "out"}; answers its pid, then its status
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent


class Forked:
    """Use as a context manager; `start` gives the pid of a running `mtllm ARGUMENTS`, `wait` its status and output.

    With `code`, that runs as the main module, and the arguments are its sys.argv[1:].
    """

    def __enter__(self) -> Forked:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.forked"],
            cwd=REPO, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.out = tempfile.TemporaryDirectory()
        return self

    def __exit__(self, *error: object) -> None:
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.terminate()  # what pytest forked meanwhile may hold the other end of the pipe open
        self.server.wait(20)
        self.out.cleanup()

    def start(self, *arguments: object, code: str = "") -> int:
        assert self.server.stdin is not None and self.server.stdout is not None
        words = [str(argument) for argument in arguments]
        request = {"arguments": words, "code": code, "out": f"{self.out.name}/out"}
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def wait(self) -> tuple[int, str]:
        """Exit code of the command, negative for the signal that ended it; what it wrote to stdout and stderr."""
        assert self.server.stdout is not None
        code = os.waitstatus_to_exitcode(int(self.server.stdout.readline()))
        return code, Path(f"{self.out.name}/out").read_text(encoding="utf-8")

    def run(self, *arguments: object, code: str = "") -> str:
        self.start(*arguments, code=code)
        code, out = self.wait()
        assert code == 0, out
        return out


def child(arguments: list[str], code: str, out: str) -> None:
    descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what it runs behind with it ignored
    if code:
        sys.argv[1:] = arguments
        exec(compile(code, "<code>", "exec"), sys.modules["__main__"].__dict__)
    else:
        from mtllm_fast import cli

        cli.main(arguments)


def main() -> None:
    import torch

    import mtllm_fast.commands.train  # what the children need
    import mtllm_fast.inference.stream  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if not pid:
            child(**request)
            return
        print(pid, flush=True)
        print(os.waitpid(pid, 0)[1], flush=True)


if __name__ == "__main__":
    main()
