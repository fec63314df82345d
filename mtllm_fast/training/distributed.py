"""Several processes: which engine shares the work, and what stays the same when their number changes.

| engine    | every process holds                      | by                                                            |
| ddp       | the whole model                          | torch.nn.parallel.DistributedDataParallel, through accelerate |
| fsdp2     | its part of the weights                  | torch.distributed.fsdp.fully_shard                            |
| deepspeed | the model, and its part of AdamW's state | ZeRO-2, through accelerate                                    |

FSDP2 is applied here and not by accelerate's plugin, which does not shard on CPUs (so that nothing could be tested
there), casts what the model returns, the sums of the losses, to bf16, and in some versions the frozen weights to fp32.
Its launcher and its configuration files are understood.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from ..models import MTLLM
from ..models.sharded import is_sharded, spread_like, whole
from .processes import processes
from .survival import SurvivingTrainer

log = logging.getLogger(__name__)

CONFIGS = Path(__file__).parent / "configs"


def shard(step: nn.Module, student: MTLLM, device: torch.device) -> None:
    """Spread the weights of `step`, which holds `student`, over the processes, in place: layer by layer, and the rest.

    A layer's weights are gathered where it runs, and again in its backward. What lies outside of the layers (the
    embeddings, the LM head, the projection) is gathered once per forward and kept until its backward. On several
    machines of several processes each, weights are spread inside of a machine and repeated on every machine.
    Quantised weights are not spread: they are small, and know no parts.
    """
    from torch.distributed.fsdp import fully_shard

    world, local = processes(), int(os.environ.get("LOCAL_WORLD_SIZE", processes()))
    several = 1 < local < world
    mesh = init_device_mesh(
        device.type,
        (world // local, local) if several else (world,),
        mesh_dim_names=("machines", "processes") if several else ("processes",),
    )
    kept = {p for p in step.parameters() if type(p) is not nn.Parameter or not p.is_floating_point()}
    if kept:
        step.to(device)
    spread = partial(fully_shard, mesh=mesh, ignored_params=kept or None)
    names: set[str] = set()
    for part in (student.encoder, student.llm):
        names |= set(getattr(part.model, "_no_split_modules", None) or ()) if part is not None else set()
    for layer in [module for module in student.modules() if type(module).__name__ in names]:
        spread(layer)
    spread(step)
    # accelerate leaves a model alone that has been prepared; it would put it into DistributedDataParallel
    step._is_accelerate_prepared = True  # type: ignore[assignment]


def whole_optimizer_state(optimizer: Any) -> dict[str, Any]:
    """`optimizer.state_dict()` as one process without sharding has it, on the CPU; called by all processes."""
    state = optimizer.state_dict()
    entries = {
        index: {name: whole(value) if isinstance(value, Tensor) else value for name, value in entry.items()}
        for index, entry in state["state"].items()
    }
    return {**state, "state": entries}


def spread_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """The reverse, for `optimizer.load_state_dict`; this process's part of every tensor."""
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    saved = [index for group in state["param_groups"] for index in group["params"]]
    like = dict(zip(saved, held))
    entries = {
        index: {
            name: spread_like(value, like[index])
            if isinstance(value, Tensor) and value.shape == like[index].shape
            else value
            for name, value in entry.items()
        }
        for index, entry in state["state"].items()
    }
    return {**state, "state": entries}


def pack_seed(seed: int, step: int, place: int) -> int:
    """Seed of the dropout of pack `place` of step `step`, wherever that pack is computed."""
    return random.Random(f"{seed}/{step}/{place}").getrandbits(62)


class ParallelTrainer(SurvivingTrainer):
    """A `Trainer` whose model is copied to all processes (DDP) or spread over them (FSDP2, applied beforehand).

    Checkpoints are the same files in either case, so that a run goes on with another engine.
    """

    @property
    def spread(self) -> bool:
        """Whether FSDP2 holds the weights."""
        return is_sharded(self.step_module)

    def create_accelerator_and_postprocess(self) -> None:
        # set by `accelerate launch` for its own FSDP, which is not used
        asked = os.environ.pop("ACCELERATE_USE_FSDP", None)
        try:
            super().create_accelerator_and_postprocess()
        finally:
            if asked is not None:
                os.environ["ACCELERATE_USE_FSDP"] = asked

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not is_sharded(model):
            super()._move_model_to_device(model, device)

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager[None]:
        # accelerate does this where it wraps the model; within its own wrapper nothing changes
        return self.accelerator.autocast() if self.spread else super().autocast_smart_context_manager()

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.spread:
            optimizer.register_load_state_dict_pre_hook(spread_optimizer_state)
        return optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The student's own weights; what is spread is gathered by all processes."""
        if self.spread or self.args.should_save:
            self._save(output_dir)

    def check_engine_of(self, checkpoint: Path) -> None:
        """Raise ValueError where this engine cannot go on from the checkpoint: DeepSpeed's are its own."""
        own = not (checkpoint / OPTIMIZER_NAME).is_file()
        if own != self.is_deepspeed_enabled:
            made, now = ("with", "without") if own else ("without", "with")
            raise ValueError(f"--resume: {checkpoint} was made {made} DeepSpeed, and this run is {now} it")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.spread:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = whole_optimizer_state(self.optimizer)
        assert self.lr_scheduler is not None
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Clip to `max_grad_norm`, by a norm that is summed in float64.

        In float32 the sum depends on how the gradients are spread, in the last bit, and so does every weight after it:
        50 steps later the losses of one process and of FSDP2 were 9e-5 apart; summed so they are the same.
        """
        if self.is_deepspeed_enabled:
            return super()._clip_grad_norm(model)
        gradients: list[Any] = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        local = [getattr(gradient, "to_local", lambda g=gradient: g)() for gradient in gradients]
        squares = torch.stack([torch.linalg.vector_norm(part, dtype=torch.float64).square() for part in local]).sum()
        if self.spread:
            squares = squares.to(self.args.device)
            dist.all_reduce(squares, group=gradients[0].device_mesh.get_group("processes"))
        norm = squares.sqrt().float()
        factor = (self.args.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        for part in local:
            part.mul_(factor.to(part.device))
        return norm

    @contextmanager
    def outside_of_forward(self) -> Iterator[None]:
        """Run parts of the student in the block: what lies outside of its layers is whole there."""
        if self.spread:
            self.step_module.unshard()  # type: ignore[operator]
        try:
            yield
        finally:
            if self.spread:
                self.step_module.reshard()  # type: ignore[operator]
