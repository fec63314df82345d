"""Translation by a Hugging Face sequence-to-sequence model, for the translate-test baseline and `mtllm translate`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..data.read import TextRow
from ..data.tokenise import StackTokenizer


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

    def __init__(self, model: Any, tokenizer: Any, *, name: str = "translator", max_length: int = 512) -> None:
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
        local = folder.exists() or str(name).startswith((".", "/", "~"))
        if local and not (folder / "config.json").is_file():
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
        self,
        texts: Sequence[str],
        languages: str | Sequence[str],
        target: str = "eng_Latn",
        *,
        num_beams: int = 1,
        max_tokens: int = 8192,
        max_new_tokens: int | None = None,
        no_repeat_ngram_size: int = 0,
        progress: Callable[[int], None] | None = None,
    ) -> list[str]:
        """Translations of N texts into `target`, in their order. A blank text stays as it is.

        Args:
            texts: N texts.
            languages: one code for all, or one per text.
            target: code of the output language.
            num_beams: 1 for greedy decoding.
            max_tokens: budget of source tokens, padding and beams included, per batch.
            max_new_tokens: limit of a translation; None: twice its source's tokens plus 32, so that an endless
                repetition ends.
            no_repeat_ngram_size: forbid repeating n-grams of this size; 0 for plain decoding.
            progress: called after each batch with the number of texts done.

        Raises:
            ValueError: an unknown code, lists of different lengths, or settings out of range.
        """
        if isinstance(texts, str):
            raise TypeError("texts: got one str; pass a list of texts")
        codes = [languages] * len(texts) if isinstance(languages, str) else list(languages)
        if len(codes) != len(texts):
            raise ValueError(f"languages: {len(codes)} codes for {len(texts)} texts")
        if (
            num_beams < 1
            or max_tokens < 1
            or no_repeat_ngram_size < 0
            or (max_new_tokens is not None and max_new_tokens < 2)
        ):
            raise ValueError(
                f"num_beams={num_beams}, max_tokens={max_tokens}, max_new_tokens={max_new_tokens}, "
                f"no_repeat_ngram_size={no_repeat_ngram_size}: expected at least 1, 1, 2 and 0"
            )
        target_id = self.tokenizer.language_id(target)
        # equal fields are common (every XNLI premise stands in three rows)
        rows = {(text, code): TextRow(text, code) for text, code in zip(texts, codes, strict=True) if text.strip()}
        keys = list(rows)
        side = self.tokenizer.mt_side(list(rows.values()))
        self.truncated += side.truncated
        found: dict[tuple[str, str], str] = {}
        for members in _batches([len(ids) for ids in side.ids], max_tokens // num_beams):
            wanted = [max_new_tokens or 2 * len(side.ids[i]) + 32 for i in members]
            limits = [min(self.max_length, count) for count in wanted]
            outputs = self._generate([side.ids[i] for i in members], limits, target_id, num_beams, no_repeat_ngram_size)
            for i, text in zip(members, outputs, strict=True):
                found[keys[i]] = text
            if progress is not None:
                progress(len(members))
        return [found.get((text, code), text) for text, code in zip(texts, codes, strict=True)]

    def translate_rows(self, rows: Iterable[TextRow], target: str = "eng_Latn", **settings: Any) -> list[TextRow]:
        """Rows with their text, and the second text of a pair, translated field by field; `settings` as for
        `translate`.

        Raises:
            ValueError: a multiple-choice row, whose choices are not translated here; and as `translate`.
        """
        rows = list(rows)
        for row in rows:
            if row.choices is not None:
                raise ValueError(f"rows: row {row.id!r} has choices; translate texts and pairs only")
        fields = [(row.text, row.language) for row in rows]
        fields += [(row.text_pair, row.language) for row in rows if row.text_pair is not None]
        texts = self.translate([text for text, _ in fields], [code for _, code in fields], target, **settings)
        pairs = iter(texts[len(rows) :])
        return [
            replace(row, text=text, language=target, text_pair=None if row.text_pair is None else next(pairs))
            for row, text in zip(rows, texts, strict=False)
        ]

    @torch.no_grad()
    def _generate(
        self, sources: list[Any], limits: list[int], target_id: int, num_beams: int, no_repeat_ngram_size: int
    ) -> list[str]:
        pad, eos = self.tokenizer.mt.pad_token_id, self.tokenizer.mt.eos_token_id
        longest = max(len(ids) for ids in sources)
        inputs = torch.full((len(sources), longest), pad, dtype=torch.long)
        mask = torch.zeros_like(inputs)
        for row, ids in enumerate(sources):
            inputs[row, : len(ids)] = torch.from_numpy(ids)
            mask[row, : len(ids)] = 1
        device = self.model.device
        settings = copy.deepcopy(self._settings)
        settings.update(
            forced_bos_token_id=target_id,
            do_sample=False,
            num_beams=num_beams,
            early_stopping=settings.early_stopping if num_beams > 1 else False,
            no_repeat_ngram_size=no_repeat_ngram_size,
            max_new_tokens=max(limits),
        )
        output = self.model.generate(
            input_ids=inputs.to(device),
            attention_mask=mask.to(device),
            generation_config=settings,
        )
        kept: list[list[int]] = []
        for tokens, limit in zip(output[:, 1:].tolist(), limits, strict=True):  # the first token starts the decoder
            # a row may run up to the batch's longest limit; cut it to its own, so that its text does not depend on its
            # batch
            end = tokens.index(eos) if eos in tokens else len(tokens)
            self.unfinished += end >= limit
            kept.append(tokens[: min(end, limit)])
        texts = self.tokenizer.mt.batch_decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return [text.strip() for text in texts]


def _batches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of padded size at most `max_tokens` (a longer single row runs alone), longest first."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    start = 0
    while start < len(order):
        count = max(1, max_tokens // max(lengths[order[start]], 1))
        yield order[start : start + count]
        start += count
