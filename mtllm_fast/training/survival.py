"""What lets a run outlive preemption, a full disk, a bad batch and a pack that does not fit.

| what happens                | what the run does                                                                   |
| kill -9                     | the last complete checkpoint is there (see `checkpoint`)                            |
| SIGTERM, SIGINT             | the step is finished and saved, exit 0, 130; all processes stop after the same step |
| the data cannot be read     | the steps so far are saved, then the error is raised                                |
| a checkpoint is not written | the one before is kept, training goes on; raised if nothing can be written at the end |
| a gradient is not finite    | the step changes no weight; after `bad_steps` of them in a row the run ends          |
| out of memory               | the pack is split in two by rows, which changes no gradient, and tried again; not   |
|                             | where a term compares the texts of a pack with each other                           |
"""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import shutil
import signal
from collections.abc import Iterator, Mapping
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..data.batch import Batch
from ..data.split import halves
from ..failures import RunFailed
from ..jobs.checkpoint import Publisher, clean, last_complete, size_of, staged
from ..jobs.durable import room, write_failure
from ..models.sharded import is_sharded
from .config import OptimSettings
from .processes import INTERRUPTED
from .signals import StopRequest
from .stage import Stage

log = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"
_KEY = "bad_steps"  # in the Trainer's state
Best = tuple[float | None, int | None, str | None]  # metric, step and folder of a checkpoint


class _Schedule(TrainerCallback):
    """When the run saves, and that it ends after the step in which all processes know that it is to end."""

    def __init__(self, trainer: SurvivingTrainer, save_steps: int) -> None:
        self.trainer, self.save_steps = trainer, save_steps

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        # a resumed state has the intervals and the path of the best checkpoint as they were
        state.compute_steps(args, state.max_steps)
        if state.best_global_step:
            best = self.trainer.run_folder / f"checkpoint-{state.best_global_step}"
            if best.is_dir():
                state.best_model_checkpoint = str(best)
            else:
                state.best_metric, state.best_global_step, state.best_model_checkpoint = None, None, None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if self.trainer.args.world_size == 1:
            self.trainer.stopping |= self.trainer.stop.received is not None
            self.trainer.interrupted |= self.trainer.stop.received is signal.SIGINT
        if self.trainer.stopping:
            control.should_training_stop = True
        # the Trainer itself saves where it evaluates, if it does
        if self.trainer.stopping or state.global_step % self.save_steps == 0:
            control.should_save = True


class SurvivingTrainer(Trainer):
    """A `Trainer` for `Batch`es that survives what the module's table lists.

    A subclass reads a step's batches with `next_batches`, passes its counts through `agreed_sums`, starts from
    `checkpoint_to_resume` and ends with `conclude`.

    Attributes:
        stop: the request to stop; entered while the run trains. stopping: all processes have agreed to stop.
        interrupted: the request was a SIGINT, so that nothing that waits for a finished run may go on.
        bad_steps: steps so far whose gradient was not finite. bad_since_log: of them, those since the latest log.
    """

    step_module: Stage

    def __init__(self, *args: Any, optim: OptimSettings, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.run_folder = Path(str(self.args.output_dir))
        world = self.args.world_size
        # one process can flush what all processes of its machine wrote, but not what those of another one did
        one_machine = int(os.environ.get("LOCAL_WORLD_SIZE", world)) == world
        self.publisher = Publisher(self.run_folder, optim.keep, background=optim.async_save and one_machine)
        self.stop = StopRequest()
        self.stopping = self.interrupted = False
        self.bad_steps, self.bad_in_a_row, self.bad_since_log = 0, 0, 0
        self.bad_limit = optim.bad_steps
        self._data_error: Exception | None = None
        self._data_failed = False
        self._saved_step = -1
        self._save_error: str | None = None
        self._best_before: Best = (None, None, None)
        self._done: list[tuple[Batch, Tensor]] = []
        self._sums_before: dict[str, Tensor] = {}
        self._term_sums: dict[str, Tensor] = {}
        self._in_backward = False
        self._unlogged: str | None = None
        self.add_callback(_Schedule(self, optim.save_steps))

    # ---- data, and what all processes agree on
    def next_batches(self, batches: Iterator[Batch], count: int) -> list[Batch]:
        """The batches of a step; what goes wrong with the data is kept until all processes know of it."""
        self._done, self._sums_before = [], dict(self._term_sums)
        try:
            return list(islice(batches, count))
        except Exception as error:
            if self.state.global_step == 0:
                raise
            self._data_error = error
            return []

    def agreed_sums(self, counts: list[float], device: torch.device) -> list[float] | None:
        """The sums of `counts` over all processes; None where the data of one cannot be read, which ends the run.

        With them goes whether a process was asked to stop, so that all stop after the same step.
        """
        received = self.stop.received
        flags = [
            float(told) for told in (received is not None, received is signal.SIGINT, self._data_error is not None)
        ]
        totals = torch.tensor(counts + flags, dtype=torch.float64, device="cpu" if device.type == "mps" else device)
        if self.args.world_size > 1:
            dist.all_reduce(totals)
        *sums, stops, interrupts, failures = totals.tolist()
        self.stopping |= stops > 0
        self.interrupted |= interrupts > 0
        if failures:
            self._data_failed = True
            self.control.should_training_stop = True
            self.control.should_save = True
            return None
        return sums

    def _on_any(self, flag: bool) -> bool:
        """Whether the flag is set on any process."""
        if self.args.world_size == 1:
            return flag
        total = torch.tensor([float(flag)], device=self.args.device)
        dist.all_reduce(total)
        return bool(total.item())

    # ---- steps
    def training_step(  # type: ignore[override]
        self, model: nn.Module, inputs: Batch, num_items_in_batch: Mapping[str, float] | None = None
    ) -> Tensor:
        """The gradient of one pack, in parts where it does not fit; a loss that is not finite is logged as 0."""
        loss = self._fitting(model, inputs, num_items_in_batch)
        self._done.append((inputs, loss))
        return torch.where(loss.isfinite(), loss, torch.zeros_like(loss))

    def _fitting(self, model: nn.Module, inputs: Batch, counts: Mapping[str, float] | None) -> Tensor:
        gradients = {p: p.grad.clone() for p in model.parameters() if p.grad is not None}
        sums = dict(self._term_sums)
        self._in_backward = False
        try:
            return super().training_step(model, inputs, counts)  # type: ignore[arg-type]
        except torch.OutOfMemoryError as error:
            reason = str(error).split(". ")[0]
        # outside of the except block: the error holds the frames, and with them the memory of the failed attempt
        self._check_splitting(inputs, reason)
        self._term_sums = sums
        for parameter in model.parameters():
            parameter.grad = gradients.get(parameter)
        gc.collect()
        torch.cuda.empty_cache()
        message = "step %d: a pack of %d rows does not fit into memory (%s): done in two halves, with the same gradient"
        log.warning(message, self.state.global_step + 1, inputs.num_rows, reason)
        first, second = halves(inputs)
        # DDP exchanges gradients in the backward pass of `model`: once, after the last part
        return self._fitting(self.step_module, first, counts) + self._fitting(model, second, counts)

    def _check_splitting(self, inputs: Batch, reason: str) -> None:
        why = None
        if inputs.num_rows < 2:
            why = "a single row does not fit"
        elif pack := [name for name, term in self.step_module.loss.terms.items() if term.compares_texts]:
            why = f"{pack[0]} compares the texts of a pack with each other, so it cannot be split"
        elif is_sharded(self.step_module) or self.is_deepspeed_enabled:
            why = "a pack cannot be split where the parameters are sharded"
        elif self.args.world_size > 1 and self._in_backward:
            why = "other processes wait for its gradient, so it cannot be split now"
        if why:
            raise RunFailed(
                f"out of memory at step {self.state.global_step + 1} in a pack of {inputs.num_rows} rows ({reason}): "
                f"{why}; go on with --checkpointing full, or begin anew with fewer --tokens or a lower --max-length; "
                f"{self._kept()}"
            )

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Also drops a gradient that is not finite: without one the optimizer changes nothing, not even its moments."""
        norm = super()._get_grad_norm(model, grad_norm)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if math.isfinite(float(norm)):
            self.bad_in_a_row = 0
            return norm
        self._term_sums = self._sums_before
        self.bad_steps, self.bad_in_a_row = self.bad_steps + 1, self.bad_in_a_row + 1
        self.bad_since_log += 1
        step = self.state.global_step + 1
        bad, rows = self._rows_to_name()
        what = "the loss is not finite" if bad else "the gradient is not finite, though the loss is"
        shown = ", ".join(rows[:5]) + (f" and {len(rows) - 5} more" if len(rows) > 5 else "")
        log.warning("step %d changes no weight: %s; its rows: %s", step, what, shown)
        self._note({"step": step, "skipped": what, "rows": rows})
        if self.is_deepspeed_enabled:
            raise RunFailed(f"step {step}: {what}, and DeepSpeed has applied it already; {self._kept()}")
        if self.bad_in_a_row >= self.bad_limit:
            raise RunFailed(
                f"{what} in {self.bad_in_a_row} steps in a row, up to step {step} (bad_steps={self.bad_limit}): look "
                f"at the rows that log.jsonl names, or begin anew with a lower --lr; {self._kept()}"
            )
        model.zero_grad(set_to_none=True)
        return norm

    def _rows_to_name(self) -> tuple[bool, list[str]]:
        """Whether a loss of this step is not finite, and the rows of those packs, or of all; over all processes."""
        bad = [batch for batch, loss in self._done if not bool(loss.isfinite())]
        mine = (bool(bad), [name for batch in bad or [batch for batch, _ in self._done] for name in self._names(batch)])
        found = [mine] * self.args.world_size
        if self.args.world_size > 1:
            dist.all_gather_object(found, mine)
        any_bad = any(is_bad for is_bad, _ in found)
        return any_bad, [name for is_bad, names in found if is_bad == any_bad for name in names]

    def _names(self, batch: Batch) -> list[str]:
        """The rows of a batch: their ids, or how their texts begin."""
        tokenizer = self.step_module.student.require_tokenizer()
        inner = tokenizer.mt if batch.mt is not None else tokenizer.llm
        side = batch.side("mt" if batch.mt is not None else "llm")
        bounds = list(pairwise(side.cu_seqlens.tolist()))[:: side.per_row]
        texts = [side.input_ids[a : min(b, a + 16)] for a, b in bounds]
        return [
            repr(inner.decode(text, skip_special_tokens=True)) if name is None else name
            for name, text in zip(batch.ids, texts)
        ]

    # ---- checkpoints
    def _save_place(self, folder: Path) -> None:
        """Write what else belongs to a checkpoint; called on the process that saves, for the subclass."""

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        """The Trainer's own files, written under a temporary name and published when all of them are there."""
        step = self.state.global_step
        self._settle()
        if not self._on_any(self._saved_step != step):  # only the process that publishes knows what failed
            return
        folder = staged(self.run_folder, step)
        error: str | None = None
        if self.args.should_save:
            try:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
            except OSError as failure:
                error = write_failure(failure)
        if not self._on_any(error is not None):
            try:
                self._write_state(folder, step)
            except Exception as failure:
                error = write_failure(failure)
                # under FSDP and DeepSpeed other processes may wait for this one inside of what failed
                if error is None or is_sharded(self.step_module) or self.is_deepspeed_enabled:
                    raise
        if self._on_any(error is not None):
            self._lost(step)
            if self.args.should_save:
                written = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) if folder.exists() else 0
                shutil.rmtree(folder, ignore_errors=True)
                self._report(step, error or "another process could not write its part", written)
            return
        self._saved_step, self._save_error = step, None
        if self.args.should_save:
            self.publisher.publish(step, self.state.best_model_checkpoint)
            if not self.publisher.background:
                self._settle()
        if not self.publisher.background:
            self.accelerator.wait_for_everyone()

    def _write_state(self, folder: Path, step: int) -> None:
        self.store_flos()
        self.save_model(str(folder), _internal_call=True)
        self._save_optimizer_and_scheduler(str(folder))
        self._save_scaler(str(folder))
        self._save_rng_state(str(folder))
        if self.state.best_global_step == step:
            self.state.best_model_checkpoint = str(self.run_folder / f"checkpoint-{step}")
        if self.args.should_save:
            kept: Any = self.state.stateful_callbacks
            kept[_KEY] = {"in_a_row": self.bad_in_a_row, "all": self.bad_steps}
            self.state.save_to_json(str(folder / STATE_FILE))
            self._save_place(folder)

    def _settle(self) -> None:
        """Wait for the checkpoint that is being published; report it if it could not be."""
        if (failed := self.publisher.settle()) is not None:
            step, error = failed
            self._lost(step)
            self._report(step, write_failure(error) or str(error), 0)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        self._settle()  # a checkpoint that is lost is not one to be compared with
        self._best_before = self._best()
        return super()._determine_best_metric(metrics, trial)

    def _best(self) -> Best:
        return self.state.best_metric, self.state.best_global_step, self.state.best_model_checkpoint

    def _lost(self, step: int) -> None:
        """The checkpoint of `step` does not exist: if it was the best one, the one before it is."""
        if self.state.best_global_step == step:
            self.state.best_metric, self.state.best_global_step, self.state.best_model_checkpoint = self._best_before

    def _report(self, step: int, reason: str, written: int) -> None:
        self._saved_step = -1
        needs = room(self.run_folder, self.bytes_needed(written))
        self._save_error = f"the checkpoint of step {step} could not be written: {reason}; {needs}"
        log.error("%s. Training goes on; %s", self._save_error, self._kept())

    def bytes_needed(self, at_least: int = 0) -> int:
        """Size of a checkpoint: of the last complete one, or the trained weights and AdamW's two moments."""
        last = self.last_checkpoint()
        if last is not None:
            return max(size_of(last), at_least)
        trained = (p for p in self.step_module.parameters() if p.requires_grad)
        return max(sum(3 * p.numel() * p.element_size() for p in trained), at_least)

    def last_checkpoint(self) -> Path | None:
        """The newest complete checkpoint, of this process or of the run before it; waits for the one in flight."""
        self._settle()
        return self.publisher.newest or last_complete(self.run_folder)

    def checkpoint_to_resume(self, resume: bool) -> Path | None:
        """Clear away what a kill left and find the checkpoint to go on from, the same on all processes."""
        if not resume:
            return None
        found: list[Path | None] = [None]
        if self.args.process_index == 0:
            clean(self.run_folder)
            found = [last_complete(self.run_folder)]
        if self.args.world_size > 1:
            dist.broadcast_object_list(found, src=0, device=self.args.device)
        checkpoint = found[0]
        if checkpoint is not None:
            self.publisher.newest = checkpoint
            state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
            self._saved_step = state["global_step"]
            bad = state.get("stateful_callbacks", {}).get(_KEY, {"in_a_row": 0, "all": 0})
            self.bad_in_a_row, self.bad_steps = bad["in_a_row"], bad["all"]
        return checkpoint

    # ---- the end
    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        # the best checkpoint may be the one in flight
        self._settle()
        if self.args.world_size > 1:
            best = [self.state.best_model_checkpoint]
            dist.broadcast_object_list(best, src=0, device=self.args.device)
            self.state.best_model_checkpoint = best[0]
        return super()._finalize_training(*args, **kwargs)

    def conclude(self) -> None:
        """After `train`: return where it went through all of its steps, else end the process or raise.

        Raises:
            SystemExit: 0 where the run was asked to stop and is saved, 130 where it was interrupted; 1 where the data
                of another process failed.
            OSError: it was asked to stop and cannot be saved. The error of the data, with what is kept.
        """
        step = self.state.global_step
        if self._data_failed and self._data_error is None:
            raise SystemExit(1)
        if not self._data_failed and (not self.stopping or step >= self.args.max_steps):
            return
        kept = self._kept() + (f" ({self._save_error})" if self._save_error else "")
        if self._data_error is not None:
            raise RunFailed(f"{self._data_error}; {kept}") from self._data_error
        if self._on_any(self._save_error is not None):
            raise OSError(kept)
        if self.args.process_index == 0:
            name = self.stop.received.name if self.stop.received else "another process"
            print(f"{name}: stopped after step {step} of {self.args.max_steps}; {kept}", flush=True)
        raise SystemExit(INTERRUPTED if self.interrupted else 0)

    def _kept(self) -> str:
        """What is kept of the run, and how to go on."""
        last = self.last_checkpoint()
        if last is None:
            return "there is no complete checkpoint: the run starts again with the same command and --resume"
        return f"{last} is complete: continue from it with the same command and --resume"

    # ---- the log
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in the Trainer; a log that cannot be written is said once and does not end the run."""
        try:
            super().log(logs, start_time)
        except OSError as error:
            if self._unlogged != (reason := str(error)):
                self._unlogged = reason
                log.warning("the log cannot be written: %s", reason)

    def _note(self, entry: Mapping[str, object]) -> None:
        if self.args.process_index == 0:
            try:
                with (self.run_folder / "log.jsonl").open("a", encoding="utf-8") as handle:
                    handle.write(json.dumps(entry, ensure_ascii=False) + "\n")
            except OSError as error:
                log.warning("the log cannot be written: %s", error)
