"""Which row comes when: the data order as arithmetic.  No files, no processes, no state.

An epoch is one permutation of the split's row groups by (seed, epoch), read as one long sequence of R rows and cut
into S streams, stream s taking the sequence positions [floor(s*R/S), floor((s+1)*R/S)).  Every stream gives B/S rows to
every global batch, in its own order, shuffled inside windows of `window` rows by (seed, epoch, stream, window).  The
global batch is the concatenation of the streams' rows, stream 0 first; rank r of W reads the streams
[r*S/W, (r+1)*S/W).  So global batch k holds the same rows in the same order for every W that divides S, and (epoch,
step) is the whole position.  Where a stream has run out, its places in the batch are padding, so that every rank makes
the same number of steps.

The shuffles are integer arithmetic of our own (`hash64`), not a library's generator: an order written down as
(seed, epoch, step) must still be the same order after an upgrade of numpy.

Example: three row groups of 3, 2 and 2 rows (rows 0-2, 3-4, 5-6), S = 2 streams, global batch B = 4, no shuffle:

    sequence     0 1 2 3 4 5 6          R = 7
    stream 0     0 1 2                  positions [0, 3)
    stream 1     3 4 5 6                positions [3, 7)
    step 0       0 1 | 3 4
    step 1       2 . | 5 6              "." is a padding row; 2 steps = ceil(4 rows / 2 a step)

With shuffling and, say, the row groups permuted to (2, 0, 1), the sequence is 5 6 0 1 2 3 4, stream 0 reads 5 6 0, and
each window of a stream is permuted.

Letters in shapes: G row groups, S streams, n rows asked for, V windows.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from kernels.errors import UserError
from trainer.data.compiled import bijection

MASK64 = (1 << 64) - 1
GOLDEN64 = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, odd: the increment of SplitMix64
SORTED_WINDOW = 1024  # windows up to this size are shuffled by sorting hashes, larger ones by a bijection


def hash64(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser of every element (uint64 -> uint64, a bijection): a good hash of consecutive integers."""
    x = x + np.uint64(GOLDEN64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key_of(*parts: int) -> np.uint64:
    """One 64-bit key of a tuple of integers; (1, 2) and (2, 1) have different ones."""
    key = np.zeros(1, np.uint64)
    for part in parts:
        key = hash64(key ^ np.uint64(part & MASK64))
    return key[0]


def permutations(key: np.uint64, first: int, count: int, size: int) -> np.ndarray:
    """The permutations of the windows first .. first+count-1, each of range(size): (count, size) uint32.

    Small windows sort the hashes of (window, place), which gives every permutation its chance but costs about 30 ns a
    row; a large one takes places through a keyed bijection of the next power of two, which costs about 1 ns a row
    (numpy's own shuffle: 10 to 15 ns), and drops those that fall outside it.
    """
    key_V = hash64(key + np.arange(first, first + count, dtype=np.uint64))
    if size <= SORTED_WINDOW:
        place = np.arange(size, dtype=np.uint64)
        hashes = hash64(key_V[:, None] + place * np.uint64(GOLDEN64))
        return np.argsort(hashes, axis=1, kind="stable").astype(np.uint32)
    out = np.empty((count, size), np.uint32)
    for v in range(count):
        constants = hash64(key_V[v] + np.arange(10, dtype=np.uint64)).astype(np.uint32)
        bijection(constants, np.uint64((size - 1).bit_length()), np.uint64(size), out[v])
    return out


class Piece(NamedTuple):
    """Rows start .. stop-1 of one row group."""

    row_group: int
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Order:
    """The order of one split under one seed.  Pure: equal fields give equal batches, anywhere.

    row_groups: rows of every row group of the split, in file order.
    streams: S.
    batch_size: B, rows of the global batch; S must divide it.
    seed: of both shuffles.
    shuffle: False reads in file order (evaluation); `seed` and `window` then do not matter.
    window: rows of a stream that are shuffled among themselves; 1 leaves the row groups' own order.
    """

    row_groups: tuple[int, ...]
    streams: int
    batch_size: int
    seed: int = 0
    shuffle: bool = True
    window: int = 1

    def __post_init__(self) -> None:
        for name in ("streams", "batch_size", "window"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)}: must be at least 1")
        if self.batch_size % self.streams:
            lower = self.batch_size // self.streams * self.streams
            fits = f"{lower} or {lower + self.streams}" if lower else str(self.streams)
            raise UserError(f"batch_size = {self.batch_size} does not divide over streams = {self.streams}; use {fits}")
        if self.window > 1 << 31:
            raise UserError(f"shuffle_window = {self.window}: at most 2**31 rows")

    @property
    def rows(self) -> int:
        """R."""
        return int(self.group_starts[-1])

    @property
    def stream_batch(self) -> int:
        """B/S, the rows that a stream gives to one global batch."""
        return self.batch_size // self.streams

    @property
    def steps_per_epoch(self) -> int:
        """Steps until the longest stream has been read: ceil(ceil(R/S) / (B/S))."""
        longest = -(-self.rows // self.streams)
        return -(-longest // self.stream_batch)

    @cached_property
    def group_starts(self) -> np.ndarray:
        """(G+1,) file-order row number at which every row group begins; the last is R."""
        return np.concatenate([[0], np.cumsum(np.array(self.row_groups, np.int64))]).astype(np.int64)

    def bounds(self, stream: int) -> tuple[int, int]:
        """The sequence positions [start, stop) that a stream reads."""
        return stream * self.rows // self.streams, (stream + 1) * self.rows // self.streams

    def stream_rows(self, stream: int) -> int:
        start, stop = self.bounds(stream)
        return stop - start

    def step_range(self, stream: int, step: int) -> tuple[int, int]:
        """The places of the stream, counted from its beginning, that go into global batch `step`; may be empty."""
        rows = self.stream_rows(stream)
        return min(step * self.stream_batch, rows), min((step + 1) * self.stream_batch, rows)

    def rows_in_step(self, step: int) -> int:
        """Rows of the global batch that are not padding."""
        # Streams differ by one row at most: `extra` of them have one row more than the others.
        short, extra = divmod(self.rows, self.streams)
        before = step * self.stream_batch

        def given(rows: int) -> int:
            return min(self.stream_batch, max(0, rows - before))

        return extra * given(short + 1) + (self.streams - extra) * given(short)

    def streams_of(self, rank: int, world_size: int) -> range:
        """The streams that rank r of W reads."""
        if self.streams % world_size:
            raise UserError(
                f"{world_size} ranks do not divide streams = {self.streams}; set data.streams to a multiple of it"
            )
        if not 0 <= rank < world_size:
            raise UserError(f"rank {rank} of {world_size}: ranks are 0 .. {world_size - 1}")
        per_rank = self.streams // world_size
        return range(rank * per_rank, (rank + 1) * per_rank)

    def epoch(self, epoch: int) -> "Epoch":
        """The order of one epoch: O(G) to make, after which every look-up is a binary search."""
        return Epoch(self, epoch)


class Epoch:
    """One epoch of an `Order`: from places in a stream to rows of row groups."""

    def __init__(self, order: Order, epoch: int):
        self.order = order
        self.number = epoch
        groups = len(order.row_groups)
        if order.shuffle:
            # Sorting hashes gives a fair permutation of few row groups too, and G is small.
            hashes = hash64(key_of(order.seed, epoch) + np.arange(groups, dtype=np.uint64))
            self._sequence = np.argsort(hashes, kind="stable")
        else:
            self._sequence = np.arange(groups)
        sizes = np.array(order.row_groups, np.int64)[self._sequence]
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)  # position where each one begins

    def pieces(self, stream: int, start: int, stop: int) -> list[Piece]:
        """The rows at the places [start, stop) of a stream before its windows are shuffled, in order."""
        base, end = self.order.bounds(stream)
        start, stop = base + start, min(base + stop, end)
        found = []
        at = int(np.searchsorted(self._starts, start, side="right")) - 1
        while start < stop:
            first, last = int(self._starts[at]), int(self._starts[at + 1])
            upto = min(stop, last)
            if upto > start:
                found.append(Piece(int(self._sequence[at]), start - first, upto - first))
            start, at = upto, at + 1
        return found

    def shuffled(self, stream: int, start: int, stop: int) -> np.ndarray | None:
        """Where the rows at the places [start, stop) of a stream come from, as (stop-start,) uint32 relative to start.

        start: a multiple of the window.  stop: another, or the end of the stream.
        None means that they stand where they are.
        """
        order = self.order
        if not order.shuffle or order.window == 1 or start >= stop:
            return None
        assert start % order.window == 0 and (stop % order.window == 0 or stop == order.stream_rows(stream))
        key = key_of(order.seed, self.number, stream)
        whole, rest = divmod(stop - start, order.window)
        first = start // order.window
        parts = []
        if whole:
            index_VW = permutations(key, first, whole, order.window)
            index_VW += np.arange(whole, dtype=np.uint32)[:, None] * np.uint32(order.window)
            parts.append(index_VW.reshape(-1))
        if rest:
            parts.append(permutations(key, first + whole, 1, rest)[0] + np.uint32(whole * order.window))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def rows(self, stream: int, start: int, stop: int) -> np.ndarray:
        """File-order row numbers at the places [start, stop) of a stream, after shuffling: (n,) int64."""
        window = self.order.window if self.order.shuffle else 1
        end = self.order.stream_rows(stream)
        start, stop = min(start, end), min(stop, end)
        first, last = start // window * window, min(-(-stop // window) * window, end)
        base = self.order.group_starts
        pieces = self.pieces(stream, first, last)
        rows = np.concatenate(
            [np.arange(base[p.row_group] + p.start, base[p.row_group] + p.stop) for p in pieces] or [[]]
        )
        index = self.shuffled(stream, first, last)
        return (rows if index is None else rows[index])[start - first : stop - first].astype(np.int64)

    def global_batch(self, step: int) -> np.ndarray:
        """(B,) int64: file-order row numbers of global batch `step`, -1 at padding."""
        out = np.full(self.order.batch_size, -1, np.int64)
        for stream in range(self.order.streams):
            rows = self.rows(stream, *self.order.step_range(stream, step))
            at = stream * self.order.stream_batch
            out[at : at + len(rows)] = rows
        return out
