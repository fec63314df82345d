"""mtllm bench."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass
class Bench:
    """Time, memory, share of the device's measured ceilings: ours against unfused PyTorch, torch.compile and Liger.

    Every variant has to give the right result before it gets a time. Example: mtllm bench linear_kl adaptation_step
    --json bench.json && mtllm report bench.json --html bench.html
    """

    cases: Annotated[tuple[str, ...], tyro.conf.Positional] = ("all",)
    """Names of cases, or all; --list shows them."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is a GPU."""
    dtype: str = ""
    """fp32, bf16 or fp16; "" for each case's own (fp32 on the CPU, bf16 on a GPU)."""
    json: str = ""
    """Write the records to this file, for `mtllm report`."""
    sizes: tuple[str, ...] = ()
    """Labels of sizes; by default those that belong to the device."""
    variants: tuple[str, ...] = ()
    """Names of variants; by default all that can run here and are not slow. --list shows them."""
    quick: bool = False
    """The small sizes of `pytest --benchmark`: a look, not a result."""
    repeats: int = 7
    """Timed rounds, each with every variant once, after a warm-up round."""
    threads: int = 0
    """CPU threads; 0 for all."""
    memory: bool = True
    """Also measure peak memory, which takes a process per variant on the CPU, some seconds each."""
    list: bool = False
    """Print the cases with their sizes and variants, run nothing."""

    def run(self) -> None:
        import torch

        from .evidence import benchmarks
        from .files import check_least, check_written

        registry, benchmark = benchmarks("registry"), benchmarks("run")
        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.list:
            for case in registry.chosen(self.cases):
                print(f"{case.name}: {case.about}")
                if isinstance(case, registry.Case):
                    print(f"  sizes     {'; '.join(s['label'] for s in case.sizes[device]) or '-'}")
                    print(f"  variants  {'; '.join(case.variants)}")
            return
        check_written(self, "json")
        check_least(self, threads=0, repeats=1)
        if self.threads:
            torch.set_num_threads(self.threads)
        how = benchmark.Measuring(
            self.variants,
            self.quick,
            self.repeats,
            self.memory,
            log=lambda text: print(text, file=sys.stderr, flush=True),
        )
        records = benchmark.run(
            self.cases,
            device=device,
            dtype=self.dtype or None,
            sizes=self.sizes,
            how=how,
            path=Path(self.json) if self.json else None,
            show=benchmark.show_tables,
        )
        if wrong := benchmark.failed(records):
            print(f"mtllm bench: wrong results, so no speed: {'; '.join(wrong)}", file=sys.stderr)
            raise SystemExit(1)
