"""mtllm doctor."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Doctor:
    """Versions, devices, and which attention backends and kernels will run here, and why not."""

    llm: str | None = None
    """Folder or hub name of an LLM: say whether its packed rows are its own (its weights are not read)."""

    encoder: str | None = None
    """Folder or hub name of an encoder: say its family and whether it has languages (its weights are not read)."""

    def run(self) -> None:
        from ..doctor import print_diagnosis, print_verdict
        from ..models.encoder import describe_encoder

        if self.encoder is not None:
            print("\n".join(describe_encoder(self.encoder)))
        if self.llm is not None:
            print_verdict(self.llm)
        if self.encoder is None and self.llm is None:
            print_diagnosis()
