"""A linear probe: multinomial logistic regression on frozen features, for models that have no task head yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from .metrics import accuracy

Features = npt.NDArray[np.floating]  # (N, D)

# weights of the L2 penalty relative to the mean cross-entropy, strongest first
PENALTIES: tuple[float, ...] = (1.0, 0.1, 0.01, 1e-3, 1e-4)


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """`logits = ((x - mean) / scale) @ weight.T + bias`.

    Fields:
        mean, scale: (D,) float64 statistics of the training features.
        weight, bias: (C, D), (C,) float64.
        penalty: the chosen L2 weight.
        dev_accuracy: accuracy on the rows that chose it, 0 to 1.
    """

    mean: npt.NDArray[np.float64]
    scale: npt.NDArray[np.float64]
    weight: npt.NDArray[np.float64]
    bias: npt.NDArray[np.float64]
    penalty: float
    dev_accuracy: float

    def logits(self, features: Features) -> npt.NDArray[np.float32]:  # (N, D) -> (N, C)
        standard = (np.asarray(features, np.float64) - self.mean) / self.scale
        return (standard @ self.weight.T + self.bias).astype(np.float32)


def fit_probe(
    features: Features,  # (N, D)
    labels: Sequence[int],
    dev_features: Features,  # (M, D)
    dev_labels: Sequence[int],
    num_classes: int,
    *,
    penalties: Sequence[float] = PENALTIES,
    max_iterations: int = 200,
) -> LinearProbe:
    """Fit on `features`, choose the penalty by accuracy on the dev rows (ties: the stronger penalty).

    The objective is the mean cross-entropy plus `penalty / 2 * |weight|^2`, convex, minimised by L-BFGS in float64
    from zero, so the result depends on the data alone.

    Raises:
        ValueError: no rows, non-finite features, or vectors that do not fit together.
    """
    for name, x, y in (("features", features, labels), ("dev_features", dev_features, dev_labels)):
        if x.ndim != 2 or len(x) != len(y) or len(x) == 0:
            raise ValueError(
                f"{name}: expected (N, D) with one label per row and N > 0, got {x.shape} and {len(y)} labels"
            )
        if not np.isfinite(x).all():
            raise ValueError(f"{name}: holds values that are not finite")
    mean = np.asarray(features, np.float64).mean(0)
    scale = np.asarray(features, np.float64).std(0)
    scale[scale < 1e-8] = 1.0  # a constant feature carries nothing; do not blow it up
    inputs = torch.from_numpy((np.asarray(features, np.float64) - mean) / scale)
    targets = torch.as_tensor(np.asarray(labels, np.int64))
    weight = torch.zeros(num_classes, features.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=torch.float64, requires_grad=True)
    probes = []
    for penalty in sorted(penalties, reverse=True):  # each fit starts from the stronger penalty's solution
        _minimise(inputs, targets, weight, bias, penalty, max_iterations)
        probe = LinearProbe(mean, scale, weight.detach().numpy().copy(), bias.detach().numpy().copy(), penalty, 0.0)
        probes.append(
            replace(probe, dev_accuracy=accuracy(probe.logits(dev_features).argmax(1), np.asarray(dev_labels)))
        )
    return max(probes, key=lambda probe: probe.dev_accuracy)  # the first of those that tie


def _minimise(
    inputs: torch.Tensor,
    targets: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    penalty: float,
    max_iterations: int,
) -> None:
    optimiser = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iterations,
        tolerance_grad=1e-7,
        tolerance_change=1e-10,
        line_search_fn="strong_wolfe",
    )

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = (
            torch.nn.functional.cross_entropy(inputs @ weight.T + bias, targets) + penalty / 2 * weight.square().sum()
        )
        loss.backward()
        return loss

    with torch.enable_grad():
        optimiser.step(closure)  # type: ignore[arg-type]
