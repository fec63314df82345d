"""The study on real weights: which system reads which language, by the library's own commands.

    mtllm fetch e5-small --output models/e5-small; mtllm fetch smollm2-135m --output models/smollm2-135m
    python -m benchmarks.real.study --data DIR --encoder models/e5-small --llm models/smollm2-135m --output runs/study

DIR holds the task's data and the English MNLI sample (`sib200/<language>/<split>.tsv`, `nusax_senti/...`,
`mnli_sample/en/train.json`, `xnli/...`, `americasnli/...`); the text of stage 1 is SIB-200's English training
sentences and MNLI's, and its runs serve every task of one --output. `--task nli` trains on MNLI's sample and is tested
on XNLI and AmericasNLI. Where translations into English are at hand (AmericasNLI's by NLLB, Portuguese by a package),
the task teacher reads them too: translate-test. Every training run is one `mtllm` command and every score a cell of
`mtllm evaluate --suite`, so the same command goes on where it was stopped; seeds are finished one after the other, and
the table is of those that are. Settings were chosen on English validation of SIB-200 alone (see benchmarks/LOG.md);
another setting needs another --output. --bf16 is for processors that multiply it faster than fp32 (AVX-512 BF16, AMX).
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mtllm_fast.evaluation import get_task
from mtllm_fast.evaluation.pretraining import XLM_R
from mtllm_fast.jobs.measured import run_measured
from mtllm_fast.models.packages.translate import translate_portuguese

from .study_table import CENTRED, CPU_SECONDS, NEW, OURS, READ, Study, write_tables

COMMON = {"tokens": 1024, "max_rows": 16, "warmup": 0.1, "lora.dropout": 0.0, "save_steps": 50, "report_to": "none"}
TEACHER = {"lr": 4e-4, "epochs": 4, "max_steps": -1}
ENCODER = {"lr": 1e-3, "epochs": 3, "max_steps": -1}
ADAPT = {"lr": 2e-4, "init": "ridge", "init_rows": 2000, "over_variance": True, "loss.pooled_mse": 1.0}
ADAPT |= {"loss.paired_mse": 1.0, "causal": True}
DISTILL = {"lr": 5e-4, "loss.pooled_mse": 1.0, "loss.head_kl": 1.0, "over_variance": True, "max_steps": 88}
DISTILL |= {"save_steps": 22}
# the name in the table -> the folder of a seed's run; between the last two, stacks after less text
FIRST = {"LLM directly": "teacher", "encoder, probe": "probe", "encoder, fine-tuned": "encoder"}
ANEW = "MT-LLM, adapter anew"


@dataclass(frozen=True)
class StudyTask:
    """What a study trains on and tests on. Folders are under --data.

    Fields:
        task, folder: of the library, trained on in English; tested on too unless `tested` names others.
        english: as the tasks name it.
        languages: tested in by default; all that there are where none is named.
        tested: (task, folder) of each set tested on.
        translations: (task, folder of its rows, folder of translations into English, languages); where the folder of
            translations is empty, the package that translates Portuguese makes them.
        settings: of a training command, instead of those of the others.
    """

    title: str
    task: str
    folder: str
    english: str
    languages: tuple[str, ...] = ()
    tested: tuple[tuple[str, str], ...] = ()
    translations: tuple[str, str, str, tuple[str, ...]] | None = None
    settings: Mapping[str, Mapping[str, object]] = field(default_factory=dict)

    def sets(self) -> tuple[tuple[str, str], ...]:
        return self.tested or ((self.task, self.folder),)


# African, Asian, American, European and Pacific languages of ten scripts, half of them read by the encoder before
SAMPLE = """
    arb_Arab ben_Beng deu_Latn ell_Grek hin_Deva ind_Latn jpn_Jpan rus_Cyrl spa_Latn swh_Latn tam_Taml
    tha_Thai tur_Latn vie_Latn zho_Hans
    ace_Latn bod_Tibt ewe_Latn fij_Latn ibo_Latn kin_Latn lus_Latn min_Latn mri_Latn quy_Latn sat_Olck tat_Cyrl
    wol_Latn yor_Latn zul_Latn
""".split()  # noqa: SIM905
# one pass over MNLI's 8,999 pairs, and half of one for a stack
PAIRS: dict[str, dict[str, object]] = {
    "teacher": {"epochs": 1, "save_steps": 281},
    "encoder": {"epochs": 1, "save_steps": 281},
    "stack": {"max_steps": 280, "save_steps": 140},
}
TASKS = {
    "sib200": StudyTask(
        "SIB-200", "sib200", "sib200", "eng_Latn", tuple(SAMPLE), translations=("sib200", "sib200", "", ("por_Latn",))
    ),
    "nusax": StudyTask("NusaX sentiment", "nusax", "nusax_senti", "english"),
    "nli": StudyTask(
        "XNLI (read before) and AmericasNLI (not)",
        "mnli",
        "mnli_sample",
        "en",
        tested=(("xnli", "xnli"), ("americasnli", "americasnli")),
        translations=("americasnli", "americasnli", "amnli_nllb600m/derived", ("aym", "gn", "quy")),
        settings=PAIRS,
    ),
}


def write_texts(data: Path, target: Path) -> int:
    """English text for stage 1, one a line: SIB-200's training sentences and MNLI's, in one seeded order."""
    found: dict[str, None] = {}
    with (data / "sib200" / "eng_Latn" / "train.tsv").open(encoding="utf-8", newline="") as file:
        found.update({" ".join(row["text"].split()): None for row in csv.DictReader(file, delimiter="\t")})
    pairs = json.loads((data / "mnli_sample" / "en" / "train.json").read_text(encoding="utf-8"))
    for row in pairs.values():
        found.update({" ".join(row[name].split()): None for name in ("text_a", "text_b")})
    lines = [line for line in found if len(line) > 20]
    random.Random(0).shuffle(lines)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)


def command(name: str, settings: dict[str, object]) -> list[str]:
    """An mtllm command line."""
    words = [sys.executable, "-m", "mtllm_fast.cli", name]
    for key, value in settings.items():
        option = "--" + key.replace("_", "-")
        words += [option] if value is True else [option, *map(str, value if isinstance(value, list) else [value])]
    return words


def train(stage: str, output: Path, settings: dict[str, object]) -> None:
    """One training command, unless its run is finished; one that was stopped goes on."""
    if (output / "result.json").is_file():
        return
    settings = {**settings, "output": output}
    if (output / "run.json").is_file():
        settings["resume"] = True
    output.parent.mkdir(parents=True, exist_ok=True)
    print(f"{stage} -> {output}", flush=True)
    words, path = command(stage, {**settings, "no_progress": True}), output.with_suffix(".log")
    add_line(path, " ".join(words))
    ended = run_measured(words, path)
    add_line(path, f"{CPU_SECONDS} {ended.used.cpu_seconds:.1f}")
    if ended.code or ended.received:
        raise SystemExit(f"{stage} ended with {ended.received or ended.code}: see {path}")
    print(f"    {ended.used.seconds:.0f} s", flush=True)


def add_line(path: Path, line: str) -> None:
    with path.open("a") as file:
        file.write(line + "\n")


def train_seed(options: argparse.Namespace, seed: int) -> None:
    """Every model of one seed: the task teacher, the baselines, and the stacks after 0 and more texts of stage 1.

    Stage 3 of the last stack also looks at other languages whenever it is validated in English; that chooses nothing.
    """
    root = options.output / f"seed-{seed}"
    of_task = root / options.task
    plan = TASKS[options.task]
    own = {stage: dict(plan.settings.get(stage, {})) for stage in ("teacher", "encoder", "stack")}
    task = {"task": plan.task, "data": options.data / plan.folder}
    common = {**COMMON, "seed": seed, **({"bf16": True} if options.bf16 else {})}
    bases = {"encoder": options.encoder, "llm": options.llm}
    if not (root / "probe").exists():
        words = {"model": options.encoder, "from": "encoder", "output": root / "probe"}
        subprocess.run(command("convert", words), check=True, stdout=subprocess.DEVNULL)
    train(
        "finetune",
        of_task / "teacher",
        {"llm": options.llm, "causal": True, **task, **common, **TEACHER, **own["teacher"]},
    )
    if not options.stacks:
        settings = {"encoder": options.encoder, **task, **common, **ENCODER, **own["encoder"]}
        train("finetune", of_task / "encoder", settings)
    adapted = {key: value for key, value in common.items() if not key.startswith("lora.")}
    for texts in options.texts:
        steps = {"max_steps": texts // COMMON["max_rows"], "text": options.output / "texts.txt"}
        train("adapt", root / f"adapted-{texts}", {**bases, **common, **ADAPT, **steps})
        starts = {"": "teacher", "-anew": "adapted"} if options.anew and texts == options.texts[-1] else {"": "teacher"}
        for name, start in starts.items():
            models = {"model": root / f"adapted-{texts}", "teacher": of_task / "teacher", "init_from": start}
            settings = {**models, **task, **adapted, **DISTILL, **own["stack"]}
            if options.watch and texts == options.texts[-1] and not name:
                seen = languages_of(options, plan.sets()[0][0])
                settings |= {"watch.languages": seen, "watch.split": "test", "watch.steps": 22}
                settings |= {"watch.limit": options.watch}
            train("distill", of_task / f"stack-{texts}{name}", settings)


def systems(texts: list[int], anew: bool = False, stacks: bool = False) -> dict[str, str]:
    """Name in the table -> folder of a seed's run; with `anew` also stage 3 from the adapted model's own adapter, with
    `stacks` without the baselines."""
    least = {0: "stack without stage 1"}
    counted = {least.get(count, f"stack, {count:,} texts"): f"stack-{count}" for count in texts[:-1]}
    found = {**({} if stacks else FIRST), **counted, OURS: f"stack-{texts[-1]}"}
    return {**found, ANEW: f"stack-{texts[-1]}-anew"} if anew else found


def languages_of(options: argparse.Namespace, task: str) -> list[str]:
    """The languages that a set is tested in, English not among them."""
    plan = TASKS[options.task]
    there = {name: get_task(name).languages(str(options.data / place)) for name, place in plan.sets()}
    every = sorted(there[task])
    asked = every if options.languages == ["all"] else options.languages or plan.languages or every
    wrong = [code for code in asked if all(code not in codes for codes in there.values())]
    if wrong:
        raise SystemExit(f"--languages: {', '.join(wrong)}: not of {options.task}")
    return [code for code in asked if code in every and code != plan.english]


def groups_of(options: argparse.Namespace) -> dict[str, dict[str, object]]:
    """The entries of a suite by name: what the encoder has read before apart from what it has not."""
    plan = TASKS[options.task]
    found: dict[str, dict[str, object]] = {}
    for task, folder in plan.sets():
        codes = {name: get_task(task).mt_code(name) for name in languages_of(options, task)}
        source = str(options.data / folder)
        english = [plan.english] if plan.english in get_task(task).languages(source) else []
        for group, chosen in (
            (READ, [name for name, code in codes.items() if code in XLM_R]),
            (NEW, [name for name, code in codes.items() if code not in XLM_R]),
        ):
            if chosen:
                assert group not in found, f"{options.task}: two sets have languages {group}"
                found[group] = {"task": task, "name": group, "data": source, "languages": [*english, *chosen]}
    return found


def places_of(options: argparse.Namespace) -> dict[str, str]:
    """System -> its folders; the page's bars are of the first model, which no other order depends on."""
    ordered = sorted(systems(options.texts, options.anew, options.stacks).items(), key=lambda system: system[0] != OURS)
    places = {name: folder if folder == "probe" else f"{options.task}/{folder}" for name, folder in ordered}
    return {name: str(options.output / "seed-{seed}" / place) for name, place in places.items()}


def evaluate(options: argparse.Namespace, seeds: list[int]) -> None:
    """Every system in every language, and where translations are at hand the teacher on them."""
    tasks = list(groups_of(options).values())
    if options.centre:
        tasks += [{**entry, "name": f"{entry['name']}{CENTRED}", "centre": options.centre} for entry in tasks]
    run_suite(options, "suite", {"seeds": seeds, "models": places_of(options), "against": OURS, "tasks": tasks})
    plan = TASKS[options.task]
    if plan.translations is None or options.stacks:
        return
    task, folder, translations, codes = plan.translations
    source = options.data / folder
    place = options.data / translations if translations else write_portuguese(options, task, source, codes)
    places = places_of(options)
    test = {"teacher": places["LLM directly"], "translations": str(place)}
    entry: dict[str, object] = {"task": task, "data": str(source), "languages": list(codes)}
    models = {name: places[name] for name in (OURS, "encoder, fine-tuned")}
    run_suite(options, "translated", {"seeds": seeds, "models": models, "translate_test": test, "tasks": [entry]})


def write_portuguese(options: argparse.Namespace, task: str, source: Path, codes: Iterable[str]) -> Path:
    """Test rows in English by the MT model of a package, one after another; once."""
    path = options.output / options.task / "translations.jsonl"
    if not path.exists():
        lines = []
        for code in codes:
            rows = get_task(task).rows(source, code, "test")
            for row, text in zip(rows, translate_portuguese([row.text for row in rows]), strict=True):
                record = {"id": row.id, "language": code, "field": "text", "source": row.text, "translation": text}
                lines.append(json.dumps(record, ensure_ascii=False) + "\n")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines), encoding="utf-8")
    return path


def run_suite(options: argparse.Namespace, name: str, content: dict[str, Any]) -> None:
    """`mtllm evaluate --suite` into the task's folder of that name, which goes on where it was stopped."""
    root = options.output / options.task
    root.mkdir(parents=True, exist_ok=True)
    tasks = [{**entry, "limit": options.limit} if options.limit else entry for entry in content["tasks"]]
    content = {"output": str(root / name), **content, "tasks": tasks, "alignment": bool(options.alignment)}
    content |= {"dtype": "bfloat16"} if options.bf16 else {}
    path = root / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    began = time.perf_counter()
    print(f"evaluate, {name}, seeds {content['seeds']}", flush=True)
    log = root / ("evaluate.log" if name == "suite" else f"{name}.log")
    with log.open("a") as file:
        words = command("evaluate", {"suite": path, "no_progress": True})
        done = subprocess.run(words, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        raise SystemExit(f"evaluate ended with {done.returncode}: see {log}")
    print(f"    {time.perf_counter() - began:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the task's data and mnli_sample/")
    parser.add_argument("--task", choices=TASKS, default="sib200")
    parser.add_argument("--encoder", type=Path, required=True, help="model folder")
    parser.add_argument("--llm", type=Path, required=True, help="model folder")
    parser.add_argument("--output", type=Path, default=Path("runs/study"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--texts", type=int, nargs="+", default=[0, 2000], help="texts of stage 1, rising")
    parser.add_argument("--anew", action="store_true", help="also stage 3 from the adapted model's own adapter")
    parser.add_argument("--stacks", action="store_true", help="only the stacks: what text for stage 1 brings")
    parser.add_argument("--bf16", action="store_true", help="train under bf16 autocast, evaluate bf16 weights")
    parser.add_argument(
        "--languages", nargs="+", help='the task\'s codes or "all"; by default of SIB-200 31 of both groups'
    )
    parser.add_argument("--limit", type=int, help="test rows a language, drawn once; by default all")
    parser.add_argument(
        "--centre", type=int, help="also score with encoder states centred by so many unlabelled texts a language"
    )
    parser.add_argument("--alignment", action="store_true", help="also retrieve the English row of each row's states")
    parser.add_argument("--watch", type=int, help="test rows a language that stage 3 of the last stack logs scores of")
    parser.add_argument("--save", type=Path, help="FILE.json for the results, with .md and .html beside it")
    options = parser.parse_args()
    if sorted(set(options.texts)) != options.texts:
        parser.error(f"--texts {options.texts}: expected rising numbers")
    texts = options.output / "texts.txt"
    count = len(texts.read_text(encoding="utf-8").splitlines()) if texts.exists() else write_texts(options.data, texts)
    if options.texts[-1] > count:
        parser.error(f"--texts {options.texts[-1]}: {options.data} holds {count} English texts")
    for name, given in (("--watch", options.watch), ("--centre", options.centre), ("--alignment", options.alignment)):
        if given and TASKS[options.task].tested:
            parser.error(f"{name}: {options.task} is trained in English alone, and tested on other sets")
    save = options.save or options.output / f"{options.task}.json"
    plan = TASKS[options.task]
    for done, seed in enumerate(options.seeds, 1):
        train_seed(options, seed)
        evaluate(options, options.seeds[:done])
        study = Study(options.output, options.task, plan.title, options.seeds[:done])
        write_tables(study, save, systems(options.texts, options.anew, options.stacks))


if __name__ == "__main__":
    main()
