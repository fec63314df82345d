"""A mutant: one file of the project with one line changed, and the tests that have to notice."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Mutant:
    """One planted fault.

    Fields:
        area: the list that it is in.
        file: of the repository, in which `old` occurs exactly once.
        old, new: the text that is replaced, and by what.
        tests: pytest's arguments, those that must fail. interpreted: they run where Triton interprets.
        equivalent: why no test can notice, where the change changes no behaviour.
    """

    area: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    interpreted: bool = False
    equivalent: str = ""

    @property
    def kind(self) -> str:
        """Of the process that its tests need: interpreted, kernels (no fixtures of the suite) or plain."""
        if self.interpreted:
            return "interpreted"
        return "kernels" if all(test.startswith("tests/kernels/") for test in self.tests) else "plain"

    def mutated(self, root: Path = REPO) -> str:
        """The text of the file with the fault in it. Raises ValueError where `old` does not occur exactly once."""
        text = (root / self.file).read_text(encoding="utf-8")
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"{self.file}: {self.old!r} occurs {count} times, but must occur once")
        return text.replace(self.old, self.new)

    def key(self, root: Path = REPO) -> str:
        """Of the mutated file and the tests: a result holds as long as neither changes."""
        parts = [self.file, self.mutated(root), *self.tests]
        parts += [
            (root / name).read_text(encoding="utf-8") for name in sorted({test.split("::")[0] for test in self.tests})
        ]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def planted(
    area: str, file: str, tests: str | tuple[str, ...], *changes: tuple[str, ...], interpreted: bool = False
) -> list[Mutant]:
    """Mutants of one file with the same tests; a change is (old, new), or (old, new, why it is equivalent)."""
    tests = (tests,) if isinstance(tests, str) else tests
    return [Mutant(area, file, old, new, tests, interpreted, *why) for old, new, *why in changes]


def all_mutants() -> list[Mutant]:
    from . import attention, data, jobs, kernels, losses, trainer, triton

    return [one for module in (kernels, triton, losses, data, attention, trainer, jobs) for one in module.MUTANTS]
