"""Decoded row groups -> shuffled batches, ahead of the consumer, in threads.

The pieces, smallest first:

    Once         a piece of work that whoever needs it first does, and everyone else waits for
    RowGroups    decoded row groups, each decoded once while it is in the cache
    Assembler    which blocks of which stream a step needs, and the work that makes its batch of them
    Batches      the iterator: `threads` workers that assemble the next `prefetch` batches and decode the next blocks

A block is a run of consecutive rows of one stream after its shuffle: whole windows, at least BLOCK_ROWS rows.  Batches
are slices of blocks (`trainer/data/assemble.py`), so the cost per row hardly depends on the window.

Memory of a rank, at most: two blocks for each of its streams (max(window, BLOCK_ROWS) rows, plus what a window leaves
to round up), streams + threads decoded row groups in the cache and one more per thread, and prefetch + threads batches.
A row is 4 bytes per label, dense input, single-hot int32 id and multi-hot id (8 for int64 ids), 8 per id in a batch.
"""

import itertools
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from queue import PriorityQueue
from typing import Any

from trainer.data.assemble import Block, Piece, Shape, Slice, build, gather
from trainer.data.base import Columns, Source
from trainer.data.batch import Batch
from trainer.data.memory import Pool
from trainer.data.order import Epoch

# Rows worked on at once: enough to hide Python's cost, few enough for a column of them to fit a core's L2 cache.
BLOCK_ROWS = 32768


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


class Assembler:
    """(epoch, step) -> Batch of one rank, for steps asked for in rising order.

    `plan` is called by the consumer only and costs microseconds; the work it returns may run in any thread.
    """

    def __init__(self, source: Source, epoch: Epoch, shape: Shape, streams: range, threads: int, pool: Pool):
        self._epoch = epoch
        self._order = epoch.order
        self._pool = pool
        self._shape = shape
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
            return build(slices, self._shape, rows, order.rows_in_step(step), self._pool)

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
            base = int(self._order.group_starts[piece.row_group])
            pieces.append(Piece(columns, base, piece.start, piece.stop))
            if piece.stop == columns.rows:
                self._row_groups.finished(piece.row_group)
        return gather(pieces, self._epoch.shuffled(stream, start, stop), self._pool)


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
