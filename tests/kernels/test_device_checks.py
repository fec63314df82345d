"""Checks of device values: an assertion on the device, or a named error on the host with MTLLM_DEBUG=1."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mtllm_fast.kernels import device_checks
from mtllm_fast.kernels.device_checks import on_device_of_arguments, require, require_rows
from mtllm_fast.kernels.segments import assert_values


@pytest.mark.parametrize("rows", [[0, 3], [-1, 0]])
def test_debug_names_the_argument_on_the_host(monkeypatch, rows):
    monkeypatch.setenv("MTLLM_DEBUG", "1")
    with pytest.raises(IndexError, match="rows_t holds a row number outside 0 to 2"):
        require_rows(torch.tensor(rows), 3, "rows_t")
    require_rows(torch.tensor([0, 2]), 3, "rows_t")
    require_rows(torch.tensor([], dtype=torch.int64), 0, "rows_t")


def test_debug_checks_cu_seqlens(monkeypatch):
    monkeypatch.setenv("MTLLM_DEBUG", "1")
    with pytest.raises(ValueError, match="cu_seqlens must start at 0"):
        assert_values(torch.tensor([1, 3]), "mean", 3)
    assert_values(torch.tensor([0, 3]), "mean", 3)


def test_without_debug_the_device_asserts(monkeypatch):
    monkeypatch.setenv("MTLLM_DEBUG", "0")
    with pytest.raises(RuntimeError, match="rows_s holds"):  # the CPU's own assertion
        require_rows(torch.tensor([5]), 3, "rows_s")
    require(torch.tensor(True), "never")


def test_kernels_are_launched_on_the_device_of_their_tensors(monkeypatch):
    entered = []

    class Device:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            entered.append(self.device)

        def __exit__(self, *error):
            entered.append("left")

    monkeypatch.setattr(torch.cuda, "device", Device)
    kernel = on_device_of_arguments(lambda scale, x, y: (scale, entered[:]))
    x = torch.empty(2, device="meta")
    assert kernel(0.5, x, None) == (0.5, [x.device])
    assert entered == [x.device, "left"]


def test_every_cuda_kernel_is_launched_so():
    """One line registers them all; a file that registers its own would have to be looked at too."""
    sources = {path.name: path.read_text() for path in Path(device_checks.__file__).parent.glob("*.py")}
    registering = {name for name, text in sources.items() if "register_kernel" in text or "custom_op(" in text}
    assert registering == {"op.py"}
    (line,) = [line for line in sources["op.py"].splitlines() if ".register_kernel(" in line]
    assert line.strip() == 'self.op.register_kernel("cuda", on_device_of_arguments(self._kernel(declaration.cuda)))'
