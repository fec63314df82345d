"""What a general-adaptation run would need, from meta tensors: memory by part, seconds by part, hours."""

from .accounting import Accounting, Rates, measured_peak
from .plan import EFFICIENCY, Column, plan_authors, plan_ours, sample_lengths, table
from .presets import GPUS, MODELS, Gpu, config, gpu, this_gpu
from .simulate import StepCost, StepSpec, authors, ours

__all__ = [
    "EFFICIENCY",
    "GPUS",
    "MODELS",
    "Accounting",
    "Column",
    "Gpu",
    "Rates",
    "StepCost",
    "StepSpec",
    "authors",
    "config",
    "gpu",
    "measured_peak",
    "ours",
    "plan_authors",
    "plan_ours",
    "sample_lengths",
    "table",
    "this_gpu",
]
