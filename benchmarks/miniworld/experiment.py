"""The method against its baselines in the miniworld, over several seeds, and the conditions that decide between
translating a text and reading it through the MT encoder.

`python -m benchmarks.miniworld.experiment --output DIR` trains and scores everything, prints the report and writes
DIR/results.json, DIR/report.md and a figure per curve. It goes on where it was stopped, cell by cell.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from mtllm_fast.jobs.durable import write_json
from mtllm_fast.miniworld.languages import ENGLISH
from mtllm_fast.miniworld.world import World

from .cells import Cells, ExperimentConfig, Translations, kind_rows
from .curves import adaptation, ambiguity, length, typos
from .report import SYSTEMS, report

PARTS = ("matrix", "length", "adaptation", "typos", "ambiguity")


def run_experiment(
    output: str | Path,
    *,
    seeds: Sequence[int] = (42, 43, 44),
    parts: Sequence[str] = PARTS,
    config: ExperimentConfig | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train and score what is missing under `output`; return all scores by part and seed.

    The world, its MT model and its LLM are those of the demo; a seed draws the first weights of what is trained and the
    order of its texts.

    Raises:
        ValueError: an unknown part, a seed twice, or `output` holds an experiment with other settings.
    """
    from mtllm_fast.miniworld.demo import base_models

    config = config or ExperimentConfig()
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds={tuple(seeds)}: expected different numbers")
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise ValueError(f"parts={unknown}: expected some of {', '.join(PARTS)}")
    root = Path(output)
    _check(root, config)
    world = World(seed=0)
    mt, llm = str(root / "models" / "mt"), str(root / "models" / "llm")
    if not (root / "models" / "llm" / "tokenizer.json").is_file():
        base_models(world, root / "models", seed=0, from_scratch=False)
    results: dict[str, Any] = {}
    for part in PARTS:  # some use the matrix's models, which it makes
        if part not in parts:
            continue
        results[part] = {}
        for seed in seeds:
            say(f"{part}, seed {seed}")
            folder = root / ("matrix" if part in ("adaptation", "typos") else part) / f"seed-{seed}"
            cells = Cells(folder, seed=seed, world=world, mt=mt, llm=llm, config=config, say=say)
            results[part][str(seed)] = _RUN[part](cells, root)
    return results


def _check(root: Path, config: ExperimentConfig) -> None:
    record = root / "experiment.json"
    if root.exists() and not root.is_dir():
        raise ValueError(f"output={str(root)!r}: is a file, not a folder")
    settings = json.loads(json.dumps(asdict(config)))
    if record.is_file() and json.loads(record.read_text()) != settings:
        raise ValueError(f"output={str(root)!r}: holds an experiment with other settings; name a new folder")
    if not record.is_file() and root.is_dir() and any(root.iterdir()):
        raise ValueError(f"output={str(root)!r}: holds something else than an experiment; name a new folder")
    root.mkdir(parents=True, exist_ok=True)
    write_json(record, settings)


def train_matrix(cells: Cells) -> dict[str, str]:
    """Folders of every trained system, and of the teacher."""
    from mtllm_fast.data import TextRow

    world, config = cells.world, cells.config
    train, dev = (
        kind_rows(world, ENGLISH, split, count)
        for split, count in (("train", config.train_rows), ("validation", config.dev_rows))
    )
    # readers of MT tokens are shown other word orders too, as in stage 3: none shall win by its texts' grammar
    free = kind_rows(world, ENGLISH, "train", config.train_rows, free=True)
    unlabelled = [TextRow(text, ENGLISH) for text in world.unlabelled(config.unlabelled)]
    plain = [TextRow(text, ENGLISH) for text in world.adaptation_texts(config.texts)]
    finetune = partial(cells.finetune, dev=dev)
    stages: dict[str, Callable[[str], Any]] = {
        "teacher": partial(finetune, kind="teacher", rows=train, steps=config.teacher_steps, llm=cells.llm),
        "encoder_only": partial(finetune, kind="encoder", rows=free, steps=config.encoder_steps, encoder=cells.mt),
        "adapted": partial(cells.adapt, texts=plain, steps=config.adapt_steps),
        "unadapted": cells.unadapted,
    }
    start = {name: str(cells.root / name) for name in stages}
    for name, model in (("direct_stack", "unadapted"), ("no_distillation", "adapted")):
        stages[name] = partial(finetune, kind="task", rows=free, steps=config.task_steps, model=start[model])
    distill = partial(cells.distill, teacher=start["teacher"], dev=dev, steps=config.distill_steps)
    for name, model, texts, kl in (
        ("full_kl", "adapted", unlabelled, 1.0),
        ("full", "adapted", unlabelled, 0.0),
        ("no_adaptation", "unadapted", unlabelled, 1.0),
        ("full_kl_labelled", "adapted", free, 1.0),
    ):
        stages[name] = partial(distill, model=start[model], texts=texts, kl=kl)
    return {name: cells.model(name, train) for name, train in stages.items()}


def matrix(cells: Cells, root: Path) -> dict[str, dict[str, float]]:
    """Accuracy of every system by language."""
    folders = train_matrix(cells)
    translate = Translations(root / "translations.json", cells.mt, cells.config.num_beams)
    scores = {}
    for name in SYSTEMS:

        def score(name: str = name) -> dict[str, float]:
            found = {}
            for code in (ENGLISH, *cells.world.languages):
                rows = kind_rows(cells.world, code, "test", cells.config.test_rows)
                if name == "translate_test" and code != ENGLISH:
                    rows = translate(rows)
                model = folders["teacher"] if name in ("direct", "translate_test") else folders[name]
                found[code] = cells.accuracy(model, rows)
            return found

        scores[name] = cells.scores(name, score)
    return scores


_RUN: dict[str, Callable[[Cells, Path], dict[str, Any]]] = {
    "matrix": matrix,
    "length": length,
    "adaptation": lambda cells, root: adaptation(cells, root, train_matrix(cells)),
    "typos": lambda cells, root: typos(cells, root, train_matrix(cells)),
    "ambiguity": ambiguity,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.miniworld.experiment", description=__doc__)
    parser.add_argument("--output", default="runs/experiment", help="new or unfinished folder of an experiment")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--report-only", action="store_true", help="report what is there, train nothing")
    options = parser.parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from mtllm_fast.cli import quiet

    quiet()
    if not options.report_only:
        run_experiment(
            options.output, seeds=options.seeds, parts=options.parts, say=lambda line: print(line, flush=True)
        )
    print(report(options.output))


if __name__ == "__main__":
    main()
