"""A `transformers.Trainer` over packs: exact losses under accumulation and data parallelism, exact resume."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..data.collate import Batch, PackedDataset, StreamCounts
from ..data.loader import PackedLoader
from ..data.read import TextRow
from ..data.store import TokenStore
from ..jobs.checkpoint import explained_failure
from ..jobs.durable import write_json
from ..losses import DistillationLoss, LossTerm
from ..models import MTLLM
from ..models.storage import load_own_state
from .automatic import on_gpu, settled
from .config import OptimSettings
from .distributed import Engine, ParallelTrainer, choose_engine, engine_arguments, pack_seed, shard
from .live import Live, LiveProgress, ModelFlops, PlainProgress, Throughput, Watch, Watching, bf16_peak, rewind_log
from .processes import processes
from .record import RECORD, RunRecord
from .run_folder import RunFolder, read_json
from .survival import STATE_FILE
from .switches import apply_switches, optimizer_name
from .teacher_variance import VARIANCE_FILE, measure_variance, recorded_variance

PLACE_FILE = "data.json"  # in a checkpoint: where the data is read on
METRICS_FILE = "metrics.json"
TASK_ROWS = 2**20  # shuffled together: all rows of a task, but for the largest, which would not fit into memory


class TrainStep(nn.Module):
    """One training objective: `forward(batch)` gives terms `(sum, count)`, `counts(batch)` their counts beforehand.

    Attributes:
        student: the model that is trained and saved.
        weights: weight of each term by name.
        loss: the terms of a distillation.
    """

    student: MTLLM
    loss: DistillationLoss
    weights: dict[str, float]

    def counts(self, batch: Batch) -> dict[str, float]:
        raise TypeError(f"{type(self).__name__} does not say how it counts its terms")

    def taught(self, batch: Batch) -> tuple[Batch, Tensor]:
        """The batch with the teacher's side, and the teacher's states of its packed rows, no gradient."""
        raise TypeError(f"{type(self).__name__} has no teacher")

    def forward(self, batch: Batch) -> dict[str, LossTerm]:
        raise TypeError(f"{type(self).__name__} has no forward")


class EpochLoader:
    """Batches of one process, epoch after epoch without end, from batch `start` on.

    Nothing here draws from torch's global generator, so that dropout after a resume is that of the uninterrupted run.

    Args:
        place: what `place_of` gave for a batch up to `start`, on any number of processes; without it the batches before
            `start` are made and dropped.
        pin_memory: page-lock the batches, for copies to a GPU that the host does not wait for.
    """

    def __init__(
        self,
        dataset: PackedDataset,
        workers: int,
        start: int,
        place: dict[str, Any] | None = None,
        pin_memory: bool = False,
    ) -> None:
        self.dataset, self.workers, self.start, self.pin_memory = dataset, workers, start, pin_memory
        self.after = place["stream"] if place else None
        self.epoch_packs: list[int] = list(place["epoch_packs"]) if place else []

    def _batches_of_epochs(self) -> int:
        return sum(self.dataset.size(packs) for packs in self.epoch_packs)

    def place_of(self, batch: int) -> dict[str, Any]:
        """Plain data: the packs of every epoch that is over, and where the stream is read on to come to `batch`."""
        stream = self.dataset.read_before(batch - self._batches_of_epochs())
        return {"epoch_packs": self.epoch_packs, "stream": stream}

    def __iter__(self) -> Iterator[Batch]:
        skip, epoch = max(self.start - self._batches_of_epochs(), 0), len(self.epoch_packs)
        while True:
            self.dataset.set_epoch(epoch, skip, self.after)
            yield from PackedLoader(self.dataset, num_workers=self.workers, pin_memory=self.pin_memory)
            size = self.dataset.size(self.dataset.counters.packs)
            if size == 0:
                raise ValueError("the training data holds no usable row")
            self.epoch_packs.append(self.dataset.counters.packs)
            skip, epoch, self.after = max(skip - size, 0), epoch + 1, None


class PackedTrainer(ParallelTrainer):
    """Trains a `TrainStep` on a `PackedDataset`.

    Every term is divided once, by its count over all packs of the step on all processes. So a step's gradient depends
    on the texts in it and not on how they were packed, accumulated or distributed.

    Args:
        step: objective and student.
        dataset: the packs; its rank and world size are set here.
        optim: settings. `folder`: the run's folder.
        validate: called on English validation data for {"accuracy", "loss"}, None for none; the step of highest
            accuracy, and of lowest loss among equals, is what `train` leaves in the model.
        rows_per_epoch: documents of a pass over the data, where that is known before the first one is over.
        watch: scores that are logged and choose nothing.
    """

    def __init__(
        self,
        step: TrainStep,
        dataset: PackedDataset,
        optim: OptimSettings,
        folder: Path,
        *,
        steps: int,
        validate: Callable[[], dict[str, float]] | None = None,
        validate_steps: int | None = None,
        rows_per_epoch: int | None = None,
        watch: Watch | None = None,
    ) -> None:
        optim = settled(optim)
        engine = choose_engine(optim)
        arguments = training_arguments(optim, folder, steps, validate_steps if validate else None, engine)
        if arguments.n_gpu > 1:
            arguments._n_gpu = 1  # one process uses one GPU: the Trainer would wrap the model in nn.DataParallel
        if arguments.device.type == "cpu":  # of several processes it is cpu:0, which torch.load refuses
            arguments.__dict__["_setup_devices"] = torch.device("cpu")  # transformers 5.17 asks for args.device
        apply_switches(step.student, optim, arguments.device, step)
        if engine == "fsdp2":
            shard(step, step.student, arguments.device)
        # the Trainer reads these to decide how a loss is scaled; compute_loss does all of it
        self.loss_is_scaled_for_ga = True
        super().__init__(
            model=step, args=arguments, data_collator=None, eval_dataset=[] if validate else None, optim=optim
        )
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self.step_module = step
        self.packs = dataset
        self.optim_settings = optim
        self.validate = validate
        self.start_batch = 0
        self.extended = False
        self.place: dict[str, Any] | None = None
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        if optim.progress:
            self.add_callback(LiveProgress() if sys.stderr.isatty() else PlainProgress())
        self.add_callback(Live(folder))
        if watch is not None:
            self.add_callback(Watching(self, watch))
        flops = ModelFlops(step.student, kl=bool(step.weights.get("kl")))
        self.flops = flops
        self.throughput = Throughput(flops, bf16_peak(self.args.device) if optim.bf16 else None)
        self.record = RunRecord(rows_per_epoch=rows_per_epoch)
        self._part_start = time.perf_counter()

    # ---- data
    def get_train_dataloader(self) -> EpochLoader:  # type: ignore[override]
        self.packs.rank, self.packs.world_size = self.args.process_index, self.args.world_size
        self.packs.accumulation = self.args.gradient_accumulation_steps
        pinned = self.args.device.type == "cuda"
        self.loader = EpochLoader(self.packs, self.optim_settings.workers, self.start_batch, self.place, pinned)
        return self.loader

    def get_batch_samples(self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device) -> Any:
        """The packs of one step on this process, and the counts of the step over all processes."""
        batches = self.next_batches(epoch_iterator, num_batches)
        self.throughput.add(batches, self.state.global_step)
        per_batch = [self.step_module.counts(batch) for batch in batches]
        names = sorted(self.step_module.weights)
        sums = [sum(counts.get(name, 0.0) for counts in per_batch) for name in names]
        totals = self.agreed_sums([*sums, sum(batch.num_rows for batch in batches if batch.weight)], device)
        if totals is None:
            return [], {}
        self.record.add(int(totals[-1]), len(self.loader.epoch_packs))
        return batches, dict(zip(names, totals))

    def _prepare_inputs(self, inputs: Batch) -> Batch:  # type: ignore[override]
        return inputs.to(self.args.device, non_blocking=True)

    def floating_point_ops(self, inputs: Batch) -> float:  # type: ignore[override]
        return self.flops(inputs) if inputs.weight else 0.0  # the Trainer's estimate is for padded (B, L) inputs

    # ---- loss
    def compute_loss(  # type: ignore[override]
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """`sum_k weight_k * sum_k / global_count_k`, times the number of processes since DDP averages gradients."""
        if self.packs.step_size > 1:
            # where a pack is computed is not to matter; one pack per step has but one place
            torch.manual_seed(pack_seed(self.args.seed, self.state.global_step, inputs.place))
        terms: dict[str, LossTerm] = model(inputs)
        parts = []
        for name, term in terms.items():
            scaled = term.sum * (inputs.weight * self.args.world_size / max(num_items_in_batch[name], 1e-9))
            self._term_sums[name] = self._term_sums.get(name, 0.0) + scaled.detach()  # type: ignore[assignment]
            parts.append(self.step_module.weights[name] * scaled)
        self._in_backward = True
        return torch.stack(parts).sum()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean of every term since the last log, and the throughput (over all processes)."""
        record, step = self.record, self.state.global_step
        if "loss" in logs and self._term_sums:
            self._update_record()
            good = record.good_steps(step)
            means = {name: total / max(good, 1) for name, total in record.sums.items()}
            # the Trainer's own mean counts the steps that changed nothing
            logs["loss"] = sum(self.step_module.weights[name] * mean for name, mean in means.items())
            logs.update(means)
            record.loss, record.steps = record.loss + logs["loss"] * good, record.steps + good
            record.sums, record.since = {}, step
            self._term_sums, self.bad_since_log = {}, 0
            logs.update(
                self.throughput.rates(
                    step,
                    self.args.max_steps,
                    lambda counts: self.accelerator.reduce(counts.float().to(self.args.device), "sum"),
                    self.args.world_size,
                )
            )
        if "train_runtime" in logs:  # the Trainer's own results are of this part of the run, and of packs
            self._update_record()
            logs.update(record.summary(self.step_module.weights, step))
        self.state.epoch = record.epoch  # type: ignore[assignment]  # the Trainer's counts an endless one
        super().log(logs, start_time)

    def _update_record(self) -> None:
        """Bring into the record what this part of the run has summed up since; all processes must call."""
        now = time.perf_counter()
        self.record.seconds, self._part_start = self.record.seconds + now - self._part_start, now
        self.record.sums = {
            name: float(self.accelerator.reduce(total.clone(), "mean")) for name, total in self._term_sums.items()
        }
        self.record.bad = self.bad_since_log

    # ---- evaluation
    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """The validation metrics of the student; only English data is ever given to it."""
        assert self.validate is not None
        training = self.step_module.training
        self.step_module.eval()
        with self.outside_of_forward():
            scores = self.validate()
        # the loss only settles ties: an accuracy over fewer than 10,000 rows moves by more than its share here
        scores["selection"] = scores["accuracy"] - 1e-4 * scores["loss"] / (1 + scores["loss"])
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        self.step_module.train(training)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ---- checkpoints
    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        self.step_module.student.save_pretrained(output_dir or str(self.args.output_dir), include_base=False)

    def _write_state(self, folder: Path, step: int) -> None:
        self._update_record()
        self.state.epoch = self.record.epoch  # type: ignore[assignment]
        kept: Any = self.state.stateful_callbacks
        kept[RECORD] = self.record.state()
        super()._write_state(folder, step)

    def _save_place(self, folder: Path) -> None:
        batch = self.state.global_step * self.args.gradient_accumulation_steps
        write_json(folder / PLACE_FILE, self.loader.place_of(batch))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_own_state(self.step_module.student, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As in the Trainer; in an extended run the next step has the learning rate of the new schedule."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not self.extended:
            return
        schedule: Any = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        rates = [rate * f(schedule.last_epoch) for f, rate in zip(schedule.lr_lambdas, schedule.base_lrs)]
        for group, rate in zip(schedule.optimizer.param_groups, rates):
            group["lr"] = rate
        schedule._last_lr = rates

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        load_own_state(self.step_module.student, Path(self.state.best_model_checkpoint))

    def run(self, resume: bool) -> dict[str, Any]:
        """Train, from the newest complete checkpoint if `resume` finds one; returns the run's metrics."""
        folder = Path(str(self.args.output_dir))
        checkpoint = self.checkpoint_to_resume(resume)
        steps = 0
        if checkpoint is not None:
            state = json.loads((checkpoint / STATE_FILE).read_text())
            steps, best = state["global_step"], state.get("best_model_checkpoint")
            self.record = RunRecord.from_state(state, steps)
            if steps >= self.args.max_steps:  # finished; the Trainer would take one step more
                load_own_state(self.step_module.student, folder / Path(best).name if best else checkpoint)
                if (folder / METRICS_FILE).is_file():
                    return read_json(folder / METRICS_FILE)
                # it was killed between its last checkpoint and its metrics
                summary = self.record.summary(self.step_module.weights, steps)
                return {
                    **summary,
                    "total_flos": state["total_flos"],
                    "skipped_steps": self.bad_steps,
                    **best_of(state["log_history"], best),
                    "log": state["log_history"],
                }
            self.check_engine_of(checkpoint)
            self.start_batch = steps * self.args.gradient_accumulation_steps
            self.bad_since_log = self.record.bad
            self._term_sums = {
                name: torch.tensor(total, device=self.args.device) for name, total in self.record.sums.items()
            }
            if (checkpoint / PLACE_FILE).is_file():
                self.place = json.loads((checkpoint / PLACE_FILE).read_text(encoding="utf-8"))
        if self.args.should_save:
            rewind_log(folder, steps)
        self._part_start = time.perf_counter()
        with self.stop:
            try:
                output = self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            finally:  # who goes on in this process after an error finds the checkpoint that was begun
                self.publisher.wait()
            self.conclude()
        history = self.state.log_history
        metrics = {
            **output.metrics,
            "skipped_steps": self.bad_steps,
            **best_of(history, self.state.best_model_checkpoint),
            "data": data_report(self.packs.counters),
        }
        if self.args.should_save:
            with explained_failure(METRICS_FILE, folder, len(str(history))):
                write_json(folder / METRICS_FILE, {**metrics, "log": history})
        return metrics


def best_of(history: list[dict[str, float]], checkpoint: str | None) -> dict[str, Any]:
    """Step and English accuracy of the best checkpoint, if there is one."""
    if checkpoint is None:
        return {}
    step = int(Path(checkpoint).name.rsplit("-", 1)[-1])
    (accuracy,) = {entry["eval_accuracy"] for entry in history if "eval_accuracy" in entry and entry["step"] == step}
    return {"best_step": step, "best_eval_accuracy": accuracy}


def data_report(counts: StreamCounts) -> dict[str, Any]:
    """What the last epoch read, for the run's metrics."""
    return {
        "rows": counts.rows,
        "truncated": dict(counts.truncated),
        "fallbacks": dict(counts.fallbacks),
        "packing_efficiency": round(counts.efficiency, 4),
        "skipped_rows": sum(getattr(counts.source, name, 0) for name in ("failed", "empty")) + counts.unreadable,
    }


def training_arguments(
    optim: OptimSettings, folder: Path, steps: int, validate_steps: int | None, engine: Engine = "one"
) -> TrainingArguments:
    """Map `OptimSettings` to `TrainingArguments`."""
    report: str | list[str] = "none"
    if optim.report_to == "auto":
        from importlib.util import find_spec
        from os import environ

        report = [name for name, module in (("tensorboard", "tensorboard"),) if find_spec(module)]
        if find_spec("wandb") and ("WANDB_API_KEY" in environ or "WANDB_MODE" in environ):
            report.append("wandb")
    options = engine_arguments(engine)
    if validate_steps:
        options |= {
            "eval_strategy": "steps",
            "eval_steps": validate_steps,
            "load_best_model_at_end": True,
            "metric_for_best_model": "selection",
            "greater_is_better": True,
        }
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=optim.lr,
        lr_scheduler_type="linear",
        warmup_steps=round(optim.warmup * steps),
        weight_decay=optim.weight_decay,
        max_grad_norm=optim.clip,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=optim.gradient_accumulation,
        optim=optimizer_name(optim),
        bf16=bool(optim.bf16),
        seed=optim.seed,
        logging_steps=optim.log_steps,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=validate_steps or optim.save_steps,
        save_total_limit=optim.keep,
        ignore_data_skip=True,
        remove_unused_columns=False,
        report_to=report,
        disable_tqdm=not (optim.progress and sys.stderr.isatty()),
        use_cpu=optim.device == "cpu" or not torch.cuda.is_available(),
        average_tokens_across_devices=False,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # they are constants; without it a pack can be split on one process alone
        **options,
    )


def length(rows: Any) -> int | None:
    """How many rows there are, None for a stream."""
    try:
        return len(rows)
    except TypeError:
        return None


def run_stage(
    step: TrainStep,
    rows: Iterable[TextRow] | TokenStore,
    optim: OptimSettings,
    run: RunFolder,
    *,
    sides: tuple[str, ...],
    align: bool = False,
    over_variance: bool = False,
    validate: Callable[[], dict[str, float]] | None = None,
    watch: Watch | None = None,
    shuffle: int = 0,
) -> dict[str, Any]:
    """Pack `rows`, train `step` on them, and return the run's metrics with what the data held.

    Args:
        rows: re-iterable texts. sides: which tokenizations the step needs. align: also the aligned row pairs.
        over_variance: divide the MSE terms of `step.loss` by the variance of the teacher's states, measured on the
            first packs before the first step, kept in the run's folder and read from there when it is continued.
        validate: scores on English validation data, asked once per epoch (in a shorter run, at its end); the best
            checkpoint is kept.
        watch: scores to log while training, in any language; they choose nothing.
        shuffle: the shuffle buffer where `optim` names none.
    """
    tokenizer = step.student.tokenizer
    if tokenizer is None:
        raise ValueError("the student has no tokenizer: pass tokenizer=StackTokenizer(...) when stacking it")
    tokenizer.max_mt_tokens = tokenizer.max_llm_tokens = optim.max_length
    optim = settled(optim)
    if run.packs_per_process is not None:
        optim = replace(optim, gradient_accumulation=run.packs_per_process)
    dataset = PackedDataset(
        rows,
        tokenizer,
        max_tokens=optim.tokens,
        max_rows=optim.max_rows,
        sides=sides,
        align=align,
        lookahead=optim.lookahead,
        shuffle_buffer=shuffle if optim.shuffle_buffer is None else optim.shuffle_buffer,
        seed=optim.seed,
    )
    # what is wrong with the first rows is said before anything is written
    if next(iter(dataset), None) is None:
        raise ValueError("the training data holds no usable row")
    if optim.max_steps == 0:
        run.start()
        return untrained(step, optim, validate)
    steps, per_epoch = optim.max_steps, None
    rows_per_epoch = length(rows)
    if steps == -1 or validate is not None:
        loader = PackedLoader(dataset, num_workers=optim.workers)
        packs = loader.count()  # shuffling moves it little
        rows_per_epoch = loader.counted_rows
        per_epoch = max(math.ceil(packs / (optim.gradient_accumulation * processes())), 1)
        steps = per_epoch * optim.epochs if steps == -1 else steps
        per_epoch = min(per_epoch, steps)  # a run of less than an epoch is validated too
    trainer = PackedTrainer(
        step,
        dataset,
        optim,
        run.folder,
        steps=steps,
        validate=validate,
        validate_steps=per_epoch,
        rows_per_epoch=rows_per_epoch,
        watch=watch,
    )
    measured = recorded_variance(run.folder) if over_variance else None
    if over_variance and measured is None:
        measured = measure_variance(step, dataset, bf16=optim.bf16)
    run.start()
    trainer.extended = bool(run.extended)
    try:
        return _trained(trainer, run, measured)
    except BaseException:
        run.release()
        raise


def _trained(trainer: PackedTrainer, run: RunFolder, measured: dict[str, float] | None) -> dict[str, Any]:
    if measured is None:
        return trainer.run(run.resume)
    if trainer.args.should_save:
        write_json(run.folder / VARIANCE_FILE, measured)
    trainer.step_module.loss.variance = measured
    return {**trainer.run(run.resume), "teacher_variance": measured}


def untrained(step: TrainStep, optim: OptimSettings, validate: Callable[[], dict[str, float]] | None) -> dict[str, Any]:
    """Metrics of a run of 0 steps, whose model is saved as it starts: its English validation score, if there is one."""
    if validate is None:
        return {"train_runtime": 0.0}
    if on_gpu(optim):
        step.student.to("cuda")
    step.eval()
    return {"train_runtime": 0.0, "best_step": 0, "best_eval_accuracy": validate()["accuracy"]}
