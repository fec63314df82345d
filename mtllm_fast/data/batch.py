"""A batch: rows as the two models read them, packed and aligned."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import add
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtllm_fast.data.align import align_rows
from mtllm_fast.data.layout import TokenizedSide
from mtllm_fast.data.pack import PackedBatch
from mtllm_fast.data.prompt import PromptTokens, Writing, target_rows
from mtllm_fast.data.read import TextRow
from mtllm_fast.data.text_tokens import of_readable
from mtllm_fast.data.tokenise import StackTokenizer

if TYPE_CHECKING:
    from mtllm_fast.kernels import TeacherMoments

SIDES = ("mt", "llm")


@dataclass(frozen=True, eq=False)
class Batch:
    """B rows as the two models read them.

    Fields:
        mt, llm: the packed sides, or None where a side was not asked for; `mt` may hold partners (see PackedBatch).
        mt_rows, llm_rows: (P,) int64, packed rows of `mt` and `llm` that end at the same character, or None; mt_rows
            ascend. With targets, the rows whose states predict them; those of a stack are known once it has read.
        labels: (B,) int64, or None where the rows have none.
        mt_spans, llm_spans: (B, C, 2) int64, packed rows [start, end) of each choice, or None.
        ids: the rows' names.
        weight: 0.0 for a filler that only keeps the ranks in step, else 1.0; multiply losses and counts with it.
        place: its number among the batches of a step over all ranks.
        targets: a sequence of LLM tokens per row that the student is to write, or None.
        before, after: LLM tokens around the texts of `mt` where there are targets, which `after` ends with, some of
            them masked if so asked; `before` may be one sequence for all.
        row_weight: (B,) float, weights of the rows in terms that weigh them, or None.
        soft_labels: (B, C) float32, the log-probability of each class, up to a constant, or None where rows have none.
        moments: what the forward KL needs of the teacher's tokens, which `llm_rows` then counts, or None.
    """

    mt: PackedBatch | None
    llm: PackedBatch | None
    mt_rows: Tensor | None = None
    llm_rows: Tensor | None = None
    labels: Tensor | None = None
    mt_spans: Tensor | None = None
    llm_spans: Tensor | None = None
    ids: tuple[str | None, ...] = ()
    weight: float = 1.0
    place: int = 0
    targets: PackedBatch | None = None
    before: PackedBatch | None = None
    after: PackedBatch | None = None
    row_weight: Tensor | None = None
    soft_labels: Tensor | None = None
    moments: "TeacherMoments | None" = None

    @property
    def num_rows(self) -> int:
        side = self.mt if self.mt is not None else self.llm
        return side.num_rows if side is not None else 0

    @property
    def num_pairs(self) -> int:
        if self.targets is not None:
            return self.targets.num_tokens
        return self.mt_rows.shape[0] if self.mt_rows is not None else 0

    @property
    def stack_lengths(self) -> tuple[int, ...]:
        """Rows that the LLM of a stack reads of every text: `mt`, and the tokens around it (not a boundary)."""
        lengths = self.side("mt").lengths
        for around in (self.before, self.after):
            if around is not None:
                more = around.lengths * (len(lengths) // around.num_sequences)
                lengths = tuple(map(add, lengths, more))
        return lengths

    def side(self, name: str) -> PackedBatch:
        """The packed side "mt" or "llm". Raises ValueError where the batch was made without it."""
        packed = self.mt if name == "mt" else self.llm
        if packed is None:
            raise ValueError(f"batch has no {name!r} side; collate it with sides=({name!r},)")
        return packed

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> "Batch":
        return self._moved(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        return self._moved(lambda x: x.pin_memory())

    def _moved(self, move: Callable[[Any], Any]) -> "Batch":
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Batch(**{k: move(v) if isinstance(v, Tensor | PackedBatch) else v for k, v in fields.items()})


@dataclass(frozen=True, eq=False)
class TokenizedRows:
    """Tokenised rows, from which batches are cut."""

    sides: dict[str, TokenizedSide]
    labels: list[int | None]
    ids: list[str | None]
    prompts: PromptTokens | None = None
    texts_differ: bool = False  # of the two sides, in some row: nothing can be aligned
    soft_labels: list[tuple[float, ...]] | None = None

    def batch(self, index: Sequence[int], align: bool) -> Batch:
        packed: dict[str, PackedBatch] = {}
        spans: dict[str, Tensor | None] = {}
        for name, side in self.sides.items():
            beside = side.partners
            rows = (
                [side.ids[i] for i in index] if beside is None else [x for i in index for x in (side.ids[i], beside[i])]
            )
            packed[name] = PackedBatch.from_sequences(rows, partners=beside is not None)
            spans[name] = _packed_spans(side, index, packed[name])
        pairs: tuple[Tensor | None, Tensor | None] = (None, None)
        if align and len(self.sides) == 2:
            if self.texts_differ:
                raise ValueError(
                    "align=True: rows with a teacher_text have another text on the llm side, and its tokens end at "
                    "characters of another; align=False, without paired_mse and kl"
                )
            keys = [self._alignment_keys(name, index) for name in SIDES]
            mt_rows, llm_rows = align_rows(*keys[0], *keys[1])
            pairs = (torch.from_numpy(mt_rows), torch.from_numpy(llm_rows))
        batch = Batch(
            mt=packed.get("mt"),
            llm=packed.get("llm"),
            mt_rows=pairs[0],
            llm_rows=pairs[1],
            labels=_labels([self.labels[i] for i in index]),
            mt_spans=spans.get("mt"),
            llm_spans=spans.get("llm"),
            ids=tuple(self.ids[i] for i in index),
            soft_labels=None if self.soft_labels is None else torch.tensor([self.soft_labels[i] for i in index]),
        )
        return batch if self.prompts is None else _with_prompts(batch, self.prompts, index)

    def _alignment_keys(self, name: str, index: Sequence[int]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        ends = [self.sides[name].ends[i] for i in index]
        return np.concatenate(ends), np.repeat(np.arange(len(ends)), [len(e) for e in ends])

    def __len__(self) -> int:
        return len(self.ids)

    def totals(self) -> dict[str, tuple[int, int]]:
        """(tokens, rows cut) by side."""
        found = {name: (sum(side.lengths), side.truncated) for name, side in self.sides.items()}
        if self.prompts is not None:
            found["target"] = (sum(map(len, self.prompts.targets)), self.prompts.truncated)
            around = sum(map(len, [*self.prompts.before, *self.prompts.after]))
            found["prompt"] = (around, self.prompts.cut)
        return found

    def costs(self) -> list[tuple[int, ...]]:
        lengths = {name: side.lengths for name, side in self.sides.items()}
        if self.prompts is not None and "mt" in lengths:  # what the LLM of a stack reads
            lengths["written"] = (np.array(lengths["mt"]) + self.prompts.lengths() + 1).tolist()
        return list(zip(*lengths.values(), strict=True))


def tokenise_rows(
    rows: Sequence[TextRow], tokenizer: StackTokenizer, sides: Sequence[str], writing: Writing | None = None
) -> TokenizedRows:
    """Both sides read the text of a row, but beside "mt", which the student reads, "llm" is what a teacher reads: the
    row's `teacher_text` where it has one."""
    differ = len(sides) == 2 and any(row.teacher_text is not None for row in rows)
    read = {"mt": rows, "llm": [row.for_teacher() for row in rows] if differ else rows}
    tokenized = {side: tokenizer.side(side, read[side], ends=writing is None) for side in sides}
    prompts = None
    if writing is not None:
        prompts = PromptTokens.of(writing, rows, tokenizer)
        if "llm" in tokenized:  # all that the LLM reads, in its own tokens
            around = PromptTokens.of(writing, read["llm"], tokenizer) if differ else prompts
            first, own = len(tokenizer.llm_prefix), tokenized["llm"]
            whole = [around.whole(index, ids[first:]) for index, ids in enumerate(own.ids)]
            tokenized["llm"] = dataclasses.replace(own, ids=whole)
        tokenized = {name: dataclasses.replace(side, spans=None) for name, side in tokenized.items()}
    labels, names = [row.label for row in rows], [row.id for row in rows]
    return TokenizedRows(tokenized, labels, names, prompts, differ, _soft_labels(rows))


def _with_prompts(batch: Batch, prompts: PromptTokens, index: Sequence[int]) -> Batch:
    targets = PackedBatch.from_sequences([prompts.targets[i] for i in index])
    rows = None if batch.llm is None else torch.from_numpy(target_rows(batch.llm.lengths, targets.lengths))
    before, after = [prompts.before[i] for i in index], [prompts.after[i] + prompts.seen[i] for i in index]
    if all(ids == before[0] for ids in before):
        before = before[:1]
    return dataclasses.replace(
        batch,
        llm_rows=rows,
        targets=targets,
        before=PackedBatch.from_sequences(before),
        after=PackedBatch.from_sequences(after),
    )


def tokenise_readable(
    rows: Sequence[TextRow], tokenizer: StackTokenizer, sides: Sequence[str], writing: Writing | None = None
) -> tuple[TokenizedRows, list[tuple[str, str]]]:
    """As `tokenise_rows`, without the rows that a tokenizer cannot read, and for each of those (its name, the reason).

    A row without an id goes by the beginning of its text.
    """
    before = tokenizer.fallback_counts.copy()

    def read(some: Sequence[TextRow]) -> TokenizedRows:
        tokenizer.fallback_counts.clear()  # some rows are read again
        tokenizer.fallback_counts.update(before)
        return tokenise_rows(some, tokenizer, sides, writing)

    tokenised, bad = of_readable(rows, read)
    names = {place: repr(row.text[:40]) if row.id is None else row.id for place, row in enumerate(rows) if place in bad}
    return tokenised, [(names[place], str(error)) for place, error in bad.items()]


def check_sides(sides: Sequence[str], tokenizer: StackTokenizer) -> tuple[str, ...]:
    if isinstance(sides, str) or not sides or set(sides) - set(SIDES):
        raise ValueError(f"sides must be a non-empty selection of {SIDES}, got {sides!r}")
    for side in sides:
        if getattr(tokenizer, side) is None:
            raise ValueError(f"sides holds {side!r} but the tokenizer has no {side} tokenizer")
    return tuple(side for side in SIDES if side in sides)


def _soft_labels(rows: Sequence[TextRow]) -> list[tuple[float, ...]] | None:
    given = [row.soft_label for row in rows if row.soft_label is not None]
    if not given:
        return None
    if len(given) != len(rows) or len(set(map(len, given))) > 1:
        counts = sorted({0 if row.soft_label is None else len(row.soft_label) for row in rows})
        raise ValueError(f"soft_label: every row needs one, of as many classes as the others; they have {counts}")
    return given


def _labels(labels: list[int | None]) -> Tensor | None:
    given = [label for label in labels if label is not None]
    if not given:
        return None
    if len(given) != len(labels):
        raise ValueError(f"label: {len(given)} of {len(labels)} rows have a label, give all of them one or none")
    return torch.tensor(given, dtype=torch.int64)


def _packed_spans(side: TokenizedSide, index: Sequence[int], packed: PackedBatch) -> Tensor | None:
    if side.spans is None:
        return None
    counts = {len(side.spans[i]) for i in index}
    if len(counts) != 1:
        raise ValueError(f"choices: every row of a batch needs the same number of choices, got {sorted(counts)}")
    starts = packed.cu_seqlens.numpy()[:-1].astype(np.int64)
    starts = starts[:: packed.per_row]
    return torch.from_numpy(np.stack([side.spans[i] for i in index]).astype(np.int64) + starts[:, None, None])
