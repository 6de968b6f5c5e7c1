"""Decoded row groups -> shuffled batches, ahead of the consumer, in threads.

The pieces, smallest first:

    Once         a piece of work that whoever needs it first does, and everyone else waits for
    visits       which row groups a rank decodes, each for all the streams that want it at about the same time
    Assembler    which blocks of which stream a step needs, and the work that makes its batch of them
    Batches      the iterator: `threads` workers that assemble the next `prefetch` batches and decode the next blocks

A block is a run of consecutive rows of one stream: whole windows of the shuffle, at least BLOCK_ROWS rows.  When all of
its row groups are decoded, its rows are written to where the shuffle puts them in the batches they belong to
(`assemble.py`), so a value is moved once and the cost per row hardly depends on the window.

Memory of a rank, at most: the batches of BLOCKS_AHEAD + 2 blocks of each of its streams; for each stream the row group
that it is reading, decoded, and its last one's rows if those are no more than KEPT_ROWS; for each thread the scratch of
a block; prefetch + threads batches.  Decoded, a row takes 4 bytes per label, dense input and id (8 per id of tables
with more than 2**31 rows); in a batch 4 per label and dense input, 8 per id, and 12.
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

from trainer.data.assemble import Frame, Piece, Run, fill
from trainer.data.base import Source
from trainer.data.batch import Batch
from trainer.data.memory import Pool
from trainer.data.order import Epoch

# Rows worked on at once: enough to hide Python's cost, few enough for a column of them to fit a core's L2 cache.
BLOCK_ROWS = 32768

# So many blocks after the one that a step needs are filled in as soon as their row groups are decoded, while those are
# in the CPU's caches; rows of later ones wait, decoded.
BLOCKS_AHEAD = 2

# A row group in which one stream begins and another ends is decoded once, at the epoch's start, if no more than so many
# of its rows have to be kept for the end: 160 bytes each with 40 columns.  Longer ones are decoded again.
KEPT_ROWS = 65536


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

    Neighbouring streams may share a row group: the one begins in it, the other ends in it.  They get it from one visit
    where their places lie within a block of each other, which in a small dataset is always, or where the one that needs
    it later has no more than KEPT_ROWS rows in it, which wait in their blocks; else that stream decodes it again.
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
        much_later = visit is not None and part.at - visit.parts[0].at > block_rows
        if visit is None or (much_later and part.stop - part.start > KEPT_ROWS):
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
        self._streams, self._start_step = streams, start_step
        window = self._order.window if self._order.shuffle else 1
        self._block_rows = -(-BLOCK_ROWS // window) * window
        self._rows = {stream: self._order.stream_rows(stream) for stream in streams}
        self._full_steps = min(self._rows.values()) // self._order.stream_batch
        self._blocks: dict[tuple[int, int], Once] = {}  # by stream and number: those that the next steps need
        self._needed: tuple[range, list[Once]] = range(0), []  # numbers of blocks that the last step needed, and those
        self._oldest = first_block = start_step * self._order.stream_batch // self._block_rows
        self._lock = threading.Lock()  # of what follows
        self._frames: dict[int, Frame] = {}  # by step
        self._pieces: dict[tuple[int, int], list[Piece]] = {}  # decoded, of blocks that are not filled in yet
        self._fills: dict[tuple[int, int], Once] = {}
        self._visits_of: dict[tuple[int, int], list[Visit]] = {}
        for visit in visits(epoch, streams, self._block_rows, first_block * self._block_rows):
            for part in visit.parts:
                for number, _, _ in self._blocks_of(part):
                    self._visits_of.setdefault((part.stream, number), []).append(visit)
            visit.once = Once(partial(self._decode, visit))

    def plan(self, step: int) -> tuple[Callable[[], Batch], list[Callable[[], None]]]:
        """The work that makes batch `step`, and the work on blocks that later batches will need."""
        size, start = self._block_rows, step * self._order.stream_batch
        numbers = range(start // size, (start + self._order.stream_batch - 1) // size + 1)
        ahead = []
        if numbers != self._needed[0]:
            for stream, rows in self._rows.items():
                for old in range(self._oldest, numbers.start):
                    self._blocks.pop((stream, old), None)
                if numbers.stop * size < rows:
                    ahead.append(self._block(stream, numbers.stop).run)
            self._needed = (
                numbers,
                [self._block(s, n) for s, rows in self._rows.items() for n in numbers if n * size < rows],
            )
            self._oldest = numbers.start
        blocks = self._needed[1]

        def work() -> Batch:
            for block in blocks:
                block.run()  # does what no other thread has begun, before waiting for what they have
            for block in blocks:
                block.result()
            with self._lock:
                frame = self._frames.pop(step, None) or self._new_frame(step)
            return frame.batch(self._order.rows_in_step(step))

        return work, ahead

    def _block(self, stream: int, number: int) -> Once:
        key = (stream, number)
        if key not in self._blocks:
            self._blocks[key] = Once(partial(self._finish, stream, number))
        return self._blocks[key]

    def _finish(self, stream: int, number: int) -> None:
        needed = self._visits_of[stream, number]
        for visit in needed:
            visit.once.run()
        for visit in needed:
            visit.once.result()
        with self._lock:
            fill_in = self._fills.pop((stream, number))
        fill_in.run()
        fill_in.result()

    def _decode(self, visit: Visit) -> None:
        columns = self._source.read(visit.row_group)
        first_row = int(self._order.group_starts[visit.row_group])
        size = self._block_rows
        near = []
        for part in visit.parts:
            for number, start, stop in self._blocks_of(part):
                piece = Piece(columns, start, stop, part.at + start - part.start - number * size, first_row)
                much_later = number > self._oldest + BLOCKS_AHEAD
                if much_later and len(visit.parts) > 1:
                    piece = piece.copy(self._pool)
                with self._lock:
                    pieces = self._pieces.setdefault((part.stream, number), [])
                    pieces.append(piece)
                    if len(pieces) < len(self._visits_of[part.stream, number]):
                        continue
                    fill_in = Once(partial(self._fill, part.stream, number))
                    self._fills[part.stream, number] = fill_in
                if not much_later:
                    near.append(fill_in)
        del columns
        for fill_in in near:  # while what was decoded is in the CPU's caches
            fill_in.run()

    def _fill(self, stream: int, number: int) -> None:
        """Shuffle a block into the frames of its batches."""
        order = self._order
        start = number * self._block_rows
        stop = min(start + self._block_rows, self._rows[stream])
        batch = order.stream_batch
        first_at = (stream - self._streams.start) * batch
        with self._lock:
            pieces = self._pieces.pop((stream, number))
            runs = []
            for step in range(max(start // batch, self._start_step), -(-stop // batch)):
                frame = self._frames.get(step)
                if frame is None:
                    frame = self._frames[step] = self._new_frame(step)
                low, high = max(start, step * batch), min(stop, (step + 1) * batch)
                runs.append(Run(frame, first_at + low - step * batch, low - start, high - low))
        if runs:
            fill(pieces, self._epoch.shuffled(stream, start, stop), runs, self._source.shape, self._pool)

    def _new_frame(self, step: int) -> Frame:
        rows = len(self._streams) * self._order.stream_batch
        return Frame(self._source.shape, rows, step < self._full_steps, self._pool)

    def _blocks_of(self, part: Part) -> Iterator[tuple[int, int, int]]:
        """The blocks that a part reaches into, with the rows of its row group that go into each."""
        size = self._block_rows
        end = part.at + part.stop - part.start
        for number in range(part.at // size, -(-end // size)):
            low, high = max(part.at, number * size), min(end, (number + 1) * size)
            yield number, part.start + low - part.at, part.start + high - part.at


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
        if threading.current_thread() in self._threads:
            # A garbage collection in the middle of its work found the iterator dropped.  Others may wait for that work
            # or for a lock it holds, so what waits for them is a thread that nobody waits for.
            threading.Thread(target=self.stop, name="loader-stop", daemon=True).start()
            return
        self._stopped.set()
        for _ in self._threads:
            self._queue.put((-1, next(self._count), None))
        for thread in self._threads:
            thread.join()


def _serve(queue: PriorityQueue, stopped: threading.Event) -> None:
    while not stopped.is_set():
        _, _, work = queue.get()
        if work is not None:
            work()
