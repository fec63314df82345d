"""One stage under several seeds: a folder each, finished ones are kept, and a summary."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from ..jobs.durable import write_json
from .record import Metrics
from .stage_config import DistillConfig, FinetuneConfig, SftConfig

Config = TypeVar("Config", FinetuneConfig, DistillConfig, SftConfig)
PLACEHOLDER = "{seed}"


def run_seeds(config: Config, seeds: Sequence[int], stage: Callable[[Config], Metrics]) -> Metrics:
    """Run `stage` on `config` once per seed, into `config.output`/seed-N, and write `config.output`/summary.json.

    The same call goes on where an earlier one stopped: finished seeds are read, an unfinished one is resumed.
    `{seed}` in the folders that the config names (model, teacher, llm, encoder) stands for the seed.

    Returns:
        {"seeds": {seed: {"output", "best_eval_accuracy", "train_loss", "train_runtime"}}, "mean", "sample_std"}; the
        last two are of the accuracy on English validation, None without one.

    Raises:
        ValueError: no seeds, one twice, or a folder of a seed that holds a run with other settings.
    """
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise ValueError(f"seeds={tuple(seeds)}: expected different numbers >= 0, e.g. --seeds 42 43 44")
    results: dict[str, Metrics] = {}
    for seed in seeds:
        folder = Path(config.output) / f"seed-{seed}"
        named: dict[str, Any] = {
            name: value.replace(PLACEHOLDER, str(seed))
            for name in ("llm", "encoder", "model", "teacher")
            if PLACEHOLDER in (value := getattr(config, name, ""))
        }
        started = folder.is_dir() and any(folder.iterdir())
        one = replace(config, output=str(folder), resume=started, train=replace(config.train, seed=seed), **named)
        metrics = stage(one)
        kept = ("best_eval_accuracy", "train_loss", "train_runtime")
        results[str(seed)] = {"output": str(folder), **{name: metrics.get(name) for name in kept}}
        write_json(Path(config.output) / "summary.json", _summary(results))
    return _summary(results)


def _summary(results: dict[str, Metrics]) -> Metrics:
    scores = [found["best_eval_accuracy"] for found in results.values() if found["best_eval_accuracy"] is not None]
    return {
        "seeds": results,
        "metric": "accuracy on English validation, 0 to 1",
        "mean": statistics.mean(scores) if scores else None,
        "sample_std": statistics.stdev(scores) if len(scores) > 1 else None,
    }
