"""The projection as training calls it: packed states, the encoder's final norm, no scale and no boundary rows.

    python -m benchmarks.cases.projection_training --device cpu

`packed_projection` (packed_path.py) measures the whole of the op; of this call the library's product needs no pass over
the result, so what remains to be gained is the norm's pass over the input.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch.nn.functional as F
from mtllm_fast.kernels import packed_projection
from torch import Tensor

from ..registry import Case, Variant, Work, register
from ..run import main
from .packed_path import COMMON, SIZES, Problem, bare_gemm, launched, trained


def finish(p: Problem, y: Tensor, w: Tensor, b: Tensor) -> dict[str, Any]:
    """Backward with the embeddings' gradient, its rows of boundaries left out by the first T."""
    if p.backward:
        y.backward(p.direction[: y.shape[0]])
    return {"embeddings": y.detach(), "weight": w.grad, "bias": b.grad}


def ours(p: Problem) -> dict[str, Any]:
    """packed_projection with norm and nothing else."""
    w, b, _ = trained(p)
    y = packed_projection(p.packed_encoder, w, b, norm="layer", norm_weight=p.norm_weight, norm_bias=p.norm_bias)
    return finish(p, y, w, b)


def unfused(p: Problem) -> dict[str, Any]:
    """LayerNorm and Linear on packed states."""
    w, b, _ = trained(p)
    x = F.layer_norm(p.packed_encoder, p.packed_encoder.shape[-1:], p.norm_weight, p.norm_bias, 1e-5)
    return finish(p, F.linear(x, w, b), w, b)


def forward(library: bool, p: Problem) -> dict[str, Tensor]:
    """The forward by our Triton GEMM, or by our norm kernel and the library's product."""
    return launched(library, p, p.packed_encoder)


def exact(p: Problem) -> dict[str, Tensor]:
    return unfused(p.wide())


def work(p: Problem) -> Work:
    """Forward and weight gradient; states, embeddings, incoming gradient and weight once each way."""
    tokens, (out, width) = p.packed_encoder.shape[0], p.weight.shape
    moved = 2 * tokens * width + 2 * tokens * out + 2 * out * width
    return Work(moved * p.weight.element_size(), 4.0 * tokens * width * out)


register(
    Case(
        name="projection_training",
        about="packed encoder states to LLM embeddings as training does it: LayerNorm, linear; forward + backward",
        variants={
            "ours": Variant(ours, ours=True),
            "ours-triton": Variant(partial(forward, False), ours=True, devices=("cuda",), keys=("embeddings",)),
            "ours-library": Variant(partial(forward, True), ours=True, devices=("cuda",), keys=("embeddings",)),
            "unfused": Variant(unfused),
            "gemm": Variant(bare_gemm, gated=False),
        },
        reference=exact,
        work=work,
        aims={"T=16384, 1024 to 4096": (("ours", "gemm", "forward", 1.20),)},
        # as packed_projection's, but for the sweep over the share of padding, of which packed states have none
        sizes={k: tuple(s for s in v if not s["label"].startswith("padding")) for k, v in SIZES.items()},
        sources=("kernels/packed_projection*.py", "kernels/gemms.py", "kernels/tiles.py"),
        **COMMON,
    )
)


if __name__ == "__main__":
    sys.exit(main(cases=("projection_training",), prog="benchmarks.cases.projection_training"))
