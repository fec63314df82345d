"""`mtllm demo`: the whole method on real models and real languages, on a CPU, in minutes."""

from .run import DemoConfig, run_demo

__all__ = ["DemoConfig", "run_demo"]
