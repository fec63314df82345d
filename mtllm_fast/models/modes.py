"""Training and evaluation mode of a model, left as they were found; dropout, taken out of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards every module has the mode that it had, even where they differ."""
    before = [(module, module.training) for module in model.modules()]
    for module, _ in before:
        module.training = False
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def without_dropout(model: nn.Module) -> None:
    """Let nothing be dropped in training mode either, in place; the model's config stays as it is."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():  # a rate that is given to a function
            if name.endswith("dropout") and isinstance(value, float):
                setattr(module, name, 0.0)
