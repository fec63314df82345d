"""What a step would allocate and how long it must take, from running its operators on meta tensors.

Memory is the sum of live storages, so its peak is exact for what torch allocates and blind to the allocator's rounding.
Time is a roofline: an operator takes the longer of its FLOPs at the device's GEMM rate and its bytes at the device's
bandwidth. Fused ops of this library are single operators here; what they allocate inside is a formula (`SCRATCH`).
`measured_peak` gives the peak of a real step on the CPU, to hold the prediction against.
"""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ..kernels import tiles

Cost = Callable[..., float]


@dataclass(frozen=True)
class Rates:
    """What a device does per second: `flops` of a large GEMM in the model's dtype, `bytes` read plus written."""

    flops: float
    bytes: float


class Accounting(TorchDispatchMode):
    """Counts what runs inside its `with` block.

    Args:
        rates: gives `seconds`; None counts memory and FLOPs only.
        architecture: key of the tile tables, for the scratch memory of fused ops; "cpu" for the CPU.

    Attributes:
        live, peak: bytes of storages allocated inside the block, now and at most.
        peak_parts: bytes per part at the peak.
        flops, seconds: per part.
        attention_pairs: sum over sequences of length squared; set it before a model runs, for packed attention.
        fp8: storages of weights whose products are fp8: twice the FLOPs per second, a byte for every number of both
            operands, and the other one is read and written as fp8 before.
    """

    def __init__(self, rates: Rates | None = None, architecture: str = "sm_90") -> None:
        super().__init__()
        self.rates, self.architecture = rates, architecture
        self.live = self.peak = 0
        self.parts: Counter[str] = Counter()
        self.peak_parts: Counter[str] = Counter()
        self.flops: Counter[str] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.attention_pairs = 0
        self.fp8: set[torch.UntypedStorage] = set()
        self._part = "other"
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Book what runs inside the block to `name`."""
        before, self._part = self._part, name
        try:
            yield
        finally:
            self._part = before

    def _allocate(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:
            return
        self._seen.add(storage)
        size, part = storage.nbytes(), self._part
        self._add(size, part)
        weakref.finalize(storage, self._add, -size, part)

    def _add(self, size: int, part: str) -> None:
        self.live += size
        self.parts[part] += size
        if self.live > self.peak:
            self.peak, self.peak_parts = self.live, Counter(self.parts)

    def scratch(self, size: float) -> None:
        """A buffer of `size` bytes that lives for one operator."""
        self._add(int(size), self._part)
        self._add(-int(size), self._part)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        named = {**dict(zip((argument.name for argument in func._schema.arguments), args)), **kwargs}
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        known = {x.untyped_storage() for x in inputs}
        name = func.namespace + "::" + func._schema.name.split("::")[1]
        for storage in known:
            self._seen.add(storage)  # made before the block: not ours to count
        out = func(*args, **kwargs)
        if name in SCRATCH:
            self.scratch(SCRATCH[name](architecture=self.architecture, **named))
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        fresh = [x for x in outputs if x.untyped_storage() not in known]
        for x in fresh:
            self._allocate(x.untyped_storage())
        mutates = func._schema.is_mutable
        if not fresh and not mutates:
            return out  # a view
        flops = FLOPS[name](**named) if name in FLOPS else self._count_flops(func, name, args, kwargs, out)
        self.flops[self._part] += int(flops)
        if self.rates is not None:
            touched = sum(map(_bytes, inputs)) + sum(map(_bytes, fresh if not mutates else outputs))
            rate = self.rates.flops
            if flops and self.fp8 and (weights := known & self.fp8):
                rate *= 2
                touched += sum(x.numel() - _bytes(x) for x in inputs)
                others = [x for x in inputs if x.untyped_storage() not in weights]
                cast = sum(_bytes(x) + x.numel() for x in others)
                self.seconds[self._part] += cast / self.rates.bytes
            self.seconds[self._part] += max(flops / rate, touched / self.rates.bytes)
        return out

    def _count_flops(self, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> float:
        if name.startswith("torch_attn::"):
            q = args[1] if "backward" in name else args[0]
            factor = 10 if "backward" in name else 4
            return factor * self.attention_pairs * q.shape[-2] * q.shape[-1]
        formula = flop_registry.get(func._overloadpacket)
        return 0.0 if formula is None else formula(*args, **kwargs, out_val=out)


def _bytes(x: Tensor) -> int:
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


# The costs below name the arguments they need as the schemas of the operators do.
def _linear_flops(*, x: Tensor, rows: Tensor | None, w: Tensor, **_: object) -> float:
    return 2.0 * (x if rows is None else rows).shape[0] * w.numel()


def _linear_backward_flops(*, need_dx: bool, need_dw: bool, **linear: Any) -> float:
    return _linear_flops(**linear) * (int(need_dx) + int(need_dw))


def _distillation_flops(
    *, rows_s: Tensor | None, head: Tensor | None, m: Tensor | None, need_dx: bool, need_dw: bool, **_: object
) -> float:
    if head is None or rows_s is None:
        return 0.0
    gemms = (2 if m is None else 1) + int(need_dx) + int(need_dw)
    return 2.0 * rows_s.shape[0] * head.numel() * gemms


def _distillation_scratch(
    *, architecture: str, rows_s: Tensor | None, head: Tensor | None, m: Tensor | None, need_dx: bool, **_: object
) -> float:
    """Logits buffers and chunk gradients of `linear_kl`, as its launcher and its CPU path allocate them."""
    if head is None or rows_s is None or not rows_s.shape[0]:
        return 0.0
    pairs, (vocab, width), sides = rows_s.shape[0], head.shape, 2 if m is None else 1
    if architecture == "cpu":
        sizes, item = tiles.LINEAR_KL_CPU, 8 if head.dtype == torch.float64 else 4
        rows, block = sizes.rows_for(pairs, vocab, item), min(sizes.block_v, vocab)
        buffers = 2 * rows * (vocab + 3 * block) if m is None else rows * block
        return float(item * (buffers + 8 * rows * width))
    chunk = min(tiles.row_of(tiles.LINEAR_KL, architecture).chunk_rows, pairs)
    logits = 4 * chunk * tiles.padded_vocabulary(vocab) * sides
    chunk_rows = chunk * width * (12 if m is None else 6)
    return float(logits + chunk_rows + pairs * width * head.element_size() * int(need_dx))


def _added_product_flops(*, mat1: Tensor, mat2: Tensor, **_: object) -> float:
    return 2.0 * mat1.numel() * mat2.shape[1]


FLOPS: dict[str, Cost] = {
    "aten::addmm_": _added_product_flops,  # torch's own table has only the one that is not in place
    "mtllm_fast::packed_linear": _linear_flops,
    "mtllm_fast::packed_linear_backward": _linear_backward_flops,
    "mtllm_fast::distillation_loss": _distillation_flops,
}
SCRATCH: dict[str, Cost] = {"mtllm_fast::distillation_loss": _distillation_scratch}


def measured_peak(run: Callable[[], object]) -> int:
    """Most bytes that `run` holds at once through torch's CPU allocator, above what was there before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    live = peak = 0
    results = profiler.profiler.kineto_results  # type: ignore[union-attr]
    for event in sorted(results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak
