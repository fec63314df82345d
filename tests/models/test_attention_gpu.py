"""The CUDA attention backend and the stack on a GPU; `pytest -m gpu`."""

from __future__ import annotations

import pytest
import torch

from mtllm_fast import MTLLM, LoraSettings, TextRow
from mtllm_fast.data.collate import collate
from mtllm_fast.data.pack import PackedBatch
from mtllm_fast.losses import DistillationLoss, DistillationWeights
from mtllm_fast.models.attention import AttentionPlan, choose_backend, sdpa_attention, varlen_attention
from tests.conftest import relative_error
from tests.tiny import LINES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 4, 64), (8, 2, 128)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_varlen_is_as_close_to_the_truth_as_sdpa(dtype, heads, kv_heads, width, causal, window) -> None:
    batch = PackedBatch.from_sequences([[1] * n for n in (1, 2, 63, 64, 65, 300)]).to("cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(batch.num_tokens, h, width, device="cuda", generator=generator) for h in (heads, kv_heads, kv_heads)
    )
    probe = torch.randn(batch.num_tokens, heads, width, device="cuda", generator=generator)

    def run(function, dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = function(*inputs, AttentionPlan(batch, causal), scale=width**-0.5, window=window)
        return [out, *torch.autograd.grad((out * probe.to(dtype)).sum(), inputs)]

    truth = run(sdpa_attention, torch.float64)
    eager, fast = run(sdpa_attention, dtype), run(varlen_attention, dtype)
    for expected, reference, actual in zip(truth, eager, fast):
        allowed = 3 * relative_error(reference, expected) + 1e-4
        assert relative_error(actual, expected) <= allowed
        assert relative_error(torch.zeros_like(expected), expected) > allowed
        assert relative_error(expected * 1.05, expected) > allowed


def test_choice_of_backend() -> None:
    device = torch.device("cuda")
    assert choose_backend(device, torch.bfloat16, 128, softcap=False, dropout=False) == "varlen"
    assert choose_backend(device, torch.float32, 128, softcap=False, dropout=False) == "sdpa"
    assert choose_backend(device, torch.bfloat16, 128, softcap=True, dropout=False) == "sdpa"


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
