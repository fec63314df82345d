"""Variable-length sequences laid end to end, and the bins they are laid in.

`PackedBatch` holds the packing metadata once; nothing downstream recomputes it. The lengths also stay on the host, so
no kernel launch waits for the device to learn `max_seqlen` or the number of tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import add

import numpy as np
import torch
from torch import Tensor

_SPLITMIX = (-7046029254386353131, -4658895280553007687, -7723592293110705685)  # of splitmix64, as int64


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """B sequences with T tokens in all, without padding.

    Fields:
        input_ids: (T,) int64.
        cu_seqlens: (B + 1,) int32, sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1].
        positions: (T,) int64, restart at 0 in every sequence.
        lengths: B host integers; a length of 0 is legal.
        partners: every second sequence is the partner of the one before it, what is read beside a text, empty where a
            text has none. B is then twice the number of rows.

    Raises:
        ValueError, TypeError: where the fields do not describe one packing.
    """

    input_ids: Tensor
    cu_seqlens: Tensor
    positions: Tensor
    lengths: tuple[int, ...]
    partners: bool = False

    def __post_init__(self) -> None:
        for name, dtype in (("input_ids", torch.int64), ("cu_seqlens", torch.int32), ("positions", torch.int64)):
            value = getattr(self, name)
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
            if value.ndim != 1 or value.dtype != dtype:
                raise ValueError(f"{name} must be a 1-D {dtype} tensor, got {value.dtype} {tuple(value.shape)}")
        if not isinstance(self.lengths, tuple) or not all(isinstance(length, int) for length in self.lengths):
            raise TypeError(f"lengths must be a tuple of host integers, got {type(self.lengths).__name__}")
        if not self.lengths or min(self.lengths) < 0:
            raise ValueError(f"lengths must hold at least one sequence and no negative length, got {self.lengths}")
        if self.partners and len(self.lengths) % 2:
            raise ValueError(f"lengths must hold a partner for every text, got {len(self.lengths)} sequences")
        total = sum(self.lengths)
        if self.input_ids.shape != (total,) or self.positions.shape != (total,):
            raise ValueError(
                f"input_ids and positions must have sum(lengths) = {total} rows, "
                f"got {self.input_ids.shape[0]} and {self.positions.shape[0]}"
            )
        if self.cu_seqlens.shape != (len(self.lengths) + 1,):
            raise ValueError(
                f"cu_seqlens must have {len(self.lengths) + 1} entries (lengths + 1), got {self.cu_seqlens.shape[0]}"
            )
        if len({self.input_ids.device, self.cu_seqlens.device, self.positions.device}) > 1:
            raise ValueError("input_ids, cu_seqlens and positions must lie on one device")
        if self.device.type == "cpu":  # on a device the check would wait for it
            expected = np.concatenate([[0], np.cumsum(self.lengths)])
            if not np.array_equal(self.cu_seqlens.numpy(), expected):
                raise ValueError(f"cu_seqlens {self.cu_seqlens.tolist()} does not agree with lengths {self.lengths}")

    @classmethod
    def from_sequences(
        cls, sequences: Sequence[Sequence[int] | np.ndarray | Tensor], *, partners: bool = False
    ) -> "PackedBatch":
        """Pack host sequences of token ids, in the order given.

        Raises:
            ValueError: no sequences, or one that is not a flat list of non-negative integers.
        """
        if len(sequences) == 0:
            raise ValueError("sequences must hold at least one sequence, got none")
        arrays = [_flat_ids(i, sequence) for i, sequence in enumerate(sequences)]
        ids = np.concatenate(arrays)
        if ids.size and ids.min() < 0:
            raise ValueError(f"sequences must hold token ids >= 0, got {ids.min()}")
        return cls.from_flat(torch.from_numpy(ids), [len(a) for a in arrays], partners=partners)

    @classmethod
    def from_flat(cls, ids: Tensor, row_lengths: Sequence[int], *, partners: bool = False) -> "PackedBatch":
        """B >= 1 sequences of these lengths that lie end to end in `ids` (T,) int64, which stays where it is."""
        lengths = np.array(row_lengths, dtype=np.int64)
        ends = np.cumsum(lengths)
        total = int(ends[-1])
        if total >= 2**31:
            raise ValueError(f"sequences hold {total} tokens, cu_seqlens (int32) addresses less than 2**31")
        cu_seqlens = np.zeros(len(lengths) + 1, dtype=np.int32)
        cu_seqlens[1:] = ends
        positions = np.arange(total, dtype=np.int64) - np.repeat(ends - lengths, lengths)
        places = (torch.from_numpy(cu_seqlens).to(ids.device), torch.from_numpy(positions).to(ids.device))
        return cls(ids, *places, tuple(lengths.tolist()), partners)

    @classmethod
    def from_padded(cls, input_ids: Tensor, attention_mask: Tensor) -> "PackedBatch":
        """Pack the rows of a padded batch; padding may stand on either side, or within.

        Reads the mask on the host, so on an accelerator it waits for the device once.

        Args:
            input_ids: (B, L) integers.
            attention_mask: (B, L), non-zero where a token is real.

        Raises:
            ValueError: shapes that are not equal, 2-D and B >= 1, or a floating-point `input_ids`.
        """
        if input_ids.ndim != 2 or input_ids.shape != attention_mask.shape or input_ids.shape[0] < 1:
            raise ValueError(
                f"input_ids and attention_mask must both be (B, L) with B >= 1, "
                f"got {tuple(input_ids.shape)} and {tuple(attention_mask.shape)}"
            )
        if input_ids.is_floating_point() or input_ids.is_complex() or input_ids.dtype == torch.bool:
            raise ValueError(f"input_ids must hold integers, got {input_ids.dtype}")
        mask = attention_mask.to(device=input_ids.device) != 0
        lengths = mask.sum(dim=1)
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        positions = (mask.cumsum(dim=1) - 1)[mask]
        return cls(input_ids[mask].to(torch.int64), cu_seqlens, positions, tuple(lengths.tolist()))

    @property
    def device(self) -> torch.device:
        return self.input_ids.device

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    @property
    def per_row(self) -> int:
        """Sequences of a row: 2 with partners, else 1."""
        return 2 if self.partners else 1

    @property
    def num_rows(self) -> int:
        return self.num_sequences // self.per_row

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[0]

    @cached_property
    def max_seqlen(self) -> int:
        """Length of the longest sequence, a host integer."""
        return max(self.lengths)

    @cached_property
    def pairs(self) -> "PackedBatch":
        """The same tokens, each text with its partner as one sequence, in which positions go on."""
        if not self.partners:
            return self
        cu_seqlens = self.cu_seqlens[::2].contiguous()
        starts = cu_seqlens[:-1].long().index_select(0, self.sequence_ids // 2)
        positions = torch.arange(self.num_tokens, device=self.device) - starts
        return PackedBatch(
            self.input_ids, cu_seqlens, positions, tuple(map(add, self.lengths[::2], self.lengths[1::2]))
        )

    @cached_property
    def digests(self) -> Tensor:
        """(B,) int64, equal for equal sequences; others have different ones, but for one pair in about 2^64."""
        # sums of token and place, stirred together; int64 wraps around, and nothing waits for the device
        x = (self.input_ids << 32) + self.positions + _SPLITMIX[0]
        for shift, factor in ((30, _SPLITMIX[1]), (27, _SPLITMIX[2]), (31, 1)):
            x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
        return torch.zeros(self.num_sequences, dtype=torch.int64, device=self.device).index_add(0, self.sequence_ids, x)

    @cached_property
    def sequence_ids(self) -> Tensor:
        """(T,) int64, the sequence each row belongs to."""
        sequences = torch.arange(self.num_sequences, device=self.device)
        # output_size is known on the host: without it the device would be asked
        return torch.repeat_interleave(sequences, self.cu_seqlens.diff(), output_size=self.num_tokens)

    def to_padded(self, pad_id: int) -> tuple[Tensor, Tensor]:
        """(ids, mask), both (B, max_seqlen) int64, padded on the right with `pad_id`."""
        shape = (self.num_sequences, self.max_seqlen)
        rows = self._padded_rows(self.max_seqlen)
        ids = self.input_ids.new_full(shape, pad_id)
        mask = self.input_ids.new_zeros(shape)
        ids.view(-1)[rows] = self.input_ids
        mask.view(-1)[rows] = 1
        return ids, mask

    def pad_states(
        self,
        x_TD: Tensor,  # (T, ...)
        value: float = 0.0,
    ) -> Tensor:  # (B, max_seqlen, ...)
        """Rows back to (B, max_seqlen, ...), right-padded with `value`. Differentiable."""
        if x_TD.shape[:1] != (self.num_tokens,):
            raise ValueError(f"x_TD must have {self.num_tokens} rows, got {tuple(x_TD.shape)}")
        rest = x_TD.shape[1:]
        padded = x_TD.new_full((self.num_sequences * self.max_seqlen, *rest), value)
        padded = padded.index_copy(0, self._padded_rows(self.max_seqlen), x_TD)
        return padded.view(self.num_sequences, self.max_seqlen, *rest)

    def unpad_states(
        self,
        x_BLD: Tensor,  # (B, L, ...), L >= max_seqlen
    ) -> Tensor:  # (T, ...)
        """The rows of a right-padded tensor that stand for tokens. Differentiable."""
        if x_BLD.ndim < 2 or x_BLD.shape[0] != self.num_sequences or x_BLD.shape[1] < self.max_seqlen:
            raise ValueError(
                f"x_BLD must be ({self.num_sequences}, L >= {self.max_seqlen}, ...), got {tuple(x_BLD.shape)}"
            )
        return x_BLD.flatten(0, 1).index_select(0, self._padded_rows(x_BLD.shape[1]))

    def _padded_rows(self, length: int) -> Tensor:
        return self.sequence_ids * length + self.positions

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> "PackedBatch":
        return self._moved(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "PackedBatch":
        return self._moved(Tensor.pin_memory)

    def _moved(self, move: Callable[[Tensor], Tensor]) -> "PackedBatch":
        parts = (move(self.input_ids), move(self.cu_seqlens), move(self.positions))
        return PackedBatch(*parts, self.lengths, self.partners)


def _flat_ids(index: int, sequence: Sequence[int] | np.ndarray | Tensor) -> np.ndarray:
    array = sequence.cpu().numpy() if isinstance(sequence, Tensor) else np.asarray(sequence)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(f"sequences[{index}] must be a flat list of integers, got {array.dtype} {array.shape}")
    return array.astype(np.int64, copy=False)


def token_budget_packs(
    costs: Sequence[tuple[int, ...]], max_tokens: int, max_rows: int | None = None
) -> list[list[int]]:
    """Group rows so that no pack exceeds a token budget on any side: best-fit decreasing (Johnson, 1974).

    Args:
        costs: per row the tokens on each side, e.g. (MT tokens, LLM tokens).
        max_tokens: budget of one pack, the same for every side.
        max_rows: at most so many rows in one pack.

    Returns:
        Row indices of each pack, ascending within a pack; every row in exactly one pack. The order is a function of
        the arguments only. Longer rows tend to stand in earlier packs: shuffle the packs before training on them.

    Raises:
        ValueError: a row above the budget, rows with different numbers of sides, or a budget below 1.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows must be at least 1 or None, got {max_rows}")
    if len(costs) == 0:
        return []
    if len({len(cost) for cost in costs}) != 1:
        raise ValueError("costs must have the same number of sides in every row")
    cost_NS = np.asarray(costs, dtype=np.int64)
    if cost_NS.shape[1] == 0 or cost_NS.min() < 0:
        raise ValueError("costs must hold at least one side and no negative number of tokens")
    if (peak := cost_NS.max()) > max_tokens:
        row = int(np.flatnonzero(cost_NS.max(axis=1) == peak)[0])
        raise ValueError(f"row {row} has {peak} tokens, more than max_tokens {max_tokens}: raise it or cut the row")

    order = np.lexsort((-cost_NS.sum(axis=1), -cost_NS.max(axis=1)))
    room_KS = np.empty((len(costs), cost_NS.shape[1]), dtype=np.int64)
    packs: list[list[int]] = []
    open_packs = np.empty(0, dtype=np.int64)
    smallest = cost_NS.min(axis=0)
    for row in order:
        cost = cost_NS[row]
        slack = room_KS[open_packs] - cost
        fits = (slack >= 0).all(axis=1)
        if fits.any():
            left = np.where(fits, slack.sum(axis=1), np.iinfo(np.int64).max)
            pack = int(open_packs[left.argmin()])
            packs[pack].append(int(row))
            room_KS[pack] -= cost
        else:
            pack = len(packs)
            packs.append([int(row)])
            room_KS[pack] = max_tokens - cost
            open_packs = np.append(open_packs, pack)
        full = max_rows is not None and len(packs[pack]) >= max_rows
        if full or (room_KS[pack] < smallest).any():
            open_packs = open_packs[open_packs != pack]
    return [sorted(pack) for pack in packs]


def consecutive_packs(
    costs: Sequence[tuple[int, ...]],
    max_tokens: int,
    *,
    padded: bool = False,
    even: bool = False,
    kinds: Sequence[int] | None = None,
) -> Iterator[list[int]]:
    """Cut rows, in their order, into packs that stay within a token budget on every side; a longer row stands alone.

    Args:
        costs: as in `token_budget_packs`.
        padded: the budget is for rows padded to the longest of their pack.
        even: packs of about equal size (of one side): no small one at the end, and few different sizes.
        kinds: rows of different kinds share no pack.

    Yields:
        Row indices of each pack.
    """
    full = max_tokens
    if even:
        total = sum(tokens for (tokens,) in costs)
        full = -(-total // max(-(-total // max_tokens), 1))
    pack: list[int] = []
    held: tuple[int, ...] = ()
    for row, cost in enumerate(costs):
        if pack:
            grown = tuple(map(max if padded else add, held, cost))
            size = (len(pack) + 1) * max(grown) if padded else max(grown)
            if size > max_tokens or max(held) >= full or (kinds is not None and kinds[row] != kinds[pack[0]]):
                yield pack
                pack, grown = [], cost
        else:
            grown = cost
        pack.append(row)
        held = grown
    if pack:
        yield pack
