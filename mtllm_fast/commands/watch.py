"""The options with which a training run also looks at other languages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..models import MTLLM
    from ..training.live import Watch


@dataclass
class WatchSettings:
    """Scores in other languages while training, for log.jsonl and the progress bar. They choose nothing: checkpoints
    are chosen on English alone."""

    languages: tuple[str, ...] = ()
    """The task's own codes, e.g. swh_Latn. Without them only English is looked at."""
    task: str = ""
    """A task as for `mtllm evaluate`; by default the one that is trained."""
    data: str = ""
    """Its folder or hub name; by default the one that is trained on."""
    quoted: bool = True
    """Quote marks in .csv and .tsv files of the task "folder" stand around fields; without, they are text. Where the
    trained task is watched, its own option holds."""
    split: str = "dev"
    """The split that is scored."""
    limit: int | None = 200
    """Rows of each language: a random sample with a fixed seed, by id, the same in every language; null for all."""
    steps: int = 500
    """Optimizer steps between two looks."""

    def watch(self, task: str = "", data: str = "", quoted: bool = True) -> Watch | None:
        """What the training stage takes; None where no languages are named.

        Args:
            task, data, quoted: of the run, where its options name none.

        Raises:
            ValueError: options without languages, no task, or a task, language or split that is not there.
        """
        if not self.languages:
            if self.task or self.data or not self.quoted:
                raise ValueError("--watch.languages is missing: name the languages to look at")
            return None
        from ..evaluation import evaluate, get_task
        from ..training.live import Watch

        name = self.task or task
        if not name:
            raise ValueError("--watch.task is missing: name the task to look at")
        named = self.data or (data if name == task else "")
        own = name == task and named == data
        chosen = get_task(name, named or None, quoted=self.quoted and (quoted or not own))
        source = named or chosen.default_source
        if source is None:
            raise ValueError(f"--watch.data is missing: the folder or hub name of task {name!r}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"--watch.limit {self.limit}: expected a positive number of rows, or null for all")
        if self.steps < 1:
            raise ValueError(f"--watch.steps {self.steps}: must be at least 1")
        available = chosen.languages(source)
        for language in self.languages:
            if language not in available:
                raise ValueError(f"--watch.languages: {language!r} is none of the {len(available)} of {source}")
            if self.split not in (splits := chosen.splits(source, language)):
                raise ValueError(f"--watch.split {self.split!r}: {source} has only {', '.join(splits)} for {language}")

        def score(student: MTLLM) -> dict[str, float]:
            found = evaluate(
                {"student": student},
                chosen,
                source,
                languages=list(self.languages),
                split=self.split,
                limit=self.limit,
                probe_rows=2000,
                resamples=1,
                progress=False,
            )
            languages = found.models[0].languages
            scores = {f"{code}_accuracy": one.accuracy for code, one in languages.items()}
            # of a sample the log says how large it was
            return scores | {f"{code}_rows": one.rows for code, one in languages.items() if one.available}

        return Watch(self.steps, score)
