"""Embedding files (.npy, .safetensors, .parquet), joined from encoded windows without holding their rows in memory."""

from __future__ import annotations

import io
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..jobs.parts import Parts
from .engine import EncodedWindow

MOST_ROWS = 10**18  # a header that is written before the rows are counted has room for so many


def join_blocks(parts: Parts, header: bytes = b"") -> None:
    """The output from a header, for which room was reserved, and the bytes of all windows in order, in its place."""
    records = parts.records()
    path = parts.only_file(records)
    if path is not None:
        with path.open("r+b") as handle:
            handle.write(header)
    else:
        path = parts.folder / "output"
        with path.open("wb") as handle:
            handle.write(header)
            handle.writelines(parts.blocks(records))
    parts.replace_output(path)


@dataclass(frozen=True)
class EmbeddingFile(ABC):
    """How the windows of (N, `width`) float32 embeddings become one file.

    Args:
        width: D.
        metadata: strings about the embeddings, stored where the format has a place for them.
    """

    width: int
    metadata: dict[str, str] = field(default_factory=dict)

    reserve = 0

    def payload(self, window: EncodedWindow, first_row: int) -> list[bytes]:
        """What is stored of a window until the join."""
        return [window.values.astype("<f4", copy=False).tobytes()]

    def holds_any(self, parts: Parts) -> bool:
        """Whether an embedding is stored: windows of unusable rows alone, which are NaN, are nothing to go on from."""
        records = parts.records()
        sizes = records["rows"].astype(np.int64) * self.width
        blocks = parts.blocks(records)
        return any(np.isfinite(np.frombuffer(block, "<f4", size)).any() for size, block in zip(sizes, blocks))

    @abstractmethod
    def join(self, parts: Parts) -> None:
        """Write the output from all windows, in order, and put it in its place."""


class RawFile(EmbeddingFile):
    """A header and then the embeddings' bytes. The data file of a single process becomes the output where it lies."""

    @property
    def reserve(self) -> int:  # type: ignore[override]
        return len(self.header(MOST_ROWS))

    @abstractmethod
    def header(self, rows: int) -> bytes:
        """The bytes before the embeddings; as many for any number of rows."""

    def join(self, parts: Parts) -> None:
        join_blocks(parts, self.header(int(parts.records()["rows"].sum())))


def npy_header(kind: str, *shape: int) -> bytes:
    """The 128 bytes before the numbers of an .npy file."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": kind, "fortran_order": False, "shape": shape})
    assert buffer.tell() == 128
    return buffer.getvalue()


class NpyFile(RawFile):
    """NumPy's format: (N, D) float32; `np.load(path, mmap_mode="r")` reads it without loading it."""

    def header(self, rows: int) -> bytes:
        return npy_header("<f4", rows, self.width)


class SafetensorsFile(RawFile):
    """One tensor "embeddings" (N, D) float32, and the metadata."""

    def header(self, rows: int) -> bytes:
        size = len(self._json(MOST_ROWS)) + 8
        size += -size % 64
        return (size - 8).to_bytes(8, "little") + self._json(rows).ljust(size - 8)

    def _json(self, rows: int) -> bytes:
        tensor = {"dtype": "F32", "shape": [rows, self.width], "data_offsets": [0, rows * self.width * 4]}
        return json.dumps({"__metadata__": self.metadata, "embeddings": tensor}).encode()


class ParquetFile(EmbeddingFile):
    """Columns id (the row's position where it has no name), language and embedding; one row group per window."""

    def payload(self, window: EncodedWindow, first_row: int) -> list[bytes]:
        names = [str(first_row + k) if name is None else name for k, name in enumerate(window.ids)]
        return [*super().payload(window, first_row), json.dumps([names, window.languages]).encode()]

    def join(self, parts: Parts) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        embedding = pa.list_(pa.float32(), self.width)
        schema = pa.schema(
            [("id", pa.string()), ("language", pa.string()), ("embedding", embedding)], metadata=dict(self.metadata)
        )
        path = parts.folder / "output"
        with parquet.ParquetWriter(path, schema, use_dictionary=["language"]) as writer:
            for values, names, languages in self._windows(parts):
                column = pa.FixedSizeListArray.from_arrays(pa.array(values), self.width)
                writer.write_table(pa.Table.from_arrays([pa.array(names), pa.array(languages), column], schema=schema))
        parts.replace_output(path)

    def _windows(self, parts: Parts) -> Iterator[tuple[NDArray[np.float32], list[str], list[str | None]]]:
        records = parts.records()
        for record, block in zip(records, parts.blocks(records)):
            size = int(record["rows"]) * self.width * 4
            yield np.frombuffer(block, "<f4", int(record["rows"]) * self.width), *json.loads(block[size:])


FORMATS: dict[str, type[EmbeddingFile]] = {
    ".npy": NpyFile,
    ".parquet": ParquetFile,
    ".safetensors": SafetensorsFile,
}


def embedding_file(path: Path, width: int, metadata: dict[str, str]) -> EmbeddingFile:
    """The writer for `path`. Raises ValueError for an ending that none has."""
    if path.suffix not in FORMATS:
        raise ValueError(f"--output {path}: expected a name ending in {' or '.join(FORMATS)}")
    return FORMATS[path.suffix](width, metadata)
