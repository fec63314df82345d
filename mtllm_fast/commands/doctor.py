"""mtllm doctor."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Doctor:
    """Versions, devices, and which attention backends and kernels will run here, and why not."""

    def run(self) -> None:
        from ..doctor import print_diagnosis

        print_diagnosis()
