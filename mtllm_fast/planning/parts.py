"""The parts of a step, told apart by hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn

from ..models import MTLLM


@contextmanager
def forward_parts(
    model: MTLLM, book: Callable[[str], AbstractContextManager[None]], loss: nn.Module | None = None
) -> Iterator[None]:
    """Inside the block, "encoder", "projection", "LLM teacher" (no gradient), "LLM student" and "loss" run inside
    `book(name)`.

    Where nothing wants a gradient, as in `encode`, the LLM's only pass is the student's: it reads projected states.
    """
    open_parts: list[AbstractContextManager[None]] = []

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, kwargs: Mapping[str, object]) -> None:
            part = name
            if name == "LLM":
                student = torch.is_grad_enabled() or "embeds" in kwargs
                part = "LLM student" if student else "LLM teacher"
            open_parts.append(book(part))
            open_parts[-1].__enter__()

        return hook

    def leave(module: nn.Module, args: object, output: object) -> None:
        open_parts.pop().__exit__(None, None, None)

    handles = []
    parts = {"encoder": model.encoder, "projection": model.projection, "LLM": model.llm, "loss": loss}
    for name, module in parts.items():
        if module is not None:
            handles += [
                module.register_forward_pre_hook(enter(name), with_kwargs=True),
                module.register_forward_hook(leave),
            ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
