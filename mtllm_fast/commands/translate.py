"""mtllm translate."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from ..data.language import ENGLISH_CODES
from ..data.read import read_rows
from .files import check_given, check_least, device_of, in_language, output_file, print_skipped, ranks, stoppable

if TYPE_CHECKING:
    from ..inference.translate import Source
    from ..inference.translator import Translator


@dataclass(frozen=True)
class _Texts:
    """What is to be translated.

    Fields:
        identity: what tells the texts apart from others.
        keep: endings that stay as they are.
        skipped: reason -> languages that are left out.
    """

    sources: Iterable[Source]
    identity: Mapping[str, object]
    keep: tuple[str, ...] = ()
    skipped: dict[str, list[str]] = field(default_factory=dict)


@dataclass
class Translate:
    """Translate the texts of a file, or of a task in every language, with an MT model.

    The output has a record per text: id, language, split, field, source, translation, score (mean log probability per
    token). A stopped run goes on where it was when the same command is given again. `mtllm evaluate --translations`
    reads what --task gave.
    Example: mtllm translate --model facebook/nllb-200-distilled-600M --task americasnli --data DIR --output T.parquet
    """

    REQUIRED: ClassVar = {
        "model": "required",
        "output": "required",
        "input": "required, or `task`",
        "task": "required, or `input`",
    }
    model: str = ""
    """MT model: folder or hub name."""
    input: str = ""
    """.txt, .jsonl, .csv, .tsv or .parquet (also .gz), a folder or glob of them, or a hub dataset."""
    output: str = ""
    """The .parquet or .jsonl file to write."""
    text_column: str = "text"
    """Column of the text."""
    id_column: str | None = None
    """Column with a name per row; by default their numbers, rows without text not counted."""
    language: str | None = None
    """With `input`: MT code of the texts' language, another one than `target`, or else `language_column`. Where both
    are missing and the target is not English, for this release they are read as English, with a warning."""
    language_column: str | None = None
    """Column with a code per row, instead of `language`."""
    quoted: bool = True
    """Quote marks in .csv and .tsv files of `input` and the task "folder" stand around fields; without, they are
    text."""
    task: str = ""
    """Instead of `input`: a task by name or .yaml file; its texts, pairs and choices are translated one by one."""
    data: str = ""
    """The task's folder or hub name; by default its own."""
    languages: tuple[str, ...] = ("all",)
    """With `task`: the data set's own codes, or "all"."""
    language_map: tuple[str, ...] = ()
    """With `task`: CODE=MT_CODE for languages that the MT model has no code for, e.g. arb_Latn=arb_Arab."""
    split: str = ""
    """Of the task (by default test) or of a hub dataset (by default train)."""
    limit: int | None = None
    """With `input`, only the first rows; with `task`, the rows of each language that `mtllm evaluate --limit` draws."""
    target: str = "eng_Latn"
    """MT code of the language to translate into."""
    num_beams: int = 1
    """1 for greedy decoding."""
    no_repeat_ngram_size: int = 0
    """Forbid repeating n-grams of this size; 0 allows all."""
    repetition_penalty: float = 1.0
    """Make tokens that were written before less likely by this factor; 1 for none."""
    max_length: int = 512
    """Most tokens of a source, which is cut there, and of a translation."""
    max_new_tokens: int | None = None
    """Most tokens of a translation, by default twice its source's plus 32; `max_length` holds where it is less."""
    max_tokens: int = 8192
    """Budget of source tokens, padding and beams included, of one batch."""
    window: int = 1024
    """Texts that are sorted by length and saved together."""
    scores: bool = True
    """Give every translation its score, which takes a pass of the decoder more."""
    device: str | None = None
    """"cpu", "cuda", "cuda:1", ...; by default a GPU where there is one."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the weights; by default as they are stored."""
    overwrite: bool = False
    """Begin anew even where there is the output or a stopped run."""
    progress: bool = True
    """Show a progress bar; a line now and then where stderr is no terminal."""

    def run(self) -> None:
        import torch

        from ..inference.device import check_device
        from ..inference.translate import FORMATS, Manner, translate_file
        from ..inference.translator import Translator
        from ..jobs.fingerprint import of_model

        if bool(self.input) == bool(self.task):
            raise ValueError("name either --input FILE or --task TASK")
        if self.input and self.language_column is None:
            english = self.target.strip("_") in ENGLISH_CODES
            language = self.target if self.language is None and english else self.language
            if language == self.target:
                raise ValueError(
                    f"--language {language}: is the --target, too; name the language of the texts or its column"
                )
        check_device(self.device)
        check_least(
            self, window=1, max_tokens=1, limit=1, max_length=1, max_new_tokens=1, num_beams=1, no_repeat_ngram_size=0
        )
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"--repetition-penalty {self.repetition_penalty}: must be above 0; 1 for none")
        check_given(self, "model")
        output = output_file(self, FORMATS)
        rank, world_size, _ = ranks()
        device = device_of(self)
        translator = Translator.from_pretrained(
            self.model,
            device=device,
            dtype=getattr(torch, self.dtype) if self.dtype else None,
            max_length=self.max_length,
        )
        texts = self._of_task(translator) if self.task else self._of_file(translator)
        settings = {"model": self.model, "weights": of_model(self.model), "dtype": self.dtype, "device": device[:4]}
        decoding = ("num_beams", "max_tokens", "max_new_tokens", "no_repeat_ngram_size", "repetition_penalty")
        how = Manner(
            self.target, texts.keep, self.scores, self.window, {name: getattr(self, name) for name in decoding}
        )
        with stoppable("translate"):
            report = translate_file(
                translator,
                texts.sources,
                output,
                how,
                settings={**settings, "max_length": self.max_length, **texts.identity},
                overwrite=self.overwrite,
                rank=rank,
                world_size=world_size,
                total=len(texts.sources) if isinstance(texts.sources, list) else None,
                progress=self.progress and rank == 0,
            )
        if not report.complete:
            print(f"translate: process {rank} of {world_size} is done; the last one to finish writes {output}")
            return
        before = f" ({report.resumed} of them by an earlier run)" if report.resumed else ""
        print(
            f"translate: {report.rows} texts to {self.target} -> {output}{before}; "
            f"{report.truncated} truncated, {translator.unfinished} met the length limit"
        )
        for reason, languages in texts.skipped.items():
            print(f"translate: not translated, {reason}: {', '.join(languages)}")

    def _of_file(self, translator: Translator) -> _Texts:
        from ..inference.translate import Source

        rows = read_rows(
            self.input,
            text_column=self.text_column,
            id_column=self.id_column,
            language=self.language,
            language_column=self.language_column,
            split=self.split or "train",
            limit=self.limit,
            quoting=self.quoted,
        )
        rows = in_language(rows, translator.tokenizer, "mt", "translate")

        def sources() -> Iterable[Source]:
            for index, row in enumerate(rows):
                code = str(row.language)
                yield Source(row.text, code, str(index) if row.id is None else row.id, code)
            print_skipped(rows, "translate")

        return _Texts(sources(), rows.identity())

    def _of_task(self, translator: Translator) -> _Texts:
        from ..evaluation.rows import task_sources
        from ..evaluation.tasks import canonical_split, get_task
        from ..jobs.fingerprint import of_settings
        from .evaluate import mapping

        task = get_task(self.task, self.data or None, quoted=self.quoted)
        data = self.data or task.default_source
        if data is None:
            raise ValueError(f"--data is missing: the folder of task {self.task!r}")
        split, overrides = canonical_split(self.split or "test"), mapping(self.language_map, "--language-map")
        available = task.languages(data)
        chosen = available if self.languages == ("all",) else list(dict.fromkeys(self.languages))
        for name in (*chosen, *overrides):
            if name not in available:
                raise ValueError(f"--languages: {name!r} is not in {data!r}, which has {', '.join(available[:20])}")
        codes: dict[str, str] = {}
        skipped: dict[str, list[str]] = {}
        for language in chosen:
            code = overrides.get(language) or task.mt_code(language)
            if code is None:
                skipped.setdefault("no MT code", []).append(language)
            elif code == self.target:
                skipped.setdefault(f"already in {self.target}", []).append(language)
            elif split not in task.splits(data, language):
                skipped.setdefault(f"no {split} split", []).append(language)
            else:
                translator.tokenizer.language_id(code)
                codes[language] = code
        if not codes:
            raise ValueError(f"--languages: none to translate ({', '.join(skipped)}); --language-map can name MT codes")
        sources = list(task_sources(task, data, list(codes), codes, split, self.limit))
        content = of_settings(texts=[[text.text, text.mt_code, text.id, text.language, text.field] for text in sources])
        identity = {"task": task.name, "data": str(data), "split": split, "content": content}
        return _Texts(sources, identity, tuple(getattr(task, "fixed_words", ())), skipped)
