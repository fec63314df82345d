"""Packed inference over a trained model."""

from .engine import Engine

__all__ = ["Engine"]
