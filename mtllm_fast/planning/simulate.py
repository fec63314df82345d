"""One micro-step of general adaptation on meta tensors: ours, and the paper's own padded way, on the same texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from ..data.batch import Batch
from ..data.pack import PackedBatch
from ..losses import DistillationLoss, DistillationWeights
from ..models import MTLLM, LoraSettings, PackedEncoder, PackedLLM, ProjectionConfig, lora
from ..models.adapters import AdaptedModel
from ..models.attention import AttentionPlan
from ..models.attention.varlen import options
from ..models.checkpointing import recompute_layers
from ..models.encoders import family_of
from ..models.mtllm import MTLLMConfig
from ..training.stage import Stage
from .accounting import Accounting, Rates
from .parts import forward_parts

PACKED, PADDED = "mtllm_plan_packed", "mtllm_plan_padded"
# bytes per weight of a frozen linear layer; nf4 with double quantisation has 4.127 bits, int8 a scale per output row,
# fp8 holds each weight twice, transposed too
WEIGHT_BYTES = {"int8": 1.0, "nf4": 0.5 + 0.127 / 8, "fp8": 2.0}
PAGING = 20e9  # bytes/s between the GPU and host memory that paged optimizer state moves at, an assumption


@dataclass(frozen=True)
class StepSpec:
    """What is trained, and how.

    Attributes:
        base: LLM linear layers "dense" in `dtype`; "int8" or "nf4", dequantised at every use; or "fp8", held
            and multiplied in fp8, at twice the rate.
        checkpointing: True, or how many of the student's layers are run again in backward instead of being kept.
        dtype: of frozen weights and activations. Trained weights, gradients and optimizer state are float32.
        eight_bit_optimizer: AdamW state in 8 bits. offloaded_optimizer: it is in host memory between steps.
    """

    encoder: PreTrainedConfig
    llm: PreTrainedConfig
    loss: DistillationWeights = field(default_factory=DistillationWeights)
    lora: LoraSettings = field(default_factory=LoraSettings)
    projection: ProjectionConfig = field(default_factory=ProjectionConfig)
    base: Literal["dense", "int8", "nf4", "fp8"] = "dense"
    checkpointing: bool | int = False
    dtype: torch.dtype = torch.bfloat16
    eight_bit_optimizer: bool = False
    offloaded_optimizer: bool = False

    @property
    def optimizer_bytes(self) -> float:
        """AdamW state per trained weight."""
        return 2.0 if self.eight_bit_optimizer else 8.0


@dataclass
class StepCost:
    """What one micro-step of one GPU costs.

    Attributes:
        texts, tokens: rows and real tokens (MT side, LLM side) of the micro-batch; slots: with padding.
        static: bytes by part that are there all the time.
        peak: most bytes beyond them at once; peak_parts: by the part that allocated them.
        flops, seconds: by part.
    """

    texts: int
    tokens: tuple[int, int]
    slots: tuple[int, int]
    static: dict[str, float]
    peak: int
    peak_parts: dict[str, int]
    flops: dict[str, float]
    seconds: dict[str, float]

    @property
    def memory(self) -> float:
        return sum(self.static.values()) + self.peak


def _packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    plan: AttentionPlan,
    **_: object,
) -> tuple[Tensor, None]:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    cu, longest = plan.batch.cu_seqlens, plan.batch.max_seqlen
    grouped: dict[str, Any] = {}
    if (groups := q.shape[1] // k.shape[1]) > 1:
        if "enable_gqa" in options():
            grouped["enable_gqa"] = True
        else:  # torch 2.11, as the varlen backend does it
            k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    out = varlen_attn(q, k, v, cu, cu, longest, longest, **grouped)
    return out[None], None  # type: ignore[call-overload,index]


def _padded_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **_: object
) -> tuple[Tensor, None]:
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (key, value))
    heads = (query.shape[0], query.shape[1], query.shape[2], query.shape[2])
    bias = None if mask is None else mask.expand(heads)
    out = torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, bias, True)[0]
    return out.transpose(1, 2).contiguous(), None


def _cpu_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, *, is_causal: bool, scale: float, **_: object
) -> Tensor:
    """What `scaled_dot_product_attention` runs on the CPU; on meta tensors it would hold all scores."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(q, k, v, dropout, is_causal, attn_mask=mask, scale=scale)[0]


for name, function in ((PACKED, _packed_attention), (PADDED, _padded_attention)):
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, lambda *args, **kwargs: None)


def _models(spec: StepSpec, device: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    with torch.device(device):
        encoder = family_of(spec.encoder).build(spec.encoder, spec.dtype)
        llm = AutoModelForCausalLM.from_config(spec.llm, dtype=spec.dtype)
    return encoder, llm


def build(spec: StepSpec, device: str = "meta") -> MTLLM:
    """The stack of `spec` with random (on "meta": no) weights, in training mode, all weights in `spec.dtype`."""
    encoder, llm = _models(spec, device)
    with torch.device(device):
        config = MTLLMConfig(projection=spec.projection, adapters={"student": spec.lora})
        model = MTLLM(config, PackedEncoder(encoder), PackedLLM(llm))
    if spec.checkpointing:
        recompute_layers(model.require_llm(), None if spec.checkpointing is True else int(spec.checkpointing))
    return model.to(spec.dtype).train()


def make_batch(lengths: Sequence[tuple[int, int]], device: str, vocab: tuple[int, int] = (8, 8)) -> Batch:
    """A packed batch of texts with (MT tokens, LLM tokens); each LLM token but the first has a partner where it can."""
    sides = [
        PackedBatch.from_sequences([[i % v for i in range(n)] for n in side]).to(device)
        for side, v in zip(zip(*lengths), vocab)
    ]
    rows: tuple[list[int], list[int]] = ([], [])
    starts = [0, 0]
    for n, m in lengths:
        count = max(0, min(n - 2, m - 1))
        for side_rows, start in zip(rows, starts):
            side_rows += range(start + 1, start + 1 + count)
        starts = [starts[0] + n, starts[1] + m]
    pairs = [torch.tensor(r, dtype=torch.int64).to(device) for r in rows]
    return Batch(mt=sides[0], llm=sides[1], mt_rows=pairs[0], llm_rows=pairs[1])


def static_memory(spec: StepSpec, model: nn.Module, encoder: nn.Module, llm: PreTrainedModel) -> dict[str, float]:
    """Bytes by part that a training process holds between steps."""
    item = spec.dtype.itemsize
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = {id(p): p for p in llm.parameters() if not p.requires_grad}.values()
    linear = {
        id(m.weight): m.weight.numel()
        for m in llm.get_decoder().modules()
        if isinstance(m, nn.Linear) and not m.weight.requires_grad
    }
    quantised = sum(linear.values()) if spec.base in WEIGHT_BYTES else 0
    llm_bytes = item * (sum(p.numel() for p in frozen) - quantised) + WEIGHT_BYTES.get(spec.base, 0.0) * quantised
    return {
        "encoder weights": float(item * sum(p.numel() for p in encoder.parameters())),
        "LLM weights": float(llm_bytes),
        "trained weights": 4.0 * trained,
        "gradients": 4.0 * trained,
        "optimizer state": 0.0 if spec.offloaded_optimizer else spec.optimizer_bytes * trained,
    }


def _dequantise(
    acc: Accounting, spec: StepSpec, llm: PreTrainedModel, rates: Rates | None, uses: dict[str, int]
) -> None:
    """Weights in int8 and nf4 are read, and written in `dtype`, before every GEMM that reads them."""
    if spec.base not in ("int8", "nf4") or rates is None:
        return
    touched = WEIGHT_BYTES[spec.base] + spec.dtype.itemsize
    weights = sum(m.weight.numel() for m in llm.get_decoder().modules() if isinstance(m, nn.Linear))
    for part, count in uses.items():
        acc.seconds[part] += count * weights * touched / rates.bytes


def _prepare(model: nn.Module) -> int:
    """Give trained weights the gradients they have in every step but the first; returns how many weights there are."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    return sum(p.numel() for p in trained)


def _cost(
    acc: Accounting,
    spec: StepSpec,
    static: dict[str, float],
    lengths: Sequence[tuple[int, int]],
    slots: tuple[int, int],
    trained: int,
) -> StepCost:
    if acc.rates is not None:
        acc.seconds["optimizer"] += 28 * trained / acc.rates.bytes  # AdamW reads and writes weight, gradient, moments
        if spec.offloaded_optimizer:
            acc.seconds["optimizer"] += 2 * spec.optimizer_bytes * trained / PAGING
    tokens = (sum(n for n, _ in lengths), sum(m for _, m in lengths))
    seconds = {k: v for k, v in acc.seconds.items() if v}
    return StepCost(
        len(lengths),
        tokens,
        slots,
        static,
        acc.peak,
        dict(acc.peak_parts),
        {k: float(v) for k, v in acc.flops.items()},
        seconds,
    )


def ours(
    spec: StepSpec,
    lengths: Sequence[tuple[int, int]],
    rates: Rates | None = None,
    architecture: str = "sm_90",
    model: MTLLM | None = None,
) -> StepCost:
    """One packed micro-step of this library, in bf16 as autocast runs it: adapters in fp32, cast at every use.

    Args:
        architecture: "cpu" takes the CPU's attention and chunk sizes.
        model: `build(spec)`, where several steps of one model are asked for.
    """
    model = build(spec) if model is None else model
    autocast = None if spec.dtype in (torch.float32, torch.float64) else spec.dtype
    if autocast is not None:
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.data = parameter.data.float()
    stack = model.require_stack()
    if architecture != "cpu":
        stack.encoder.model.set_attn_implementation(PACKED)
        stack.llm.model.set_attn_implementation(PACKED)
    stage, batch = Stage(model, DistillationLoss(spec.loss)), make_batch(lengths, "meta")
    trained = _prepare(model)
    acc = Accounting(rates, architecture)
    if spec.base == "fp8":
        layers = [m for m in stack.llm.layers_root.modules() if isinstance(m, nn.Linear) and not m.weight.requires_grad]
        acc.fp8 = {layer.weight.untyped_storage() for layer in layers}
    squares = [sum(side[i] ** 2 for side in lengths) for i in (0, 1)]

    @contextmanager
    def book(name: str) -> Iterator[None]:
        acc.attention_pairs = squares[1 if name == "LLM teacher" else 0]
        with acc.part(name):
            yield

    with ExitStack() as parts:
        parts.enter_context(forward_parts(model, book, stage.loss))
        parts.enter_context(patch.object(lora, "autocast_dtype", lambda _: autocast))  # meta tensors have no autocast
        if architecture == "cpu":
            parts.enter_context(patch.object(torch.nn.functional, "scaled_dot_product_attention", _cpu_attention))
        with acc:
            terms = stage(batch)
            with acc.part("loss"):
                total = stage.loss.total(terms, stage.counts(batch))
            acc.attention_pairs = squares[0]
            with acc.part("backward"):
                total.backward()
    tokens = (sum(n for n, _ in lengths), sum(m for _, m in lengths))
    uses = {"LLM teacher": 1, "LLM student": 1, "backward": 2 if spec.checkpointing else 1}
    _dequantise(acc, spec, stack.llm.model, rates, uses)
    static = static_memory(spec, model, stack.encoder, stack.llm.model)
    return _cost(acc, spec, static, lengths, tokens, trained)


class _Padded(AdaptedModel):
    @property
    def layers_root(self) -> nn.Module:
        return self.model.get_decoder()


def authors(spec: StepSpec, lengths: Sequence[tuple[int, int]], rates: Rates | None = None) -> StepCost:
    """One micro-step as the paper's code runs it: both sides padded to their longest text, two passes with a 4-D mask
    and a KV cache, norms and residual stream in float32 under autocast, pooled MSE of masked means; with `loss.kl`
    full logits of the aligned rows."""
    encoder, llm = _models(spec, "meta")
    for model in (encoder, llm):
        model.set_attn_implementation(PADDED)
        model.requires_grad_(False)
    for module in llm.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.float()
    adapted = _Padded(llm, None)
    adapted.add_adapter(spec.lora)
    adapted.train()
    encoder.eval()
    with torch.device("meta"):
        projection = nn.Linear(family_of(spec.encoder).width(spec.encoder), int(spec.llm.hidden_size), dtype=spec.dtype)
    for name, parameter in llm.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(spec.dtype)
    for module in llm.modules():
        if isinstance(module, nn.Linear):  # autocast: a linear layer casts what it is given
            module.register_forward_pre_hook(lambda m, args: (args[0].to(m.weight.dtype),))
    count = len(lengths)
    longest = (max(n for n, _ in lengths), max(m for _, m in lengths))
    ids = [torch.empty(count, length, dtype=torch.int64, device="meta") for length in longest]
    masks = [torch.empty(count, 1, length, length, dtype=spec.dtype, device="meta") for length in longest]
    keep = [torch.empty(count, length, 1, device="meta") for length in longest]
    decoder = llm.get_decoder()

    def pooled(states: Tensor, side: int) -> Tensor:
        return (states * keep[side]).sum(1) / keep[side].sum(1)

    both = nn.ModuleList([llm, projection])
    trained = _prepare(both)
    acc = Accounting(rates)
    with acc:
        with acc.part("LLM teacher"), torch.no_grad(), adapted.adapter(None):
            teacher = decoder(input_ids=ids[1], attention_mask=masks[1], use_cache=True).last_hidden_state
        with acc.part("encoder"), torch.no_grad():
            states = encoder(input_ids=ids[0], attention_mask=masks[0]).last_hidden_state
        with acc.part("projection"):
            embeds = projection(states).float()
        with acc.part("LLM student"):
            student = decoder(inputs_embeds=embeds, attention_mask=masks[0], use_cache=True).last_hidden_state
        with acc.part("loss"):
            loss = (pooled(student, 0) - pooled(teacher, 1)).square().mean()
            if spec.loss.kl:
                pairs = sum(max(0, min(n - 2, m - 1)) for n, m in lengths)
                rows = torch.empty(pairs, dtype=torch.int64, device="meta")
                head = llm.get_output_embeddings()
                z_s, z_t = (head(x.flatten(0, 1)[rows].to(spec.dtype)).float() for x in (student, teacher))
                loss = loss + torch.nn.functional.kl_div(
                    z_s.log_softmax(-1), z_t.log_softmax(-1), log_target=True, reduction="batchmean"
                )
        with acc.part("backward"):
            loss.backward()
    _dequantise(acc, spec, llm, rates, {"LLM teacher": 1, "LLM student": 1, "backward": 1})
    static = static_memory(spec, both, encoder, llm)
    return _cost(acc, spec, static, lengths, (count * longest[0], count * longest[1]), trained)
