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
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from packaging.version import Version
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from ..models import MTLLM
from ..models.sharded import is_sharded, spread_like, whole
from .config import OptimSettings
from .processes import processes
from .survival import SurvivingTrainer
from .switches import optimizer_name

log = logging.getLogger(__name__)

Engine = Literal["one", "ddp", "fsdp2", "deepspeed"]
CONFIGS = Path(__file__).parent / "configs"
# torch's own know spread weights
SPREAD_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")


def _asked(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true", "yes", "y", "on")


def choose_engine(optim: OptimSettings) -> Engine:
    """The engine of this run, from `optim.parallel` and from what `accelerate launch` was configured with.

    Raises:
        ValueError: the two disagree, an engine cannot do what it is asked for, or its package is missing.
    """
    launched = "fsdp2" if _asked("ACCELERATE_USE_FSDP") else None
    launched = "deepspeed" if _asked("ACCELERATE_USE_DEEPSPEED") else launched
    asked = optim.parallel
    if launched and asked not in ("auto", launched):
        raise ValueError(f"parallel={asked!r}: but accelerate was launched with a configuration for {launched}")
    engine: str = launched or asked
    if processes() == 1:
        if engine not in ("auto", "ddp"):
            log.info("%s: there is one process, which holds everything", engine)
        return "one"
    if engine == "fsdp2":
        _check_fsdp2(optim, launched is not None)
        return "fsdp2"
    if engine == "deepspeed":
        if find_spec("deepspeed") is None:
            raise ValueError("DeepSpeed is asked for, but it is not installed: pip install 'mtllm-fast[deepspeed]'")
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        if stage not in ("1", "2"):
            raise ValueError(f"DeepSpeed ZeRO stage {stage}: 1 and 2 are known here; --parallel fsdp2 spreads weights")
        return "deepspeed"
    return "ddp"


def _check_fsdp2(optim: OptimSettings, launched: bool) -> None:
    if launched and os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError("fsdp_version: only FSDP2 is known here; say `fsdp_version: 2` in accelerate's configuration")
    if Version(version("accelerate")) < Version("1.14"):  # older ones put a model that is spread already into DDP
        raise ValueError(f"FSDP2 needs accelerate 1.14 or newer, this is {version('accelerate')}")
    if _asked("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise ValueError(
            "say `fsdp_cpu_ram_efficient_loading: false`: with true only the first process would read the weights"
        )
    if _asked("FSDP_ACTIVATION_CHECKPOINTING"):
        raise ValueError("fsdp_activation_checkpointing: it would draw other dropout; use --checkpointing full")
    if _asked("FSDP_OFFLOAD_PARAMS"):
        raise ValueError("fsdp_offload_params: spread weights stay on the GPUs here; say `fsdp_offload_params: false`")
    if (name := optimizer_name(optim)) not in SPREAD_OPTIMIZERS:
        raise ValueError(f"optim={name!r} with FSDP2: expected one of {', '.join(SPREAD_OPTIMIZERS)}")


def engine_arguments(engine: Engine) -> dict[str, Any]:
    """`TrainingArguments` of an engine that accelerate was not launched for."""
    if engine != "deepspeed" or _asked("ACCELERATE_USE_DEEPSPEED"):
        return {}
    automatic = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return {
        "deepspeed": {
            "zero_optimization": {"stage": 2},
            "bf16": {"enabled": "auto"},
            **dict.fromkeys(automatic, "auto"),
        }
    }


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
    options: dict[str, Any] = {"mesh": mesh, "ignored_params": kept or None}
    names: set[str] = set()
    for part in (student.encoder, student.llm):
        names |= set(getattr(part.model, "_no_split_modules", None) or ()) if part is not None else set()
    for layer in [module for module in student.modules() if type(module).__name__ in names]:
        fully_shard(layer, **options)
    fully_shard(step, **options)
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

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
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

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

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
