"""One system under one seed in every language of a task: cells from the store, or computed."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from typing import TYPE_CHECKING

import numpy as np

from ..data.read import TextRow
from ..data.text_fields import has_blank
from ..jobs.fingerprint import of_settings
from ..models.fusion import READS_ALONE
from .alignment import alignment, parallel
from .cells import Cell, of_rows
from .metrics import UNREAD
from .results import NO_MT_CODE
from .scorers import (
    EngineScorer,
    GenerationScorer,
    HeadScorer,
    LikelihoodScorer,
    ProbeScorer,
    Scorer,
    States,
    TranslateScorer,
    check_codes,
    probe_rows_of,
)
from .settings import Settings
from .systems import TRANSLATE_TEST, Reading, System, config_of, load_engine, reading

if TYPE_CHECKING:
    from torch import Tensor

NOT_RUN = "not run"


@dataclass(frozen=True)
class _Inputs:
    """What a system reads in one language.

    Fields:
        rows: as the set, or its translations, have them.
        counts: what was counted in joining translations.
        unlabelled: texts, of the language and English ones, by which it is centred; empty where it is not.
        key: what the cell depends on; empty where none are kept.
    """

    rows: Sequence[TextRow]
    counts: dict[str, int]
    unlabelled: dict[str, list[TextRow]]
    key: dict[str, str]


@dataclass
class Run:
    """A system under one seed.

    Fields:
        index: of the seed, from 0.
        cells, alignment, pairs: by language, as in `ModelCells`.
    """

    system: System
    index: int
    settings: Settings
    cells: dict[str, Cell] = field(default_factory=dict)
    alignment: dict[str, dict[str, float]] = field(default_factory=dict)
    pairs: dict[str, int] = field(default_factory=dict)
    method: str = ""
    notes: list[str] = field(default_factory=list)
    _loaded: tuple[EngineScorer, Scorer] | None = None
    _english_states: States | None = None
    _english_mean: Tensor | None = None

    def __post_init__(self) -> None:
        self.folder = (self.system.name, f"seed {self.index + 1}")  # of its cells in the store
        self.key: dict[str, str] = {}  # what all cells depend on
        if self.settings.store is None:
            return
        self.key = {"model": self.system.fingerprint(self.index), "settings": self._settings_key()}
        record = self.settings.store.read_record((*self.folder, "model"), self.key)
        if record is not None:
            self.method, self.notes = record["method"], record["notes"]

    @property
    def loaded(self) -> tuple[EngineScorer, Scorer]:
        """What reads a text's states, and what scores a row; loaded when the first cell needs it."""
        if self._loaded is None:
            self._loaded = _, scorer = self._load()
            self.method, self.notes = scorer.method, list(scorer.notes)
            if (store := self.settings.store) is not None:
                record = {"method": self.method, "notes": self.notes}
                store.write_record((*self.folder, "model"), self.key, record)
        return self._loaded

    @property
    def scorer(self) -> Scorer:
        return self.loaded[1]

    def evaluate(self, language: str) -> None:
        """Fill in the cell of a language, from the store or computed, and its alignment."""
        try:
            inputs = self._inputs(language)
        except ValueError as error:
            self.cells[language] = Cell.without_rows(str(error))
            return
        store, name = self.settings.store, (*self.folder, language)
        cell = None if store is None else store.read_cell(name, inputs.key)
        if cell is None:
            cell = self._cell(language, inputs)
            if store is not None:
                store.write_cell(name, inputs.key, cell)
        self.cells[language] = cell
        if self.settings.alignment and not self.system.translates and not cell.skipped:
            self._align(language, inputs)

    def finish(self) -> None:
        """Let go of the model; a run whose cells were all there still has to say how it was read."""
        if not self.method and any(not cell.skipped for cell in self.cells.values()):
            self.scorer  # noqa: B018
        self.method = self.method or (TRANSLATE_TEST if self.system.translates else NOT_RUN)
        self._loaded, self._english_states, self._english_mean = None, None, None
        gc.collect()

    def _inputs(self, language: str) -> _Inputs:
        """Raises ValueError where the language cannot be read, has no translations, or no text to centre it by."""
        system, settings, data = self.system, self.settings, self.settings.data
        rows, counts = data.rows(language), dict[str, int]()
        if system.translations is not None and rows[0].language != system.target:
            translated = data.translated(language, system.translations, system.target)
            if translated is None:
                raise ValueError("no translations")
            rows, counts = translated
        elif system.partners is not None and rows[0].language != system.target:
            rows, counts = data.with_partners(language, system.partners, system.target)
        english, unlabelled = settings.task.english, {}
        if settings.centre and language != english and not system.translates:
            unlabelled = {name: data.unlabelled(name, settings.centre) for name in (language, english)}
        key: dict[str, str] = {}
        if settings.store is not None:
            centre = {name: of_rows(texts) for name, texts in unlabelled.items()}
            more = {"centre": centre} if centre else {}
            key = {
                "model": self.key["model"],
                "data": of_rows(rows, settings.task.labels),
                "settings": of_settings(run=self.key["settings"], code=self._mt_code(language), **more),
            }
        return _Inputs(rows, counts, unlabelled, key)

    def _cell(self, language: str, inputs: _Inputs) -> Cell:
        code, mapped, reason = self._model_code(language)
        if reason:
            return Cell.without_rows(reason)
        rows = _read_as(inputs.rows, code)
        before, start = self.scorer.counts(), time.perf_counter()
        good = self.scorer.readable(rows)
        generated = self.settings.task.kind == "generated"
        read = np.zeros((0, 2 if generated else max(len(self.settings.task.labels), 1)), np.float32)
        if good:  # all rows of a language may be in a script that a smaller vocabulary lost
            with self._centred(inputs):
                read = np.asarray(self.scorer.logits([rows[index] for index in good]), np.float32)
        time_s = time.perf_counter() - start
        logits, predictions = np.zeros((len(rows), read.shape[1]), np.float32), np.full(len(rows), UNREAD)
        logits[good], predictions[good] = read, read.argmax(1)
        counts = {name: count - before.get(name, 0) for name, count in self.scorer.counts().items()}
        if unread := len(rows) - len(good):
            counts["rows_that_a_tokenizer_fails_on_(wrong)"] = unread
        return Cell(
            logits=logits,
            predictions=predictions.astype(np.int64),
            gold=np.array([1 if generated else row.label for row in rows], np.int64),
            ids=tuple(str(row.id) for row in rows),
            mt_code=code,
            mapped=mapped,
            blank=sum(map(has_blank, rows)),
            counts={**inputs.counts, **counts},
            time_s=time_s,
            answers=_placed(self.loaded[0].written if good else (), good, len(rows)),
        )

    @contextmanager
    def _centred(self, inputs: _Inputs) -> Iterator[None]:
        """Inside, encoder states of a language are moved so that its texts' mean is that of English ones."""
        engine = self.loaded[0].engine
        if not inputs.unlabelled or engine.model.side != "mt":
            yield
            return
        language, english = inputs.unlabelled

        def mean(name: str) -> Tensor:
            rows = _read_as(inputs.unlabelled[name], self._model_code(name)[0])
            return engine.encoder_mean([rows[index] for index in self.scorer.readable(rows)])

        if self._english_mean is None:
            self._english_mean = mean(english)
        engine.model.shift = self._english_mean - mean(language)
        try:
            yield
        finally:
            engine.model.shift = None

    def _mt_code(self, language: str) -> str | None:
        return self.settings.language_map.get(language, self.settings.task.mt_code(language))

    def _model_code(self, language: str) -> tuple[str | None, bool, str]:
        """What the model is told the language is, whether by a mapping, and why it cannot run ("" if it can)."""
        known = self.scorer.mt_languages
        if known is None:
            return None, False, ""
        code, mapped = self._mt_code(language), language in self.settings.language_map
        if code is None and language in known:  # the model's tokenizer was saved with an explicit fallback for it
            code = language
        if code is None:
            return None, False, NO_MT_CODE
        if code not in known:
            return None, False, f"MT code {code} unknown to the model"
        return known[code], mapped or known[code] != code, ""

    def _align(self, language: str, inputs: _Inputs) -> None:
        """Fill in how close the states of a language are to those of English, where both have the same rows."""
        english, data, store = self.settings.task.english, self.settings.data, self.settings.store
        if language == english or english not in data.available or data.problem(english):
            return
        english_rows = data.rows(english)
        pairs = parallel([row.id for row in inputs.rows], [row.id for row in english_rows])
        if len(pairs) < 2:
            return
        name, key = (*self.folder, f"{language}.alignment"), inputs.key
        if store is not None:
            settings = f"{key['settings']} {self._mt_code(english)}"
            key = {**key, "data": key["data"] + of_rows(english_rows), "settings": settings}
            if (record := store.read_record(name, key)) is not None:
                self.pairs[language] = record.pop("pairs", len(pairs))
                self.alignment[language] = record
                return
        code, _, reason = self._model_code(english)
        if reason:
            return
        reader = self.loaded[0]
        if self._english_states is None:
            as_read = _read_as(english_rows, code)
            known = reader.readable(as_read)
            if len(known) < 2:
                return
            states = reader.states([as_read[index] for index in known])
            self._english_states = np.full((len(as_read), states.shape[1]), np.nan, np.float32)
            self._english_states[known] = states
        texts = _read_as(inputs.rows, self._model_code(language)[0])
        good = set(reader.readable(texts))
        pairs = [(i, j) for i, j in pairs if i in good and not np.isnan(self._english_states[j, 0])]
        if len(pairs) < 2:
            return
        with self._centred(inputs):
            states = reader.states([texts[i] for i, _ in pairs])
        self.pairs[language] = len(pairs)
        self.alignment[language] = alignment(states, self._english_states[[j for _, j in pairs]])
        if store is not None:
            store.write_record(name, key, {**self.alignment[language], "pairs": len(pairs)})

    def _load(self) -> tuple[EngineScorer, Scorer]:
        system, settings = self.system, self.settings
        engine = load_engine(
            system.models[self.index], device=settings.device, dtype=settings.dtype, max_tokens=settings.max_tokens
        )
        name = "teacher" if system.translates else system.name
        how = reading(engine.model.config, settings.task, settings.prompt, name)
        reader: HeadScorer | LikelihoodScorer | GenerationScorer | ProbeScorer
        if how == "head":
            reader = HeadScorer(engine, settings.task, name)
        elif how == "probe":
            reader = ProbeScorer(
                engine,
                settings.task,
                name,
                source=settings.probe_source or settings.source,
                max_rows=settings.probe_rows,
                language_map=settings.language_map,
            )
        else:
            prompt = engine.model.config.prompt or settings.prompt
            assert prompt is not None
            if how == "generation":
                reader = GenerationScorer(engine, name, prompt, settings.decoding)
            else:
                reader = LikelihoodScorer(engine, settings.task, name, prompt)
        if engine.model.config.fusion is not None:
            reader.notes.append(
                f"{name} {READS_ALONE}"
                if system.partners is None
                else f"{name} reads a text together with its translation into {system.target} from {system.partners}; "
                f"one that has none, and English, alone"
            )
        scorer: Scorer = reader
        if system.translations is not None:  # only the classifier is left to do, which is told no language
            reader.method, reader.mt_languages = TRANSLATE_TEST, None
            reader.notes.insert(
                0, f"translate-test: existing translations into {system.target} from {system.translations}"
            )
        elif (translator := system.loaded_translator) is not None:
            scorer = TranslateScorer(
                translator,
                reader,
                target=system.target,
                keep=getattr(settings.task, "fixed_words", ()),
                num_beams=system.num_beams,
                max_tokens=settings.max_tokens or 8192,
            )
        check_codes(settings.language_map, settings.data.available, scorer.mt_languages)
        return reader, scorer

    def _settings_key(self) -> str:
        """Fingerprint of the settings that every language shares."""
        import torch

        system, settings = self.system, self.settings
        return of_settings(
            version=version("mtllm-fast"),
            task=settings.task.name,
            max_tokens=settings.max_tokens,
            device=(settings.device or ("cuda" if torch.cuda.is_available() else "cpu")).split(":")[0],
            probe=self._probe_key(),
            **({"dtype": settings.dtype} if settings.dtype else {}),
            target=system.target if system.translates or system.partners is not None else None,
            num_beams=system.num_beams if system.translator is not None else None,
            **self._writing_key(),
        )

    @property
    def _reading(self) -> Reading | None:
        """How the model is read; None for a hub name whose config cannot be had."""
        system, settings = self.system, self.settings
        config = config_of(system.models[self.index])
        return None if config is None else reading(config, settings.task, settings.prompt, system.name)

    def _writing_key(self) -> dict[str, object]:
        """What the answers of a model that is read by what it writes depend on; {} for others.

        Its own prompt belongs to the model.
        """
        settings, how = self.settings, self._reading
        key: dict[str, object] = {"reading": how} if how in ("likelihood", "generation") else {}
        if settings.prompt is not None and how not in ("head", "probe"):
            key["prompt"] = asdict(settings.prompt)
        if settings.task.kind == "generated":
            key["max_new_tokens"] = settings.max_new_tokens
        return key

    def _probe_key(self) -> list[str | int | None] | None:
        """What the linear probe of a model that is read by one depends on; None for other models."""
        settings, how = self.settings, self._reading
        if how not in ("probe", None) or settings.task.kind == "generated":
            return None
        source, code = settings.probe_source or settings.source, self._mt_code(settings.task.english)
        try:
            train, dev, _ = probe_rows_of(settings.task, self.system.name, source, settings.probe_rows)
        except ValueError:
            if how == "probe":
                raise
            return [code, str(source), settings.probe_rows]  # it may have a head, and need no such rows
        return [code, of_rows([*train, *dev])]


def _placed(answers: tuple[str, ...], rows: Sequence[int], count: int) -> tuple[str, ...]:
    """Answers to some of `count` rows, with "" for the others; none where nothing was written."""
    found = dict(zip(rows, answers, strict=True)) if answers else {}
    return tuple(found.get(index, "") for index in range(count)) if answers else ()


def _read_as(rows: Sequence[TextRow], code: str | None) -> list[TextRow]:
    return [row if code in (None, row.language) else replace(row, language=str(code)) for row in rows]
