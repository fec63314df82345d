"""A `transformers.Trainer` over packs: exact losses under accumulation and data parallelism, exact resume."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..data.batch import Batch
from ..data.collate import PackedDataset
from ..jobs.checkpoint import explained_failure
from ..jobs.durable import write_json
from ..models.storage import load_own_state
from .arguments import training_arguments
from .automatic import settled
from .config import OptimSettings
from .distributed import ParallelTrainer, pack_seed, shard
from .engines import choose_engine
from .epochs import EpochLoader, Place
from .live import Live, LiveProgress, ModelFlops, PlainProgress, Throughput, Watch, Watching, bf16_peak, rewind_log
from .record import RECORD, Metrics, RunRecord, best_of, data_report
from .run_folder import read_json
from .stage import Stage
from .survival import STATE_FILE
from .switches import apply_switches

PLACE_FILE = "data.json"  # in a checkpoint: where the data is read on
METRICS_FILE = "metrics.json"


class PackedTrainer(ParallelTrainer):
    """Trains a `Stage` on a `PackedDataset`.

    Every term is divided once, by its count over all packs of the step on all processes. So a step's gradient depends
    on the texts in it and not on how they were packed, accumulated or distributed; but for a term that compares the
    texts of a pack with each other, where it depends on the packs.

    Args:
        step: the stage. Where it has `validate`, the step of highest accuracy, and of lowest loss among equals, is what
            `train` leaves in the model.
        dataset: the packs; its rank and world size are set here.
        optim: settings. `folder`: the run's folder.
        steps: of the whole run. validate_steps: between two validations.
        rows_per_epoch: documents of a pass over the data, where that is known before the first one is over.
        watch: scores that are logged and choose nothing.
    """

    def __init__(
        self,
        step: Stage,
        dataset: PackedDataset,
        optim: OptimSettings,
        folder: Path,
        *,
        steps: int,
        validate_steps: int | None = None,
        rows_per_epoch: int | None = None,
        watch: Watch | None = None,
    ) -> None:
        optim = settled(optim)
        engine = choose_engine(optim)
        arguments = training_arguments(optim, folder, steps, validate_steps if step.validate else None, engine)
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
            model=step, args=arguments, data_collator=None, eval_dataset=[] if step.validate else None, optim=optim
        )
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self.step_module = step
        self.packs = dataset
        self.optim_settings = optim
        self.start_batch = 0
        self.extended = False
        self.place: Place | None = None
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        if optim.progress:
            self.add_callback(LiveProgress() if sys.stderr.isatty() else PlainProgress())
        self.add_callback(Live(folder))
        if watch is not None:
            self.add_callback(Watching(self, watch))
        self.flops = ModelFlops(step.student, step.loss.terms.values(), step.beside)
        self.throughput = Throughput(self.flops, bf16_peak(self.args.device) if optim.bf16 else None)
        self.record = RunRecord(rows_per_epoch=rows_per_epoch)
        self._part_start = time.perf_counter()

    # ---- data
    def get_train_dataloader(self) -> EpochLoader:  # type: ignore[override]
        self.packs.rank, self.packs.world_size = self.args.process_index, self.args.world_size
        self.packs.accumulation = self.args.gradient_accumulation_steps
        pinned = self.args.device.type == "cuda"
        self.loader = EpochLoader(self.packs, self.optim_settings.workers, self.start_batch, self.place, pinned)
        return self.loader

    def get_batch_samples(  # type: ignore[override]
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], dict[str, float]]:
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
        loss = self.step_module.loss
        scaled = loss.scaled(model(inputs), num_items_in_batch, inputs.weight * self.args.world_size)
        for name, value in scaled.items():
            self._term_sums[name] = self._term_sums.get(name, 0.0) + value.detach()  # type: ignore[assignment]
        self._in_backward = True
        return loss.weighted(scaled)

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
    def evaluate(self, *args: object, metric_key_prefix: str = "eval", **kwargs: object) -> dict[str, float]:
        """The validation metrics of the student; only English data is ever given to it."""
        assert self.step_module.validate is not None
        training = self.step_module.training
        self.step_module.eval()
        with self.outside_of_forward():
            scores = self.step_module.validate()
        # the loss only settles ties: an accuracy over fewer than 10,000 rows moves by more than its share here
        scores["selection"] = scores["accuracy"] - 1e-4 * scores["loss"] / (1 + scores["loss"])
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        self.step_module.train(training)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ---- checkpoints
    def _save(self, output_dir: str | None = None, state_dict: object = None) -> None:
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

    def run(self, resume: bool) -> Metrics:
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
