"""Decoded row groups -> shuffled batches, ahead of the consumer, in threads.

The pieces, smallest first:

    Once         a piece of work that whoever needs it first does, and everyone else waits for
    visits       which row groups a rank decodes, each for all the streams that want it at about the same time
    Assembler    which blocks of which stream a step needs, and the work that makes its batch of them
    Batches      the iterator: `threads` workers that assemble the next `prefetch` batches and decode the next blocks

A block is a run of consecutive rows of one stream after its shuffle: whole windows, at least BLOCK_ROWS rows.  A row
group is copied into its blocks as soon as it is decoded, and batches are slices of blocks (`assemble.py`), so the cost
per row hardly depends on the window.

Memory of a rank, at most: for each of its streams two blocks (max(window, BLOCK_ROWS) rows each, rounded up to whole
windows) and the rest of the row group that it is reading; for each thread one decoded row group and the unshuffled copy
of a block; prefetch + threads batches.  A row takes 4 bytes per label, dense input and id (8 per id of tables with more
than 2**31 rows, and per id in a batch).
"""

import itertools
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from queue import PriorityQueue
from typing import Any, NamedTuple

from trainer.data.assemble import Block, Filling, Scatter, Slice, Target, build
from trainer.data.base import Source
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
            self._error, self._traceback = error, error.__traceback__
        finally:
            self._done.set()

    def result(self) -> Any:
        """Wait for whoever runs it; raises what the work raised."""
        self._done.wait()
        if self._error is not None:
            raise self._error.with_traceback(self._traceback)  # raised many times, it would grow at each
        return self._result


class Part(NamedTuple):
    """Rows start .. stop-1 of a row group, which stand at the places `at` and after it of a stream."""

    stream: int
    at: int
    start: int
    stop: int


@dataclass
class Visit:
    """One decoding of one row group, for all the streams that want rows of it at about the same time."""

    row_group: int
    parts: list[Part]
    once: Once | None = None


def visits(epoch: Epoch, streams: range, block_rows: int, first_place: int) -> list[Visit]:
    """What a rank decodes from place `first_place` of its streams on, in no particular order.

    Neighbouring streams may share a row group.  They get it from one visit where their places lie within a block of
    each other, which in a small dataset is always; a stream that needs it much later decodes it again, as holding it
    until then would cost memory.
    """
    open_visits: dict[int, Visit] = {}
    found = []
    parts = []
    for stream in streams:
        at = first_place
        for piece in epoch.pieces(stream, first_place, epoch.order.stream_rows(stream)):
            parts.append((piece.row_group, Part(stream, at, piece.start, piece.stop)))
            at += piece.stop - piece.start
    for row_group, part in sorted(parts, key=lambda p: p[1].at):
        visit = open_visits.get(row_group)
        if visit is None or part.at - visit.parts[0].at > block_rows:
            visit = open_visits[row_group] = Visit(row_group, [])
            found.append(visit)
        visit.parts.append(part)
    return found


class Assembler:
    """(epoch, step) -> Batch of one rank, for steps asked for in rising order.

    `plan` is called by the consumer only and costs microseconds; the work it returns may run in any thread.
    """

    def __init__(self, source: Source, epoch: Epoch, streams: range, start_step: int, pool: Pool):
        self._source, self._epoch, self._order, self._pool = source, epoch, epoch.order, pool
        self._streams = streams
        window = self._order.window if self._order.shuffle else 1
        self._block_rows = -(-BLOCK_ROWS // window) * window
        self._first_block = start_step * self._order.stream_batch // self._block_rows
        self._blocks: dict[tuple[int, int], Once] = {}  # by stream and number: those that the next steps need
        self._oldest = dict.fromkeys(streams, self._first_block)
        self._fillings: dict[tuple[int, int], Filling] = {}
        self._lock = threading.Lock()  # of the fillings
        self._visits_of: dict[tuple[int, int], list[Visit]] = {}
        for visit in visits(epoch, streams, self._block_rows, self._first_block * self._block_rows):
            for part in visit.parts:
                for number, _, _ in self._blocks_of(part):
                    self._visits_of.setdefault((part.stream, number), []).append(visit)
            visit.once = Once(partial(self._decode, visit))

    def plan(self, step: int) -> tuple[Callable[[], Batch], list[Callable[[], None]]]:
        """The work that makes batch `step`, and the work on blocks that later batches will need."""
        order, size = self._order, self._block_rows
        wanted: list[tuple[int, int, int, int]] = []  # at, stream, start, stop within one block
        ahead = []
        for i, stream in enumerate(self._streams):
            start, stop = order.step_range(stream, step)
            at = i * order.stream_batch - start
            first, following = start // size, max(stop - 1, start) // size + 1
            for number in range(first, -(-stop // size)):
                wanted.append((at, stream, max(start, number * size), min(stop, (number + 1) * size)))
            for old in range(self._oldest[stream], first):
                self._blocks.pop((stream, old), None)
            self._oldest[stream] = first
            if (stream, following) not in self._blocks and following * size < order.stream_rows(stream):
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
            return build(slices, self._source.shape, rows, order.rows_in_step(step), self._pool)

        return work, ahead

    def _block(self, stream: int, number: int) -> Once:
        key = (stream, number)
        if key not in self._blocks:
            self._blocks[key] = Once(partial(self._finish, stream, number))
        return self._blocks[key]

    def _finish(self, stream: int, number: int) -> Block:
        needed = self._visits_of[stream, number]
        for visit in needed:
            visit.once.run()
        for visit in needed:
            visit.once.result()
        with self._lock:
            filling = self._fillings.pop((stream, number))
        return filling.finish()

    def _decode(self, visit: Visit) -> None:
        first_row = int(self._order.group_starts[visit.row_group])
        targets = []
        for part in visit.parts:
            for number, start, stop in self._blocks_of(part):
                filling = self._filling(part.stream, number)
                at = part.at + start - part.start - number * self._block_rows
                targets.append(Target(filling, start, stop, at))
        self._source.read(visit.row_group, Scatter(targets, first_row))

    def _blocks_of(self, part: Part) -> Iterator[tuple[int, int, int]]:
        """The blocks that a part reaches into, with the rows of its row group that go into each."""
        size = self._block_rows
        end = part.at + part.stop - part.start
        for number in range(part.at // size, -(-end // size)):
            low, high = max(part.at, number * size), min(end, (number + 1) * size)
            yield number, part.start + low - part.at, part.start + high - part.at

    def _filling(self, stream: int, number: int) -> Filling:
        start = number * self._block_rows
        stop = min(start + self._block_rows, self._order.stream_rows(stream))
        key = (stream, number)
        with self._lock:
            if key not in self._fillings:
                index = self._epoch.shuffled(stream, start, stop)
                whole = len(self._visits_of[key]) == 1
                self._fillings[key] = Filling(self._source.shape, stop - start, index, whole, self._pool)
            return self._fillings[key]


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
