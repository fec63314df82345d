"""What every stage and command makes from fixed inputs, as digests: a change that should change nothing is held to it.

    python -m tests.goldens save FILE.json       before
    python -m tests.goldens check FILE.json      after; exit code 1 and the names of what differs

Two processes on the same machine give the same bytes; another processor may round otherwise, so no digests are
committed. Everything goes through `mtllm` commands: the method's three stages with each loss, a token store, gradient
accumulation, LoRA and its dropout, a resumed run, a suite against translate-test, encode in three formats, translate,
convert. Less than a minute.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from pyarrow import parquet
from safetensors.numpy import load_file

from .forked import Forked
from .tiny import LINES, build_encoder_folder, build_llm_folder

REPO = Path(__file__).resolve().parents[1]
TIMES = re.compile("second|_per_s|runtime|time_s|source|^check$")  # a store knows the time of its file, and checks it
COMMON = {"tokens": 128, "max_length": 48, "log_steps": 5, "report_to": "none", "device": "cpu", "seed": 3}
LANGUAGES = {"eng_Latn": "", "deu_Latn": "ü", "swh_Latn": "wa "}


def make_inputs(folder: Path) -> None:
    """Tiny models, the shipped MT model of the generated world, plain text and a labelled task in three languages."""
    build_encoder_folder(folder / "encoder")
    build_llm_folder(folder / "llm")
    (assets,) = (path.parent for path in REPO.glob("*/miniworld/assets/mt"))
    (folder / "mt").symlink_to(assets / "mt")
    rng, words = random.Random(0), " ".join(LINES).split()

    def sentence() -> str:
        return " ".join(rng.choices(words, k=rng.randint(3, 16)))

    (folder / "text.txt").write_text("".join(f"{sentence()} {number}\n" for number in range(1500)), encoding="utf-8")
    (folder / "foreign.txt").write_text("".join(f"{sentence()}\n" for _ in range(10)), encoding="utf-8")
    rows = {split: [(rng.choice("abc"), sentence()) for _ in range(n)] for split, n in (("train", 160), ("dev", 24))}
    rows["test"] = [(rng.choice("abc"), sentence()) for _ in range(30)]
    for code, before in LANGUAGES.items():
        (folder / "task" / code).mkdir(parents=True)
        for split, lines in rows.items():
            body = "".join(f"{i}\t{before}{text}\t{label}\n" for i, (label, text) in enumerate(lines))
            (folder / "task" / code / f"{split}.tsv").write_text("id\ttext\tlabel\n" + body, encoding="utf-8")
    english = [
        {"id": str(i), "language": code, "field": "text", "translation": text[: len(text) // 2]}
        for code in LANGUAGES
        for i, (_, text) in enumerate(rows["test"])
    ]
    (folder / "translations.jsonl").write_text("".join(json.dumps(one) + "\n" for one in english), encoding="utf-8")
    suite = {
        "output": "suite",
        "models": {"stack": "distilled", "teacher": "teacher", "alone": "alone", "adapted": "adapted"},
        "tasks": [{"task": "folder", "data": "task"}, {"task": "folder", "name": "few", "data": "task", "limit": 12}],
        "translate_test": {"teacher": "teacher", "translations": "translations.jsonl"},
        "alignment": True,
        "resamples": 200,
    }
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite), encoding="utf-8")


def commands() -> list[tuple[str, dict[str, Any]]]:
    """Every command in order, on paths below the working folder."""
    bases = {"encoder": "encoder", "llm": "llm"}
    adapt = {**bases, **COMMON, "max_steps": 50, "save_steps": 20, "lookahead": 64}
    paired = {"loss.paired_mse": 1, "loss.pooled_mse": 1, "over_variance": True, "lora.dropout": 0.1}
    task = {"task": "folder", "data": "task", **COMMON, "save_steps": 10}
    losses = {"loss.pooled_mse": 1, "loss.head_kl": 1, "loss.paired_mse": 0.3}
    few = {**adapt, "max_steps": 12, "save_steps": 6}
    return [
        ("tokenize", {**bases, "text": "text.txt", "output": "store", "max_length": 48}),
        ("adapt", {**adapt, **paired, "text": "text.txt", "gradient_accumulation": 2, "workers": 2, "output": "adapted"}),
        ("adapt", {**few, "text": "store", "loss.pooled_mse": 1, "output": "stored"}),
        ("adapt", {**few, "text": "text.txt", "loss.pooled_mse": 0, "loss.kl": 1, "causal": True, "output": "kl"}),
        ("adapt", {**few, "text": "text.txt", "loss.pooled_mse": 1, "init": "ridge", "init_rows": 200, "output": "ridge"}),
        ("finetune", {"llm": "llm", **task, "max_steps": 30, "output": "teacher"}),
        ("finetune", {"encoder": "encoder", **task, "max_steps": 20, "output": "alone"}),
        ("finetune", {"model": "adapted", **task, "max_steps": 20, "output": "supervised"}),
        ("distill", {"model": "adapted", "teacher": "teacher", **task, **losses, "max_steps": 30, "output": "distilled"}),
        ("distill", {"model": "adapted", "teacher": "teacher", **task, "init_from": "teacher", "max_steps": 10,
                     "over_variance": True, "train_projection": True, "output": "started"}),
        ("evaluate", {"suite": "suite.yaml"}),
        *(("encode", {"model": "adapted", "input": "text.txt", "language": "eng_Latn", "output": f"states.{kind}",
                      "device": "cpu"}) for kind in ("npy", "safetensors", "parquet")),
        ("encode", {"model": "distilled", "input": "task/deu_Latn/test.tsv", "language": "deu_Latn", "id_column": "id",
                    "output": "german.parquet", "device": "cpu"}),
        ("translate", {"model": "mt", "input": "foreign.txt", "language": "xaa_Latn", "num_beams": 2,
                       "output": "translated.jsonl", "device": "cpu"}),
        ("convert", {"model": "distilled", "output": "merged", "to": "merged"}),
    ]  # fmt: skip


IN_FOLDER = "import os, sys; os.chdir(sys.argv[1]); from mtllm_fast import cli; cli.main(sys.argv[2:])"


def run(forked: Forked, folder: Path, name: str, options: dict[str, Any]) -> None:
    words = [name]
    for key, value in options.items():
        option = "--" + key.replace("_", "-")
        words += [option] if value is True else [option, str(value)]
    words += [] if name in ("tokenize", "convert") else ["--no-progress"]
    forked.start(folder, *words, code=IN_FOLDER)
    status, said = forked.wait()
    if status:
        raise SystemExit(f"mtllm {' '.join(words)}\nended with {status}:\n{said[-3000:]}")


def digests(folder: Path) -> dict[str, str]:
    """Path -> digest of what it holds, times left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".safetensors":
            tensors = load_file(path)
            content = b"".join(
                f"{key} {one.dtype} {one.shape}".encode() + one.tobytes() for key, one in tensors.items()
            )
        elif path.suffix == ".parquet":
            content = repr(parquet.read_table(path).to_pydict()).encode()
        elif path.suffix in (".npy", ".bin", ".tsv", ".csv") or path.name == "translated.jsonl":
            content = path.read_bytes()
        elif path.name in ("log.jsonl", "scores.json", "result.json", "config.json", "store.json"):
            lines = [path.read_text(encoding="utf-8")]
            lines = lines[0].splitlines() if path.suffix == ".jsonl" else lines
            content = json.dumps([without_times(json.loads(line)) for line in lines], sort_keys=True).encode()
        else:
            continue
        found[name] = hashlib.sha256(content.replace(str(folder).encode(), b"")).hexdigest()[:16]
    return found


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(one) for key, one in value.items() if not TIMES.search(key)}
    return [without_times(one) for one in value] if isinstance(value, list) else value


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.goldens", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=("save", "check"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--folder", type=Path, help="keep everything in this folder, which is not there yet")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="goldens-") as name, Forked() as forked:
        folder = options.folder or Path(name)
        make_inputs(folder)
        for command, settings in commands():
            print(f"mtllm {command} -> {settings.get('output', 'suite')}", flush=True)
            run(forked, folder, command, settings)
        found = digests(folder)
    if options.what == "save":
        options.file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"{len(found)} digests -> {options.file}")
        return 0
    before = json.loads(options.file.read_text(encoding="utf-8"))
    wrong = [name for name in sorted(before.keys() | found.keys()) if before.get(name) != found.get(name)]
    for path in wrong:
        print(f"{path}: {'gone' if path not in found else 'new' if path not in before else 'differs'}")
    print(f"{len(before) - len([n for n in wrong if n in before])} of {len(before)} equal")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
