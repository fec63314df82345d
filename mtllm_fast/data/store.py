"""Tokenised rows on disk: made once, memory-mapped by every process of every run.

    store.json               what the rows were made from and with, the shards in order, size and SHA-256 of every file
                             in them, and `check`, the SHA-256 of all this; written last
    shard-00000/             one folder per `shard_rows` rows, complete as soon as it has this name
        mt.ids.npy           (tokens,) int32          mt.starts.npy      (rows + 1,) int64
        mt.ends.npy          (tokens,) int32, as in TokenizedSide
        mt.truncated.npy     (1,) int64, rows cut     the same for llm.
        unreadable.npy       (1,) int64, rows left out because a tokenizer cannot read them
        labels.npy           (rows,) int64            only where rows have labels
        names.npy, name_starts.npy                    row ids as UTF-8, only where rows have ids
        complete.json        size and SHA-256 of these files as they were written

A run that is killed leaves complete shards and at most one temporary folder; the same call goes on after the shards.
While one writes, `.lock` names its process, and another call into the same folder is refused.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..jobs.durable import MARKER, FolderLock, difference, mark_complete, replace_folder, scratch, write_text
from ..jobs.fingerprint import sha256_of, sha256_of_json
from ..jobs.ledger import differing
from .batch import Batch, TokenizedRows, check_sides, tokenise_readable
from .layout import TokenizedSide
from .read import TextRow
from .tokenise import StackTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

STORE_FILE = "store.json"
BEGUN_FILE = "begun.json"
_WINDOW = 2048
_FORMAT = 2
_READING = 2  # how text is given to a tokenizer and ends are found; 2: composed, see `characters`
_SHOWN = 10  # unreadable rows that are named in the log
AT_ONCE = 4 * 2**30  # bytes of a store that is compared with its digests before training: seconds
# what stores say that were written before there were digests
_FIRST_KEYS = {"format", "sides", "shard_rows", "tokenizer", "source", "shards", "skipped"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoreReport:
    """What came of `write_store`.

    Fields:
        rows: of the store. resumed: rows of the source that a killed call had read.
        tokens, truncated: tokens and rows cut, by side.
        skipped: rows of the source that are not in the store, by reason: "empty", "failed" (the reader could not read
            the record), "unreadable" (a tokenizer could not read the text).
    """

    rows: int
    resumed: int
    tokens: dict[str, int]
    truncated: dict[str, int]
    skipped: dict[str, int]


def tokenizer_state(tokenizer: PreTrainedTokenizerFast) -> dict[str, object]:
    """What a fast Hugging Face tokenizer does, as plain data: without padding and truncation, which the last call left
    there and a StackTokenizer does not use."""
    state: dict[str, object] = json.loads(tokenizer.backend_tokenizer.to_str())
    return {name: value for name, value in state.items() if name not in ("padding", "truncation")}


def tokenizer_key(tokenizer: StackTokenizer, sides: Sequence[str]) -> dict[str, object]:
    """Plain data that tells whether another StackTokenizer makes the same tokens on `sides`."""
    key: dict[str, object] = {
        "reading": _READING,
        "pair_separator": tokenizer.pair_separator,
        "fallbacks": dict(tokenizer.fallbacks),
    }
    for side in sides:
        inner = getattr(tokenizer, side)
        digest = hashlib.sha256(json.dumps(tokenizer_state(inner), sort_keys=True).encode())
        digest.update(str((inner.bos_token_id, inner.eos_token_id)).encode())
        key[side] = {"tokenizer": digest.hexdigest()[:16], "limit": getattr(tokenizer, f"max_{side}_tokens")}
    return key


def write_store(
    rows: Iterable[TextRow],
    tokenizer: StackTokenizer,
    folder: str | Path,
    *,
    sides: Sequence[str] = ("mt", "llm"),
    shard_rows: int = 65536,
    source: object = None,
    on_progress: Callable[[int], object] | None = None,
) -> StoreReport:
    """Tokenise `rows` into `folder`, going on after the complete shards of a call that was killed.

    Args:
        rows: re-iterable; rows with choices are refused, rows that a tokenizer cannot read are left out and counted.
        source: plain data that names the rows, such as `RowStream.identity()`; compared before going on.
        on_progress: called with the number of rows done after every window.

    Raises:
        ValueError: the folder holds a store of other rows or tokenizers, or is complete already; no usable row;
            choices; another process is writing into the folder.
    """
    folder, sides = Path(folder), check_sides(sides, tokenizer)
    if shard_rows < 1:
        raise ValueError(f"shard_rows={shard_rows}: must be at least 1")
    settings = {
        "format": _FORMAT,
        "sides": list(sides),
        "shard_rows": shard_rows,
        "tokenizer": tokenizer_key(tokenizer, sides),
        "source": json.loads(json.dumps(source)),
    }
    _check_started(folder, settings)  # before a lock is written into what is no store
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(folder)
    if not lock.take():
        raise ValueError(
            f"{folder}: another process ({lock.holder()}) is writing tokens into it; wait for it, or name a new folder"
        )
    try:
        _check_started(folder, settings)  # what a process that has let go of it meanwhile left
        if not (folder / BEGUN_FILE).exists():
            write_text(folder / BEGUN_FILE, json.dumps(settings, indent=1))
        for unfinished in folder.glob(".shard-*"):
            shutil.rmtree(unfinished)
        return _write_shards(rows, tokenizer, folder, settings, on_progress)
    except ValueError:
        if not any(folder.glob("shard-*")):  # nothing to go on from
            shutil.rmtree(folder) if new else (folder / BEGUN_FILE).unlink(missing_ok=True)
        raise
    finally:
        lock.release()


def _write_shards(
    rows: Iterable[TextRow],
    tokenizer: StackTokenizer,
    folder: Path,
    settings: dict[str, Any],
    on_progress: Callable[[int], object] | None,
) -> StoreReport:
    """The shards that are not there yet, and the file that makes a store of them."""
    sides, shard_rows = settings["sides"], settings["shard_rows"]
    shards = sorted(path.name for path in folder.glob("shard-*") if path.is_dir())
    done = len(shards) * shard_rows
    stream = islice(iter(rows), done, None)
    position = done
    while chunk := list(islice(stream, shard_rows)):
        name = f"shard-{len(shards):05d}"
        _write_shard(folder, name, chunk, tokenizer, sides, position, on_progress)
        shards.append(name)
        position += len(chunk)
    opened = _open_shards(folder, shards)
    if not any(len(shard[f"{sides[0]}.starts"]) > 1 for shard in opened):
        for name in shards:
            shutil.rmtree(folder / name)
        raise ValueError("rows: the source holds no usable row")
    counts = getattr(rows, "counts", None)
    skipped = {"empty": counts.empty, "failed": counts.failed} if counts is not None else {}
    skipped["unreadable"] = int(sum(shard["unreadable"][0] for shard in opened))
    files = {name: _digests(folder / name) for name in shards}
    record = {**settings, "shards": shards, "skipped": skipped, "files": files}
    write_text(folder / STORE_FILE, json.dumps({**record, "check": sha256_of_json(record)}, indent=1))
    store = TokenStore(folder)
    tokens = {side: int(sum(shard[f"{side}.starts"][-1] for shard in store.shards)) for side in sides}
    return StoreReport(len(store), min(done, position), tokens, store.truncated, skipped)


def _digests(shard: Path) -> dict[str, Any]:
    """Size and digest of every file of a shard, from when it was written."""
    if not (shard / MARKER).exists():  # by a call before there were digests
        mark_complete(shard)
    try:
        found: dict[str, Any] = json.loads((shard / MARKER).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{shard / MARKER} is damaged ({error}): delete {shard.parent} and tokenise again") from None
    return found


def _open_shards(folder: Path, names: Sequence[str]) -> list[dict[str, NDArray[np.integer]]]:
    files = [sorted((folder / name).glob("*.npy")) for name in names]
    return [{file.stem: _memory_map(file) for file in inside} for inside in files]


def _memory_map(file: Path) -> NDArray[np.integer]:
    try:
        return np.load(file, mmap_mode="r")  # type: ignore[no-any-return]
    except (OSError, ValueError) as error:
        raise ValueError(f"{file.parent.name}/{file.name}: {error}") from None


def _check_started(folder: Path, settings: dict[str, object]) -> None:
    """What a killed call began must be what this one goes on with."""
    if (folder / STORE_FILE).exists():
        raise ValueError(f"{folder} holds a complete token store: delete it or name another folder")
    begun = folder / BEGUN_FILE
    if begun.exists():
        before = json.loads(begun.read_text(encoding="utf-8"))
        if other := differing(before, settings):
            raise ValueError(f"{folder} was begun with another {other[0]}: delete it or name another folder")
    elif folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise ValueError(f"{folder} holds files, but no token store that was begun: name another folder")


def _write_shard(
    folder: Path,
    name: str,
    rows: list[TextRow],
    tokenizer: StackTokenizer,
    sides: Sequence[str],
    position: int,
    on_progress: Callable[[int], object] | None,
) -> None:
    parts: dict[str, list[NDArray[np.integer]]] = {}
    labels: list[int | None] = []
    ids: list[str | None] = []
    unreadable = 0
    for start in range(0, len(rows), _WINDOW):
        window = rows[start : start + _WINDOW]
        if any(row.choices is not None for row in window):
            raise ValueError("choices: a token store holds texts and pairs, multiple choice is tokenised as it is read")
        if any(row.teacher_text is not None for row in window):
            raise ValueError("teacher_text: a token store holds two tokenizations of one text; read such rows as text")
        readable, bad = tokenise_readable(window, tokenizer, sides)
        for row, reason in bad[: max(_SHOWN - unreadable, 0)]:
            logger.warning("row %s is left out: %s", row, reason)
        unreadable += len(bad)
        labels += readable.labels
        ids += readable.ids
        for side, tokenised in readable.sides.items():
            parts.setdefault(f"{side}.ids", []).extend(row.astype(np.int32) for row in tokenised.ids)
            parts.setdefault(f"{side}.ends", []).extend(tokenised.ends)
            parts.setdefault(f"{side}.truncated", []).append(np.array([tokenised.truncated]))
        if on_progress is not None:
            on_progress(position + start + len(window))
    arrays: dict[str, NDArray[np.integer]] = {"unreadable": np.array([unreadable], dtype=np.int64)}
    for side in sides:
        lengths = [len(ids) for ids in parts[f"{side}.ids"]]
        arrays[f"{side}.starts"] = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        for part in ("ids", "ends"):
            arrays[f"{side}.{part}"] = np.concatenate([np.empty(0, np.int32), *parts[f"{side}.{part}"]])
        arrays[f"{side}.truncated"] = np.array([np.sum(parts[f"{side}.truncated"])], dtype=np.int64)
    given = [label for label in labels if label is not None]
    if given:
        if len(given) < len(labels):
            raise ValueError("label: some rows of a shard have a label and some have none")
        arrays["labels"] = np.array(given, dtype=np.int64)
    if any(name is not None for name in ids):
        names = [(name or "").encode() for name in ids]
        arrays["name_starts"] = np.concatenate([[0], np.cumsum([len(n) for n in names])]).astype(np.int64)
        arrays["names"] = np.frombuffer(b"".join(names), dtype=np.uint8)
    with scratch(folder / f".{name}.{os.getpid()}") as temporary:
        for key, array in arrays.items():
            np.save(temporary / f"{key}.npy", array)
        mark_complete(temporary)
        replace_folder(temporary, folder / name)


class TokenStore:
    """A complete store, opened. Give it to a PackedDataset, or to `adapt`, in place of rows.

    Files are compared with their digests: those that say where rows start when the store is opened, the others of a
    shard when this process first reads a row of it, or all by `verify`. Stores that were written before there were
    digests are not compared.

    Args:
        folder: written by `write_store`.

    Attributes:
        sides: which of "mt" and "llm" it holds. shards: memory-mapped arrays by name, one mapping per shard.

    Raises:
        ValueError: the folder is no store, is not complete, or damaged; while reading: a file that is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / STORE_FILE
        if not path.is_file():
            begun = (self.folder / BEGUN_FILE).is_file()
            what = "is not complete: run the same `mtllm tokenize` again" if begun else "is no token store"
            raise ValueError(f"{self.folder} {what}")
        try:
            self.record = _record(path)
            self.sides = tuple(self.record["sides"])
            self._uncompared = set(range(len(self.record["shards"]))) if "files" in self.record else set()
            for shard in sorted(self._uncompared):
                if (found := self._difference(shard, (".starts.npy", ".truncated.npy"))) is not None:
                    raise ValueError(found)
            self.shards = _open_shards(self.folder, self.record["shards"])
            sizes = [len(shard[f"{self.sides[0]}.starts"]) - 1 for shard in self.shards]
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{self.folder} is damaged ({error}): tokenise the text again") from None
        self.first = np.concatenate([[0], np.cumsum(sizes)])
        self._lengths = {
            side: np.concatenate([np.diff(shard[f"{side}.starts"]) for shard in self.shards]) for side in self.sides
        }

    def __len__(self) -> int:
        return int(self.first[-1])

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))

    @property
    def truncated(self) -> dict[str, int]:
        """Rows that were cut, by side."""
        return {side: int(sum(shard[f"{side}.truncated"][0] for shard in self.shards)) for side in self.sides}

    def __reduce__(self) -> tuple[type[TokenStore], tuple[Path]]:
        return TokenStore, (self.folder,)

    def check(self, tokenizer: StackTokenizer, sides: Sequence[str]) -> None:
        """Raise ValueError unless `tokenizer` would make these tokens on `sides`."""
        for side in sides:
            if side not in self.sides:
                raise ValueError(f"{self.folder} holds the sides {', '.join(self.sides)}, but {side!r} is needed")
        mine, asked = self.record["tokenizer"], json.loads(json.dumps(tokenizer_key(tokenizer, sides)))
        for name, value in asked.items():
            if mine.get(name) != value:
                raise ValueError(
                    f"{self.folder} was tokenised with another {name} ({mine.get(name)}, now {value}): do it again"
                )

    def verify(self, most_bytes: int | None = None) -> None:
        """Compare all files with their digests, about a second per GB.

        Args:
            most_bytes: of a store that is larger nothing is compared now, but every shard when it is first read.

        Raises:
            ValueError: names the first file that is not as it was written.
        """
        files = self.record.get("files", {})
        size = sum(file["bytes"] for shard in files.values() for file in shard.values())
        if most_bytes is None or size <= most_bytes:
            self._compare(self._uncompared)

    def _compare(self, shards: Iterable[int]) -> None:
        for shard in sorted(self._uncompared.intersection(shards)):
            if (what := self._difference(shard)) is not None:
                raise ValueError(f"{self.folder} is damaged ({what}): tokenise the text again")
            self._uncompared.discard(shard)

    def _difference(self, shard: int, endings: tuple[str, ...] = ("",)) -> str | None:
        """What is not as it was written in those files of a shard whose names end so."""
        name = self.record["shards"][shard]
        record = {file: is_to_be for file, is_to_be in self.record["files"][name].items() if file.endswith(endings)}
        what = difference(self.folder / name, record)
        return None if what is None else f"{name}: {what}"

    def identity(self) -> dict[str, object]:
        """Plain data that names these rows."""
        return {"store": str(self.folder), "key": sha256_of(self.folder / STORE_FILE)[:16]}

    def lengths(self, index: NDArray[np.int64], sides: Sequence[str]) -> dict[str, NDArray[np.int64]]:
        """Tokens of the rows of these numbers, by side."""
        return {side: self._lengths[side][index] for side in sides}

    def take(self, index: NDArray[np.int64], sides: Sequence[str]) -> TokenizedRows:
        """Read the rows."""
        shard_of = np.searchsorted(self.first, index, side="right") - 1
        self._compare(shard_of.tolist())
        places = [(self.shards[s], int(i - self.first[s])) for s, i in zip(shard_of.tolist(), index.tolist())]
        rows = {}
        for side in sides:
            ids, ends = [], []
            for shard, row in places:
                start, stop = (int(x) for x in shard[f"{side}.starts"][row : row + 2])
                ids.append(shard[f"{side}.ids"][start:stop].astype(np.int64))
                ends.append(np.array(shard[f"{side}.ends"][start:stop]))
            rows[side] = TokenizedSide(ids, ends, 0)
        labels = [int(shard["labels"][row]) if "labels" in shard else None for shard, row in places]
        names = [_name(shard, row) for shard, row in places]
        return TokenizedRows(rows, labels, names)


def _record(path: Path) -> dict[str, Any]:
    """What store.json says. Raises ValueError where it is not what was written."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    rest = {name: value for name, value in found.items() if name != "check"}
    if not set(found) <= _FIRST_KEYS and found.get("check") != sha256_of_json(rest):
        raise ValueError(f"the content of {path.name} is not what was written")
    return found


def _name(shard: dict[str, NDArray[np.integer]], row: int) -> str | None:
    if "names" not in shard:
        return None
    start, stop = shard["name_starts"][row : row + 2]
    return bytes(shard["names"][start:stop]).decode() or None


@dataclass(frozen=True, eq=False)
class StoredRows:
    """Rows of a store that are read when a batch is cut from them; what a window of a PackedDataset holds."""

    store: TokenStore
    index: NDArray[np.int64]
    sides: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.index)

    def costs(self) -> list[tuple[int, ...]]:
        lengths = self.store.lengths(self.index, self.sides)
        return list(zip(*(lengths[side].tolist() for side in self.sides), strict=True))

    def totals(self) -> dict[str, tuple[int, int]]:
        """(tokens, rows cut) by side; the store counts the cut ones as a whole."""
        return {side: (int(n.sum()), 0) for side, n in self.store.lengths(self.index, self.sides).items()}

    def batch(self, chosen: Sequence[int], align: bool) -> Batch:
        rows = self.store.take(self.index[list(chosen)], self.sides)
        return rows.batch(range(len(chosen)), align)
