"""What the losses need of the teacher for every training text, computed once, kept on disk, read through memory maps.

The teacher is stage 1's bare LLM or stage 3's task teacher; a sweep over seeds, losses or adapters shares its states.

    FOLDER/<key>/            a complete cache; the key is the digest of all that it was made from
      meta.json              what it was made from, its shape, the digest of each file
      keys.npy               (N, 16) uint8: the digest of each distinct text
      states.bin             (N, D) or (N, C, D) float32: mean states of the texts, or of their C choices
      tokens.bin             (T, W) float32, for losses that compare single tokens: see `Kept`
      lengths.bin            (N,) int32: tokens of each text in tokens.bin
    FOLDER/<key>.building/   one in the making, or left unfinished: the next run goes on with it
    FOLDER/<key>.lock        held by the process that builds, so that runs and ranks can share FOLDER

Texts are found by their content, so the order in which a run draws them, and its seed, do not matter.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data.batch import Batch, TokenizedRows, tokenise_rows
from ..data.pack import PackedBatch, token_budget_packs
from ..data.read import MappedRows, TextRow
from ..data.store import tokenizer_state
from ..jobs.durable import exclusive, replace_folder, write_json
from ..jobs.fingerprint import of_tensors, sha256_of, sha256_of_json
from ..jobs.ledger import differing
from ..kernels import TeacherMoments, teacher_moments
from ..losses import DistillationWeights
from ..models import MTLLM
from ..models.frozen import KINDS, quantize_frozen
from ..models.llm import LMHead
from ..models.modes import evaluating
from .automatic import settled, to_device
from .config import OptimSettings

log = logging.getLogger(__name__)

FORMAT = 1
WINDOW = 2048  # texts between two points from which an interrupted build goes on
_KEY_BYTES = 16
# not what the weights compute: where the LLM lay, and which version wrote its config
_VOLATILE = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "_attn_implementation_internal"}


def text_key(row: TextRow) -> bytes:
    """Digest of what the teacher reads of a row: text, second text and choices."""
    row = row.for_teacher()
    content = json.dumps([row.text, row.text_pair, row.choices], ensure_ascii=False)
    return hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=_KEY_BYTES).digest()


class KeyedRows(MappedRows):
    """The rows with their key behind their name as `id`, so that a batch knows which cached states are its own."""

    def change(self, row: TextRow) -> TextRow:
        name = row.id if row.id is not None else repr(row.text[:40])
        return dataclasses.replace(row, id=f"{name} {text_key(row).hex()}")


@dataclass(frozen=True)
class Kept:
    """What a cache holds of every token, besides the pooled states of the texts.

    Fields:
        tokens: "" nothing; "states" the states (D,), for paired_mse and any KL; "moments" the D + 2 numbers of
            `TeacherMoments`, all that the forward KL needs, with which a step has no teacher logits at all.
        temperature: of the moments.
    """

    tokens: Literal["", "states", "moments"] = ""
    temperature: float = 1.0

    @classmethod
    def for_loss(cls, loss: DistillationWeights, teacher: MTLLM) -> Kept:
        if not loss.needs_pairs:
            return cls()
        forward_kl_alone = not loss.paired_mse and loss.divergence == "forward"
        if forward_kl_alone and teacher.require_llm().lm_head.softcap is None:
            return cls("moments", loss.temperature)
        return cls("states")


class TeacherCache:
    """A complete cache. `open_or_build` and `cached_states` give one.

    Raises:
        ValueError: the folder is no cache, was made from something else than `made_from`, or a file is damaged.
    """

    def __init__(self, folder: Path, made_from: Mapping[str, object]) -> None:
        remedy = f"delete {str(folder)!r} and it will be built again"
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            shape, files, before = tuple(meta["shape"]), dict(meta["files"]), dict(meta["made_from"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"teacher_cache={str(folder)!r}: its meta.json cannot be read ({error}); {remedy}"
            ) from None
        if before != made_from:
            changed = ", ".join(differing(before, made_from))
            raise ValueError(f"teacher_cache={str(folder)!r}: stale, it was made from another {changed}; {remedy}")
        for name, digest in files.items():
            path = folder / name
            if not path.is_file() or sha256_of(path) != digest:
                raise ValueError(f"teacher_cache={str(folder)!r}: {name} is missing, cut short or damaged; {remedy}")
        self.folder = folder
        self.states = np.memmap(folder / "states.bin", np.float32, "r", shape=shape)
        self.kept, self.vocab_size = Kept(**meta.get("kept", {})), int(meta.get("vocab_size", 0))
        if self.needs_tokens:
            self._lengths = np.fromfile(folder / "lengths.bin", np.int32).astype(np.int64)
            self._starts = self._lengths.cumsum() - self._lengths
            shape = (int(self._lengths.sum()), -1)
            self.tokens = np.memmap(folder / "tokens.bin", np.float32, "r").reshape(shape)
        keys = np.load(folder / "keys.npy").view(f"S{_KEY_BYTES}")[:, 0]
        self._order = np.argsort(keys)
        self._sorted = keys[self._order]

    def places(self, ids: Sequence[str | None]) -> NDArray[np.int64]:
        """(B,), the numbers in `states` of the texts with these ids, which `KeyedRows` gave.

        Raises:
            ValueError: a text that the cache has not.
        """
        wanted = np.array([bytes.fromhex((name or "")[-2 * _KEY_BYTES :]) for name in ids], f"S{_KEY_BYTES}")
        place = np.minimum(np.searchsorted(self._sorted, wanted), len(self._sorted) - 1)
        if not (self._sorted[place] == wanted).all():
            raise ValueError(
                f"teacher_cache={str(self.folder)!r}: has not all texts of the batch; did the data change in the run?"
            )
        return self._order[place]

    @property
    def needs_tokens(self) -> bool:
        """Whether the batches that it teaches must have the teacher's tokens too."""
        return bool(self.kept.tokens)

    def _of_tokens(self, places: NDArray[np.int64], packed: PackedBatch) -> Tensor:
        """(T, W) of the packed tokens of the texts at these places."""
        lengths = self._lengths[places]
        if tuple(lengths) != packed.lengths:
            raise ValueError(f"teacher_cache={str(self.folder)!r}: its texts have other tokens than those of the batch")
        offsets = np.arange(lengths.sum()) - np.repeat(lengths.cumsum() - lengths, lengths)
        taken = self.tokens[np.repeat(self._starts[places], lengths) + offsets]
        return torch.from_numpy(taken).to(packed.input_ids.device, non_blocking=True)

    def teach(self, batch: Batch) -> tuple[Batch, Tensor]:
        """The batch and the teacher's states of its side: of tokens, where they are kept.

        Otherwise that side is one row per pooled state (B or B * C, D): a mean over one row is the row, so the losses
        need not know where the teacher's states come from. What stands for the tokens is the number of the text, the
        same for equal texts alone. With moments `batch.moments` has those of the tokens that `batch.llm_rows` counts.
        """
        device, places = batch.side("mt").input_ids.device, self.places(batch.ids)
        if self.kept.tokens == "states":
            return batch, self._of_tokens(places, batch.side("llm"))
        moments = None
        if self.kept.tokens == "moments":
            m, entropy, bias_mean = self._of_tokens(places, batch.side("llm")).tensor_split((-2, -1), 1)
            numbers = (entropy[:, 0], bias_mean[:, 0], self.kept.temperature, self.vocab_size)
            moments = TeacherMoments(m, *numbers)
        states = torch.from_numpy(np.asarray(self.states[places])).to(device, non_blocking=True)
        per_text = states.shape[1] if states.ndim == 3 else 1
        packed = PackedBatch.from_sequences(np.repeat(places[:, None], per_text, axis=1))  # type: ignore[arg-type]
        spans = None
        if states.ndim == 3:
            rows = torch.arange(batch.num_rows * per_text, device=device).view(batch.num_rows, per_text)
            spans = torch.stack([rows, rows + 1], -1)
        taught = dataclasses.replace(batch, llm=packed.to(device), llm_spans=spans, moments=moments)
        return taught, states.flatten(0, -2)


@dataclass(frozen=True)
class CacheReport:
    """What `open_or_build` did: texts in the cache, texts computed now, texts truncated by the teacher's tokenizer."""

    folder: str
    texts: int
    computed: int
    truncated: int


def cached_states(
    folder: str | Path, rows: Iterable[TextRow], teacher: MTLLM, optim: OptimSettings, loss: DistillationWeights
) -> tuple[TeacherCache, CacheReport]:
    """`open_or_build` of the teacher as a run with these settings has it: its device, precision and base weights."""
    chosen = settled(optim)
    to_device(teacher, optim)
    return open_or_build(
        folder,
        rows,
        teacher,
        max_tokens=chosen.tokens,
        max_length=optim.max_length,
        bf16=chosen.bf16,
        base_weights=optim.base_weights,
        kept=Kept.for_loss(loss, teacher),
    )


def check_cache(folder: str) -> None:
    """Refuse, before anything is loaded, a folder that is a file: ValueError."""
    if folder and Path(folder).exists() and not Path(folder).is_dir():
        raise ValueError(f"teacher_cache={folder!r}: is a file, name a folder")


def open_or_build(
    folder: str | Path,
    rows: Iterable[TextRow],
    teacher: MTLLM,
    *,
    max_tokens: int,
    max_length: int,
    bf16: bool,
    base_weights: str = "auto",
    kept: Kept = Kept(),
) -> tuple[TeacherCache, CacheReport]:
    """The cache of `teacher` on `rows` under `folder`: opened where it is complete, else finished or built.

    Args:
        rows: re-iterable; equal texts are stored once.
        teacher: on the device it is to run on: a task teacher, or a stack without a head, whose bare LLM teaches.
        max_tokens: budget of one pass. max_length: limit of a text in the teacher's tokens.
        bf16: run it under bf16 autocast, as the training does.
        base_weights: of `OptimSettings`; int8, nf4 and fp8 are put into the teacher before it runs.
        kept: what is kept of the tokens.

    Raises:
        ValueError: the cache is stale or damaged, or rows with and without choices are mixed.
        OSError: it cannot be written; what was finished stays and is used by the next run.
    """
    root = Path(folder)
    teacher.require_tokenizer().max_llm_tokens = max_length
    keys = list(dict.fromkeys(text_key(row) for row in rows))
    if not keys:
        raise ValueError("the training data holds no usable row")
    made_from = _fingerprint(teacher, keys, bf16, base_weights, kept)
    key = sha256_of_json(made_from)[:24]
    entry = root / key
    computed = truncated = 0
    if not entry.exists():
        root.mkdir(parents=True, exist_ok=True)
        with exclusive(root / f"{key}.lock"):
            if not entry.exists():  # another process may have built it while this one waited
                _say_why(root, made_from)
                if base_weights in KINDS:
                    quantize_frozen(teacher.backbone.layers_root, base_weights, next(teacher.parameters()).device)
                computed, truncated = _build(entry, rows, teacher, keys, made_from, _Pass(max_tokens, bf16, kept))
    return TeacherCache(entry, made_from), CacheReport(str(entry), len(keys), computed, truncated)


def _build(
    entry: Path,
    rows: Iterable[TextRow],
    teacher: MTLLM,
    keys: list[bytes],
    made_from: Mapping[str, object],
    how: _Pass,
) -> tuple[int, int]:
    """Compute what is missing, then move the finished folder into place. Returns texts computed and truncated."""
    building = entry.with_name(f"{entry.name}.building")
    building.mkdir(exist_ok=True)
    names = ("states.bin", "tokens.bin", "lengths.bin") if how.kept.tokens else ("states.bin",)
    progress = building / "progress.json"
    shape, done, sizes = _progress(progress, names)
    computed = truncated = 0
    try:
        with ExitStack() as files:
            handles = {}
            for name in names:
                path = building / name
                handles[name] = files.enter_context(path.open("r+b" if path.exists() else "w+b"))
                handles[name].truncate(sizes[name])
                handles[name].seek(0, os.SEEK_END)
            stream = islice(_distinct(rows), done, None)
            while window := list(islice(stream, WINDOW)):
                made, cut = how.read(teacher, window)
                if shape and made["states.bin"].shape[1:] != shape:
                    raise ValueError(
                        "choices: a teacher cache needs the same number in all texts, got "
                        f"{made['states.bin'].shape[1:]}, {shape}"
                    )
                shape = made["states.bin"].shape[1:]
                for name, values in made.items():
                    handles[name].write(values.tobytes())
                    handles[name].flush()
                    os.fsync(handles[name].fileno())
                    sizes[name] += values.nbytes
                done, computed, truncated = done + len(window), computed + len(window), truncated + cut
                write_json(progress, {"texts": done, "shape": shape, "sizes": sizes})
        if done != len(keys):
            raise ValueError(f"the training data changed while it was read: {len(keys)} distinct texts, then {done}")
        vocab_size = len(teacher.require_llm().lm_head.weight) if how.kept.tokens == "moments" else 0
        complete(building, keys, shape, how.kept, vocab_size, made_from)
    except OSError as error:
        raise OSError(
            error.errno,
            f"teacher_cache={str(entry)!r}: {error.strerror or error}; {done} of {len(keys)} texts are kept, "
            "the same command goes on from there",
        ) from error
    progress.unlink()
    replace_folder(building, entry)
    return computed, truncated


def complete(
    folder: Path,
    keys: Sequence[bytes],
    shape: Sequence[int],
    kept: Kept,
    vocab_size: int,
    made_from: Mapping[str, object],
) -> None:
    """Write keys.npy and meta.json beside the states of the texts with these keys, each of this shape."""
    np.save(folder / "keys.npy", np.frombuffer(b"".join(keys), np.uint8).reshape(-1, _KEY_BYTES))
    files = ("keys.npy", "states.bin", *(("tokens.bin", "lengths.bin") if kept.tokens else ()))
    digests = {name: sha256_of(folder / name) for name in files}
    meta: dict[str, object] = {"made_from": made_from, "shape": [len(keys), *shape], "files": digests}
    if kept.tokens:
        meta |= {"kept": asdict(kept), "vocab_size": vocab_size}
    write_json(folder / "meta.json", meta)


def moments_of(states: Tensor, head: LMHead, temperature: float) -> Tensor:
    """(T, D + 2): m, entropy and bias_mean of `TeacherMoments`, of teacher states (T, D) as they are: a step's KL
    rounds none under autocast."""
    with torch.autocast(states.device.type, enabled=False):
        found = teacher_moments(states, head.weight.to(states.dtype), temperature, bias_t=head.bias)
    return torch.cat([found.m, found.entropy[:, None], found.bias_mean[:, None]], 1)


def _progress(progress: Path, names: Sequence[str]) -> tuple[tuple[int, ...], int, dict[str, int]]:
    """Shape of one text's states, number of texts that an earlier build left whole, and the bytes of them in each file;
    it may have left nothing."""
    try:
        found = json.loads(progress.read_text())
        shape, done = tuple(map(int, found["shape"])), int(found["texts"])
        sizes = found.get("sizes", {"states.bin": done * int(np.prod(shape)) * 4})  # without: an older version's
        sizes = {name: int(sizes[name]) for name in names}
        if all((progress.parent / name).stat().st_size >= size for name, size in sizes.items()):
            return shape, done, sizes
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return (), 0, dict.fromkeys(names, 0)


def _distinct(rows: Iterable[TextRow]) -> Iterator[TextRow]:
    seen: set[bytes] = set()
    for row in rows:
        key = text_key(row)
        if key not in seen:
            seen.add(key)
            yield row


@dataclass(frozen=True)
class _Pass:
    """How the teacher reads the texts: tokens of a pack, bf16 autocast, what is kept of tokens."""

    max_tokens: int
    bf16: bool
    kept: Kept

    @torch.no_grad()
    def read(self, teacher: MTLLM, rows: list[TextRow]) -> tuple[dict[str, NDArray[Any]], int]:
        """What is appended to each file for these rows, in their order, and how many of them were truncated."""
        device = next(teacher.parameters()).device
        tokenised = tokenise_rows([row.for_teacher() for row in rows], teacher.require_tokenizer(), ("llm",))
        packs = list(token_budget_packs(tokenised.costs(), self.max_tokens))
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16), evaluating(teacher):
            parts = [self._pack(teacher, tokenised, members, device) for members in packs]
        pooled = np.concatenate([part[0] for part in parts])
        order = np.concatenate(packs)
        pooled[order] = pooled.copy()
        made: dict[str, NDArray[Any]] = {"states.bin": pooled}
        if self.kept.tokens:
            of_text = [text for part in parts for text in part[1]]
            in_order = [of_text[k] for k in np.argsort(order)]
            made["tokens.bin"] = np.concatenate(in_order)
            made["lengths.bin"] = np.array([len(text) for text in in_order], np.int32)
        return made, tokenised.sides["llm"].truncated

    def _pack(
        self, teacher: MTLLM, tokenised: TokenizedRows, members: Sequence[int], device: torch.device
    ) -> tuple[NDArray[np.float32], list[NDArray[np.float32]]]:
        """Pooled states (n, D) or (n, C, D), and what is kept of the tokens (t, W) of each text."""
        batch = tokenised.batch(members, align=False).to(device)
        packed = batch.side("llm")
        states = teacher.teacher_states(packed) if teacher.head is None else teacher.states(packed)
        choice = teacher.head is not None and teacher.head.config.kind == "choice"
        pooled = teacher.pool(states, packed, batch.llm_spans if choice else None).float().cpu().numpy()
        if not self.kept.tokens:
            return pooled, []
        tokens = states
        if self.kept.tokens == "moments":
            tokens = moments_of(states, teacher.require_llm().lm_head, self.kept.temperature)
        return pooled, np.split(tokens.float().cpu().numpy(), np.cumsum(packed.lengths)[:-1])


def _fingerprint(teacher: MTLLM, keys: list[bytes], bf16: bool, base_weights: str, kept: Kept) -> dict[str, object]:
    """Digests of all that the states depend on, by the name that a message gives them."""
    llm, tokenizer = teacher.require_llm(), teacher.require_tokenizer()
    bare = teacher.head is None
    state: dict[str, Tensor] = llm.bare_state() if bare else llm.state_dict()
    # what is in no tensor but changes what they compute
    config = llm.model.config.to_dict()
    adapters = {} if bare else {name: dataclasses.asdict(lora) for name, lora in teacher.config.adapters.items()}
    reading = [tokenizer_state(tokenizer.llm), str(tokenizer.llm.bos_token), tokenizer.pair_separator]
    return {
        "teacher weights": of_tensors(state),
        "teacher settings": sha256_of_json(
            [{k: v for k, v in config.items() if k not in _VOLATILE}, adapters, teacher.config.causal]
        ),
        "tokenizer": sha256_of_json(reading),
        "data": hashlib.sha256(b"".join(keys)).hexdigest(),
        "settings": {
            "format": FORMAT,
            "pooling": teacher.head.config.kind if teacher.head is not None else "mean",
            "max_length": tokenizer.max_llm_tokens,
            "bf16": bf16,
            **({"base_weights": base_weights} if base_weights in KINDS else {}),
            **({"kept": asdict(kept)} if kept.tokens else {}),
        },
    }


def _say_why(root: Path, made_from: Mapping[str, object]) -> None:
    """Name what keeps the caches that lie there from being used."""
    for meta in sorted(root.glob("*/meta.json")):
        try:
            before = json.loads(meta.read_text(encoding="utf-8"))["made_from"]
        except (OSError, ValueError, KeyError):
            continue
        changed = ", ".join(differing(before, made_from))
        log.warning("teacher cache %s is not used: it was made from another %s", meta.parent, changed)
