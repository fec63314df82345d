"""Fingerprints of models in memory, those with quantised weights among them."""

from __future__ import annotations

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from mtllm_fast import MTLLM
from mtllm_fast.jobs.fingerprint import of_tensors
from mtllm_fast.models.fingerprint import fingerprint

A, B = torch.arange(6.0).reshape(2, 3), torch.ones(2, 3)


class Scaled(TwoTensor):
    """As quantised weights are: it has no bytes of its own, and a setting beside its tensors."""

    scale = 1

    def __tensor_flatten__(self):
        return ["a", "b"], {"scale": self.scale}


def test_a_tensor_that_wraps_others_counts_as_what_it_holds() -> None:
    with pytest.raises(RuntimeError):
        TwoTensor(A, B).numpy()
    digest = of_tensors({"w": TwoTensor(A, B)})
    assert of_tensors({"w": TwoTensor(A.clone(), B.clone())}) == digest
    others = [{"w": TwoTensor(A, A)}, {"w": TwoTensor(B, B)}, {"v": TwoTensor(A, B)}, {"w": A}]
    assert len({digest, *map(of_tensors, others)}) == 5
    one, two = Scaled(A, B), Scaled(A, B)
    two.scale = 2
    assert of_tensors({"w": one}) != of_tensors({"w": two})


def test_a_model_with_such_weights(encoder_folder: str, llm_folder: str) -> None:
    model = MTLLM.stack(encoder_folder, llm_folder, dtype=torch.float32)
    layer = model.llm.decoder.layers[0].mlp.up_proj
    weight, found = layer.weight.detach(), {fingerprint(model)}
    for scale in (weight, 2 * weight):
        layer.weight = torch.nn.Parameter(TwoTensor(weight, scale), requires_grad=False)
        found.add(fingerprint(model))
    assert len(found) == 3
