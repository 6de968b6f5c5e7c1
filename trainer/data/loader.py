"""Decoded row groups -> shuffled batches, ahead of the consumer, in threads.

The pieces, smallest first:

    Once         a piece of work that whoever needs it first does, and everyone else waits for
    RowGroups    decoded row groups, each decoded once while it is in the cache
    Block        consecutive rows of one stream after its shuffle: whole windows, at least BLOCK_ROWS rows
    Assembler    (epoch, step) -> Batch, made of slices of one block or two per stream
    Batches      the iterator: `threads` workers that assemble the next `prefetch` batches and decode the next blocks

Shuffling gathers each column once per block (so a column's part of a window is in the CPU's cache while it is permuted)
and batches are slices of blocks: the cost per row does not depend on the window.

Memory of a rank, at most: two blocks for each of its streams (max(window, BLOCK_ROWS) rows, plus what a window leaves
to round up), streams + threads decoded row groups in the cache and one more per thread, and prefetch + threads batches.
A row is 4 bytes per label, dense input, single-hot int32 id and multi-hot id (8 for int64 ids), 8 per id in a batch.

Letters in shapes: n rows of a block, B rows of this rank's batch, K dense inputs, T labels, F features, N ids.
"""

import itertools
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import PriorityQueue
from typing import Any, NamedTuple

import numpy as np
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from trainer.data.base import Columns, Ids, Source
from trainer.data.batch import Batch
from trainer.data.order import Epoch

BLOCK_ROWS = (
    32768  # work done at once: large enough to hide Python's cost, small enough for a column to fit the L2 cache
)


class Once:
    """Work done at most once: by the first thread that runs it, while others that need the result wait."""

    def __init__(self, work: Callable[[], Any]):
        self._work: Callable[[], Any] | None = work
        self._claim = threading.Lock()
        self._done = threading.Event()
        self._result: Any = None
        self._error: BaseException | None = None

    def run(self) -> None:
        """Do the work unless somebody has begun it; never waits."""
        if not self._claim.acquire(blocking=False):
            return
        work, self._work = self._work, None
        try:
            self._result = work()
        except BaseException as error:  # handed to everyone who asks for the result
            self._error = error
        finally:
            self._done.set()

    def result(self) -> Any:
        """Wait for whoever runs it; raises what the work raised."""
        self._done.wait()
        if self._error is not None:
            raise self._error
        return self._result


class RowGroups:
    """Decoded row groups, the most recently used ones kept."""

    def __init__(self, source: Source, capacity: int):
        self._source = source
        self._capacity = capacity
        self._kept: OrderedDict[int, Once] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, row_group: int) -> Columns:
        with self._lock:
            entry = self._kept.get(row_group)
            if entry is None:
                entry = self._kept[row_group] = Once(lambda: self._source.read(row_group))
            self._kept.move_to_end(row_group)
            while len(self._kept) > self._capacity:
                self._kept.popitem(last=False)
        entry.run()
        return entry.result()

    def finished(self, row_group: int) -> None:
        """A stream has read the last row it needs: the row group is the next to go when room is needed."""
        with self._lock:
            if row_group in self._kept:
                self._kept.move_to_end(row_group, last=False)


@dataclass(frozen=True, kw_only=True)
class Block:
    """n shuffled rows of one stream."""

    columns: Columns
    row_n: np.ndarray  # int64, row numbers in the split
    ids_Fn: np.ndarray | None  # all features' ids where every bag holds one id; columns.ids are its rows


def gather(pieces: list[tuple[Columns, int, int, int]], index: np.ndarray | None) -> Block:
    """Join rows start .. stop-1 of each piece, then take them in the order of `index`.

    pieces: (columns, row number of the columns' first row, start, stop).
    index: (n,) int64, a permutation of the joined rows; None leaves them as they are.

    Example: pieces of rows a b c d [1:3) and e f [0:2) join to b c e f; index 2 0 3 1 gives e b f c.
    """
    rows = sum(stop - start for _, _, start, stop in pieces)
    first = pieces[0][0]

    def join(arrays: list[np.ndarray]) -> np.ndarray:
        joined = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        return joined if index is None else np.take(joined, index, axis=0, mode="wrap", out=np.empty_like(joined))

    features = [
        [columns.ids[f].slice(start, stop) for columns, _, start, stop in pieces] for f in range(len(first.ids))
    ]
    ids_Fn = None
    if all(part.offsets is None for parts in features for part in parts):
        wide = any(part.values.dtype == np.int64 for parts in features for part in parts)
        ids_Fn = np.empty((len(features), rows), np.int64 if wide else np.int32)
        for out_n, parts in zip(ids_Fn, features, strict=True):
            joined = parts[0].values if len(parts) == 1 else np.concatenate([part.values for part in parts])
            if index is None or joined.dtype != ids_Fn.dtype:
                out_n[:] = joined if index is None else joined[index]
            else:
                np.take(joined, index, mode="wrap", out=out_n)
        ids = tuple(Ids(values) for values in ids_Fn)
    else:
        ids = tuple(take_bags(join_bags(parts), index) for parts in features)
    return Block(
        columns=Columns(
            rows=rows,
            ids=ids,
            dense_nK=join([columns.dense_nK[start:stop] for columns, _, start, stop in pieces]),
            labels_nT=join([columns.labels_nT[start:stop] for columns, _, start, stop in pieces]),
            weight_n=None
            if first.weight_n is None
            else join([columns.weight_n[start:stop] for columns, _, start, stop in pieces]),
        ),
        row_n=join([np.arange(base + start, base + stop) for _, base, start, stop in pieces]),
        ids_Fn=ids_Fn,
    )


def join_bags(parts: list[Ids]) -> Ids:
    if len(parts) == 1:
        return parts[0]
    values = np.concatenate([part.values for part in parts])
    if all(part.offsets is None for part in parts):
        return Ids(values)
    lengths = [np.ones(len(p.values), np.int64) if p.offsets is None else np.diff(p.offsets) for p in parts]
    return Ids(values, offsets_of(np.concatenate(lengths)))


def take_bags(ids: Ids, index: np.ndarray | None) -> Ids:
    """The bags in the order of `index`.

    Example: bags [7 8] [] [9] are values 7 8 9, offsets 0 2 2 3; index 2 0 1 gives bags [9] [7 8] []: lengths 1 2 0,
    offsets 0 1 3 3; the first id of each bag lies at 2 0 2, so the ids are taken from 2, 0 1: values 9 7 8.
    """
    if index is None:
        return ids
    if ids.offsets is None:
        return Ids(np.take(ids.values, index, mode="wrap"))
    length_n = np.diff(ids.offsets)[index]
    offsets = offsets_of(length_n)
    start_n = ids.offsets[:-1][index]
    if length_n.max(initial=0) <= 1:
        return Ids(ids.values[start_n[length_n > 0]], offsets)
    at_N = np.repeat(start_n - offsets[:-1], length_n)
    at_N += np.arange(len(at_N))
    return Ids(ids.values[at_N], offsets)


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    out = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=out[1:])
    return out


class Slice(NamedTuple):
    """Rows start .. stop-1 of a block stand at `at` and after it in the batch."""

    at: int
    block: Block
    start: int
    stop: int


def build(slices: list[Slice], features: tuple[str, ...], rows: int, rows_in_step: int) -> Batch:
    """A batch of `rows` rows out of slices of blocks, in the batch's order; places that none covers are padding."""
    shape = slices[0].block.columns if slices else None
    covered = sum(s.stop - s.start for s in slices)
    new = np.empty if covered == rows else np.zeros
    dense_BK = new((rows, shape.dense_nK.shape[1]), np.float32)
    labels_BT = new((rows, shape.labels_nT.shape[1]), np.float32)
    weight_B = new(rows, np.float32)
    row_B = np.empty(rows, np.int64) if covered == rows else np.full(rows, -1, np.int64)
    for at, block, start, stop in slices:
        upto = at + stop - start
        dense_BK[at:upto] = block.columns.dense_nK[start:stop]
        labels_BT[at:upto] = block.columns.labels_nT[start:stop]
        weight_B[at:upto] = 1.0 if block.columns.weight_n is None else block.columns.weight_n[start:stop]
        row_B[at:upto] = block.row_n[start:stop]
    if covered == rows and all(s.block.ids_Fn is not None for s in slices):
        ids = _one_id_per_bag(slices, features, rows)
    else:
        ids = _bags(slices, features, rows)
    return Batch(
        dense_BK=torch.from_numpy(dense_BK),
        ids=ids,
        labels_BT=torch.from_numpy(labels_BT),
        weight_B=torch.from_numpy(weight_B),
        row_B=torch.from_numpy(row_B),
        rows_in_step=rows_in_step,
    )


def _one_id_per_bag(slices: list[Slice], features: tuple[str, ...], rows: int) -> KeyedJaggedTensor:
    ids_FB = np.empty((len(features), rows), np.int64)
    for at, block, start, stop in slices:
        ids_FB[:, at : at + stop - start] = block.ids_Fn[:, start:stop]
    return _keyed(features, ids_FB.reshape(-1), np.ones(len(features) * rows, np.int32), [rows] * len(features), rows)


def _bags(slices: list[Slice], features: tuple[str, ...], rows: int) -> KeyedJaggedTensor:
    length_FB = np.zeros((len(features), rows), np.int32)
    parts = []
    ids_per_key = []
    for f in range(len(features)):
        before = len(parts)
        for at, block, start, stop in slices:
            ids = block.columns.ids[f]
            if ids.offsets is None:
                length_FB[f, at : at + stop - start] = 1
                parts.append(ids.values[start:stop])
            else:
                offsets = ids.offsets[start : stop + 1]
                np.subtract(offsets[1:], offsets[:-1], out=length_FB[f, at : at + stop - start], casting="same_kind")
                parts.append(ids.values[offsets[0] : offsets[-1]])
        ids_per_key.append(sum(len(part) for part in parts[before:]))
    values_N = np.empty(sum(ids_per_key), np.int64)
    np.concatenate(parts, out=values_N)
    return _keyed(features, values_N, length_FB.reshape(-1), ids_per_key, rows)


def _keyed(
    features: tuple[str, ...], values_N: np.ndarray, length_FB: np.ndarray, ids_per_key: list[int], rows: int
) -> KeyedJaggedTensor:
    """Ids per key are given along, or TorchRec would sum the lengths, on a GPU with a wait for the device.

    Lengths are int32, which is what the sharded input distribution sends; values int64, which is what FBGEMM looks up.
    """
    return KeyedJaggedTensor(
        keys=list(features),
        values=torch.from_numpy(values_N),
        lengths=torch.from_numpy(length_FB),
        stride=rows,
        length_per_key=ids_per_key,
        offset_per_key=[0, *itertools.accumulate(ids_per_key)],
    )


class Assembler:
    """(epoch, step) -> Batch of one rank, for steps asked for in rising order.

    `plan` is called by the consumer only and costs microseconds; the work it returns may run in any thread.
    """

    def __init__(self, source: Source, epoch: Epoch, features: tuple[str, ...], streams: range, threads: int) -> None:
        self._epoch = epoch
        self._order = epoch.order
        self._features = features
        self._streams = streams
        self._row_groups = RowGroups(source, capacity=len(streams) + threads)
        window = self._order.window if self._order.shuffle else 1
        self._block_rows = -(-BLOCK_ROWS // window) * window
        self._blocks: dict[tuple[int, int], Once] = {}

    def plan(self, step: int) -> tuple[Callable[[], Batch], list[Callable[[], None]]]:
        """The work that makes batch `step`, and the work on blocks that later batches will need."""
        order, size = self._order, self._block_rows
        wanted: list[tuple[int, int, int, int]] = []  # at, stream, start, stop within one block
        ahead = []
        for i, stream in enumerate(self._streams):
            start, stop = order.step_range(stream, step)
            at = i * order.stream_batch - start
            for number in range(start // size, -(-stop // size)):
                wanted.append((at, stream, max(start, number * size), min(stop, (number + 1) * size)))
            for old in [key for key in self._blocks if key[0] == stream and key[1] < start // size]:
                del self._blocks[old]
            following = max(stop - 1, start) // size + 1
            if following * size < order.stream_rows(stream) and (stream, following) not in self._blocks:
                ahead.append(self._block(stream, following).run)
        blocks = [self._block(stream, start // size) for _, stream, start, _ in wanted]

        def work() -> Batch:
            for block in blocks:
                block.run()  # does what no other thread has begun, before waiting for what they have
            slices = [
                Slice(at + start, block.result(), start % size, stop - start // size * size)
                for (at, _, start, stop), block in zip(wanted, blocks, strict=True)
            ]
            rows = len(self._streams) * order.stream_batch
            return build(slices, self._features, rows, order.rows_in_step(step))

        return work, ahead

    def _block(self, stream: int, number: int) -> Once:
        key = (stream, number)
        if key not in self._blocks:
            self._blocks[key] = Once(lambda: self._read(stream, number))
        return self._blocks[key]

    def _read(self, stream: int, number: int) -> Block:
        start = number * self._block_rows
        stop = min(start + self._block_rows, self._order.stream_rows(stream))
        pieces = []
        for piece in self._epoch.pieces(stream, start, stop):
            columns = self._row_groups.get(piece.row_group)
            pieces.append((columns, int(self._order.group_starts[piece.row_group]), piece.start, piece.stop))
            if piece.stop == columns.rows:
                self._row_groups.finished(piece.row_group)
        return gather(pieces, self._epoch.shuffled(stream, start, stop))


class Batches(Iterator[Batch]):
    """The batches start_step, start_step+1, ... of one epoch, made ahead in threads.

    Ends with the epoch.  `close()`, leaving a `with` block, the last batch, an error, or dropping the iterator stops
    its threads; an error in a thread is raised by `next` at the batch that needed what failed.
    """

    def __init__(self, assembler: Assembler, steps: range, *, threads: int, prefetch: int, pin_memory: bool = False):
        self._assembler = assembler
        self._steps = iter(steps)
        self._pin_memory = pin_memory
        self._coming: deque[Once] = deque()
        self._workers = _Workers(threads)
        # Not a method of self: the finalizer may not keep the iterator alive.
        self._stop = weakref.finalize(self, self._workers.stop)
        for _ in range(prefetch):
            self._plan_next()

    def __next__(self) -> Batch:
        if not self._coming:
            self.close()
            raise StopIteration
        try:
            batch = self._coming[0].result()
        except BaseException:
            self.close()
            raise
        self._coming.popleft()
        self._plan_next()
        return batch

    def close(self) -> None:
        self._coming.clear()
        self._stop()

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _plan_next(self) -> None:
        step = next(self._steps, None)
        if step is None:
            return
        work, ahead = self._assembler.plan(step)
        batch = Once((lambda: work().pin_memory()) if self._pin_memory else work)
        self._coming.append(batch)
        self._workers.submit(batch.run, urgent=True)
        for block in ahead:
            self._workers.submit(block, urgent=False)


class _Workers:
    """Threads that do the urgent work first, then the rest, each in the order in which it was submitted."""

    def __init__(self, threads: int):
        self._queue: PriorityQueue = PriorityQueue()
        self._count = itertools.count()  # decides between equals, so that the work itself is never compared
        self._stopped = threading.Event()
        self._threads = [
            threading.Thread(target=_serve, args=(self._queue, self._stopped), name=f"loader-{i}", daemon=True)
            for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, work: Callable[[], None], *, urgent: bool) -> None:
        self._queue.put((0 if urgent else 1, next(self._count), work))

    def stop(self) -> None:
        """Returns when every thread has ended, which is at most the piece of work that it is doing now."""
        self._stopped.set()
        for _ in self._threads:
            self._queue.put((-1, next(self._count), None))
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()


def _serve(queue: PriorityQueue, stopped: threading.Event) -> None:
    while not stopped.is_set():
        _, _, work = queue.get()
        if work is not None:
            work()
