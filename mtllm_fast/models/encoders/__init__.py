"""Families of MT encoders, one file each.

family.py        what a family declares
m2m_100.py       NLLB-200, M2M-100
bert.py          multilingual-E5-small, LaBSE, mBERT
xlm_roberta.py   XLM-R, multilingual-E5-base and -large
modernbert.py    mmBERT
mbart.py         mBART-50
t5.py            mT5, uMT5, MADLAD-400
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .bert import Bert
from .family import EncoderFamily
from .m2m_100 import M2M100
from .mbart import MBart
from .modernbert import ModernBert
from .t5 import T5
from .xlm_roberta import XLMRoberta

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FAMILIES: list[EncoderFamily] = []
MODEL_TYPES: dict[str, EncoderFamily] = {}


def register(family: EncoderFamily) -> None:
    """Make a family known. Raises ValueError where one of its model types is another family's."""
    for name in family.model_types:
        if name in MODEL_TYPES:
            raise ValueError(f"family: model type {name!r} is another family's ({MODEL_TYPES[name].about})")
    FAMILIES.append(family)
    MODEL_TYPES.update(dict.fromkeys(family.model_types, family))


# A new family is one file and one name here; a family from outside calls `register` itself.
for _family in (M2M100(), Bert(), XLMRoberta(), ModernBert(), MBart(), T5()):
    register(_family)


def family_of(config: PreTrainedConfig, name: str | None = None) -> EncoderFamily:
    """The family of a transformers config, of the model `name`. Raises ValueError, with the families, without one."""
    family = MODEL_TYPES.get(config.model_type)
    if family is None:
        known = "; ".join(f"{', '.join(known.model_types)} ({known.about})" for known in FAMILIES)
        which = "encoder" if name is None else f"encoder={name!r}"
        raise ValueError(f"{which}: model type {config.model_type!r} is not supported; supported: {known}")
    return family


__all__ = ["FAMILIES", "MODEL_TYPES", "EncoderFamily", "family_of", "register"]
