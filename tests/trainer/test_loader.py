"""The loader's threads, its memory, and gathering, with a source in memory instead of files."""

import gc
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.errors import UserError
from trainer.data.assemble import Frame, Piece, Run, fill
from trainer.data.base import Bags, Columns, Shape
from trainer.data.loader import Assembler, Batches, Once, visits
from trainer.data.memory import Pool
from trainer.data.order import Order

SHAPE = Shape(features=("a",), multi_hot=(False,), dense=1, labels=1)


class Numbers:
    """A source whose dense input, label and id are the row number; counts what is decoded."""

    def __init__(self, row_groups: tuple[int, ...], fail_at: int | None = None, wait: threading.Event | None = None):
        self.row_groups, self.shape = row_groups, SHAPE
        self.fail_at, self.wait = fail_at, wait
        self.reads: list[int] = []
        self.most_at_once = self._now = 0
        self._lock = threading.Lock()

    def check(self) -> None:
        pass

    def read(self, row_group: int) -> Columns:
        with self._lock:
            self.reads.append(row_group)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        if self.wait is not None:
            assert self.wait.wait(30)
        if row_group == self.fail_at:
            raise UserError(f"file f, row group {row_group}, row 3: column 'x' is nan")
        start = sum(self.row_groups[:row_group])
        numbers = np.arange(start, start + self.row_groups[row_group])
        floats = numbers.astype(np.float32)
        with self._lock:
            self._now -= 1
        return Columns(numbers=[floats, floats], ids=[numbers.astype(np.int32)], holes=[False])


def loader(source: Numbers, *, streams: int = 4, batch_size: int = 16, start_step: int = 0, **options) -> Batches:
    order = Order(row_groups=source.row_groups, streams=streams, batch_size=batch_size, seed=1, window=8)
    assembler = Assembler(source, order.epoch(0), range(streams), start_step, Pool())
    return Batches(assembler, range(start_step, order.steps_per_epoch), **({"threads": 2, "prefetch": 3} | options))


def loader_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("loader-")]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    assert not loader_threads()
    yield
    assert not loader_threads()


def test_threads_end_with_the_epoch():
    batches = loader(Numbers((30, 40, 50)))
    assert loader_threads()
    rows = [row for batch in batches for row in batch.row_B.tolist() if row >= 0]
    assert sorted(rows) == list(range(120))
    assert not loader_threads()
    assert next(batches, None) is None, "an iterator that has ended stays so"


def test_close_stops_the_threads_and_may_be_called_again():
    batches = loader(Numbers((1000,) * 20))
    next(batches)
    batches.close()
    assert not loader_threads()
    batches.close()
    assert next(batches, None) is None


def test_with_closes_also_when_the_consumer_fails():
    with pytest.raises(ZeroDivisionError), loader(Numbers((1000,) * 20)) as batches:
        next(batches)
        raise ZeroDivisionError
    assert not loader_threads()


def test_dropping_the_iterator_stops_the_threads():
    batches = loader(Numbers((1000,) * 20))
    next(batches)
    del batches
    gc.collect()
    assert not loader_threads()


def test_an_iterator_that_a_thread_of_its_own_finds_dropped():
    """A cycle of references is collected in whichever thread allocates; others may wait for that thread's work."""
    dropped = threading.Event()

    class Collecting(Numbers):
        def read(self, row_group: int) -> Columns:
            if row_group == 7:
                assert dropped.wait(30)
                gc.collect()
            return super().read(row_group)

    gc.disable()
    try:
        cycle = [batches := loader(Collecting((100,) * 20), threads=3, streams=1)]
        cycle.append(cycle)
        del batches, cycle
        dropped.set()
        deadline = time.monotonic() + 30
        while loader_threads() and time.monotonic() < deadline:
            time.sleep(0.005)
    finally:
        gc.enable()
    assert not loader_threads()


def test_an_error_in_a_thread_is_raised_where_the_batch_is_asked_for():
    batches = loader(Numbers((30, 40, 50), fail_at=1))
    with pytest.raises(UserError, match="file f, row group 1, row 3: column 'x' is nan"):
        list(batches)
    assert not loader_threads()


def test_a_broken_row_group_later_on_does_not_stop_the_batches_before_it():
    order = Order(row_groups=(40_000,) * 4, streams=1, batch_size=1000, seed=1, window=8).epoch(0)
    last = order.pieces(0, 120_000, 160_000)[0].row_group
    batches = loader(Numbers((40_000,) * 4, fail_at=last), streams=1, batch_size=1000)
    for _ in range(98):  # blocks of 32,768 rows: the third one ends at 98,304
        next(batches)
    with pytest.raises(UserError):
        list(batches)


def test_no_more_is_made_ahead_than_asked_for(monkeypatch):
    """One batch taken, two prefetched, one block for later ones: with a row group each, four of a hundred."""
    monkeypatch.setattr("trainer.data.loader.BLOCK_ROWS", 100)
    source = Numbers((100,) * 100)
    with loader(source, streams=1, batch_size=104, prefetch=2) as batches:
        next(batches)
        time.sleep(0.1)
        assert len(source.reads) <= 5


def test_row_groups_are_decoded_by_several_threads_at_once():
    go = threading.Event()
    source = Numbers((100,) * 8, wait=go)
    batches = loader(source, threads=3)
    deadline = time.monotonic() + 20
    while source.most_at_once < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    go.set()
    assert len(list(batches)) == 50 and source.most_at_once == 3


def test_a_row_group_that_streams_share_is_decoded_once():
    source = Numbers((7, 300, 11))
    list(loader(source, streams=8, batch_size=16))
    assert sorted(source.reads) == [0, 1, 2]


@pytest.mark.parametrize(("kept", "times"), [(49, 2), (50, 1)])
def test_rows_that_a_stream_needs_much_later_are_kept_or_decoded_again(monkeypatch, kept, times):
    monkeypatch.setattr("trainer.data.loader.BLOCK_ROWS", 8)
    monkeypatch.setattr("trainer.data.loader.KEPT_ROWS", kept)
    source = Numbers((100,) * 5)
    rows = [row for batch in loader(source, streams=2, batch_size=4) for row in batch.row_B.tolist() if row >= 0]
    assert sorted(rows) == list(range(500))
    counts = np.bincount(source.reads)
    assert sorted(counts) == [1, 1, 1, 1, times], "the one in the middle ends stream 0 and begins stream 1"


def test_a_seek_decodes_only_what_is_ahead():
    source = Numbers((40_000,) * 8)
    found = list(loader(source, streams=1, batch_size=1000, start_step=290))
    assert len(found) == 30 and len(source.reads) == 2


@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.integers(1, 5), st.integers(1, 20), st.integers(0, 3))
@settings(max_examples=80)
def test_visits_cover_every_row_once(row_groups, streams, block_rows, first_block):
    order = Order(row_groups=tuple(row_groups), streams=streams, batch_size=streams, seed=2, window=4)
    epoch = order.epoch(0)
    first = first_block * block_rows
    found = visits(epoch, range(streams), block_rows, first)
    for stream in range(streams):
        parts = sorted((p.at, v.row_group, p.start, p.stop) for v in found for p in v.parts if p.stream == stream)
        expected = epoch.pieces(stream, first, order.stream_rows(stream))
        assert [(g, start, stop) for _, g, start, stop in parts] == [tuple(p) for p in expected]
        at = first
        for place, _, start, stop in parts:
            assert place == at
            at += stop - start


bags = st.lists(st.lists(st.integers(0, 99), max_size=4), max_size=12)


def as_bags(lists: list[list[int]], dtype=np.int32) -> Bags:
    offsets = np.concatenate([[0], np.cumsum([len(b) for b in lists])]).astype(np.int64)
    return Bags(np.array([i for b in lists for i in b], dtype), offsets)


@st.composite
def blocks(draw):
    """A shape, the rows of a block in pieces of row groups, its shuffle, and where its places go in which batches."""
    kinds = draw(st.lists(st.sampled_from(["small", "large", "bags"]), min_size=1, max_size=7))
    dense, labels = draw(st.sampled_from([0, 1, 13, 15, 16, 17, 33])), draw(st.integers(0, 2))
    shape = Shape(
        features=tuple(f"f{i}" for i in range(len(kinds))),
        multi_hot=tuple(kind == "bags" for kind in kinds),
        dense=dense,
        labels=labels,
        weighted=draw(st.booleans()),
        wide=draw(st.booleans()),
        small=tuple(kind == "small" for kind in kinds),
    )
    sizes = draw(st.lists(st.integers(1, 150), min_size=1, max_size=3))
    rows = sum(sizes)
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    index = None if draw(st.booleans()) else rng.permutation(rows).astype(np.uint32)
    ends = sorted({*rng.integers(1, rows + 1, draw(st.integers(0, 3))).tolist(), rows})
    batch_rows = draw(st.sampled_from([rows, rows + 3, -(-rows // 64) * 64 + 64]))
    return shape, sizes, rng, index, ends, batch_rows, draw(st.booleans())


@given(blocks())
@settings(max_examples=60, deadline=None)
def test_a_block_goes_where_the_shuffle_puts_it(case):
    """Against numpy, for every kind of column, pieces in any order with rows around them, runs of several batches."""
    shape, sizes, rng, index, ends, batch_rows, holes = case
    rows, dtype = sum(sizes), shape.id_dtype
    highest = {"small": 1 << 15, "large": (1 << 40) if shape.wide else (1 << 31) - 1}
    numbers = rng.random((shape.numbers, rows), np.float32)
    ids = []
    for f, many in enumerate(shape.multi_hot):
        if many:
            ids.append([rng.integers(0, 99, rng.integers(0, 4)).tolist() for _ in range(rows)])
        else:
            column = rng.integers(0, highest["small" if shape.small[f] else "large"], rows)
            ids.append(np.where(holes & (rng.random(rows) < 0.2), -1, column).astype(dtype))
    pieces, row_numbers, at = [], [], 0
    for p, size in enumerate(sizes):
        before, after, stop = p, 2 * p, at + size
        pad = lambda column: np.concatenate([column[:1]] * before + [column[at:stop]] + [column[:1]] * after)  # noqa: E731,B023
        columns = Columns(
            numbers=[pad(column) for column in numbers],
            ids=[
                as_bags([[5]] * before + column[at:stop] + [[6]] * after, dtype) if many else pad(column)
                for column, many in zip(ids, shape.multi_hot, strict=True)
            ],
            holes=[holes and not many for many in shape.multi_hot],
        )
        piece = Piece(columns, before, before + size, at, 1000 * p)
        pieces.append(piece.copy(Pool()) if p == 1 else piece)
        row_numbers += range(1000 * p + before, 1000 * p + before + size)
        at = stop
    frames, runs, first = [], [], 0
    for end in ends:  # each batch holds one run, in its middle
        frames.append(Frame(shape, batch_rows, False, Pool()))
        runs.append(Run(frames[-1], (batch_rows - (end - first)) // 2, first, end - first))
        first = end
    fill(pieces[::-1], index, runs, shape, Pool())
    order = np.arange(rows) if index is None else index
    for run in runs:
        batch = run.frame.batch(7)
        inside, source = slice(run.at, run.at + run.rows), order[run.first : run.first + run.rows]
        padding = np.ones(batch_rows, bool)
        padding[inside] = False
        assert np.array_equal(batch.dense_BK[inside].numpy(), numbers[: shape.dense, source].T)
        assert np.array_equal(
            batch.labels_BT[inside].numpy(), numbers[shape.dense : shape.dense + shape.labels, source].T
        )
        assert np.array_equal(
            batch.weight_B[inside].numpy(), numbers[-1, source] if shape.weighted else np.ones(run.rows)
        )
        assert batch.row_B[inside].tolist() == [row_numbers[i] for i in source]
        assert (batch.row_B.numpy()[padding] == -1).all() and (batch.weight_B.numpy()[padding] == 0).all()
        for name, column, many in zip(shape.features, ids, shape.multi_hot, strict=True):
            jagged = batch.ids[name]
            expected = [[]] * run.at + [column[i] if many else [int(column[i])] * int(column[i] >= 0) for i in source]
            expected += [[]] * (batch_rows - len(expected))
            assert jagged.lengths().tolist() == [len(bag) for bag in expected]
            assert jagged.values().tolist() == [i for bag in expected for i in bag]


@given(bags, st.data())
def test_slicing_bags(lists, data):
    start = data.draw(st.integers(0, len(lists)))
    stop = data.draw(st.integers(start, len(lists)))
    found = as_bags(lists).slice(start, stop)
    assert [found.values[a:b].tolist() for a, b in zip(found.offsets, found.offsets[1:], strict=False)] == lists[
        start:stop
    ]


def test_memory_comes_back_when_the_last_view_is_gone():
    pool = Pool()
    array = pool.array((100, 3), np.float32)
    address = array.ctypes.data
    view = array[10:, 1]
    del array
    assert pool.array((100, 3), np.float32).ctypes.data != address
    del view
    gc.collect()
    taken = [pool.array((100, 3), np.float32) for _ in range(3)]
    assert address in [a.ctypes.data for a in taken]
    assert len({a.ctypes.data for a in taken}) == 3


@given(st.lists(st.tuples(st.integers(0, 500), st.sampled_from([np.int32, np.int64, np.float32])), max_size=30))
def test_arrays_of_a_pool_never_overlap(wanted):
    pool = Pool()
    arrays = [pool.array(count, dtype) for count, dtype in wanted]
    for number, array in enumerate(arrays):
        array.fill(number)
    for number, (array, (count, dtype)) in enumerate(zip(arrays, wanted, strict=True)):
        assert array.shape == (count,) and array.dtype == dtype and (array == number).all()


def test_work_is_done_once_and_its_error_reaches_everyone():
    calls = []
    good = Once(lambda: calls.append(1) or "result")
    good.run()
    good.run()
    assert good.result() == good.result() == "result" and calls == [1]
    bad = Once(lambda: 1 / 0)
    bad.run()
    depths = []
    for _ in range(3):
        with pytest.raises(ZeroDivisionError) as found:
            bad.result()
        depths.append(len(found.traceback))
    assert len(set(depths)) == 1, "the traceback grows with every raise"
