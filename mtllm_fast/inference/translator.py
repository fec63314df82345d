"""Translation by a Hugging Face sequence-to-sequence model, for the translate-test baseline and `mtllm translate`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..data.language import language_read
from ..data.pack import consecutive_packs
from ..data.read import TextRow
from ..data.text_fields import text_fields, with_text_fields
from ..data.tokenise import StackTokenizer
from ..models.names import is_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LOGITS = 2**26  # logits that are held at once for scores: 256 MiB in float32


@dataclass(frozen=True)
class Translation:
    """A translated text. score: mean log probability per token; None for a blank text, or where none was asked for."""

    text: str
    score: float | None = None


@dataclass(frozen=True)
class Decoding:
    """How translations are made.

    Fields:
        num_beams: 1 for greedy decoding.
        max_tokens: budget of source tokens, padding and beams included, per batch.
        max_new_tokens: limit of a translation; None: twice its source's tokens plus 32, so that an endless repetition
            ends.
        no_repeat_ngram_size: forbid repeating n-grams of this size; 0 allows all.
        repetition_penalty: divide the logits of tokens that were written before by this (Keskar et al., 2019); 1 for
            none.

    Raises:
        ValueError: settings out of range.
    """

    num_beams: int = 1
    max_tokens: int = 8192
    max_new_tokens: int | None = None
    no_repeat_ngram_size: int = 0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, least in (("num_beams", 1), ("max_tokens", 1), ("max_new_tokens", 2), ("no_repeat_ngram_size", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value}: expected at least {least}")
        if not self.repetition_penalty > 0:
            raise ValueError(f"repetition_penalty={self.repetition_penalty}: expected more than 0, 1 for none")


class Translator:
    """An MT model that reads one language per row.

    The source is `[lang] A </s>` with the row's own language token, the output is forced to begin with the target's.
    Equal (text, language) rows are translated once. Rows are sorted by length and run in padded batches of at most
    `max_tokens` source tokens; the order is kept.

    Args:
        model: a multilingual encoder-decoder with `generate` (M2M100, NLLB); put into eval mode.
        tokenizer: its fast tokenizer, whose special tokens hold the language codes.
        name: what reports call it.
        max_length: most tokens of a source and of a translation; longer sources are cut and counted.

    Attributes:
        truncated: source texts cut so far; unfinished: translations that met the limit before their end token.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str = "translator",
        max_length: int = 512,
    ) -> None:
        positions = getattr(model.config, "max_position_embeddings", None) or max_length
        self.max_length = min(max_length, positions)
        self.tokenizer = StackTokenizer(tokenizer, None, max_mt_tokens=self.max_length)
        if not self.tokenizer.languages:
            raise ValueError(
                f"translator={name!r}: its tokenizer has no language codes, so no target language can be chosen"
            )
        largest = max(self.tokenizer.language_id(code) for code in self.tokenizer.languages)
        if largest >= model.config.vocab_size:
            raise ValueError(
                f"translator={name!r}: token id {largest} of its tokenizer, but {model.config.vocab_size} embeddings"
            )
        self.model, self.name = model.eval(), name
        self.truncated = 0
        self.unfinished = 0
        self._settings = copy.deepcopy(model.generation_config)
        self._settings.max_length = None  # the length limit is set per batch

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        device: str | None = None,
        dtype: torch.dtype | None = None,
        max_length: int = 512,
        trust_remote_code: bool = False,
    ) -> Translator:
        """Load an MT model from a folder or the hub (safetensors only).

        Args:
            device: None for CUDA where there is one, else the CPU.
            dtype: None for the one it is stored in.

        Raises:
            ValueError: not a model folder, not an encoder-decoder, or a tokenizer without language codes or offsets.
        """
        from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

        folder = Path(name)
        if is_path(name) and not (folder / "config.json").is_file():
            raise ValueError(f"translator={str(name)!r}: no model folder (it has no config.json)")
        try:
            model = AutoModelForSeq2SeqLM.from_pretrained(
                str(name),
                dtype="auto" if dtype is None else dtype,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
            )
            tokenizer = AutoTokenizer.from_pretrained(str(name), trust_remote_code=trust_remote_code)
        except Exception as error:
            if not isinstance(error, OSError | ValueError | RuntimeError) and type(error).__name__ != "SafetensorError":
                raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"translator={str(name)!r}: cannot be loaded as an encoder-decoder MT model: {reason}"
            ) from error
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return cls(model, tokenizer, name=str(name), max_length=max_length)

    @property
    def languages(self) -> tuple[str, ...]:
        """The language codes it can read and write."""
        return self.tokenizer.languages

    def translate(
        self, texts: Sequence[str], languages: str | Sequence[str], target: str = "eng_Latn", **decoding: Any
    ) -> list[str]:
        """Translations of N texts into `target`, in their order. A blank text stays as it is.

        Args:
            texts: N texts.
            languages: one code for all, or one per text.
            target: code of the output language.
            decoding: fields of `Decoding`, and `keep` and `progress` as for `translate_scored`.

        Raises:
            ValueError: an unknown code, lists of different lengths, or settings out of range.
        """
        return [translation.text for translation in self._translate(texts, languages, target, scored=False, **decoding)]

    def translate_scored(
        self, texts: Sequence[str], languages: str | Sequence[str], target: str = "eng_Latn", **decoding: Any
    ) -> list[Translation]:
        """As `translate`, with a score per translation, for one more pass of the decoder."""
        return self._translate(texts, languages, target, scored=True, **decoding)

    def _translate(
        self,
        texts: Sequence[str],
        languages: str | Sequence[str],
        target: str,
        *,
        scored: bool,
        keep: Sequence[str] = (),
        progress: Callable[[int], None] | None = None,
        **decoding: Any,
    ) -> list[Translation]:
        """`keep`: endings that are left out of the translation and put back after it. `progress` is called after each
        batch with the number of texts done."""
        if isinstance(texts, str):
            raise TypeError("texts: got one str; pass a list of texts")
        codes = [languages] * len(texts) if isinstance(languages, str) else list(languages)
        if len(codes) != len(texts):
            raise ValueError(f"languages: {len(codes)} codes for {len(texts)} texts")
        settings = Decoding(**decoding)
        target_id = self.tokenizer.language_id(target)
        parts = [_split_end(text, keep) for text in texts]
        # equal fields are common (every XNLI premise stands in three rows)
        rows = {(text, code): TextRow(text, code) for (text, _), code in zip(parts, codes, strict=True) if text.strip()}
        keys = list(rows)
        side = self.tokenizer.mt_side(list(rows.values()))
        self.truncated += side.truncated
        translations: dict[tuple[str, str], Translation] = {}
        order = sorted(range(len(keys)), key=lambda index: (-len(side.ids[index]), index))
        packs = consecutive_packs(
            [(len(side.ids[i]),) for i in order], settings.max_tokens // settings.num_beams, padded=True
        )
        for members in ([order[k] for k in pack] for pack in packs):
            wanted = [settings.max_new_tokens or 2 * len(side.ids[i]) + 32 for i in members]
            limits = [min(self.max_length, count) for count in wanted]
            outputs = self._generate([side.ids[i] for i in members], limits, target_id, settings, scored)
            translations.update(zip((keys[i] for i in members), outputs, strict=True))
            if progress is not None:
                progress(len(members))
        out = []
        for (text, end), code in zip(parts, codes, strict=True):
            translation = translations.get((text, code), Translation(text))
            out.append(Translation(f"{translation.text} {end}", translation.score) if end else translation)
        return out

    def translate_rows(self, rows: Iterable[TextRow], target: str = "eng_Latn", **decoding: Any) -> list[TextRow]:
        """Rows with every text translated: the text, the second text of a pair, each choice. `decoding` as for
        `translate`; a task's `fixed_words` go into `keep`.

        Raises:
            ValueError: as `translate`.
        """
        rows = list(rows)
        names = [(index, name) for index, row in enumerate(rows) for name in text_fields(row)]
        texts = [text for row in rows for text in text_fields(row).values()]
        codes = [str(language_read(self.tokenizer, "mt", row.language, "TextRow.language")) for row in rows]
        translated = self.translate(texts, [codes[index] for index, _ in names], target, **decoding)
        translations: list[dict[str, str]] = [{} for _ in rows]
        for (index, name), text in zip(names, translated, strict=True):
            translations[index][name] = text
        return [with_text_fields(row, texts, target) for row, texts in zip(rows, translations, strict=True)]

    @torch.no_grad()
    def _generate(
        self, sources: list[NDArray[np.int64]], limits: list[int], target_id: int, decoding: Decoding, scored: bool
    ) -> list[Translation]:
        pad, eos = self.tokenizer.mt.pad_token_id, self.tokenizer.mt.eos_token_id
        inputs, mask = self._padded(sources, pad)
        settings = copy.deepcopy(self._settings)
        settings.update(
            forced_bos_token_id=target_id,
            do_sample=False,
            num_beams=decoding.num_beams,
            early_stopping=settings.early_stopping if decoding.num_beams > 1 else False,
            no_repeat_ngram_size=decoding.no_repeat_ngram_size,
            repetition_penalty=decoding.repetition_penalty,
            max_new_tokens=max(limits),
        )
        output = self.model.generate(input_ids=inputs, attention_mask=mask, generation_config=settings)
        start = int(output[0, 0])
        kept: list[list[int]] = []
        finished: list[bool] = []
        for tokens, limit in zip(output[:, 1:].tolist(), limits, strict=True):  # the first token starts the decoder
            # a row may run up to the batch's longest limit; cut it to its own, so that its text does not depend on its
            # batch
            end = tokens.index(eos) if eos in tokens else len(tokens)
            finished.append(end < limit)
            kept.append(tokens[: min(end, limit)])
        self.unfinished += finished.count(False)
        texts = self.tokenizer.mt.batch_decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        scores: Sequence[float | None] = [None] * len(kept)
        if scored:
            ends = [[eos] if done else [] for done in finished]
            scores = self._scores(inputs, mask, [[start, *ids, *end] for ids, end in zip(kept, ends)], pad)
        return [Translation(text.strip(), score) for text, score in zip(texts, scores, strict=True)]

    def _scores(self, inputs: torch.Tensor, mask: torch.Tensor, outputs: list[list[int]], pad: int) -> list[float]:
        """Mean log probability of the tokens after the language token, by the model without repetition control."""
        scores: list[float] = []
        longest = max(map(len, outputs))
        count = max(1, _LOGITS // (longest * self.model.config.vocab_size))
        for first in range(0, len(outputs), count):
            part = slice(first, first + count)
            decoder, _ = self._padded([np.array(ids) for ids in outputs[part]], pad)
            logits = self.model(
                input_ids=inputs[part],
                attention_mask=mask[part],
                decoder_input_ids=decoder[:, :-1],
                use_cache=False,
            ).logits
            chosen = logits.gather(-1, decoder[:, 1:, None]).squeeze(-1).float()
            logs = chosen - torch.stack([row.float().logsumexp(-1) for row in logits])
            for ids, row in zip(outputs[part], logs.tolist(), strict=True):
                scored = row[1 : len(ids) - 1]  # row[0] is the language token, which was forced
                scores.append(sum(scored) / max(len(scored), 1))
        return scores

    def _padded(self, rows: Sequence[NDArray[np.integer]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and attention mask (B, L) on the model's device."""
        longest = max(len(ids) for ids in rows)
        inputs = torch.full((len(rows), longest), pad, dtype=torch.long)
        mask = torch.zeros_like(inputs)
        for row, ids in enumerate(rows):
            inputs[row, : len(ids)] = torch.from_numpy(ids)
            mask[row, : len(ids)] = 1
        return inputs.to(self.model.device), mask.to(self.model.device)


def _split_end(text: str, keep: Sequence[str]) -> tuple[str, str]:
    """A text without the ending of `keep` that it has, and that ending."""
    end = next((end for end in keep if text.endswith(" " + end)), "")
    return (text[: -len(end) - 1], end) if end else (text, "")
