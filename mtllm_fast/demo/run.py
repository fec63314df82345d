"""Three training stages in English, then every system in every language: what `mtllm demo` does.

Everything here is what the commands `mtllm fetch | finetune | adapt | distill | evaluate` call, on files under the
output folder.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluation.pretraining import XLM_R
from .rows import ASSETS, ENGLISH, TOPICS, languages, write_task

if TYPE_CHECKING:
    from ..evaluation.tasks import FolderTask
    from .report import Results

MARKER = "demo.json"
PARTS = ("task", "teacher", "encoder_probe", "encoder_only", "adapted", "mt_llm", "translations")
RESULTS = ("results.json", "report.md", "scores.png")
PORTUGUESE = "por_Latn"


@dataclass(frozen=True)
class DemoConfig:
    """Sizes and settings of the demo, chosen by English validation accuracy and by time on two cores.

    rows: test rows a language. train_rows: English rows of the task.
    """

    rows: int = 16
    train_rows: int = 480
    teacher: dict[str, float] = field(default_factory=lambda: {"lr": 4e-4, "epochs": 2, "max_rows": 16})
    encoder: dict[str, float] = field(default_factory=lambda: {"lr": 1e-3, "epochs": 3, "max_rows": 16})
    adapt: dict[str, float] = field(default_factory=lambda: {"lr": 2e-4, "max_steps": 20, "max_rows": 16})
    adapt_loss: dict[str, Any] = field(default_factory=lambda: {"pooled_mse": 1.0, "paired_mse": 1.0})
    distill: dict[str, float] = field(default_factory=lambda: {"lr": 2e-4, "max_steps": 20, "max_rows": 16})
    distill_loss: dict[str, Any] = field(default_factory=lambda: {"pooled_mse": 1.0, "head_kl": 1.0})


def run_demo(
    output: str | Path = "runs/demo",
    *,
    encoder: str | Path,
    llm: str | Path,
    seed: int = 0,
    codes: Sequence[str] | None = None,
    config: DemoConfig | None = None,
    say: Callable[[str], None] = print,
) -> Results:
    """Run the demo and return what it writes to `output`/results.json; report.md and scores.png stand beside it.

    Args:
        output: a folder that is new, empty, or of an earlier demo, whose parts are then replaced.
        encoder, llm: model folders, from `mtllm fetch`.
        codes: languages of the test; all by default.
        say: told what happens next, a line at a time.

    Raises:
        ValueError: `output` holds something else than an earlier demo, or an argument does not fit.
    """
    from ..data import read_rows
    from ..evaluation import evaluate
    from ..evaluation.tasks import FolderTask
    from ..losses import DistillationWeights
    from ..models import MTLLM, LoraSettings
    from ..training.adapt import AdaptConfig, adapt
    from ..training.config import OptimSettings
    from ..training.distill import DistillConfig, distill
    from ..training.finetune import FinetuneConfig, finetune
    from .report import print_demo, summarise, write_report

    started = time.perf_counter()
    config = config or DemoConfig()
    root = fresh_folder(Path(output), PARTS, {"seed": seed, **asdict(config)})
    folders = {part: str(root / part) for part in PARTS}
    codes = list(codes) if codes else languages()
    write_task(root / "task", codes, rows=config.rows, train_rows=config.train_rows)
    task = FolderTask.from_folder(root / "task", name="topics", labels=TOPICS, id_column="id")
    train, valid = (task.rows(root / "task", ENGLISH, split) for split in ("train", "dev"))
    lora = LoraSettings(dropout=0.0)

    def optim(settings: Mapping[str, float]) -> OptimSettings:
        chosen: dict[str, Any] = {"max_steps": -1, "warmup": 0.1, "tokens": 1024, **settings}
        return OptimSettings(seed=seed, report_to="none", save_steps=10**6, log_steps=5, progress=False, **chosen)

    say("[1/6] Stage 2, task teacher: the LLM learns the task in English, by itself")
    teacher = finetune(
        FinetuneConfig(llm=str(llm), output=folders["teacher"], causal=True, lora=lora, train=optim(config.teacher)),
        train,
        TOPICS,
        valid,
    )
    say(f"      English validation: {100 * teacher['best_eval_accuracy']:.1f} %")
    say("[2/6] Baseline: the encoder alone learns the task in English (fine-tuned; and frozen, with a linear probe)")
    finetune(
        FinetuneConfig(encoder=str(encoder), output=folders["encoder_only"], lora=lora, train=optim(config.encoder)),
        train,
        TOPICS,
        valid,
    )
    MTLLM.stack(str(encoder), reader="encoder").save_pretrained(folders["encoder_probe"])
    say("[3/6] Stage 1: the LLM learns from itself to read through the encoder, on plain English text")
    texts = [*read_rows(ASSETS / "english.txt", language=ENGLISH), *(replace(row, label=None) for row in train)]
    adapt(
        AdaptConfig(
            encoder=str(encoder),
            llm=str(llm),
            output=folders["adapted"],
            causal=True,
            lora=lora,
            init="ridge",
            init_rows=len(texts),
            loss=DistillationWeights(**config.adapt_loss),
            over_variance=True,
            train=optim(config.adapt),
        ),
        texts,
    )
    say("[4/6] Stage 3: the stack learns the task from the teacher, in English")
    distill(
        DistillConfig(
            model=folders["adapted"],
            teacher=folders["teacher"],
            output=folders["mt_llm"],
            init_from="teacher",
            loss=DistillationWeights(**config.distill_loss),
            over_variance=True,
            train=optim(config.distill),
        ),
        [replace(row, label=None) for row in train],
        valid,
    )
    say(f"[5/6] {len(codes)} languages: the LLM directly, the encoder alone, the stack")
    systems = {"direct": "teacher", "encoder_probe": "encoder_probe", "encoder_only": "encoder_only"}
    systems["mt_llm"] = "mt_llm"
    models = {name: folders[folder] for name, folder in systems.items()}
    known = [ENGLISH, *(code for code in codes if code in XLM_R and code != ENGLISH)]
    scores = [evaluate(models, task, root / "task", languages=known, progress=False)]
    if others := [code for code in codes if code not in XLM_R]:
        scores.append(evaluate(models, task, root / "task", languages=others, progress=False))
    translated = None
    if PORTUGUESE in codes and (path := _translations(task, root, say)) is not None:
        translated = evaluate(
            {},
            task,
            root / "task",
            languages=[PORTUGUESE],
            translations=path,
            teacher=folders["teacher"],
            progress=False,
        )
    say("[6/6] Writing the report")
    results = summarise(scores, translated, seconds=time.perf_counter() - started, seed=seed)
    write_report(results, scores[0], root)
    print_demo(results)
    say(f"results.json, report.md, scores.png and every model are in {root}")
    return results


def _translations(task: FolderTask, root: Path, say: Callable[[str], None]) -> Path | None:
    """Portuguese test rows in English by a real MT model, where the package that carries it is installed."""
    from ..models.packages.translate import translate_portuguese

    rows = task.rows(root / "task", PORTUGUESE, "test")
    try:
        english = translate_portuguese([row.text for row in rows])
    except ValueError as error:
        say(f"      no translate-test: {error}")
        return None
    path = root / "translations" / "portuguese.jsonl"
    path.parent.mkdir()
    lines = (
        {"id": row.id, "language": PORTUGUESE, "field": "text", "source": row.text, "translation": text}
        for row, text in zip(rows, english, strict=True)
    )
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def fresh_folder(root: Path, parts: Sequence[str], settings: Mapping[str, object]) -> Path:
    """An output folder without `parts`, which an earlier demo left there, and with the settings of the new one.

    Raises:
        ValueError: it holds something else than an earlier demo.
    """
    if root.exists() and not root.is_dir():
        raise ValueError(f"output={str(root)!r}: is a file, not a folder")
    if root.is_dir() and any(root.iterdir()) and not (root / MARKER).is_file():
        raise ValueError(f"output={str(root)!r}: holds something else than an earlier demo; name a new folder")
    for part in parts:
        shutil.rmtree(root / part, ignore_errors=True)
    for name in RESULTS:
        (root / name).unlink(missing_ok=True)
    root.mkdir(parents=True, exist_ok=True)
    (root / MARKER).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return root
