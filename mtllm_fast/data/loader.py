"""Worker processes that read a PackedDataset; those that die are replaced."""

import logging
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mtllm_fast.data.batch import Batch
from mtllm_fast.data.collate import PackedDataset, Window
from mtllm_fast.data.workers import WorkerDied, from_workers, start_worker

T = TypeVar("T")

logger = logging.getLogger(__name__)
_DEATHS = 3  # of workers in a row without a window between them


class _WindowStream(IterableDataset):
    """The windows of one DataLoader worker, from number `first` on."""

    def __init__(self, dataset: PackedDataset, first: int) -> None:
        super().__init__()
        self.dataset, self.first = dataset, first

    def __iter__(self) -> Iterator[Window]:
        info = get_worker_info()
        assert info is not None, "windows are only asked for in workers"
        return self.dataset.windows(info.id, info.num_workers, self.first)


def _as_is(window: T) -> T:
    return window


class PackedLoader:
    """A PackedDataset read by worker processes; the batches and their order are the same for any number of them.

    Args:
        dataset: the PackedDataset; every pass reads its current epoch and start_batch.
        num_workers: 0 reads in this process. A worker that dies is replaced; one that keeps dying is a WorkerDied.
        prefetch: windows that each worker holds ready.
        pin_memory: page-lock the batches for asynchronous copies to a GPU.
    """

    def __init__(
        self, dataset: PackedDataset, num_workers: int = 0, prefetch: int = 2, pin_memory: bool = False
    ) -> None:
        if num_workers < 0 or prefetch < 1:
            raise ValueError(f"num_workers must be >= 0 and prefetch >= 1, got {num_workers} and {prefetch}")
        self.dataset = dataset
        self.num_workers = num_workers
        self.prefetch = prefetch
        self.pin_memory = pin_memory
        self.counted_rows: int | None = None  # documents of the epoch that `count` went through

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.dataset.batches(self._windows()):
            yield batch.pin_memory() if self.pin_memory else batch

    def count(self) -> int:
        """Batches of a whole epoch on each rank. Reads, tokenises and packs it, but makes no batch."""
        packs, rows = self.dataset.before.packs, self.dataset.before.rows
        for window in self._windows():
            if window.error is not None:
                raise window.error
            if window.rows is not None:
                packs, rows = packs + len(window.packs), rows + len(window.rows)
        self.counted_rows = rows
        return self.dataset.size(packs)

    def _windows(self) -> Iterable[Window]:
        self.dataset.window_rows()  # here once, not in every worker
        if self.num_workers == 0:
            return self.dataset.windows()
        return self._windows_of_workers()

    def _windows_of_workers(self) -> Iterator[Window]:
        """As `PackedDataset.windows`; dead workers are replaced, and the new ones go on where those stopped."""
        first, deaths = self.dataset.before.windows, 0
        while True:
            try:
                for window in from_workers(self._loader(first)):
                    if window.rows is not None:
                        first, deaths = window.index + 1, 0
                    yield window
                return
            except WorkerDied as error:
                deaths += 1
                if deaths > _DEATHS:
                    raise
                logger.warning("%s; new workers go on at window %d, no row is lost or repeated", error, first)

    def _loader(self, first: int) -> DataLoader:
        return DataLoader(
            _WindowStream(self.dataset, first),
            batch_size=None,
            num_workers=self.num_workers,
            prefetch_factor=self.prefetch,
            collate_fn=_as_is,
            worker_init_fn=start_worker,
            # without its own generator it would draw from the global one and change every later dropout mask
            generator=torch.Generator(),
        )
