"""The cells of the miniworld's experiment: one trained model or one evaluation each, kept on disk, never made twice."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtllm_fast.jobs.durable import exclusive, write_json
from mtllm_fast.miniworld.languages import ENGLISH
from mtllm_fast.miniworld.world import World, free_english

if TYPE_CHECKING:
    from mtllm_fast.data import TextRow
    from mtllm_fast.models import MTLLM


@dataclass(frozen=True)
class ExperimentConfig:
    """Sizes and settings. Learning rates and losses are the demo's; steps are optimizer steps."""

    texts: int = 20_000
    unlabelled: int = 12_000
    train_rows: int = 3_000
    dev_rows: int = 240
    test_rows: int = 200
    rows: int = 64
    """Texts in a step; half as many in the experiments with longer texts."""
    teacher_steps: int = 150
    encoder_steps: int = 400
    adapt_steps: int = 400
    task_steps: int = 400
    """Of direct fine-tuning of a stack."""
    distill_steps: int = 600
    num_beams: int = 5
    lengths: tuple[int, ...] = (1, 2, 3, 4, 6, 8)
    """Clauses of a text, in the experiment with longer texts."""
    typos: tuple[float, ...] = (0.0, 0.02, 0.05, 0.1, 0.2)
    """Share of letters that are changed, in the experiment with typos."""
    longer_adaptation: tuple[int, ...] = (1_200,)
    """Steps of stage 1, in the experiment with more adaptation, besides none and `adapt_steps`."""
    mt_steps: int = 400
    """Steps by which the MT model learns the words with two senses."""
    curve_rows: int = 120
    lr: dict[str, float] = field(
        default_factory=lambda: {"teacher": 1e-3, "encoder": 2e-3, "adapt": 4e-4, "task": 1.5e-3, "distill": 1.5e-3}
    )


class Cells:
    """Trains and scores for one seed, into `root`; whatever is already there and finished is read.

    Args:
        root: folder of this seed and part. mt, llm: folders of the base models. say: told what is made, a line each.
    """

    def __init__(
        self,
        root: Path,
        *,
        seed: int,
        world: World,
        mt: str,
        llm: str,
        config: ExperimentConfig,
        say: Callable[[str], None] = print,
    ) -> None:
        self.root, self.seed, self.world, self.mt, self.llm, self.config = root, seed, world, mt, llm, config
        self.say = say
        self._engines: dict[str, Any] = {}

    def model(self, name: str, train: Callable[[str], Any]) -> str:
        """Folder of the trained model `name`; `train(folder)` makes it where it is missing or unfinished."""
        folder = self.root / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(folder.with_name(f"{name}.lock")):  # several processes may share an experiment
            if (folder / "done.json").is_file():
                return str(folder)
            shutil.rmtree(folder, ignore_errors=True)
            start = time.perf_counter()
            metrics = train(str(folder)) or {}
            for checkpoint in folder.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)
            kept = ("best_eval_accuracy", "best_step", "train_loss", "max_steps")
            seconds = round(time.perf_counter() - start, 1)
            write_json(folder / "done.json", {"seconds": seconds, **{k: metrics[k] for k in kept if k in metrics}})
            self.say(f"  {self.root.name} {name}: {seconds:.0f} s")
        return str(folder)

    def scores(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The scores `name`, computed where they are missing."""
        path = self.root / "scores" / f"{name}.json"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, compute())
        return json.loads(path.read_text(encoding="utf-8"))

    def optim(self, kind: str, steps: int, rows: int | None = None) -> Any:
        from mtllm_fast.training import OptimSettings

        return OptimSettings(
            seed=self.seed,
            lr=self.config.lr[kind],
            max_steps=steps,
            max_rows=rows or self.config.rows,
            warmup=0.05,
            device="cpu",
            report_to="none",
            progress=False,
            save_steps=10**6,
            log_steps=100,
            shuffle_buffer=2048,
        )

    def finetune(self, folder: str, kind: str, rows: Any, dev: Any, steps: int, per_step: int | None = None, **reader):
        """Stage 2 of the reader named (llm=, encoder= or model=), on labelled rows."""
        from mtllm_fast.training import FinetuneConfig, finetune

        config = FinetuneConfig(
            output=folder, causal=True, train_projection=True, train=self.optim(kind, steps, per_step), **reader
        )
        return finetune(config, rows, self.world.categories, dev)

    def adapt(self, folder: str, texts: Sequence[TextRow], steps: int, per_step: int | None = None) -> dict[str, Any]:
        from mtllm_fast.losses import DistillationWeights
        from mtllm_fast.training import AdaptConfig, adapt

        loss = DistillationWeights(pooled_mse=1.0, paired_mse=1.0)
        train = self.optim("adapt", steps, per_step)
        return adapt(
            AdaptConfig(encoder=self.mt, llm=self.llm, output=folder, causal=True, loss=loss, train=train), texts
        )

    def unadapted(self, folder: str) -> None:
        """A stack as stage 1 would begin it: a random projection of the right scale, adapters that do nothing yet."""
        from transformers import set_seed

        from mtllm_fast.models import MTLLM, LoraSettings

        set_seed(self.seed)
        MTLLM.stack(self.mt, self.llm, causal=True, lora=LoraSettings()).save_pretrained(folder)

    def distill(
        self,
        folder: str,
        model: str,
        teacher: str,
        texts: Sequence[TextRow],
        dev: Any,
        *,
        kl: float,
        steps: int,
        per_step: int | None = None,
    ) -> dict[str, Any]:
        """Stage 3 from the teacher's cached states: pooled MSE, plus `kl` times the KL of the heads."""
        from mtllm_fast.losses import DistillationWeights
        from mtllm_fast.training import DistillConfig, distill

        return distill(
            DistillConfig(
                model=model,
                teacher=teacher,
                output=folder,
                teacher_cache=str(self.root / "teacher_states"),
                train_projection=True,
                loss=DistillationWeights(pooled_mse=1.0, head_kl=kl),
                train=self.optim("distill", steps, per_step),
            ),
            texts,
            dev,
        )

    def accuracy(self, folder: str, rows: Sequence[TextRow]) -> float:
        """Accuracy, 0 to 1, of a trained model on labelled rows."""
        import numpy as np

        from mtllm_fast.inference import Engine
        from mtllm_fast.models import MTLLM

        if folder not in self._engines:
            model: MTLLM = MTLLM.from_pretrained(folder)
            self._engines[folder] = Engine(model)
        logits = self._engines[folder].classify(rows)
        return float((logits.argmax(-1) == np.array([row.label for row in rows])).mean())


class Translations:
    """English of foreign rows by one MT model, kept in a file: every seed and system is given the same ones."""

    def __init__(self, path: Path, mt: str, num_beams: int) -> None:
        self.path, self.mt, self.num_beams = path, mt, num_beams
        self.known: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        self._translator: Any = None

    def __call__(self, rows: Sequence[TextRow]) -> list[TextRow]:
        """The rows in English, labels kept."""
        from dataclasses import replace

        from mtllm_fast.evaluation import Translator

        missing = [row for row in rows if f"{row.language} {row.text}" not in self.known]
        if missing:
            self._translator = self._translator or Translator.from_pretrained(self.mt, device="cpu")
            translated = self._translator.translate_rows(missing, num_beams=self.num_beams)
            self.known.update(
                {f"{row.language} {row.text}": found.text for row, found in zip(missing, translated, strict=True)}
            )
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, self.known)
        return [replace(row, text=self.known[f"{row.language} {row.text}"], language=ENGLISH) for row in rows]


def kind_rows(world: World, code: str, split: str, count: int, *, free: bool = False) -> list[TextRow]:
    """Labelled rows of the kind task in a language; `free` renders the English ones in free English."""
    from mtllm_fast.data import TextRow

    rng = random.Random(f"{world.seed}/free {split}")
    return [
        TextRow(free_english(clause, rng) if free else world.render(code, clause), code, label=label)
        for clause, label in world.kind_task(split, count)
    ]
