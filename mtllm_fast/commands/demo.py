"""mtllm demo."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Demo:
    """The whole method in a generated world: no download of models or data."""

    output: str = "runs/demo"
    seed: int = 0
    from_scratch: bool = False
    """Also train the world's MT model and LLM, instead of using the shipped ones."""

    def run(self) -> None:
        from ..miniworld.demo import run_demo

        run_demo(output=self.output, seed=self.seed, from_scratch=self.from_scratch)
