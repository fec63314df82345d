"""The whole method on the miniworld: three training stages, the baselines, zero-shot evaluation, a report.

Everything here is what the commands `mtllm adapt | finetune | distill | evaluate` call, on files under the output
folder.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..demo.run import fresh_folder
from .languages import ENGLISH
from .world import World

if TYPE_CHECKING:
    from ..data.read import RowStream
    from ..demo.report import Results
    from ..losses import DistillationWeights

ASSETS = Path(__file__).parent / "assets"
PARTS = ("world", "models", "teacher", "encoder_only", "adapted", "mt_llm")


@dataclass(frozen=True)
class DemoConfig:
    """Sizes and settings of the demo; what they were chosen by stands in benchmarks/miniworld/README.md."""

    texts: int = 20_000
    unlabelled: int = 12_000
    train_rows: int = 3_000
    dev_rows: int = 240
    test_rows: int = 300
    causal: bool = True
    teacher: dict[str, float] = field(
        default_factory=lambda: {"lr": 1e-3, "max_steps": 150, "max_rows": 64, "warmup": 0.05}
    )
    encoder: dict[str, float] = field(
        default_factory=lambda: {"lr": 2e-3, "max_steps": 400, "max_rows": 64, "warmup": 0.05}
    )
    adapt: dict[str, float] = field(
        default_factory=lambda: {"lr": 4e-4, "max_steps": 400, "max_rows": 64, "warmup": 0.05}
    )
    adapt_loss: dict[str, float] = field(default_factory=lambda: {"pooled_mse": 1.0, "paired_mse": 1.0})
    distill: dict[str, float] = field(
        default_factory=lambda: {"lr": 1.5e-3, "max_steps": 1300, "max_rows": 64, "warmup": 0.05}
    )
    distill_loss: dict[str, float] = field(
        default_factory=lambda: {"pooled_mse": 1.0, "paired_mse": 0.3, "head_kl": 1.0}
    )
    num_beams: int = 5


def run_demo(
    output: str | Path = "runs/demo",
    *,
    seed: int = 0,
    from_scratch: bool = False,
    config: DemoConfig | None = None,
    say: Callable[[str], None] = print,
) -> Results:
    """Run the demo and return what it writes to `output`/results.json; report.md and scores.png stand beside it.

    Args:
        output: a folder that is new, empty, or of an earlier demo, whose parts are then replaced.
        seed: of the stages. The world and its two models are those of seed 0 unless `from_scratch`.
        from_scratch: train the MT model and the LLM too, for the world of `seed` (some 25 minutes more on two cores).
        say: told what happens next, a line at a time.

    Raises:
        ValueError: `output` holds something else than an earlier demo, or the shipped models are not at hand.
    """
    if not from_scratch:
        check_models()
    from ..data import read_rows
    from ..evaluation import Translator, evaluate
    from ..models import MTLLM
    from ..training.adapt import AdaptConfig, adapt
    from ..training.config import OptimSettings
    from ..training.distill import DistillConfig, distill
    from ..training.finetune import FinetuneConfig, finetune
    from .files import write_world

    started = time.perf_counter()
    config = config or DemoConfig()
    root = fresh_folder(Path(output), PARTS, {"seed": seed, "from_scratch": from_scratch, **asdict(config)})
    world = World(seed=seed if from_scratch else 0)
    say(f"[1/7] Writing a world of {len(world.languages)} languages and English to {root / 'world'}")
    write_world(
        world,
        root / "world",
        texts=config.texts,
        unlabelled=config.unlabelled,
        train=config.train_rows,
        dev=config.dev_rows,
        test=config.test_rows,
    )
    mt, llm = base_models(world, root / "models", seed=seed, from_scratch=from_scratch, say=say)

    def optim(settings: dict[str, Any]) -> OptimSettings:
        return OptimSettings(
            seed=seed, device="cpu", report_to="none", save_steps=10**6, log_steps=100, shuffle_buffer=2048, **settings
        )

    def task_rows(split: str) -> RowStream:
        path = root / "world" / "kinds" / ENGLISH / f"{split}.tsv"
        return read_rows(path, label_column="label", labels=world.categories, id_column="id", language=ENGLISH)

    dev = list(task_rows("dev"))
    folders = {part: str(root / part) for part in PARTS}
    say("[2/7] Task teacher: the LLM learns the task in English")
    finetune(
        FinetuneConfig(llm=llm, output=folders["teacher"], causal=config.causal, train=optim(config.teacher)),
        task_rows("train"),
        world.categories,
        dev,
    )
    say("[3/7] Baseline: the MT encoder alone learns the task in English")
    finetune(
        FinetuneConfig(encoder=mt, output=folders["encoder_only"], train=optim(config.encoder)),
        task_rows("train"),
        world.categories,
        dev,
    )
    say("[4/7] Stage 1: the LLM learns from itself to read through the MT encoder, on plain English")
    adapt(
        AdaptConfig(
            encoder=mt,
            llm=llm,
            output=folders["adapted"],
            causal=config.causal,
            loss=_loss(config.adapt_loss),
            train=optim(config.adapt),
        ),
        read_rows(root / "world" / "adapt" / "train.txt", language=ENGLISH),
    )
    say("[5/7] Stage 3: the stack learns the task from the task teacher, in English")
    distill(
        DistillConfig(
            model=folders["adapted"],
            teacher=folders["teacher"],
            output=folders["mt_llm"],
            train_projection=True,
            loss=_loss(config.distill_loss),
            train=optim(config.distill),
        ),
        read_rows(root / "world" / "unlabelled" / "train.txt", language=ENGLISH),
        dev,
    )
    say("[6/7] Zero-shot evaluation in every language")
    models = {
        name: MTLLM.from_pretrained(folders[folder])
        for name, folder in (("direct", "teacher"), ("encoder_only", "encoder_only"), ("mt_llm", "mt_llm"))
    }
    scores = evaluate(
        models,
        "folder",
        root / "world" / "kinds",
        translator=Translator.from_pretrained(mt, device="cpu"),
        teacher=models["direct"],
        num_beams=config.num_beams,
        progress=False,
    )
    say("[7/7] Writing the report")
    from .report import print_demo, summarise, write_demo_report

    results = summarise(
        scores,
        world,
        seconds=time.perf_counter() - started,
        seed=seed,
        from_scratch=from_scratch,
        num_beams=config.num_beams,
    )
    write_demo_report(results, scores, root)
    print_demo(results)
    say(f"results.json, report.md, scores.png and every model are in {root}")
    return results


def check_models() -> None:
    """Raise ValueError where the world's two models are missing, as in an installed package."""
    if not all((ASSETS / name / "model.safetensors").is_file() for name in ("mt", "llm")):
        raise ValueError(
            "the generated world's models are in the repository of mtllm-fast, not in the installed package: run this "
            "in a checkout (`pip install --editable .`), or add --from-scratch, which trains them (half an hour)"
        )


def base_models(
    world: World, folder: Path, *, seed: int, from_scratch: bool, say: Callable[[str], None] = print
) -> tuple[str, str]:
    """Folders of the world's MT model and LLM: built now, or the shipped ones. Shipped weights are stored in half
    precision to keep the repository small; they are read into float32 here, once."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    if from_scratch:
        from .build import build

        say("      Training the MT model and the LLM from scratch")
        build(world, folder, seed=seed)
    else:
        for name, auto in (("mt", AutoModelForSeq2SeqLM), ("llm", AutoModelForCausalLM)):
            auto.from_pretrained(ASSETS / name, dtype=torch.float32).save_pretrained(folder / name)
            AutoTokenizer.from_pretrained(ASSETS / name).save_pretrained(folder / name)
    return str(folder / "mt"), str(folder / "llm")


def _loss(weights: dict[str, Any]) -> DistillationWeights:
    from ..losses import DistillationWeights

    return DistillationWeights(**weights)
