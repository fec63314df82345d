"""Plant every fault of the lists in a copy of the project, one after another, and see whether the tests fail.

    python -m tests.mutants [--only AREA ...] [--match TEXT] [--limit N] [--json FILE]

A result is written as soon as it is there; one that holds still (neither the mutated file nor the tests have changed) is
not made again. Exit code 1 where a fault that changes behaviour is not found, or a list is out of step with its file.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .planted import REPO, Mutant, all_mutants

COPIED = ("mtllm_fast", "kernels", "tests", "benchmarks", "pyproject.toml")
MAPPED = ("kernels",)  # folders that are subpackages of mtllm_fast
# What is imported before forking. The tests of the kernels use no fixture of the suite, and so need nothing but torch.
MODULES = {
    "plain": ("torch", "numpy", "hypothesis", "transformers", "peft", "datasets", "safetensors.torch"),
    "kernels": ("torch", "numpy"),
    "interpreted": ("torch", "numpy", "triton"),
}
# seconds that a mutant's tests may take: so many, and so many times what they took without
BASE_LIMIT, FACTOR = 60.0, 8.0
STATES = ("found", "survived", "equivalent", "invalid")


@contextmanager
def copied(root: Path, names: Iterable[str] = COPIED, mapped: Iterable[str] = MAPPED) -> Iterator[Path]:
    """A copy of the project that can be imported as it is; the user's own files are never changed."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = Path(folder)
        for name in names:
            source = root / name
            if source.is_dir():
                shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
            else:
                shutil.copy(source, copy / name)
        for name in mapped:
            (copy / "mtllm_fast" / name).symlink_to(copy / name)
        yield copy


class Server:
    """A process of `server.py` on a copy of the project."""

    def __init__(self, copy: Path, kind: str, modules: Sequence[str] | None = None) -> None:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        # a fault changes neither the size of its file nor, within a second, its time
        environment["PYTHONDONTWRITEBYTECODE"] = "1"
        environment.pop("TRITON_INTERPRET", None)
        if kind == "interpreted":
            environment["TRITON_INTERPRET"] = "1"
        self.copy = copy
        self.options = [] if kind == "plain" else ["--noconftest"]
        self.without: dict[tuple[str, ...], dict[str, Any]] = {}
        modules = MODULES[kind] if modules is None else modules
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("server.py")), str(copy), *modules],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip

    def ask(self, **job: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(job), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the server died with exit code {self.process.wait()}")
        return json.loads(answer)

    def result(self, mutant: Mutant) -> dict[str, Any]:
        """{"state", "seconds", "note"} of one mutant."""
        tests = [*self.options, *mutant.tests]
        if mutant.tests not in self.without:
            self.without[mutant.tests] = self.ask(file="", text=None, tests=tests, limit=600.0)
        plain = self.without[mutant.tests]
        if plain["code"] != 0:
            note = f"the tests fail without the fault too (exit code {plain['code']}): {_last(plain['tail'])}"
            return {"state": "invalid", "seconds": 0.0, "note": note}
        limit = BASE_LIMIT + FACTOR * plain["seconds"]
        found = self.ask(file=mutant.file, text=mutant.mutated(self.copy), tests=tests, limit=limit)
        if found["code"] == 0:
            state = "equivalent" if mutant.equivalent else "survived"
        else:
            state = "found"
        note = {0: mutant.equivalent, -1: "ran into the limit", -2: "died"}.get(found["code"], _last(found["tail"]))
        return {"state": state, "seconds": found["seconds"], "note": note}

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def _last(text: str) -> str:
    lines = [line for line in text.splitlines() if line.startswith(("FAILED", "ERROR", "E  "))]
    return (lines or text.splitlines() or [""])[-1][:200]


@dataclass
class Results:
    """What is known, by key; written after every mutant."""

    path: Path
    known: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, path: Path) -> Results:
        rows = json.loads(path.read_text(encoding="utf-8"))["results"] if path.is_file() else []
        return cls(path, {row["key"]: row for row in rows})

    def add(self, row: dict[str, Any]) -> None:
        self.known[row["key"]] = row

    def write(self, mutants: Sequence[Mutant]) -> None:
        """Only what the lists hold now, in their order, with how many of how many were run."""
        rows = [self.known[key] for one in mutants if (key := _key(one)) in self.known]
        states = Counter(row["state"] for row in rows)
        counts = {"planted": len(mutants), "run": len(rows), **{state: states[state] for state in STATES}}
        text = json.dumps({"counts": counts, "results": rows}, indent=1, ensure_ascii=False)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(self.path)


def _key(mutant: Mutant) -> str:
    try:
        return mutant.key()
    except ValueError:
        return ""


def table(mutants: Sequence[Mutant], results: Results) -> str:
    """Counts by area, and every mutant that was not found."""
    lines = [f"{'':12}{'planted':>9}{'run':>6}" + "".join(f"{state:>12}" for state in STATES)]
    for area in [*dict.fromkeys(one.area for one in mutants), "all"]:
        own = [one for one in mutants if area in (one.area, "all")]
        states = Counter(results.known[key]["state"] for one in own if (key := _key(one)) in results.known)
        lines.append(f"{area:12}{len(own):>9}{states.total():>6}" + "".join(f"{states[state]:>12}" for state in STATES))
    for one in mutants:
        row = results.known.get(_key(one))
        if row and row["state"] != "found":
            lines += [
                f"{row['state']}: {one.file}: {row['note']}",
                f"    - {one.old.strip()}",
                f"    + {one.new.strip()}",
            ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    areas = sorted({one.area for one in all_mutants()})
    parser.add_argument("--only", nargs="+", choices=areas, default=areas, help="areas to run")
    parser.add_argument("--match", default="", help="only mutants whose file or new text holds this")
    parser.add_argument("--limit", type=int, help="mutants to run now, at most")
    parser.add_argument("--json", type=Path, default=REPO / "benchmarks" / "results" / "cpu" / "mutants.json")
    parser.add_argument("--again", action="store_true", help="run those again that were not found")
    options = parser.parse_args()
    mutants = all_mutants()
    for one in mutants:
        one.mutated()  # a list that is out of step is an error before anything runs
    results = Results.read(options.json)
    if options.again:
        results.known = {key: row for key, row in results.known.items() if row["state"] == "found"}
    wanted = [one for one in mutants if one.area in options.only and options.match in f"{one.file}: {one.new}"]
    waiting = [one for one in wanted if one.key() not in results.known][: options.limit]
    for kind in MODULES:
        own = [one for one in waiting if one.kind == kind]
        if not own:
            continue
        with copied(REPO) as copy:
            server = Server(copy, kind)
            for number, one in enumerate(own, 1):
                row = {"key": one.key(), "area": one.area, "file": one.file, "old": one.old, "new": one.new}
                row |= server.result(one)
                results.add(row)
                results.write(mutants)
                print(f"{number}/{len(own)} {row['state']:10} {row['seconds']:6.1f} s  {one.file}: {one.new.strip()[:90]}", flush=True)  # fmt: skip
            server.close()
    print(table(mutants, results))
    bad = [one for one in mutants if results.known.get(_key(one), {}).get("state") in ("survived", "invalid")]
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
