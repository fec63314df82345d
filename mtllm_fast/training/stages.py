"""Every stage by its name. A new one is a file and its line here."""

from __future__ import annotations

from .adapt import ADAPT
from .compress import COMPRESS
from .distill import DISTILL
from .finetune import FINETUNE
from .run import StageKind
from .sft import SFT

STAGES: dict[str, StageKind] = {kind.name: kind for kind in (ADAPT, FINETUNE, DISTILL, SFT, COMPRESS)}
