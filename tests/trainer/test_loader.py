"""The loader's threads, its memory, and gathering, with a source in memory instead of files."""

import gc
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.errors import UserError
from trainer.data.assemble import Filling, join_bags, take_bags
from trainer.data.base import Bags, Columns, Shape, Sink
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

    def read(self, row_group: int, sink: Sink) -> None:
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
        sink.put(Columns(numbers=[floats, floats], ids=[numbers.astype(np.int32)], holes=[False]))
        with self._lock:
            self._now -= 1


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


def test_a_row_group_that_a_stream_needs_much_later_is_decoded_again(monkeypatch):
    monkeypatch.setattr("trainer.data.loader.BLOCK_ROWS", 8)
    source = Numbers((100,) * 5)
    rows = [row for batch in loader(source, streams=2, batch_size=4) for row in batch.row_B.tolist() if row >= 0]
    assert sorted(rows) == list(range(500))
    counts = np.bincount(source.reads)
    assert sorted(counts) == [1, 1, 1, 1, 2], "the one in the middle ends stream 0 and begins stream 1"


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


def as_lists(found: Bags) -> list[list[int]]:
    return [found.values[a:b].tolist() for a, b in zip(found.offsets[:-1], found.offsets[1:], strict=True)]


@given(bags, st.randoms(use_true_random=False))
def test_taking_bags(lists, random):
    index = list(range(len(lists)))
    random.shuffle(index)
    assert as_lists(take_bags(as_bags(lists), np.array(index, np.uint32), Pool())) == [lists[i] for i in index]


@given(bags, bags, st.data())
def test_joining_and_slicing_bags(one, two, data):
    joined = join_bags([as_bags(one), as_bags(two)], Pool())
    assert as_lists(joined) == one + two
    start = data.draw(st.integers(0, len(one + two)))
    stop = data.draw(st.integers(start, len(one + two)))
    assert as_lists(joined.slice(start, stop)) == (one + two)[start:stop]


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("ends", [(4,), (2, 4), (1, 2, 4)])
@pytest.mark.parametrize("index", [None, (2, 0, 3, 1)])
def test_the_example_of_a_filling(wide, ends, index):
    shape = Shape(features=("a", "b"), multi_hot=(False, True), dense=1, labels=0, weighted=True, wide=wide)
    ids, lists = [10, 11, 12, -1], [[1], [2, 3], [], [4]]
    columns = Columns(  # of a row group that has a row before the block and one after it
        numbers=[np.arange(6, dtype=np.float32) + column for column in (0, 1)],
        ids=[np.array([0, *ids, 0], shape.id_dtype), as_bags([[9], *lists, []], shape.id_dtype)],
        holes=[True, False],
    )
    filling = Filling(shape, 4, None if index is None else np.array(index, np.uint32), len(ends) == 1, Pool())
    for start, stop in reversed(list(zip((0, *ends[:-1]), ends, strict=True))):
        filling.put(columns, start + 1, stop + 1, start, 100)
    block = filling.finish()
    order = index or range(4)
    assert block.ids_Gn.tolist() == [[ids[i] for i in order]] and block.ids_Gn.dtype == shape.id_dtype
    assert block.holes
    assert as_lists(block.bags[0]) == [lists[i] for i in order]
    assert block.numbers_Mn.tolist() == [[i + 1 for i in order], [i + 2 for i in order]]
    assert block.row_n.tolist() == [101 + i for i in order]


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
