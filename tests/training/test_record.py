"""What a run reports of itself: the same whether it was interrupted or not, and right; the order of task rows."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path

import pytest

from mtllm_fast import MTLLM, HeadConfig, TextRow, read_rows
from mtllm_fast.data import PackedDataset
from mtllm_fast.losses import DistillationWeights
from mtllm_fast.models import LoraSettings
from mtllm_fast.training import AdaptConfig, DistillConfig, FinetuneConfig, adapt, distill, finetune
from mtllm_fast.training.epochs import EpochLoader
from mtllm_fast.training.live import ModelFlops
from mtllm_fast.training.stage import Stage
from tests.tiny import LINES
from tests.training.short_runs import entries, logged, optim, same_weights, stopped_in

ROWS = [TextRow(f"{line} {i}", id=f"row-{i}") for i, line in enumerate(LINES * 4)]
SORTED = [TextRow(line + " " + name, label=k) for k, name in enumerate(("good", "bad")) for line in LINES * 2]
REPORTED = ("train_loss", "epoch", "total_flos", "data", "skipped_steps")


_optim = partial(optim, max_steps=8, save_steps=100, log_steps=4, gradient_accumulation=2)


def _adapt(encoder: str, llm: str, output: Path, rows=ROWS, *, resume: bool = False, **train) -> dict:
    config = AdaptConfig(
        encoder=encoder, llm=llm, output=str(output), lora=LoraSettings(dropout=0.1), resume=resume,
        loss=DistillationWeights(pooled_mse=1.0, paired_mse=0.5), train=_optim(**train),
    )  # fmt: skip
    return adapt(config, rows)


def _losses(output: Path) -> dict[int, float]:
    return {step: entry["loss"] for step, entry in logged(output).items()}


@pytest.fixture
def seen(monkeypatch) -> list:
    """Every batch that is trained on, and FLOPs of it."""
    batches, plain = [], Stage.forward

    def forward(self, batch):
        if batch.weight and self.training:
            batches.append((batch, ModelFlops(self.student)(batch)))
        return plain(self, batch)

    monkeypatch.setattr(Stage, "forward", forward)
    return batches


def test_a_resumed_run_reports_what_the_whole_one_does(encoder_folder, llm_folder, tmp_path, seen) -> None:
    each = _adapt(encoder_folder, llm_folder, tmp_path / "each", log_steps=1)
    trained, flops = sum(batch.num_rows for batch, _ in seen), sum(count for _, count in seen)
    whole = _adapt(encoder_folder, llm_folder, tmp_path / "whole")
    run = tmp_path / "run"
    with stopped_in(2 * 2):  # a step has two packs
        _adapt(encoder_folder, llm_folder, run)
    with stopped_in(3 * 2):
        _adapt(encoder_folder, llm_folder, run, resume=True)
    resumed = _adapt(encoder_folder, llm_folder, run, resume=True)
    for name in REPORTED:
        assert resumed[name] == whole[name], name
    # steps 2 and 5 lie between logs: the means since the log before do not begin anew
    assert _losses(run) == _losses(tmp_path / "whole") and set(_losses(run)) == {4, 8}
    # and what they report is right
    losses = _losses(tmp_path / "each")
    assert len(losses) == 8 and len(set(losses.values())) == 8
    assert whole["train_loss"] == pytest.approx(sum(losses.values()) / 8, rel=1e-6)
    assert each["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-6)
    assert whole["total_flos"] == pytest.approx(flops, rel=1e-9) and flops > 0
    assert trained > len(ROWS), "less than a pass: no test of the second"
    assert whole["epoch"] == pytest.approx(trained / len(ROWS))
    for metrics in (whole, resumed):
        seconds = metrics["train_runtime"]
        assert metrics["train_samples_per_second"] == pytest.approx(trained / seconds, rel=1e-2)
        assert metrics["train_steps_per_second"] == pytest.approx(8 / seconds, rel=1e-2)


def test_the_report_of_a_run_killed_before_its_metrics(encoder_folder, llm_folder, tmp_path) -> None:
    whole = _adapt(encoder_folder, llm_folder, tmp_path / "run", max_steps=3, log_steps=2)
    each = _adapt(encoder_folder, llm_folder, tmp_path / "each", max_steps=3, log_steps=1)
    assert whole["train_loss"] == pytest.approx(sum(_losses(tmp_path / "each").values()) / 3, rel=1e-6)
    assert whole["train_loss"] == pytest.approx(each["train_loss"], rel=1e-6)
    (tmp_path / "run" / "metrics.json").unlink()
    again = _adapt(encoder_folder, llm_folder, tmp_path / "run", max_steps=3, log_steps=2, resume=True)
    for name in ("train_loss", "epoch", "total_flos", "skipped_steps"):
        assert again[name] == whole[name], name
    assert 0 < again["train_runtime"] <= whole["train_runtime"]


def test_a_checkpoint_says_where_its_last_batch_lies(encoder_folder, llm_folder, tmp_path) -> None:
    """In batches, of which a step has two: what comes before is not tokenised again."""
    _adapt(encoder_folder, llm_folder, tmp_path / "run", max_steps=4, save_steps=2, lookahead=4)
    tokenizer = MTLLM.from_pretrained(tmp_path / "run").tokenizer
    tokenizer.max_mt_tokens = tokenizer.max_llm_tokens = 48
    for step in (2, 4):
        place = json.loads((tmp_path / "run" / f"checkpoint-{step}" / "data.json").read_text())
        dataset = PackedDataset(ROWS, tokenizer, max_tokens=96, align=True, lookahead=4, seed=_optim().seed)
        loader = EpochLoader(dataset, 0, 0)
        list(islice(iter(loader), 2 * step))
        assert place == json.loads(json.dumps(loader.place_of(2 * step)))
        assert place != json.loads(json.dumps(loader.place_of(step))), "the control"


def test_epochs_are_passes(llm_folder, tmp_path, seen) -> None:
    """Counted (validation, epochs), known by the list, and by the end of a stream's first pass."""
    train = {"epochs": 2, "max_steps": -1, "log_steps": 1}
    metrics = finetune(
        FinetuneConfig(llm=llm_folder, output=str(tmp_path / "two"), train=_optim(**train)), SORTED, ["good", "bad"]
    )
    assert metrics["epoch"] == 2.0
    assert sum(batch.num_rows for batch, _ in seen) == 2 * len(SORTED)
    epochs = [entry["epoch"] for entry in entries(tmp_path / "two")]
    assert epochs == sorted(epochs) and 0 < epochs[0] < 1


def test_the_length_of_a_stream_is_known_after_one_pass(encoder_folder, llm_folder, tmp_path, seen) -> None:
    (tmp_path / "text.txt").write_text("\n".join(row.text for row in ROWS) + "\n")
    stream = read_rows(tmp_path / "text.txt")
    metrics = _adapt(encoder_folder, llm_folder, tmp_path / "stream", stream, log_steps=1)
    trained = sum(batch.num_rows for batch, _ in seen)
    assert metrics["epoch"] == pytest.approx(trained / len(ROWS)) and trained > len(ROWS)
    assert "epoch" not in entries(tmp_path / "stream")[0], "nobody knows yet how long the first pass is"


# ---- order
def _labels(seen) -> list[list[int]]:
    return [batch.labels.tolist() for batch, _ in seen]


@pytest.mark.parametrize("source", ["list", "file"])
def test_task_rows_sorted_by_class_are_shuffled(source, llm_folder, tmp_path, seen) -> None:
    """Small packs, windows of 6 rows: without shuffling, a window has one class."""
    rows: object = SORTED
    if source == "file":
        lines = [json.dumps({"text": row.text, "label": row.label}) for row in SORTED]
        (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
        rows = read_rows(tmp_path / "rows.jsonl", label_column="label")

    def order(name: str, **train) -> list[list[int]]:
        seen.clear()
        train = {"lookahead": 6, "epochs": 1, "max_steps": -1, "gradient_accumulation": 1, "tokens": 192, **train}
        config = FinetuneConfig(llm=llm_folder, output=str(tmp_path / name), train=_optim(**train))
        finetune(config, rows, ["good", "bad"])
        return _labels(seen)

    shuffled = order("run", epochs=2)
    flat = [label for pack in shuffled for label in pack]
    half = len(SORTED) // 2
    assert Counter(flat) == {0: 2 * half, 1: 2 * half}, "every row in every epoch"
    for start in range(0, len(flat), half):  # 4 halves of an epoch; binomial: outside of this once in a million
        assert 0.2 < sum(flat[start : start + half]) / half < 0.8
    assert shuffled[: len(shuffled) // 2] != shuffled[len(shuffled) // 2 :], "every epoch has an order of its own"
    if source == "list":
        first = shuffled[: len(shuffled) // 2]
        assert order("again") == first
        assert order("other", seed=7) != first
    kept = [label for pack in order("kept", shuffle_buffer=0) for label in pack]
    assert sum(kept[:half]) == 0, "the control: this is what sorted rows do when they are not shuffled"


ANSWERS = ("the bridge", "a mill")
SORTED_CHOICES = [TextRow(f"{line} {i}", choices=ANSWERS, label=k) for k in (0, 1) for i, line in enumerate(LINES * 4)]
SORTED_CLASSES = [TextRow(f"{line} {i}", label=k) for k in (0, 1) for i, line in enumerate(LINES * 4)]


@pytest.mark.parametrize(
    ("stage", "head"),
    [
        ("finetune", "choice"),
        ("distill", "choice"),
        ("distill", "classification"),
        ("distill from a cache", "choice"),
        ("distill from a cache", "classification"),
    ],
)
def test_sorted_rows_are_shuffled_in_every_task_stage(stage, head, encoder_folder, llm_folder, tmp_path, seen) -> None:
    """Rows with choices too; windows of 6 rows: without shuffling, a window has one class."""
    rows = SORTED_CHOICES if head == "choice" else SORTED_CLASSES
    names = ("good", "bad") if head == "classification" else ()
    if stage != "finetune":
        MTLLM.stack(encoder_folder, llm_folder, lora=LoraSettings(r=2)).save_pretrained(tmp_path / "adapted")
        teacher = MTLLM.stack(None, llm_folder, reader="llm", head=HeadConfig(head, names), lora=LoraSettings(r=2))
        teacher.save_pretrained(tmp_path / "teacher")

    def order(name: str, **changes) -> list[int]:
        seen.clear()
        settings = {"lookahead": 6, "epochs": 1, "max_steps": -1, "gradient_accumulation": 1, "tokens": 192, **changes}
        output, train = str(tmp_path / name), _optim(**settings)
        if stage == "finetune":
            finetune(FinetuneConfig(llm=llm_folder, output=output, train=train), rows, names)
        else:
            cache = str(tmp_path / "cache") if stage == "distill from a cache" else ""
            loss = DistillationWeights(head_kl=1.0)
            distill(
                DistillConfig(
                    str(tmp_path / "adapted"), str(tmp_path / "teacher"), output, cache, loss=loss, train=train
                ),
                rows,
            )
        of_choices = {batch.llm_spans is not None or batch.mt_spans is not None for batch, _ in seen}
        assert len(seen) > 6 and of_choices == {head == "choice"}
        return [label for labels in _labels(seen) for label in labels]

    found, half = order("run"), len(rows) // 2
    assert Counter(found) == {0: half, 1: half}, "every row once"
    for part in (found[:half], found[half:]):  # drawn without replacement: outside of this once in 100,000
        assert 0.2 < sum(part) / half < 0.8
    kept = order("kept", shuffle_buffer=0)
    assert Counter(kept) == Counter(found) and sum(kept[:half]) == 0, "the control: this is what sorted rows do"


def test_shuffled_task_training_resumes_where_it_was(llm_folder, tmp_path, seen) -> None:
    def run(name: str, **more) -> None:
        train = _optim(lookahead=6, gradient_accumulation=1, max_steps=8, log_steps=1)
        config = FinetuneConfig(llm=llm_folder, output=str(tmp_path / name), train=train, **more)
        finetune(config, SORTED, ["good", "bad"])

    run("whole")
    whole = _labels(seen)
    seen.clear()
    with stopped_in(5):
        run("run")
    assert len(seen) == 5
    run("run", resume=True)
    assert _labels(seen) == whole
    assert _losses(tmp_path / "run") == _losses(tmp_path / "whole")
    assert same_weights(tmp_path / "run", tmp_path / "whole")
