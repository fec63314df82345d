"""One model under one seed in every language of a task: cells from the store, or computed."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..data.read import TextRow
from ..jobs import fingerprint
from .alignment import alignment, parallel
from .cells import Cell, CellStore, of_rows
from .results import NO_MT_CODE
from .rows import TaskRows
from .scorers import (
    Encoder,
    Scorer,
    TranslatedScorer,
    TranslateScorer,
    check_codes,
    check_labels,
    probe_rows_of,
    scorer,
)
from .tasks import Task
from .translate_test import Translator

Dtype = Literal["float32", "bfloat16", "float16"]
Model = Any  # MTLLM, an engine around one, or a folder or hub name of one

TRANSLATE_TEST = "translate-test"
NOT_RUN = "not run"


@dataclass
class Options:
    """What the runs of one evaluation share."""

    task: Task
    data: TaskRows
    languages: list[str]
    language_map: dict[str, str]
    probe_source: str | Path
    probe_rows: int
    max_tokens: int | None
    device: str | None
    dtype: Dtype | None
    alignment: bool
    store: CellStore | None
    centre: int = 0


@dataclass
class Contestant:
    """A model under its name, with one entry per seed; `translator` or `translations` make it a translate-test."""

    name: str
    models: list[Model]
    translator: Any = None
    translations: str | Path | None = None
    target: str = "eng_Latn"
    num_beams: int = 1

    @property
    def reads_itself(self) -> bool:
        return self.translator is None and self.translations is None


class Lazy:
    """A translator that is loaded once, when it is first needed, and shared by the seeds."""

    def __init__(self, name: str | Path, device: str | None) -> None:
        self.name, self.device = name, device
        self.made: Translator | None = None

    def get(self) -> Translator:
        if self.made is None:
            self.made = Translator.from_pretrained(self.name, device=self.device)
        return self.made


@dataclass
class Run:
    """One contestant under one seed."""

    one: Contestant
    index: int
    options: Options
    cells: dict[str, Cell] = field(default_factory=dict)
    alignment: dict[str, dict[str, float]] = field(default_factory=dict)
    pairs: dict[str, int] = field(default_factory=dict)  # parallel rows behind the alignment
    method: str = ""
    notes: list[str] = field(default_factory=list)
    _scorer: Scorer | None = None
    _english: tuple[list[TextRow], Any] | None = None
    _english_mean: Any = None

    def __post_init__(self) -> None:
        self.place = (self.one.name, f"seed {self.index + 1}")
        self.model_key = self.settings = ""
        store = self.options.store
        if store is None:
            return
        self.model_key, self.settings = self._keys()
        record = store.read_record((*self.place, "model"), {"model": self.model_key, "settings": self.settings})
        if record is not None:
            self.method, self.notes = record["method"], record["notes"]

    @property
    def scorer(self) -> Scorer:
        """The model, loaded when the first cell needs it."""
        if self._scorer is None:
            self._scorer = self._load()
            self.method, self.notes = self._scorer.method, list(self._scorer.notes)
            if self.options.store is not None:
                key = {"model": self.model_key, "settings": self.settings}
                record = {"method": self.method, "notes": self.notes}
                self.options.store.write_record((*self.place, "model"), key, record)
        return self._scorer

    def do(self, language: str) -> None:
        """The cell of a language, from the store or computed, and its alignment."""
        data, store = self.options.data, self.options.store
        if problem := data.problem(language):
            self.cells[language] = Cell.without_rows(problem)
            return
        rows = data.rows(language)
        counts: dict[str, int] = {}
        if self.one.translations is not None and rows[0].language != self.one.target:
            joined = data.translated(language, self.one.translations, self.one.target)
            if isinstance(joined, str):
                self.cells[language] = Cell.without_rows(joined)
                return
            rows, counts = joined
        try:
            unlabelled = self._unlabelled(language)
        except ValueError as error:
            self.cells[language] = Cell.without_rows(str(error))
            return
        key = {}
        if store is not None:
            centre = {name: of_rows(texts) for name, texts in unlabelled.items()}
            key = {
                "model": self.model_key,
                "data": of_rows(rows, self.options.task.labels),
                "settings": fingerprint.of_settings(
                    run=self.settings, code=self._wanted(language), **({"centre": centre} if centre else {})
                ),
            }
            found = store.read_cell((*self.place, language), key)
            if found is not None:
                self.cells[language] = found
        if language not in self.cells:
            self.cells[language] = self._cell(language, rows, counts, unlabelled)
            if store is not None:
                store.write_cell((*self.place, language), key, self.cells[language])
        if self.options.alignment and self.one.reads_itself and not self.cells[language].skipped:
            self._align(language, rows, key, unlabelled)

    def finish(self) -> None:
        """Let go of the model; a run whose cells were all there still has to say how it was read."""
        if not self.method and any(not cell.skipped for cell in self.cells.values()):
            self.scorer  # noqa: B018
        self.method = self.method or (TRANSLATE_TEST if not self.one.reads_itself else NOT_RUN)
        self._scorer, self._english, self._english_mean = None, None, None
        gc.collect()

    def _cell(
        self,
        language: str,
        rows: Sequence[TextRow],
        counts: dict[str, int],
        unlabelled: Mapping[str, Sequence[TextRow]],
    ) -> Cell:
        code, mapped, reason = self._code(language)
        if reason:
            return Cell.without_rows(reason)
        rows = _read_as(rows, code)
        before, start = self.scorer.counts(), time.perf_counter()
        with self._centred(unlabelled):
            logits = np.ascontiguousarray(self.scorer.logits(rows), np.float32)
        time_s = time.perf_counter() - start
        return Cell(
            logits=logits,
            predictions=logits.argmax(1).astype(np.int64),
            gold=np.array([row.label for row in rows], np.int64),
            ids=tuple(str(row.id) for row in rows),
            mt_code=code,
            mapped=mapped,
            blank=sum(_blank(row) for row in rows),
            counts={**counts, **{name: n - before.get(name, 0) for name, n in self.scorer.counts().items()}},
            time_s=time_s,
        )

    def _unlabelled(self, language: str) -> dict[str, list[TextRow]]:
        """The texts, its own and English ones, by which a language is centred; empty where it is not.

        Raises:
            ValueError: there are none.
        """
        english, count = self.options.task.english, self.options.centre
        if not count or language == english or not self.one.reads_itself:
            return {}
        return {name: self.options.data.unlabelled(name, count) for name in (language, english)}

    @contextmanager
    def _centred(self, unlabelled: Mapping[str, Sequence[TextRow]]) -> Iterator[None]:
        """Inside, encoder states of a language are moved so that its texts' mean is that of English ones."""
        engine = getattr(self.scorer, "engine", None)
        if not unlabelled or engine is None or engine.model.side != "mt":
            yield
            return
        language, english = unlabelled

        def mean(name: str) -> Any:
            return engine.encoder_mean(_read_as(unlabelled[name], self._code(name)[0]))

        if self._english_mean is None:
            self._english_mean = mean(english)
        engine.model.shift = self._english_mean - mean(language)
        try:
            yield
        finally:
            engine.model.shift = None

    def _wanted(self, language: str) -> str | None:
        return self.options.language_map.get(language, self.options.task.mt_code(language))

    def _code(self, language: str) -> tuple[str | None, bool, str]:
        """What the model is told the language is, whether by a mapping, and why it cannot run ("" if it can)."""
        known = self.scorer.mt_languages
        if known is None:
            return None, False, ""
        code, mapped = self._wanted(language), language in self.options.language_map
        if code is None and language in known:  # the model's tokenizer was saved with an explicit fallback for it
            code = language
        if code is None:
            return None, False, NO_MT_CODE
        if code not in known:
            return None, False, f"MT code {code} unknown to the model"
        return known[code], mapped or known[code] != code, ""

    def _align(
        self,
        language: str,
        rows: Sequence[TextRow],
        key: dict[str, str],
        unlabelled: Mapping[str, Sequence[TextRow]],
    ) -> None:
        task, data, store = self.options.task, self.options.data, self.options.store
        if language == task.english or task.english not in data.available or data.problem(task.english):
            return
        name = (*self.place, f"{language}.alignment")
        english = data.rows(task.english)
        pairs = parallel([row.id for row in rows], [row.id for row in english])
        if len(pairs) < 2:
            return
        self.pairs[language] = len(pairs)
        if store is not None:
            wanted = self._wanted(task.english)
            key = {**key, "data": key["data"] + of_rows(english), "settings": f"{key['settings']} {wanted}"}
            found = store.read_record(name, key)
            if found is not None:
                self.alignment[language] = found
                return
        if self._english is None:
            code, _, reason = self._code(task.english)
            self._english = (english, None if reason else self.scorer.states(_read_as(english, code)))
        states = self._english[1]
        if states is None:
            return
        with self._centred(unlabelled):
            mine = self.scorer.states(_read_as([rows[i] for i, _ in pairs], self._code(language)[0]))
        assert mine is not None
        self.alignment[language] = alignment(mine, states[[j for _, j in pairs]])
        if store is not None:
            store.write_record(name, key, self.alignment[language])

    def _load(self) -> Scorer:
        options, one, name = self.options, self.one, self.one.name
        engine = _engine(one.models[self.index], options)
        reader = scorer(
            engine,
            options.task,
            name if one.reads_itself else "teacher",
            probe_source=options.probe_source,
            probe_rows=options.probe_rows,
            language_map=options.language_map,
        )
        made: Scorer = reader
        if one.translations is not None:
            made = TranslatedScorer(reader, source=one.translations, target=one.target)
        elif one.translator is not None:
            translator = one.translator.get() if isinstance(one.translator, Lazy) else one.translator
            tokens = options.max_tokens or 8192
            made = TranslateScorer(
                translator,
                reader,
                target=one.target,
                keep=getattr(options.task, "fixed_words", ()),
                num_beams=one.num_beams,
                max_tokens=tokens,
            )
        check_codes(options.language_map, options.data.available, made.mt_languages)
        return made

    def _keys(self) -> tuple[str, str]:
        """Fingerprints of the model and of the settings that every language shares."""
        import torch

        options, model = self.options, self.one.models[self.index]
        parts = [_of_model(model, self.one.name)]
        if self.one.translator is not None:
            translator = self.one.translator
            name = translator.name if isinstance(translator, Lazy) else translator
            parts.append(_of_model(name, "translator"))
        settings = fingerprint.of_settings(
            version=version("mtllm-fast"),
            task=options.task.name,
            max_tokens=options.max_tokens,
            device=(options.device or ("cuda" if torch.cuda.is_available() else "cpu")).split(":")[0],
            probe=self._probe_key(model),
            **({"dtype": options.dtype} if options.dtype else {}),
            target=None if self.one.reads_itself else self.one.target,
            num_beams=self.one.num_beams if self.one.translator is not None else None,
        )
        return " ".join(parts), settings

    def _probe_key(self, model: Model) -> list[Any] | None:
        """What the linear probe of a model without a head depends on; None for a model with a head."""
        options, headless = self.options, _headless(model)
        if headless is False:
            return None
        code = self._wanted(options.task.english)
        try:
            train, dev, _ = probe_rows_of(options.task, self.one.name, options.probe_source, options.probe_rows)
        except ValueError:
            if headless:
                raise
            return [code, str(options.probe_source), options.probe_rows]  # it may have a head, and need no such rows
        return [code, of_rows([*train, *dev])]


def _read_as(rows: Sequence[TextRow], code: str | None) -> list[TextRow]:
    return [row if code in (None, row.language) else replace(row, language=str(code)) for row in rows]


def _blank(row: TextRow) -> bool:
    texts = (row.text, *(() if row.text_pair is None else (row.text_pair,)), *(row.choices or ()))
    return not all(text.strip() for text in texts)


def _of_model(model: Model, name: str) -> str:
    if not isinstance(model, str | Path):
        raise ValueError(
            f"cells: {name!r} is a {type(model).__name__} in memory; give its folder, by which finished cells are known"
        )
    return fingerprint.of_model(model)


def _local_config(model: Model) -> Any:
    from ..models.storage import read_config

    local = isinstance(model, str | Path) and (Path(model).exists() or str(model).startswith((".", "/", "~")))
    return read_config(Path(model)) if local else None


def _headless(model: Model) -> bool | None:
    """Whether a model has no head; None for a hub name whose config cannot be had."""
    from ..models.storage import read_config

    config = _local_config(model)
    if config is None:
        found = fingerprint.hub_config(str(model))
        config = None if found is None else read_config(found.parent)
    return None if config is None else config.head is None


def check_folder(model: Model, task: Task, name: str) -> None:
    """ValueError for a folder that is no model, or whose head cannot answer the task, before anything is loaded."""
    config = _local_config(model)
    if config is not None and config.head is not None:
        check_labels(config.labels, task, str(model))


def check_seeds(one: Contestant) -> None:
    """ValueError where some of a model's seeds have a head and others do not, before anything is loaded."""
    headless = {str(model): config.head is None for model in one.models if (config := _local_config(model)) is not None}
    if len(set(headless.values())) > 1:
        without = next(name for name, missing in headless.items() if missing)
        raise ValueError(
            f"model={one.name!r}: its seed {without!r} has no task head, others have one: no mean over both"
        )


def _engine(model: Model, options: Options) -> Encoder:
    if hasattr(model, "classify") and hasattr(model, "encode_rows"):
        return model
    from ..inference.engine import Engine

    device = options.device
    if isinstance(model, str | Path):
        import torch

        from ..models import MTLLM

        model = MTLLM.from_pretrained(model)
        if model.dtype == torch.float32:  # a sum in fewer bits than fp32 would lose a part of the adapter
            for part in (model.encoder, model.llm):
                if part is not None:
                    part.merge_adapter(keep=False)
        if options.dtype is not None:
            model = model.to(getattr(torch, options.dtype))
        device = device or ("cuda" if torch.cuda.is_available() else None)
    return Engine(model, max_tokens=options.max_tokens, device=device)
