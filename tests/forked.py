"""`mtllm` in child processes of one process that has imported everything: real processes, without seconds of imports.

python -m tests.forked        reads a JSON line per command: {"arguments", "code", "out", "environments"}; answers with the
                              pids, one for each environment, then with their statuses
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent


class Forked:
    """Use as a context manager; `start` gives the pid of a running `mtllm ARGUMENTS`, `wait` its status and output,
    `group` runs a process group to its end.

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

    def _ask(self, arguments: Sequence[object], code: str, environments: list[dict[str, str]]) -> list[int]:
        assert self.server.stdin is not None
        words = [str(argument) for argument in arguments]
        request = {"arguments": words, "code": code, "out": f"{self.out.name}/out", "environments": environments}
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return self._answer()

    def _answer(self) -> list[int]:
        assert self.server.stdout is not None
        return [int(word) for word in self.server.stdout.readline().split()]

    def start(self, *arguments: object, code: str = "") -> int:
        return self._ask(arguments, code, [{}])[0]

    def wait(self) -> tuple[int, str]:
        """Exit code of the command, negative for the signal that ended it; what it wrote to stdout and stderr."""
        (status,) = self._answer()
        return os.waitstatus_to_exitcode(status), Path(f"{self.out.name}/out0").read_text(encoding="utf-8")

    def run(self, *arguments: object, code: str = "") -> str:
        self.start(*arguments, code=code)
        found, out = self.wait()
        assert found == 0, out
        return out

    def group(self, *arguments: object, code: str = "", joined: bool = True) -> list[str]:
        """What each of two processes at once wrote, both of which exit with 0; with the variables that torchrun sets on
        one machine, or not `joined`."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
        shared |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        ranks = ["0", "1"]
        self._ask(arguments, code, [{**shared, "RANK": rank, "LOCAL_RANK": rank} if joined else {} for rank in ranks])
        statuses = self._answer()
        outs = [Path(f"{self.out.name}/out{rank}").read_text(encoding="utf-8") for rank in ranks]
        assert statuses == [0, 0], "\n".join(outs)
        return outs


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
    import torch.distributed.fsdp  # what the children need
    import torch.distributed.tensor

    import mtllm_fast.commands.train
    import mtllm_fast.inference.stream  # noqa: F401

    torch.set_num_threads(1)
    gc.freeze()  # or the children would copy every page that holds an object
    for line in sys.stdin:
        request = json.loads(line)
        out, pids = request.pop("out"), []
        for number, variables in enumerate(request.pop("environments")):
            pid = os.fork()
            if not pid:
                os.environ |= variables
                child(**request, out=f"{out}{number}")
                return
            pids.append(pid)
        print(*pids, flush=True)
        print(*(os.waitpid(pid, 0)[1] for pid in pids), flush=True)


if __name__ == "__main__":
    main()
