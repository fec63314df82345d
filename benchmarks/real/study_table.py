"""The study's table: means by group with intervals and seeds, and what MT-LLM gains over each other system."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import yaml
from numpy.typing import NDArray
from safetensors.numpy import load_file

from mtllm_fast.evaluation.results import Gap, ModelScores, Scores
from mtllm_fast.evaluation.statistics import interval, mean_samples
from mtllm_fast.evaluation.systems import TRANSLATE_TEST
from mtllm_fast.reporting.scores import read_scores
from mtllm_fast.reporting.table import Table

READ, NEW = "read before", "not read before"
CENTRED = ", centred"
OURS = "MT-LLM"
CPU_SECONDS = "CPU-seconds:"  # before their number, in the log of a training command


@dataclass(frozen=True)
class Study:
    """Where the runs and cells of a task are: `output`/seed-S/`task`/ and `output`/`task`/suite/."""

    output: Path
    task: str
    title: str
    seeds: Sequence[int]

    @property
    def suite(self) -> Path:
        return self.output / self.task / "suite"

    def run(self, seed: int, folder: str) -> Path:
        """A training run; stage 1 serves every task."""
        place = self.output / f"seed-{seed}"
        return place / folder if folder.startswith("adapted-") else place / self.task / folder


Hits = Mapping[str, NDArray[np.float64]]  # language -> (N,) share of seeds in which each of its rows came out right


def hits(study: Study, group: str, system: str, codes: Sequence[str]) -> Hits:
    """What a system got right in each language, row by row."""
    found = {}
    for code in codes:
        cells = []
        for index in range(len(study.seeds)):
            folder = study.suite / "cells" / quote(group, safe=" ") / quote(system, safe=" ") / f"seed {index + 1}"
            cell = load_file(folder / f"{code}.safetensors")
            cells.append(cell["predictions"] == cell["gold"])
        found[code] = np.mean(cells, axis=0)
    return found


def of_mean(rows: Hits) -> tuple[float, NDArray[np.float64]]:
    """The mean over languages and its bootstrap samples. Languages of equally many rows, which are then parallel, are
    resampled by the same draws."""
    middle = float(np.mean([values.mean() for values in rows.values()]))
    return middle, np.mean([mean_samples(values) for values in rows.values()], axis=0)


def difference(ours: Hits, theirs: Hits) -> list[float]:
    """Mean difference and its 95 % interval, rows resampled and both systems on the same draw."""
    middle, samples = of_mean({code: ours[code] - theirs[code] for code in ours})
    return [middle, *interval(samples)]


def of_training(study: Study, folder: str) -> dict[str, Any]:
    """CPU-seconds (loading included; of a stack, both of its stages) and best English validation accuracy of a system's
    runs, by seed; the CPU-seconds of a seed None where a log does not hold them all."""
    found: dict[str, Any] = {"cpu_seconds": [], "english_validation": []}
    for seed in study.seeds:
        path = study.run(seed, folder) / "result.json"
        if path.is_file():
            stages = [folder, *([f"adapted-{folder.split('-')[1]}"] if folder.startswith("stack-") else [])]
            used = [of_log(study.run(seed, stage).with_suffix(".log")) for stage in stages]
            found["cpu_seconds"].append(None if None in used else round(sum(filter(None, used))))
            found["english_validation"].append(json.loads(path.read_text(encoding="utf-8")).get("best_eval_accuracy"))
    return found


def of_log(path: Path) -> float | None:
    """CPU-seconds of a training command, of all the times that it was started; None where one did not say."""
    lines = path.read_text(encoding="utf-8").splitlines()
    used = [float(line.split()[1]) for line in lines if line.startswith(CPU_SECONDS)]
    started = sum(" -m mtllm_fast.cli " in line for line in lines)
    return sum(used) if used and len(used) == started else None


def of_checkpoints(study: Study, folder: str) -> list[dict[str, Any]]:
    """Of each seed's run, whenever it looked at other languages: the step, English validation accuracy (None where it
    was not asked then), and the mean over the watched languages, which chose nothing; empty where no run looked."""
    found = []
    for seed in study.seeds:
        english, watched = {}, {}
        for line in (study.run(seed, folder) / "log.jsonl").read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            if "eval_accuracy" in entry:
                english[entry["step"]] = entry["eval_accuracy"]
            scores = [value for key, value in entry.items() if key.startswith("watch_") and key.endswith("_accuracy")]
            if scores:
                watched[entry["step"]] = sum(scores) / len(scores)
        steps = sorted(watched)
        if steps:
            result = json.loads((study.run(seed, folder) / "result.json").read_text(encoding="utf-8"))
            found.append(
                {
                    "seed": seed,
                    "steps": steps,
                    "english_validation": [english.get(step) for step in steps],
                    "watched": [watched[step] for step in steps],
                    "chosen": watched[result["best_step"]],
                    "hindsight": max(watched[step] for step in steps),
                }
            )
    return found


def summarise(study: Study, systems: Mapping[str, str]) -> dict[str, Any]:
    """Everything that the table shows, from the suite's report and its cells; shares from 0 to 1."""
    parts = {part.task: part for part in read_scores(study.suite / "scores.json")}
    models = {}
    for name, folder in systems.items():
        models[name] = {"training": of_training(study, folder), "groups": {}, "languages": {}}
        for group, part in parts.items():
            scores = next(model for model in part.models if model.name == name)
            mean = scores.overall("non_english")
            assert mean is not None
            models[name]["groups"][group] = {
                "accuracy": mean.accuracy,
                "interval": list(mean.accuracy_interval),
                "seeds": scores.seed_means,
                "ours_minus_it": ours_minus(mean.gap),
                "gain_of_centring": of_centring(study, group, name, part.foreign()),
                "retrieval": of_retrieval(scores, part.foreign()),
            }
            if not group.endswith(CENTRED):
                models[name]["languages"] |= {code: score.accuracy for code, score in scores.languages.items()}
    first: Scores = next(iter(parts.values()))
    suite = yaml.safe_load((study.suite.parent / "suite.yaml").read_text(encoding="utf-8"))
    return {
        "task": study.title,
        "seeds": list(study.seeds),
        "languages": {g: p.foreign() for g, p in parts.items()},
        "dtype": suite.get("dtype", "float32"),
        "centre": max(task.get("centre", 0) for task in suite["tasks"]),
        "rows": first.limit or next(iter(first.models[0].languages.values())).rows,
        "english": {name: of_english(first, name) for name in systems},
        "texts": {name: int(f.split("-")[1]) for name, f in systems.items() if f.startswith("stack-")},
        "translated": of_translations(study),
        "systems": models,
        "checkpoints": of_checkpoints(study, systems[OURS]),
        "versions": first.versions,
    }


def of_retrieval(scores: ModelScores, codes: Iterable[str]) -> dict[str, Any] | None:
    """Share of texts whose nearest English state is that of their translation, a mean over languages with an interval
    over these; None where it was not asked for."""
    found = [one["to_english"] for code in codes if (one := scores.languages[code].alignment)]
    if not found:
        return None
    return {"to_english": float(np.mean(found)), "interval": list(interval(mean_samples(np.array(found))))}


def of_translations(study: Study) -> dict[str, Any] | None:
    """Language -> rows, translate-test's accuracy, and of each system its accuracy and gap to that, by the library's
    own report; None where there are no translations."""
    path = study.suite.with_name("translated") / "scores.json"
    if not path.is_file():
        return None
    part = read_scores(path)[0]
    found: dict[str, Any] = {}
    for code in part.shared():
        found[code] = {"systems": {}}
        for model in part.models:
            score = model.languages[code]
            own = {"accuracy": score.accuracy, "interval": list(score.accuracy_interval or ())}
            if score.gap is not None:
                own["gap"] = [score.gap.accuracy, score.gap.low, score.gap.high]
            found[code]["rows"] = score.rows
            found[code]["systems"][model.name] = own
    return found


def ours_minus(gap: Gap | None) -> list[float] | None:
    """What MT-LLM has more than a system, by the report's gap of that to MT-LLM; None for MT-LLM itself."""
    return None if gap is None else [-gap.accuracy, -gap.high, -gap.low]


def of_centring(study: Study, group: str, system: str, codes: Sequence[str]) -> list[float] | None:
    """What a system gains by centring, None where the group is of systems without."""
    if not group.endswith(CENTRED):
        return None
    centred, apart = (hits(study, name, system, codes) for name in (group, group.removesuffix(CENTRED)))
    return difference(centred, apart)


def of_english(part: Scores, system: str) -> dict[str, Any]:
    """English accuracy over the seeds with its interval: the task teacher's is the bound of what reads its states."""
    score = next(model for model in part.models if model.name == system).languages[part.english]
    return {"accuracy": score.accuracy, "interval": list(score.accuracy_interval or ())}


def markdown(found: Mapping[str, Any]) -> list[str]:
    """The table and how to read it."""
    groups = list(found["languages"])
    table = table_of(found, "system", {name: name for name in found["systems"]})
    lines = [*table.markdown(), "", "MT-LLM against the others, paired on the same rows:", ""]
    lines += [f"- {name}: {gains(system, groups)}" for name, system in found["systems"].items() if name != OURS]
    centred = [group for group in groups if group.endswith(CENTRED)]
    if centred:
        lines += [
            "",
            f"Centring by {found['centre']} unlabelled texts a language, each system against itself without:",
            "",
        ]
        lines += [
            f"- {name}: {gains(system, centred, 'gain_of_centring')}" for name, system in found["systems"].items()
        ]
    return [*lines, *retrieved(found), *translated(found)]


def table_of(found: Mapping[str, Any], first: str, named: Mapping[str, str], left: int = 1) -> Table:
    """A row for each system of `named`, by what the `first` column calls it."""
    groups = {group: len(codes) for group, codes in found["languages"].items()}
    heads = [first, "English", *(f"{name} ({count})" for name, count in groups.items()), "seeds, in this order"]
    rows = []
    for name, title in named.items():
        system = found["systems"][name]
        cells = [cell(found["english"][name]), *(cell(system["groups"][group]) for group in groups)]
        rows.append([title, *cells, by_seed(system, groups), cost(system)])
    return Table([*heads, "training, CPU-s"], rows, left=left)


def retrieved(found: Mapping[str, Any]) -> list[str]:
    """Lines on retrieval, none where it was not asked for."""
    lines = []
    for name, system in found["systems"].items():
        groups = {group: one["retrieval"] for group, one in system["groups"].items() if one.get("retrieval")}
        if groups:
            shares = (f"{cell({**one, 'accuracy': one['to_english']})} ({group})" for group, one in groups.items())
            lines.append(f"- {name}: {'; '.join(shares)}")
    if not lines:
        return []
    title = (
        f"Texts whose nearest English state, of {found['rows']}, is their translation's; in %, interval over languages:"
    )
    return ["", title, "", *lines]


def translated(found: Mapping[str, Any]) -> list[str]:
    """Lines on translate-test, none where there are no translations."""
    lines = []
    for code, one in (found.get("translated") or {}).items():
        systems = dict(one["systems"])
        own = systems.pop(TRANSLATE_TEST)
        against = (f"{name} {cell(system)}, {points(system['gap'])} against it" for name, system in systems.items())
        lines.append(f"- {code}, {one['rows']} rows: translate-test {cell(own)}; {'; '.join(against)}")
    return ["", "Translated into English and read by the task teacher:", "", *lines] if lines else []


def points(values: Sequence[float]) -> str:
    middle, low, high = (100 * value for value in values)
    return f"{middle:+.1f} [{low:+.1f}, {high:+.1f}]"


def by_seed(system: Mapping[str, Any], groups: Iterable[str]) -> str:
    return "; ".join(", ".join(f"{100 * s:.1f}" for s in system["groups"][group]["seeds"]) for group in groups)


def cost(system: Mapping[str, Any]) -> str:
    """Mean CPU-seconds of training over the seeds that know them."""
    used = [seconds for seconds in system["training"]["cpu_seconds"] if seconds is not None]
    return f"{sum(used) / len(used):.0f}" if used else "-"


def gains(system: Mapping[str, Any], groups: Iterable[str], what: str = "ours_minus_it") -> str:
    """By group, by default what MT-LLM has more than the system."""
    return "; ".join(f"{points(system['groups'][group][what])} ({group})" for group in groups)


def cell(value: Mapping[str, Any]) -> str:
    low, high = value["interval"]
    return f"{100 * value['accuracy']:.1f} [{100 * low:.0f}, {100 * high:.0f}]"


def head(found: Mapping[str, Any]) -> str:
    """What the table is of."""
    seeds = ", ".join(map(str, found["seeds"]))
    runs = [system["training"]["cpu_seconds"] for system in found["systems"].values()]
    known = sorted({seed for used in runs for seed, seconds in zip(found["seeds"], used) if seconds is not None})
    cost = f"seed{'s' * (len(known) > 1)} {', '.join(map(str, known))}" if known else "no seed"
    return (
        f"{found['task']} test, {found['rows']} rows a language, {found['dtype']}, seeds {seeds}; accuracy in % with "
        "95 % intervals over rows (languages and seeds fixed), by whether the "
        "encoder's pretraining had the language. CPU-seconds are of both "
        f"stages of a stack, its teacher's not counted, known of {cost}."
    )


def write_tables(study: Study, save: Path, systems: Mapping[str, str]) -> None:
    """The results into `save`, a .json file, with .md and .html beside it."""
    found = summarise(study, systems)
    save.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"# Real weights, real languages: {study.title}", "", head(found), "", *markdown(found), ""]
    save.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    save.with_suffix(".md").write_text("\n".join(lines), encoding="utf-8")
    shutil.copy(study.suite / "scores.html", save.with_suffix(".html"))
    print("\n".join(markdown(found)), flush=True)
