"""The batches of a run: epoch after epoch, from any batch on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypedDict

from ..data.batch import Batch
from ..data.collate import PackedDataset
from ..data.loader import PackedLoader


class Place(TypedDict):
    """Plain data: the packs of every epoch that is over, and where the stream is read on (see `read_before`)."""

    epoch_packs: list[int]
    stream: dict[str, Any]


class EpochLoader:
    """Batches of one process, epoch after epoch without end, from batch `start` on.

    Nothing here draws from torch's global generator, so that dropout after a resume is that of the uninterrupted run.

    Args:
        place: what `place_of` gave for a batch up to `start`, on any number of processes; without it the batches before
            `start` are made and dropped.
        pin_memory: page-lock the batches, for copies to a GPU that the host does not wait for.
    """

    def __init__(
        self,
        dataset: PackedDataset,
        workers: int,
        start: int,
        place: Place | None = None,
        pin_memory: bool = False,
    ) -> None:
        self.dataset, self.workers, self.start, self.pin_memory = dataset, workers, start, pin_memory
        self.after = place["stream"] if place else None
        self.epoch_packs: list[int] = list(place["epoch_packs"]) if place else []

    def _batches_of_epochs(self) -> int:
        return sum(self.dataset.size(packs) for packs in self.epoch_packs)

    def place_of(self, batch: int) -> Place:
        """The place from which the stream is read on to come to `batch`."""
        stream = self.dataset.read_before(batch - self._batches_of_epochs())
        return {"epoch_packs": self.epoch_packs, "stream": stream}

    def __iter__(self) -> Iterator[Batch]:
        skip, epoch = max(self.start - self._batches_of_epochs(), 0), len(self.epoch_packs)
        while True:
            self.dataset.set_epoch(epoch, skip, self.after)
            yield from PackedLoader(self.dataset, num_workers=self.workers, pin_memory=self.pin_memory)
            size = self.dataset.size(self.dataset.counters.packs)
            if size == 0:
                raise ValueError("the training data holds no usable row")
            self.epoch_packs.append(self.dataset.counters.packs)
            skip, epoch, self.after = max(skip - size, 0), epoch + 1, None
