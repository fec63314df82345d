"""Short runs of two processes, one after the other: torchrun --nproc-per-node=2 -m tests.training.distributed_runs ENCODER LLM FOLDER"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.studies.parallel import CONTROLS
from mtllm_fast import TextRow
from mtllm_fast.data.batch import Batch
from mtllm_fast.losses import DistillationWeights
from mtllm_fast.training import (
    AdaptConfig,
    CompressConfig,
    FinetuneConfig,
    adapt,
    compress,
    finetune,
    trainer,
)
from mtllm_fast.training.processes import ends_process
from mtllm_fast.training.stage import Stage
from tests.tiny import LINES
from tests.training.short_runs import optim

ROWS = [TextRow(line[: 20 + 7 * i % 41], id=f"row-{i}") for i, line in enumerate(LINES * 3)]
TASK = [TextRow(line + " " + ("good", "bad")[i % 2], label=i % 2) for i, line in enumerate(LINES * 4)]
STEPS = 6


settings = partial(optim, tokens=64, warmup=0.0, max_steps=STEPS, save_steps=2, keep=9)


def run_adapt(encoder: str, llm: str, output: Path, *, resume: bool = False, **changes: Any) -> Path:
    loss = DistillationWeights(pooled_mse=1.0, paired_mse=0.5, kl=0.3, temperature=2.0)
    config = AdaptConfig(
        encoder=encoder, llm=llm, output=str(output), loss=loss, train=settings(**changes), resume=resume, include_base=True
    )  # fmt: skip
    adapt(config, ROWS)
    return output


def run_finetune(llm: str, output: Path, **changes: Any) -> Path:
    """Two epochs, validated after each."""
    config = FinetuneConfig(llm=llm, output=str(output), train=settings(max_steps=-1, epochs=2, **changes))
    finetune(config, TASK, ["good", "bad"], TASK[:12])
    return output


def run_compress(encoder: str, small: Path, output: Path, **changes: Any) -> None:
    compress(CompressConfig(encoder=str(small), teacher=encoder, output=str(output), train=settings(**changes)), ROWS)


def run_with_a_bad_pack(encoder: str, llm: str, output: Path) -> None:
    """The loss of rank 1 alone is not finite in the second step; `bad.json` names its rows."""
    plain, count = Stage.forward, [0]

    def forward(self: Stage, batch: Batch) -> Any:
        terms = plain(self, batch)
        count[0] += 1
        if os.environ["RANK"] != "1" or count[0] != 2:
            return terms
        output.with_name("bad.json").write_text(json.dumps(batch.ids))
        return {name: term._replace(sum=term.sum * float("nan")) for name, term in terms.items()}

    Stage.forward = forward  # type: ignore[method-assign]
    run_adapt(encoder, llm, output, max_steps=3)
    Stage.forward = plain  # type: ignore[method-assign]


def main() -> None:
    encoder, llm, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    torch.set_num_threads(1)
    with ends_process():
        run_adapt(encoder, llm, folder / "ddp")
        run_adapt(encoder, llm, folder / "fsdp2", parallel="fsdp2", checkpointing="full")
        run_adapt(encoder, llm, folder / "one-fsdp2", parallel="fsdp2", resume=True, gradient_accumulation=2)
        run_finetune(llm, folder / "teacher-fsdp2", parallel="fsdp2")
        run_compress(encoder, folder / "small", folder / "compress-ddp")
        run_compress(encoder, folder / "small", folder / "compress-fsdp2", parallel="fsdp2")
        run_with_a_bad_pack(encoder, llm, folder / "bad-pack")
        CONTROLS["pack means"](trainer)
        run_adapt(encoder, llm, folder / "pack-means", parallel="fsdp2")


if __name__ == "__main__":
    main()
