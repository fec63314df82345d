"""Steps of recipes without the seconds of imports that a process of their own costs, and what recipes read."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from mtllm_fast import cli
from mtllm_fast.jobs.measured import Ended, Used

QUICK = [
    "*.report_to=none", "*.device=cpu", "*.progress=false", "*.tokens=128", "*.max_length=48", "*.max_rows=4", "*.save_steps=2",
    "*.max_steps=4", "*.epochs=1", "*.warmup=0.0",
]  # fmt: skip
WORDS = {"a": "river bridge stone mill", "b": "bread apples cheese loaf", "c": "star light science distance"}
LANGUAGES = ("eng_Latn", "fra_Latn", "swh_Latn")


def inside(words: Sequence[str], log: Path | None, report: Callable[[Used], object]) -> Ended:
    """In place of `run_measured`: the command in this very process."""
    code = 0
    try:
        cli.main(list(words[words.index("mtllm_fast.cli") + 1 :]))
    except SystemExit as ending:
        code = int(ending.code or 0)
    return Ended(code, Used(1.0, 0.5, 2**20), None)


def forked(words: Sequence[str], log: Path | None, report: Callable[[Used], object]) -> Ended:
    """In place of `run_measured`: the command in a process forked from this one."""
    pid = os.fork()
    if not pid:
        try:
            cli.main(list(words[words.index("mtllm_fast.cli") + 1 :]))
        except SystemExit as ending:
            os._exit(int(ending.code or 0))
        os._exit(0)
    report(Used(0.1, 0.1, 2**20))
    _, status, usage = os.wait4(pid, 0)
    used = Used(0.2, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)
    return Ended(os.waitstatus_to_exitcode(status), used, None)


def models(folder: Path) -> dict[str, bytes]:
    """The weights that every step of a run made."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob("*/model*.safetensors"))}


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "recipe.json").read_text())


def write_yaml(path: Path, content: object) -> str:
    """A file of text, or of what is YAML."""
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return str(path)


def write_data(root: Path) -> dict[str, str]:
    """Role -> what tiny recipes read: a task of three languages, English lines."""
    rng = random.Random(0)

    def text(label: str, number: int) -> str:
        return " ".join([*rng.choices(WORDS[label].split(), k=3), str(number)])

    for language in LANGUAGES:
        (root / "task" / language).mkdir(parents=True)
        for split, count in (("train", 24), ("dev", 9), ("test", 12)):
            rows = [f"{split}{i}\t{text('abc'[i % 3], i)}\t{'abc'[i % 3]}\n" for i in range(count)]
            (root / "task" / language / f"{split}.tsv").write_text("id\ttext\tlabel\n" + "".join(rows))
    lines = [f"The {text('abc'[i % 3], i)} runs past the old harbour." for i in range(40)]
    (root / "english.txt").write_text("\n".join(lines) + "\n")
    return {"english": str(root / "english.txt"), "task": "folder", "folder": str(root / "task")}


def write_pairs(root: Path) -> dict[str, str]:
    """Role -> prompts, a dictionary, labelled translations with their English, English texts that match, and rows with
    targets: translations, translations with an answer behind them."""
    rng = random.Random(1)
    found = {"dictionary": str(root / "dictionary.txt")}
    Path(found["dictionary"]).write_text("river fleuve\nbread mkate\nold vieux\nstar nyota\n")
    for role in ("pairs", "prompts", "chains", "matches"):
        rows = []
        for number in range(32):
            words = [rng.choice(" ".join(WORDS.values()).split()) for _ in range(3)]
            row = {"text": f"{' '.join(words)} {number}", "language": LANGUAGES[1 + number % 2]}
            if role == "matches":
                row["language"] = LANGUAGES[0]
            target = {"pairs": " ".join(reversed(words)), "chains": f"{words[1]}: {words[0]}"}
            target["matches"] = target["pairs"]
            rows.append({**row, "target": target[role]} if role in target else {**row, "english": " ".join(words)})
        found[role] = str(root / f"{role}.jsonl")
        Path(found[role]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    found["translated"] = str(root / "translated.jsonl")
    rows = []
    for number in range(24):
        label, language = "abc"[number % 3], LANGUAGES[number % 4 % 3]
        english = " ".join(rng.choices(WORDS[label].split(), k=2 + number % 4))
        text = english if language == LANGUAGES[0] else f"le {english} {number}"
        rows.append({"text": text, "language": language, "english": english, "label": label})
    Path(found["translated"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return found
