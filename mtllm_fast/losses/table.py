"""Every loss term by its name. A new one is a file and its line here."""

from __future__ import annotations

from .contrast import Contrast
from .head_kl import TaskHeadKL
from .label_kl import SoftLabelKL
from .lm_head_kl import LMHeadKL
from .paired_mse import PairedMSE
from .partner_ce import PartnerCrossEntropy
from .pooled_mse import PooledMSE
from .target_ce import TargetCrossEntropy
from .task_ce import TaskCrossEntropy
from .term import Term

TERMS: dict[str, type[Term]] = {
    "pooled_mse": PooledMSE,
    "paired_mse": PairedMSE,
    "kl": LMHeadKL,
    "head_kl": TaskHeadKL,
    "task": TaskCrossEntropy,
    "partner_task": PartnerCrossEntropy,
    "label_kl": SoftLabelKL,
    "target_ce": TargetCrossEntropy,
    "contrast": Contrast,
}
