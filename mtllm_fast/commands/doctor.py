"""mtllm doctor."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Doctor:
    """Versions, devices, and which attention backends and kernels will run here, and why not."""

    llm: str | None = None
    """Folder or hub name of an LLM: say whether its packed rows are its own (its weights are not read)."""

    def run(self) -> None:
        from ..doctor import print_diagnosis, print_verdict

        if self.llm is None:
            print_diagnosis()
        else:
            print_verdict(self.llm)
