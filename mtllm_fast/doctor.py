"""What will run on this machine, and what will not and why."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch

REQUIRED = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "triton")
OPTIONAL = {
    "flash-attn": "FlashAttention package for the LLM (extra: flash)",
    "xformers": "memory-efficient attention (extra: xformers)",
    "liger-kernel": "fused RMSNorm/RoPE/SwiGLU of the LLM, benchmark baseline (extra: liger)",
    "bitsandbytes": "4-bit and 8-bit weights, 8-bit AdamW (extra: quant)",
    "torchao": "fp8 and int8 weights (extra: quant)",
    "tensorboard": "training curves",
    "wandb": "training curves",
}


class Check(NamedTuple):
    name: str
    works: bool
    reason: str
    instead: str = ""  # what runs in its place


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def devices() -> list[Check]:
    threads = f"{torch.get_num_threads()} threads, {platform.processor() or platform.machine()}"
    checks = [Check("cpu", True, threads)]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            capability = f"sm_{properties.major}{properties.minor}"
            checks.append(
                Check(
                    f"cuda:{index}", True, f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {capability}"
                )
            )
    else:
        why = (
            "torch was built without CUDA"
            if torch.version.cuda is None and torch.version.hip is None
            else "no GPU is visible"
        )
        checks.append(Check("cuda", False, why))
    return checks


def attention_backends() -> list[Check]:
    """Every packed-attention backend: whether it runs here, for what it is chosen, or why it does not run."""
    from .models.attention import BACKENDS, Call, choose_backend

    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    size = {"heads": 32, "kv_heads": 8, "head_dim": 128, "value_dim": 128, "causal": False, "scale": 128**-0.5}
    uses: dict[str, list[str]] = {}
    for use, dtype, softcap in (
        ("bfloat16", torch.bfloat16, None),
        ("float32", torch.float32, None),
        ("bfloat16 with a soft-cap", torch.bfloat16, 50.0),
    ):
        chosen = choose_backend(Call(device=device, dtype=dtype, softcap=softcap, needs_grad=True, **size))
        uses.setdefault(chosen.name, []).append(use)
    checks = []
    for name, backend in BACKENDS.items():
        missing = backend.missing(device)
        chosen_for = f"; chosen for {', '.join(uses[name])}" if name in uses else ""
        checks.append(Check(name, missing is None, missing or backend.about + chosen_for))
    return checks


def kernels() -> list[Check]:
    """Which of the fused ops run as Triton kernels here."""
    if installed("triton") is None:
        why = "triton is not installed"
    elif os.environ.get("TRITON_INTERPRET") == "1":
        why = "TRITON_INTERPRET=1: kernels run in the interpreter, for tests only"
    elif not torch.cuda.is_available():
        why = "no GPU for Triton"
    else:
        why = ""
    from . import kernels as ops

    instead = "CPU path" if not torch.cuda.is_available() else ""
    return [Check(name, not why, why or "Triton on the GPU", instead) for name in ops.__all__ if name.islower()]


def print_diagnosis() -> None:
    """Print versions, devices, attention backends, kernels and extras as tables."""
    from rich.console import Console
    from rich.table import Table

    from . import __version__

    console = Console()
    console.print(f"mtllm-fast {__version__}, Python {sys.version.split()[0]}, {platform.platform()}", highlight=False)
    versions = Table("package", "version", title="Versions", title_justify="left")
    for name in REQUIRED:
        versions.add_row(name, installed(name) or "[red]missing[/red]")
    console.print(versions)
    sections = [("Devices", devices()), ("Packed attention", attention_backends()), ("Fused kernels", kernels())]
    extras = [
        Check(name, installed(name) is not None, f"{installed(name) or 'not installed'}: {use}")
        for name, use in OPTIONAL.items()
    ]
    for title, checks in (*sections, ("Optional packages", extras)):
        table = Table("name", "here", "why", title=title, title_justify="left")
        for check in checks:
            here = "[green]yes[/green]" if check.works else check.instead or "no"
            table.add_row(check.name, here, check.reason)
        console.print(table)


def print_verdict(llm: str) -> None:
    """Print whether the LLM `llm` (folder or hub name) can be read on packed rows, causal and bidirectional, and why.

    Raises:
        ValueError: `llm` is no causal LM.
    """
    from .models.gate import require
    from .models.loading import empty_llm

    model = empty_llm(llm)
    print(f"{llm}: {type(model).__name__} ({model.config.model_type})")
    for causal in (True, False):
        try:
            require(model, causal)
            says = "packed rows equal those of each text alone"
        except ValueError as error:
            says = str(error).removeprefix("llm: ")
        print(f"{'causal' if causal else 'bidirectional'}: {says}")
