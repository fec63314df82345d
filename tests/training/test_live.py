"""What a run says while it trains: rates that add up, FLOPs that torch counts too, scores that change nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mtllm_fast import MTLLM, TextRow, cli
from mtllm_fast.data.collate import collate
from mtllm_fast.losses import DistillationLoss, DistillationWeights
from mtllm_fast.models import LoraSettings
from mtllm_fast.training import AdaptConfig, adapt, live
from mtllm_fast.training.live import ModelFlops, Throughput, Watch, bar_text, rewind_log
from mtllm_fast.training.stage import Stage
from tests.evaluation.fakes import write_folder
from tests.tiny import LINES
from tests.training.short_runs import entries, optim, refused, same_weights

ROWS = [TextRow(line) for line in LINES]
TOLERANCE = 0.02


@pytest.fixture(scope="module")
def stack(encoder_folder: str, llm_folder: str) -> MTLLM:
    return MTLLM.stack(encoder_folder, llm_folder, lora=LoraSettings(), dtype=torch.float32)


def test_rates(stack, monkeypatch) -> None:
    now = [100.0]
    monkeypatch.setattr(live.time, "perf_counter", lambda: now[0])
    batch = collate(ROWS, stack.tokenizer)
    throughput = Throughput(lambda batch: 6e12, peak=8e12)

    def twice(x: torch.Tensor) -> torch.Tensor:  # as two processes that hold the same
        return 2 * x

    assert throughput.rates(0, 100, twice, 2) == {}
    throughput.add([batch, batch], 0)
    now[0] += 4
    tokens = batch.mt.num_tokens + batch.llm.num_tokens
    found = throughput.rates(2, 100, twice, 2)
    assert found["documents_per_s"] == pytest.approx(2 * 2 * len(ROWS) / 4, rel=1e-3)
    assert found["tokens_per_s"] == pytest.approx(2 * 2 * tokens / 4, rel=1e-3)
    assert found["model_tflops_per_s"] == 6.0
    assert found["utilisation"] == pytest.approx(6e12 / 2 / 8e12, rel=1e-3)  # of each of the two devices
    assert found["seconds_left"] == 2 * 98
    assert throughput.rates(2, 100, twice, 2) == {}
    throughput.add([batch], 2)
    now[0] += 10
    found = throughput.rates(4, 100, twice, 2)
    assert found["documents_per_s"] == pytest.approx(2 * len(ROWS) / 10, rel=1e-3)
    assert found["seconds_left"] == (4 + 10) / 4 * 96


def test_a_filler_counts_nothing(stack) -> None:
    throughput = Throughput(lambda batch: 1.0)
    throughput.add([replace(collate(ROWS, stack.tokenizer), weight=0.0)], 0)
    assert throughput.counts.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("kl", [0.0, 1.0])
def test_flops_are_those_that_torch_counts(stack, kl) -> None:
    """All matrix products of a real step but those inside this library's own operators, and attention by its formula."""
    batch = collate(ROWS, stack.tokenizer)
    step = Stage(stack, DistillationLoss(DistillationWeights(pooled_mse=1.0, kl=kl)))
    added_in_place = {torch.ops.aten.addmm_: lambda y, a, b, **_: 2 * a[0] * a[1] * b[1]}  # torch's own table lacks it
    with FlopCounterMode(display=False, custom_mapping=added_in_place) as counter:
        terms = step(batch)
        sum(term.sum for term in terms.values()).backward()
    stack.zero_grad()
    products = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "mm" in str(op))
    flops = ModelFlops(stack, step.loss.terms.values())
    attention, head = _attention(flops, batch), 6 * flops.head * batch.num_pairs
    expected = flops(batch) - attention - head
    assert expected == pytest.approx(products, rel=TOLERANCE)
    # control: without the teacher's pass, or with a trained base, the figure is another one
    assert abs(expected - 2 * flops.llm[0] * batch.llm.num_tokens - products) > 5 * TOLERANCE * products
    assert abs(expected + 2 * flops.llm[0] * batch.mt.num_tokens - products) > 5 * TOLERANCE * products
    assert (head > 0) == (kl > 0)


def _attention(flops: ModelFlops, batch) -> float:
    mt, llm = (sum(n * n for n in side.lengths) for side in (batch.mt, batch.llm))
    return 4 * (flops.encoder[2] * mt + flops.llm[2] * (3 * mt + llm))


def _adapt(output: Path, encoder: str, llm: str, watch: Watch | None, **settings: Any) -> None:
    train = optim(max_steps=6, log_steps=2, **settings)
    adapt(AdaptConfig(encoder=encoder, llm=llm, output=str(output), train=train), ROWS, watch=watch)


def test_a_run_logs_rates_and_watched_scores_which_change_nothing(tmp_path, encoder_folder, llm_folder) -> None:
    modes = []

    def score(student: MTLLM) -> dict[str, float]:
        modes.append(student.training)
        return {"swh_Latn_accuracy": float(torch.rand(()))}

    for name, watch in (("plain", None), ("watched", Watch(3, score))):
        _adapt(tmp_path / name, encoder_folder, llm_folder, watch)
    log = entries(tmp_path / "watched")
    steps = [entry for entry in log if "loss" in entry]
    assert [entry["step"] for entry in steps] == [2, 4, 6]
    assert all(entry["documents_per_s"] > 0 and entry["tokens_per_s"] > 0 for entry in steps)
    assert all(entry["model_tflops_per_s"] > 0 and "utilisation" not in entry for entry in steps)  # no ceiling of a CPU
    assert [entry["seconds_left"] > 0 for entry in steps] == [True, True, False]
    assert [entry["step"] for entry in log if "watch_swh_Latn_accuracy" in entry] == [3, 6]
    assert modes == [False, False]
    assert same_weights(tmp_path / "plain", tmp_path / "watched")


@pytest.mark.parametrize("bf16", [False, True])
def test_watched_scores_are_of_the_precision_that_it_trains_in(tmp_path, encoder_folder, llm_folder, bf16) -> None:
    seen = []

    def score(student: MTLLM) -> dict[str, float]:
        seen.append(torch.is_autocast_enabled("cpu"))
        return {"swh_Latn_accuracy": 0.5}

    _adapt(tmp_path / "run", encoder_folder, llm_folder, Watch(3, score), bf16=bf16)
    assert seen == [bf16, bf16]


def test_the_log_goes_back_to_the_step_that_a_run_goes_on_from(tmp_path) -> None:
    rewind_log(tmp_path, 0)  # nothing there yet
    path = tmp_path / "log.jsonl"
    lines = ['{"step": 2, "loss": 1}\n', '{"step": 4, "skipped": "é"}\n', '{"step": 4, "loss": 1}\n']
    lines += ['{"step": 6, "loss": 2}\n', '{"st']
    path.write_text("".join(lines), encoding="utf-8")
    rewind_log(tmp_path, 4)
    assert path.read_text(encoding="utf-8") == "".join(lines[:3])
    before = path.stat().st_ino
    rewind_log(tmp_path, 5)
    assert path.stat().st_ino == before, "written again without need"
    rewind_log(tmp_path, 0)
    assert path.read_text() == ""


def test_watching_languages_from_the_command_line(capsys, tmp_path, llm_folder) -> None:
    folder = str(write_folder(tmp_path / "mini", ("eng_Latn", "fra_Latn"), words=("river", "bread", "light")))
    command = [
        "finetune", "--llm", llm_folder, "--task", "folder", "--data", folder, "--output", str(tmp_path / "run"), "--max-steps",
        "4", "--tokens", "128", "--max-length", "64", "--no-progress", "--report-to", "none", "--device", "cpu",
        "--watch.split", "test", "--watch.steps", "2", "--watch.languages",
    ]  # fmt: skip
    cli.main([*command, "fra_Latn", "eng_Latn"])
    watched = [entry for entry in entries(tmp_path / "run") if "watch_fra_Latn_accuracy" in entry]
    assert [entry["step"] for entry in watched] == [2, 4]
    assert all(0 <= entry["watch_eng_Latn_accuracy"] <= 1 for entry in watched)
    for wrong, message in (
        (["xho_Latn"], "--watch.languages: 'xho_Latn' is none of the 2 of"),
        (["fra_Latn", "--watch.split", "validation"], "--watch.split 'validation'"),
        (["fra_Latn", "--watch.steps", "0"], "--watch.steps 0: must be at least 1"),
    ):
        assert message in refused(capsys, [*command, *wrong, "--resume"])


def test_the_line_on_the_progress_bar() -> None:
    logs = {"loss": 2.34567, "documents_per_s": 31.234, "tokens_per_s": 21345.0, "utilisation": 0.412}
    assert bar_text(logs) == "loss 2.346, 31.2 documents/s, 21,345 tokens/s, 41 % of peak"
    assert bar_text({"loss": 1.0}) == "loss 1"
