"""Whole training steps, forward + backward: ours against the authors' way, on the same documents and weights.

    python -m benchmarks.cases.steps --device cpu --json F        (mtllm bench adaptation_step task_distillation_step)

ours             MTLLM on packed rows, DistillationLoss.
ours, teacher cached  the same with `--teacher-cache`: pooled states, and the moments of the forward KL, read from disk.
packed, unfused  the same packed models, the loss op by op with the logits of all aligned rows held.
padded, 4-D mask the authors' way: Hugging Face's models on the padded batch, a 4-D mask, teacher and student pass, the
                 loss op by op, logits held. (Of the aligned rows only: full (B, L, V) logits would be slower still.)

All three train the same parameters (projection, LoRA r=16 on every linear layer of the LLM, no dropout) with the same
optimisation maths. The gate compares loss and all gradients with the padded step in fp64, on the same weights and the
first texts of the batch (on a small model where the weights are too large for fp64).
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtllm_fast.data.batch import Batch
from mtllm_fast.data.pack import PackedBatch
from mtllm_fast.losses import DistillationLoss, DistillationWeights
from mtllm_fast.models import MTLLM
from mtllm_fast.models.adapters import LoraSettings
from mtllm_fast.models.attention import NAME
from mtllm_fast.models.heads import HeadConfig
from mtllm_fast.training.stage import Stage
from mtllm_fast.training.teacher_cache import Kept, TeacherCache, complete, moments_of

from ..lengths import DISTRIBUTIONS
from ..models import llama, m2m100
from ..registry import Case, Size, Variant, Work, register
from ..run import main
from .attention import mask_4d
from .lora import pefts_layers

ALIGNED = 0.65  # share of a text's tokens that end at the same character in both tokenizations: words over tokens
LLM_TOKENS = 1.05  # LLM tokens per MT token
LARGE = 200_000_000  # parameters beyond which the gate takes a small model
SMALL = {"encoder": (64, 2, 128, 500), "llm": (64, 2, 176, 500), "count": 5, "limit": 40}


@dataclass
class Problem:
    """One model and one batch of documents."""

    model: MTLLM
    batch: Batch
    weights: DistillationWeights
    teacher: str | None  # adapter of the teacher's pass
    options: dict[str, Any]
    cache: TeacherCache | None = None

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}


def build_model(encoder: tuple[int, ...], llm: tuple[int, ...], task: bool, device: str, dtype: torch.dtype) -> MTLLM:
    """Random M2M100 encoder and Llama of (width, layers, MLP width, vocabulary); adapters that are not zero."""
    from transformers import LlamaForCausalLM
    from transformers.models.m2m_100.modeling_m2m_100 import M2M100Encoder

    torch.manual_seed(0)
    width, layers, inner, vocab = encoder
    heads = max(1, width // 64)
    dropout = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout", "encoder_layerdrop"), 0.0)
    base = m2m100(width, layers, inner, vocab, heads, **dropout)
    width, layers, inner, vocab = llm
    heads = max(1, width // 128 if width >= 4096 else width // 64)
    key_heads = max(1, heads // 4) if width >= 4096 else heads
    more = {"num_key_value_heads": key_heads, "max_position_embeddings": 2048}
    config = llama(width, layers, inner, vocab, heads, **more)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            models = M2M100Encoder(base).eval(), LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    tokenizer: Any = _NoTokenizer()
    model = MTLLM.stack(*models, tokenizer=tokenizer, lora=LoraSettings(r=16, dropout=0.0))
    model.to(device)
    if task:
        stack = model.require_stack()
        model.set_head(HeadConfig(labels=("entailment", "neutral", "contradiction")))
        stack.llm.add_adapter(LoraSettings(r=16, dropout=0.0), "teacher")
        stack.llm.train_adapter("student")
        stack.projection.requires_grad_(False)
        assert model.head is not None
        model.head.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.02)
    return model


class _NoTokenizer:
    """Stands where a tokenizer would: the documents here are token ids already."""

    mt = None  # the model has nothing to check


def make_batch(lengths: list[int], mt_vocab: int, llm_vocab: int, device: str) -> Batch:
    """Random ids over given lengths, with aligned rows as two tokenizers of one text have them."""
    generator = torch.Generator().manual_seed(1)
    other = [max(2, round(n * LLM_TOKENS)) for n in lengths]

    def ids(sizes: list[int], vocab: int) -> PackedBatch:
        rows = [torch.randint(4, vocab, (n,), generator=generator) for n in sizes]
        return PackedBatch.from_sequences(rows)

    mt_rows, llm_rows, start, start_llm = [], [], 0, 0
    for n, m in zip(lengths, other):
        pairs = max(1, int(ALIGNED * min(n, m)))
        for rows, size, first in ((mt_rows, n, start), (llm_rows, m, start_llm)):
            rows.append(first + torch.randperm(size, generator=generator)[:pairs].sort().values)
        start, start_llm = start + n, start_llm + m
    batch = Batch(ids(lengths, mt_vocab), ids(other, llm_vocab), torch.cat(mt_rows), torch.cat(llm_rows))
    return batch.to(device)


def make(
    lengths: str = "NLI",
    count: int = 32,
    limit: int = 512,
    kl: float = 0.5,
    task: bool = False,
    encoder: tuple[int, ...] = (512, 4, 2048, 8000),
    llm: tuple[int, ...] = (512, 4, 1376, 32000),
    *,
    dtype: torch.dtype,
    device: str,
) -> Problem:
    """Stage 1 (pooled MSE and KL) or, with `task`, stage 3 (pooled MSE and the task head's KL, the teacher adapted)."""
    encoder, llm = tuple(encoder), tuple(llm)
    options = {"lengths": lengths, "count": count, "limit": limit, "kl": kl, "task": task}
    sizes = [min(limit, n) for n in DISTRIBUTIONS[lengths](count)]
    weights = DistillationWeights(pooled_mse=1.0, kl=kl, head_kl=1.0 if task else 0.0)
    model = build_model(encoder, llm, task, device, dtype)
    batch = make_batch(sizes, encoder[3], llm[3], device)
    return cached(Problem(model, batch, weights, "teacher" if task else None, options))


def cached(p: Problem) -> Problem:
    """With a cache of its teacher, as `mtllm adapt --teacher-cache` has it."""
    keys = [number.to_bytes(16) for number in range(p.batch.num_rows)]
    batch, llm = replace(p.batch, ids=tuple(key.hex() for key in keys)), p.batch.side("llm")
    kept = Kept("moments", p.weights.temperature) if p.weights.kl else Kept()
    head = p.model.require_llm().lm_head
    with torch.no_grad(), mixed(p), TemporaryDirectory() as name:
        folder, states = Path(name), p.model.teacher_states(llm, p.teacher)
        pooled = p.model.pool(states, llm).float().cpu().numpy()
        pooled.tofile(folder / "states.bin")
        if kept.tokens:
            moments_of(states, head, kept.temperature).float().cpu().numpy().tofile(folder / "tokens.bin")
            np.array(llm.lengths, np.int32).tofile(folder / "lengths.bin")
        complete(folder, keys, pooled.shape[1:], kept, len(head.weight), {})
        return replace(p, batch=batch, cache=TeacherCache(folder, {}))  # its files stay open


def small(p: Problem) -> Problem:
    """The first three texts, cut to 48 tokens; on a small model where fp64 cannot hold this one."""
    device = p.batch.mt_rows.device.type  # type: ignore[union-attr]
    if sum(x.numel() for x in p.model.parameters()) > LARGE:
        return make(**{**p.options, **SMALL}, dtype=next(p.model.parameters()).dtype, device=device)
    stack = p.model.require_stack()
    lengths = [min(48, n) for n in p.batch.side("mt").lengths[:3]]
    return cached(replace(p, batch=make_batch(lengths, stack.encoder.vocab_size, stack.llm.vocab_size, device)))


def gradients(p: Problem, loss: Tensor) -> dict[str, Any]:
    """Backward; the gradients stay in the parameters."""
    for parameter in p.trained.values():
        parameter.grad = None
    loss.backward()
    return {"loss": loss.detach()}


def result(p: Problem, out: dict[str, Any]) -> dict[str, Tensor]:
    """Loss, the gradient of all adapters together and that of the projection."""
    groups: dict[str, list[Tensor]] = {}
    for name, parameter in p.trained.items():
        assert parameter.grad is not None, name
        groups.setdefault("adapters" if ".lora_" in name else "projection", []).append(parameter.grad.flatten())
    return {"loss": out["loss"], **{name: torch.cat(parts) for name, parts in groups.items()}}


def mixed(p: Problem) -> Any:
    """bf16 autocast where the weights are bf16, as `mtllm adapt --bf16` trains."""
    weight = next(p.model.parameters())
    bf16 = weight.dtype == torch.bfloat16
    return torch.autocast(weight.device.type, torch.bfloat16) if bf16 else nullcontext()


def ours(p: Problem, cache: TeacherCache | None = None) -> dict[str, Any]:
    """A step as the trainer takes it."""
    stage = Stage(p.model, DistillationLoss(p.weights), teacher=cache, adapter=p.teacher)
    with mixed(p):
        loss = stage.step(p.batch)
    return gradients(p, loss)


def ours_cached(p: Problem) -> dict[str, Any]:
    """The same, with the teacher's cache."""
    return ours(p, p.cache)


def unfused_loss(
    p: Problem, means: tuple[Tensor, Tensor], rows: tuple[Tensor, Tensor], select: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Pooled MSE, LM-head KL with logits held, task-head KL: fp32 after the heads, one op after the other.

    With `select` the logits of all `rows` are computed and those are compared that it names.
    """
    wide = torch.float64 if means[0].dtype == torch.float64 else torch.float32
    total = p.weights.pooled_mse * F.mse_loss(means[0].to(wide), means[1].to(wide))

    def kl(student: Tensor, teacher: Tensor) -> Tensor:
        with torch.no_grad():
            target = F.log_softmax(teacher.to(wide), -1)
        return F.kl_div(F.log_softmax(student.to(wide), -1), target, reduction="batchmean", log_target=True)

    if p.weights.kl:
        head = p.model.require_llm().lm_head.weight
        with torch.no_grad():
            teacher_logits = F.linear(rows[1], head)
        student_logits = F.linear(rows[0], head)
        if select is not None:
            student_logits, teacher_logits = student_logits[select[0]], teacher_logits[select[1]]
        total = total + p.weights.kl * kl(student_logits, teacher_logits)
    if p.weights.head_kl:
        assert p.model.head is not None
        head = p.model.head.linear.weight
        total = total + p.weights.head_kl * kl(*(F.linear(m.to(head.dtype), head) for m in means))
    return total


def packed_mean(states: Tensor, packed: PackedBatch) -> Tensor:
    """(B, D) means of (T, D)."""
    sums = states.new_zeros(packed.num_sequences, states.shape[1]).index_add(0, packed.sequence_ids, states)
    return sums / packed.cu_seqlens.diff()[:, None]


def packed_unfused(p: Problem) -> dict[str, Any]:
    """Our packed models, an unfused loss."""
    mt, llm = p.batch.side("mt"), p.batch.side("llm")
    assert p.batch.mt_rows is not None and p.batch.llm_rows is not None
    with mixed(p):
        teacher = p.model.teacher_states(llm, p.teacher)
        student = p.model.states(mt)
        rows = (student[p.batch.mt_rows], teacher[p.batch.llm_rows])
        total = unfused_loss(p, (packed_mean(student, mt), packed_mean(teacher, llm)), rows)
    return gradients(p, total)


def with_pefts_lora(p: Problem) -> dict[str, Any]:
    """Our step, its adapted layers run by peft."""
    with pefts_layers():
        return ours(p)


@contextmanager
def huggingface(model: MTLLM) -> Iterator[None]:
    """Hugging Face's own padded attention and peft's own LoRA layers inside the block."""
    stack = model.require_stack()
    bases = (stack.encoder.model, stack.llm.model)
    for base in bases:
        base.set_attn_implementation("sdpa")
    try:
        with pefts_layers():
            yield
    finally:
        for base in bases:
            base.set_attn_implementation(NAME)


def padded_states(p: Problem, decoder: Any = None) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Student (B, L, D) and teacher (B, L_llm, D) states of two padded passes with 4-D masks, and the masks (B, L)."""
    stack, mt, llm = p.model.require_stack(), p.batch.side("mt"), p.batch.side("llm")
    decoder = decoder or stack.llm.decoder
    dtype = stack.llm.model.dtype
    (ids, mask), (llm_ids, llm_mask) = (packed.to_padded(1) for packed in (mt, llm))
    with torch.no_grad(), p.model.teacher(p.teacher):
        teacher = decoder(input_ids=llm_ids, attention_mask=mask_4d(llm, dtype, False), use_cache=False)[0]
    with torch.no_grad():
        states = stack.encoder.model(input_ids=ids, attention_mask=mask).last_hidden_state
    embeds = stack.projection.layers(states.to(next(stack.projection.parameters()).dtype)).to(dtype)
    student = decoder(inputs_embeds=embeds, attention_mask=mask_4d(mt, dtype, False), use_cache=False)[0]
    return student, teacher, (mask, llm_mask)


def masked_mean(states: Tensor, mask: Tensor) -> Tensor:
    """(B, D) means of (B, L, D) over the rows that `mask` keeps."""
    return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def padded(p: Problem, decoder: Any = None) -> dict[str, Any]:
    """Two padded passes with 4-D masks, as the authors train."""
    mt, llm = p.batch.side("mt"), p.batch.side("llm")
    assert p.batch.mt_rows is not None and p.batch.llm_rows is not None
    with mixed(p), huggingface(p.model):
        student, teacher, masks = padded_states(p, decoder)
        means = masked_mean(student, masks[0]), masked_mean(teacher, masks[1])
        rows = student.flatten(0, 1)[padded_rows(mt)[p.batch.mt_rows]]
        teacher_rows = teacher.flatten(0, 1)[padded_rows(llm)[p.batch.llm_rows]]
        total = unfused_loss(p, means, (rows, teacher_rows))
        return gradients(p, total)


def padded_rows(packed: PackedBatch) -> Tensor:
    """(T,) rows of the flattened (B, L)."""
    return packed.sequence_ids * packed.max_seqlen + packed.positions


_COMPILED: dict[int, Any] = {}


def padded_compiled(p: Problem) -> dict[str, Any]:
    """torch.compile of the LLM's decoder in the authors' step."""
    decoder = p.model.require_llm().decoder
    if id(decoder) not in _COMPILED:
        _COMPILED.clear()
        torch.compiler.reset()
        _COMPILED[id(decoder)] = torch.compile(decoder)
    return padded(p, _COMPILED[id(decoder)])


def exact(p: Problem) -> dict[str, Tensor]:
    """The padded step in fp64."""
    wide = replace(p, model=copy.deepcopy(p.model).double())
    return result(wide, padded(wide))


def work(p: Problem) -> Work:
    """Products over real tokens: encoder and teacher forward, projection forward and for its gradient, student forward
    and for its inputs' gradient, attention, the adapters, three of the LM head's for the KL."""
    mt, llm, stack = p.batch.side("mt"), p.batch.side("llm"), p.model.require_stack()

    def linears(module: nn.Module) -> int:
        found = [m for n, m in module.named_modules() if isinstance(m, nn.Linear) and ".lora_" not in n]
        return sum(m.weight.numel() for m in found)

    layers = sum(isinstance(m, nn.Module) and n.endswith("self_attn") for n, m in stack.llm.named_modules())
    squares = [sum(n * n for n in side.lengths) for side in (mt, llm)]
    width, lora = stack.llm.hidden_size, sum(x.numel() for n, x in p.trained.items() if ".lora_" in n)
    base, t, t_llm = linears(stack.llm.layers_root), mt.num_tokens, llm.num_tokens
    trained = next(stack.projection.parameters()).requires_grad
    projection = stack.encoder.hidden_size * width * (4 if trained else 2)
    flops = 2.0 * linears(stack.encoder) * t + projection * t + 2.0 * base * (2 * t + t_llm) + 6.0 * lora * t
    flops += 4.0 * squares[0] * stack.encoder.hidden_size * stack.encoder.num_layers
    flops += layers * width * (4.0 * squares[1] + 12.0 * squares[0])
    if p.weights.kl:
        flops += 6.0 * p.batch.num_pairs * width * stack.llm.vocab_size
    return Work(0.0, flops)


def shape(p: Problem) -> dict[str, int]:
    mt, own = p.batch.side("mt"), p.model.require_llm()
    return {
        "B": mt.num_sequences,
        "T": mt.num_tokens,
        "L": mt.max_seqlen,
        "T_llm": p.batch.side("llm").num_tokens,
        "P": p.batch.num_pairs,
        "D": own.hidden_size,
        "V": own.vocab_size,
    }


def sized(label: str, **options: Any) -> Size:
    return {"label": label, **options}


REAL = {"encoder": (1024, 12, 4096, 256206), "llm": (4096, 32, 14336, 128256)}  # NLLB-600M, Llama-3-8B
TINY = {"encoder": (128, 2, 512, 2000), "llm": (128, 2, 344, 8000)}
THEIRS = "padded, 4-D mask"
COMMON: dict[str, Any] = {
    "make": make,
    "variants": {
        "ours": Variant(ours, result, ours=True),
        "ours, teacher cached": Variant(ours_cached, result, ours=True),
        "ours, peft's LoRA": Variant(with_pefts_lora, result),
        "packed, unfused": Variant(packed_unfused, result),
        THEIRS: Variant(padded, result),
        "padded, compile": Variant(padded_compiled, result, needs=("compiler",), slow=True),
    },
    "reference": exact,
    "tolerance": {"fp32": 1e-4, "bf16": 5e-2},
    "shape": shape,
    "work": work,
    "small": small,
    "sources": ("kernels/*.py", "mtllm_fast/losses/*.py", "mtllm_fast/models/attention/*.py"),
}


def aims(time: float) -> tuple[tuple[str, str, str, float], ...]:
    return ("ours", THEIRS, "time", time), ("ours", THEIRS, "memory", 1.0)


register(
    Case(
        name="adaptation_step",
        about="stage 1, self-distillation: pooled MSE and KL of the LM head, forward + backward",
        sizes={
            "quick": (sized("NLI, small", lengths="NLI", count=8, **TINY),),
            "cpu": (
                sized("NLI, KL", lengths="NLI", count=32),
                sized("web text, KL", lengths="web text", count=8),
                sized("NLI", lengths="NLI", count=32, kl=0.0),
                sized("web text", lengths="web text", count=8, kl=0.0),
                sized("sentences, KL", lengths="sentences", count=32),
            ),
            "cuda": (
                # 8,500 tokens, as a step of a real run has; then a third of them, which the padded way holds
                sized("web text, KL, 24 texts", lengths="web text", count=24, **REAL),
                sized("web text, KL", lengths="web text", count=8, **REAL),
                sized("NLI, KL", lengths="NLI", count=24, **REAL),
            ),
        },
        warm={**SMALL, "kl": 0.5},
        aims={"NLI, KL": aims(0.5), "NLI": aims(0.5), "web text, KL": aims(1 / 1.3), "web text": aims(1.0)},
        **COMMON,
    )
)
register(
    Case(
        name="task_distillation_step",
        about="stage 3, task distillation: pooled MSE and KL of the task head, the teacher with its own adapter",
        sizes={
            "quick": (sized("NLI, small", lengths="NLI", count=8, kl=0.0, task=True, **TINY),),
            "cpu": (sized("NLI", lengths="NLI", count=32, kl=0.0, task=True),),
            "cuda": (sized("NLI", lengths="NLI", count=24, kl=0.0, task=True, **REAL),),
        },
        warm={**SMALL, "kl": 0.0, "task": True},
        aims={"NLI": aims(0.5)},
        **COMMON,
    )
)


if __name__ == "__main__":
    sys.exit(main(cases=("adaptation_step", "task_distillation_step"), prog="benchmarks.cases.steps"))
