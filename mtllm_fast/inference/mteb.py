"""An MTLLM as a model of mteb, every text read in its own language.

    model = MTEBEncoder("runs/adapted")
    results = mteb.evaluate(model, mteb.get_tasks(tasks=["SIB200Classification"]))

mteb says which subset of which task it encodes, and the task's metadata which languages that subset is in ("swh-Latn").
They become codes of the MT tokenizer. A language without one is an error that names the nearest codes; the tokenizer's
`fallbacks` and `language_of` are the ways to decide otherwise.

mteb's CachedEmbeddingWrapper finds embeddings by the text alone and hands over only the texts that it lacks. Two-sided
tasks (translations, sentence pairs) in two languages are therefore refused under it; elsewhere, a text that stands in
several languages of one task gets the embedding of the first.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..data.language import language_read, reads_language
from ..data.read import TextRow
from ..data.tokenise import StackTokenizer
from ..models import MTLLM
from ..models.fingerprint import fingerprint
from .engine import Engine

try:
    from mteb.models import ModelMeta
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.cache_wrappers import CachedEmbeddingWrapper
    from mteb.models.model_meta import ScoringFunction
except ImportError as error:
    raise ImportError(f"mteb 2.26 or newer is needed ({error}): pip install 'mtllm-fast[doors]'") from error

if TYPE_CHECKING:
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.types import PromptType
    from torch.utils.data import DataLoader

# Codes of mteb's tasks -> NLLB's: macrolanguages stand for their largest member; NLLB's tokenizer misnames two scripts.
NLLB_CODES = {
    "ara-Arab": "arb_Arab",
    "aym-Latn": "ayr_Latn",
    "aze-Latn": "azj_Latn",
    "cmn-Hans": "zho_Hans",
    "cmn-Hant": "zho_Hant",
    "din-Latn": "dik_Latn",
    "fas-Arab": "pes_Arab",
    "fil-Latn": "tgl_Latn",
    "ful-Latn": "fuv_Latn",
    "gug-Latn": "grn_Latn",
    "kau-Arab": "knc_Arab",
    "kau-Latn": "knc_Latn",
    "kor-Kore": "kor_Hang",
    "kur-Arab": "ckb_Arab",
    "kur-Latn": "kmr_Latn",
    "lav-Latn": "lvs_Latn",
    "mlg-Latn": "plt_Latn",
    "mon-Cyrl": "khk_Cyrl",
    "msa-Latn": "zsm_Latn",
    "nep-Deva": "npi_Deva",
    "nor-Latn": "nob_Latn",
    "ori-Orya": "ory_Orya",
    "orm-Latn": "gaz_Latn",
    "pus-Arab": "pbt_Arab",
    "que-Latn": "quy_Latn",
    "sat-Olck": "sat_Beng",
    "sqi-Latn": "als_Latn",
    "swa-Latn": "swh_Latn",
    "uzb-Latn": "uzn_Latn",
    "yid-Hebr": "ydd_Hebr",
}

# task types whose two sides are encoded one directly after the other, in the order of the subset's languages
_TWO_SIDED = ("BitextMining", "STS")


class MTEBEncoder(AbsEncoder):
    """What `mteb.evaluate` takes.

    Args:
        model: an MTLLM, its folder, or an Engine over it, which decides about token budget, device and quantisation. A
            model given by its folder runs on the GPU where there is one, an MTLLM where it is.
        language_of: `language_of(task_metadata, hf_subset, prompt_type)` gives the MT code of the texts of a call, or
            None to go by the metadata. Needed where a subset mixes languages and mteb does not say which texts are in
            which: multilingual text in one subset, and retrieval with queries and documents in different languages.
        name, revision: what mteb files the results under, and skips finished tasks by. The revision is by default a
            fingerprint of the model, which does not cover `language_of`.

    Raises:
        ValueError: while evaluating, a language that the MT tokenizer does not have, a subset of several languages, or
            texts in two languages whose sides mteb's CachedEmbeddingWrapper hides.
    """

    def __init__(
        self,
        model: MTLLM | Engine | str | Path,
        *,
        language_of: Callable[[TaskMetadata, str, PromptType | None], str | None] | None = None,
        name: str = "mtllm-fast/local",
        revision: str | None = None,
    ) -> None:
        if isinstance(model, str | Path):
            device = "cuda" if torch.cuda.is_available() else None
            model = Engine(MTLLM.from_pretrained(model), device=device)
        self.engine = model if isinstance(model, Engine) else Engine(model)
        self.model = self.engine.model
        self.language_of = language_of
        self._first_side: tuple[str, str, str] | None = None
        self.mteb_model_meta = ModelMeta.create_empty(
            overwrites={
                "name": name,
                "revision": revision or fingerprint(self.model),
                "loader": type(self),
                "embed_dim": self.model.hidden_size,
                "n_parameters": self.model.describe()["parameters"],
                "similarity_fn_name": ScoringFunction.COSINE,
            }
        )

    def encode(
        self,
        inputs: DataLoader[Any],
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: object,
    ) -> NDArray[np.float32]:
        """Embeddings (N, D) of the texts that `inputs` yields; a column "language" of MT codes goes before all else.

        mteb's `batch_size` only sets how many texts it hands over at a time: the engine packs by tokens. A text without
        a token (an empty one, for an LLM that writes no BOS) gets zeros, which are like no other text, and a log line.
        """
        this = (task_metadata.name, hf_split, hf_subset)
        two_sided = task_metadata.type in _TWO_SIDED and len(_languages(task_metadata, hf_subset)) == 2
        side = int(self._first_side == this) if two_sided else None
        self._first_side = None  # until this call has succeeded
        hidden = two_sided and _called_by_cache()
        tokenizer = self.model.require_tokenizer()

        def rows() -> Iterator[TextRow]:
            code: str | None = None
            named = False
            for batch in inputs:
                codes = batch.get("language")
                if codes is None:
                    if not named:
                        code = self._language(task_metadata, hf_subset, prompt_type, side, hidden)
                        named = True
                    codes = [code] * len(batch["text"])
                else:
                    language_read(tokenizer, self.model.side, codes, "the column 'language'")
                for text, language in zip(batch["text"], codes):
                    yield TextRow(text, language)

        parts = list(self.engine.encode_rows(rows(), on_bad_text="nan"))
        self._first_side = this if side == 0 else None
        values = np.concatenate(parts) if parts else np.zeros((0, self.model.hidden_size), np.float32)
        return np.nan_to_num(values, copy=False, nan=0.0)

    def _language(
        self, task: TaskMetadata, subset: str, prompt_type: PromptType | None, side: int | None, hidden: bool
    ) -> str | None:
        """The MT code of the texts of one call, the subset's language number `side` where it has two; None for a model
        that reads no language.

        hidden: `side` is a guess, since a side that mteb has in its cache never comes here.
        """
        tokenizer = self.model.require_tokenizer()
        if not reads_language(tokenizer, self.model.side):
            language_read(tokenizer, self.model.side, self.language_of, "language_of")
            return None
        if self.language_of is not None and (code := self.language_of(task, subset, prompt_type)) is not None:
            return code
        languages = _languages(task, subset)
        if len(languages) > 1 and side is None:
            raise ValueError(
                f"{task.name}, subset {subset!r}: texts in {', '.join(languages)}, and mteb does not say which are in "
                "which; pass MTEBEncoder(..., language_of=...)"
            )
        if hidden:
            raise ValueError(
                f"{task.name}, subset {subset!r}: mteb's CachedEmbeddingWrapper leaves out the texts that it has, so "
                f"{' and '.join(languages)} cannot be told apart; evaluate this task without it"
            )
        return mt_code(languages[side or 0], tokenizer)


def _called_by_cache() -> bool:
    """Whether mteb's CachedEmbeddingWrapper is calling; nothing in the arguments says so."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not CachedEmbeddingWrapper.encode.__code__:
        frame = frame.f_back
    return frame is not None


def _languages(task: TaskMetadata, subset: str) -> list[str]:
    """mteb's names of the languages of a subset; in parallel data a subset is named by its one language."""
    return list(dict.fromkeys(task.hf_subsets_to_langscripts.get(subset, [subset])))


def mt_code(language: str, tokenizer: StackTokenizer) -> str:
    """mteb's name of a language ("swh-Latn") -> the MT tokenizer's ("swh_Latn").

    Raises:
        ValueError: the tokenizer has no such language; names the nearest ones.
    """
    code = language.replace("-", "_")
    if code not in tokenizer.languages and code not in tokenizer.fallbacks:
        code = NLLB_CODES.get(code.replace("_", "-"), code)
    tokenizer.language_id(code)
    return code
