"""Every attention backend that runs on this GPU, and the stack on a GPU; `pytest -m gpu`."""

from __future__ import annotations

import pytest
import torch

from mtllm_fast import MTLLM, LoraSettings, TextRow
from mtllm_fast.data.collate import collate
from mtllm_fast.losses import DistillationLoss, DistillationWeights
from mtllm_fast.models.attention import BACKENDS, AttentionPlan, Call, attention, choose_backend
from tests.conftest import relative_error
from tests.models.attention_cases import FEATURES, LENGTHS, Features, check, packed
from tests.tiny import LINES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]

ON_GPU = {
    **FEATURES,
    "head 64": Features(width=64),
    "head 128 causal grouped": Features(causal=True, heads=(8, 2), width=128),
    "head 128 causal window": Features(causal=True, window=20, heads=(4, 4), width=128),
    "head 128 soft-cap": Features(causal=True, softcap=2.0, heads=(4, 2), width=128),
    "head 256": Features(causal=True, heads=(2, 2), width=256),
}
COMPILED = [ON_GPU[name] for name in ("plain", "causal window soft-cap", "window", "head 128 causal grouped")]


@pytest.mark.parametrize("features", list(ON_GPU.values()), ids=list(ON_GPU))
@pytest.mark.parametrize("lengths", [pytest.param(lengths, id=name) for name, lengths in LENGTHS.items()])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("backend", list(BACKENDS))
def test_output_and_gradients(backend, dtype, lengths, features) -> None:
    """Each backend is as close to the float64 reference as plain torch is in its dtype, or says why it cannot."""
    if dtype == torch.float32:
        torch.backends.cuda.matmul.allow_tf32 = False
    call = Call(
        torch.device("cuda"), dtype, *features.heads, features.width, features.width, features.causal, 1.0,
        features.window, features.softcap, needs_grad=True,
    )  # fmt: skip
    reason = BACKENDS[backend].refusal(call)
    if reason is not None:
        pytest.skip(f"{backend} {reason}")
    if backend == "flex":
        if features not in COMPILED or lengths != LENGTHS["edges"] or dtype == torch.float16:
            pytest.skip("every kind of call is compiled: the rest takes too long")
        torch._dynamo.reset()  # compilations of one function are limited in number

    def attend(q, k, v, plan, **options):
        return attention(q, k, v, AttentionPlan(plan.batch, plan.causal, backend), **options)

    # Triton and CUTLASS multiply float32 in TF32 unless they are told otherwise
    slack = 2e-3 if dtype == torch.float32 and backend in ("flex", "xformers") else 1e-4
    check(attend, packed(lengths, "cuda"), features, dtype, slack=slack)


@pytest.mark.parametrize("backend", list(BACKENDS))
def test_dropout_keeps_the_mean(backend) -> None:
    call = Call(torch.device("cuda"), torch.bfloat16, 4, 4, 64, 64, False, 0.125, dropout=0.25, needs_grad=True)
    reason = BACKENDS[backend].refusal(call)
    if reason is not None:
        pytest.skip(f"{backend} {reason}")
    torch.manual_seed(0)
    batch = packed((200, 300, 7), "cuda")
    q, k = (torch.randn(batch.num_tokens, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = attention(q, k, torch.ones_like(k), AttentionPlan(batch, False, backend), dropout=0.25).float()
    assert abs(float(out.mean()) - 1) < 0.03
    assert float(out.std()) > 0.01


def test_the_choice_on_this_gpu() -> None:
    def chosen(dtype: torch.dtype, **changes) -> str:
        return choose_backend(Call(torch.device("cuda"), dtype, 4, 4, 128, 128, True, 0.1, **changes)).name

    if torch.cuda.get_device_capability() >= (8, 0):
        assert chosen(torch.bfloat16) in ("flash_attn_3", "flash_attn_4", "varlen")
    assert chosen(torch.float32) in ("xformers", "sdpa")
    assert chosen(torch.float64) == "sdpa"


def test_a_step_on_the_gpu_is_the_step_on_the_cpu(encoder_folder, llm_folder) -> None:
    """fp32 gradients of the whole stack and all three terms agree between devices, through the Triton kernels."""
    gradients = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = MTLLM.stack(encoder_folder, llm_folder, lora=LoraSettings(dropout=0.0), dtype=torch.float32).to(device)
        batch = collate([TextRow(line) for line in LINES], model.tokenizer).to(device)
        loss = DistillationLoss(DistillationWeights(1.0, 1.0, 1.0, temperature=2.0))
        terms = loss(model.states(batch.mt), model.teacher_states(batch.llm), batch, lm_head=model.llm.lm_head)
        loss.total(terms, loss.weights.counts(batch)).backward()
        gradients.append({n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        if float(expected.abs().max()) > 0:
            assert relative_error(gradients[1][name], expected) < 1e-2, name
            assert relative_error(expected * 1.05, expected) > 1e-2
