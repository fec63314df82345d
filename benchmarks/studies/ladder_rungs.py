"""What a rung of the ladder is: how it takes a step, what it puts into a model, whether its result is right."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mtllm_fast.data.pack import PackedBatch
from mtllm_fast.losses import DistillationLoss
from mtllm_fast.models.checkpointing import kept_bytes_per_token
from mtllm_fast.models.frozen import KINDS, dequantised
from mtllm_fast.training import OptimSettings
from mtllm_fast.training.switches import apply_switches, check_switches

from ..cases.joint_pass import shared_products
from ..cases.steps import (
    SMALL,
    Problem,
    exact,
    gradients,
    huggingface,
    make,
    masked_mean,
    packed_mean,
    padded_rows,
    padded_states,
    result,
    small,
    unfused_loss,
)
from ..common import peak_incremental_mib, relative_error
from ..registry import Size

# of loss and gradients, relative, in the 2-norm; fp8 rounds what is multiplied with the weights to 3 bits of mantissa
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2, "fp8": 0.1}


@dataclass(frozen=True)
class Rung:
    """A way to take a step.

    Attributes:
        packed, joint, fused: packed rows; one pass of the LLM over teacher and student; the fused loss.
        switches: fields of `OptimSettings`. budget: share of the activations that checkpointing may keep.
        below: the rung that it is one change away from.
    """

    name: str
    packed: bool = False
    joint: bool = False
    fused: bool = False
    switches: dict[str, Any] = field(default_factory=dict)
    budget: float = 0.0
    below: str = "plain"

    @property
    def base(self) -> str:
        return str(self.switches.get("base_weights", "auto"))

    @property
    def precision(self) -> str:
        """Key of `TOLERANCE`."""
        return "fp8" if self.base == "fp8" else "bf16" if self.switches.get("bf16") else "fp32"


def joint_states(p: Problem) -> tuple[Tensor, Tensor]:
    """Student and teacher states of one pass over both."""
    stack, mt, llm = p.model.require_stack(), p.batch.side("mt"), p.batch.side("llm")
    with torch.no_grad():
        states = stack.encoder(mt, final_norm=False)
    embeds = stack.projection(states, stack.encoder.final_norm, stack.llm.model.dtype)
    tokens = stack.llm.model.get_input_embeddings()(llm.input_ids)
    both = PackedBatch.from_sequences([[0] * n for n in (*mt.lengths, *llm.lengths)]).to(mt.device)
    with shared_products(stack.llm, mt.num_tokens):
        states = stack.llm(both, embeds=torch.cat([embeds, tokens]))
    return states[: mt.num_tokens], states[mt.num_tokens :].detach()


def forward_backward(rung: Rung, p: Problem) -> dict[str, Any]:
    """Loss and gradients of one step."""
    mt, llm, model = p.batch.side("mt"), p.batch.side("llm"), p.model
    assert p.batch.mt_rows is not None and p.batch.llm_rows is not None
    bf16 = torch.autocast(mt.device.type, torch.bfloat16) if rung.switches.get("bf16") else nullcontext()
    with bf16:
        if rung.joint:
            student, teacher = joint_states(p)
        elif rung.packed:
            teacher = model.teacher_states(llm, p.teacher)
            student = model.states(mt)
        else:
            with huggingface(model):
                student, teacher, masks = padded_states(p)
                if not rung.fused:
                    means = masked_mean(student, masks[0]), masked_mean(teacher, masks[1])
                    select = padded_rows(mt)[p.batch.mt_rows], padded_rows(llm)[p.batch.llm_rows]
                    every = student.flatten(0, 1), teacher.flatten(0, 1)
                    return gradients(p, unfused_loss(p, means, every, select))
                student, teacher = (x.flatten(0, 1)[padded_rows(s)] for x, s in ((student, mt), (teacher, llm)))
                return _fused(p, student, teacher)
        if rung.fused:
            return _fused(p, student, teacher)
        means = packed_mean(student, mt), packed_mean(teacher, llm)
        return gradients(p, unfused_loss(p, means, (student, teacher), (p.batch.mt_rows, p.batch.llm_rows)))


def _fused(p: Problem, student: Tensor, teacher: Tensor) -> dict[str, Any]:
    loss = DistillationLoss(p.weights)
    terms = loss(student, teacher, p.batch, lm_head=p.model.require_llm().lm_head)
    return gradients(p, loss.total(terms, p.weights.counts(p.batch)))


def settings(rung: Rung, p: Problem, device: str) -> OptimSettings:
    """The rung's switches as a training run would have them."""
    switches = {"bf16": False, "compile": False, "liger": False, **rung.switches}
    if rung.budget:
        llm, tokens = p.model.require_llm(), p.batch.side("mt").num_tokens
        layers = len(llm.layers)
        with torch.autocast(device, torch.bfloat16, enabled=bool(switches.get("bf16"))):
            kept, _ = kept_bytes_per_token(llm)
        switches |= {"activation_memory_gib": rung.budget * kept * tokens * layers / 2**30, "tokens": tokens}
    tokens = switches.pop("tokens", 512)
    return OptimSettings(device=device, tokens=tokens, max_length=min(512, tokens), **switches)  # type: ignore[arg-type]


def optimizer_of(optim: OptimSettings, p: Problem) -> torch.optim.Optimizer:
    """The optimizer that transformers' Trainer makes for these settings."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(output_dir="unused", optim=optim.optim, learning_rate=0.0, report_to="none")
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    return kind(p.trained.values(), **options)


@dataclass
class Prepared:
    """A problem with a rung's switches in its model, its optimizer, and what its gradients must be."""

    rung: Rung
    problem: Problem
    optimizer: torch.optim.Optimizer

    def step(self) -> dict[str, Any]:
        out = forward_backward(self.rung, self.problem)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return out

    def static_mib(self) -> float:
        """Weights and optimizer state."""
        state = [x for entry in self.optimizer.state.values() for x in entry.values() if isinstance(x, Tensor)]
        found: dict[int, int] = {}
        for tensor in _plain([*self.problem.model.state_dict().values(), *state]):
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        return sum(found.values()) / 2**20


def _plain(tensors: list[Any]) -> Iterator[Tensor]:
    for tensor in tensors:
        if is_traceable_wrapper_subclass(tensor):
            yield from _plain([getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]])
        elif isinstance(tensor, Tensor):
            yield tensor


def as_bf16(p: Problem) -> None:
    """Frozen weights in bf16, as they are loaded for training; position tables of the LLM stay fp32."""
    stack = p.model.require_stack()
    stack.encoder.to(torch.bfloat16)
    for parameter in stack.llm.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()


def prepare(rung: Rung, p: Problem, device: str, done: dict[str, Any] | None = None) -> Prepared:
    """Put the rung's switches into the problem's model, except those in `done`, which are there already."""
    optim = settings(rung, p, device)
    check_switches(optim)
    missing = {"compile": False, "liger": False, "base_weights": "auto"} if done is not None else {}
    todo = replace(optim, **{k: v for k, v in missing.items() if done and done.get(k) == rung.switches.get(k)})
    p.model.train()
    if optim.bf16 and next(p.model.parameters()).dtype == torch.float32:
        as_bf16(p)
    apply_switches(p.model, todo, torch.device(device))
    return Prepared(rung, p, optimizer_of(optim, p))


def reference(rung: Rung, plain: Problem, mine: Problem | None) -> dict[str, Tensor]:
    """Loss and gradients of the plain step in fp64; over the rung's own dequantised weights where it has such."""
    if rung.base not in KINDS:
        return exact(plain)
    assert mine is not None
    model = copy.deepcopy(plain.model)
    own = dict(mine.model.require_llm().named_modules())
    with torch.no_grad():
        for name, module in model.require_llm().named_modules():
            if name.endswith(".base_layer"):
                module.weight.copy_(dequantised(own[name]))  # type: ignore[operator,union-attr]
    return exact(replace(plain, model=model))


def gate(rung: Rung, mine: Problem, want: dict[str, Tensor]) -> tuple[str, dict[str, float]]:
    """("pass" | "fail", relative error by result) on the problem `mine`."""
    got = result(mine, forward_backward(rung, mine))
    errors = {key: relative_error(got[key], right) for key, right in want.items()}
    return ("pass" if all(e <= TOLERANCE[rung.precision] for e in errors.values()) else "fail"), errors


def missing(rung: Rung, device: str) -> str | None:
    """Why a rung cannot run here."""
    try:
        checkpointing = "none" if rung.budget else rung.switches.get("checkpointing", "none")
        switches: dict[str, Any] = {**rung.switches, "checkpointing": checkpointing}
        check_switches(OptimSettings(device=device, **switches))
    except ValueError as error:
        return str(error)
    return None


def memory_here(rung: Rung, size: Size, threads: int) -> tuple[float, float]:
    """(static, peak incremental) MiB of a CPU step in this process, everything warmed up on a tiny problem first."""
    torch.set_num_threads(threads)
    warm = prepare(rung, make(**SMALL, kl=0.5, dtype=torch.float32, device="cpu"), "cpu")
    warm.step()
    torch.compiler.reset()
    ready = prepare(rung, make(**size, dtype=torch.float32, device="cpu"), "cpu")
    whole, ready.problem = ready.problem, small(ready.problem)
    ready.step()  # the optimizer's state, compiled layers
    ready.problem = whole
    if rung.switches.get("compile"):
        ready.step()
    del warm
    # the larger of two: where the system takes mapped files out of memory meanwhile, less is seen
    return ready.static_mib(), max(peak_incremental_mib(ready.step, "cpu") for _ in range(2))
