"""The data order: property tests, without files or processes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.errors import UserError
from trainer.data.order import SORTED_WINDOW, Order, Piece, hash64, key_of, permutations

orders = st.builds(
    lambda groups, streams, per_stream, seed, shuffle, window: Order(
        row_groups=tuple(groups),
        streams=streams,
        batch_size=streams * per_stream,
        seed=seed,
        shuffle=shuffle,
        window=window,
    ),
    groups=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    streams=st.sampled_from([1, 2, 3, 8]),
    per_stream=st.integers(1, 9),
    seed=st.integers(0, 2**31 - 1),
    shuffle=st.booleans(),
    window=st.sampled_from([1, 2, 7, 16, 64, 1000]),
)


def batches(order: Order, epoch: int) -> list[np.ndarray]:
    found = order.epoch(epoch)
    return [found.global_batch(step) for step in range(order.steps_per_epoch)]


def test_the_example_of_the_module():
    order = Order(row_groups=(3, 2, 2), streams=2, batch_size=4, shuffle=False)
    assert order.rows == 7 and order.steps_per_epoch == 2
    assert [b.tolist() for b in batches(order, 0)] == [[0, 1, 3, 4], [2, -1, 5, 6]]
    assert [order.rows_in_step(k) for k in range(3)] == [4, 3, 0]
    assert order.epoch(0).pieces(1, 0, 4) == [Piece(1, 0, 2), Piece(2, 0, 2)]


@given(orders, st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_every_row_is_read_exactly_once_in_an_epoch(order, epoch):
    rows = np.concatenate([*batches(order, epoch), np.empty(0, np.int64)])
    assert sorted(rows[rows >= 0]) == list(range(order.rows))


@given(orders)
@settings(max_examples=100, deadline=None)
def test_padding_stands_only_behind_the_last_row_of_a_stream(order):
    each = order.stream_batch
    for step, batch in enumerate(batches(order, 1)):
        assert (batch >= 0).sum() == order.rows_in_step(step)
        assert (batch >= 0).any(), "a step without rows"
        for stream in range(order.streams):
            there = batch[stream * each : (stream + 1) * each] >= 0
            left = order.stream_rows(stream) - step * each
            assert there.tolist() == [i < left for i in range(each)]
    assert order.rows_in_step(order.steps_per_epoch) == 0


@given(orders, st.sampled_from([1, 2, 3, 4, 8]))
@settings(max_examples=100, deadline=None)
def test_ranks_share_the_streams_in_order(order, world_size):
    if order.streams % world_size:
        with pytest.raises(UserError, match=r"do not divide streams"):
            order.streams_of(0, world_size)
        return
    found = [s for rank in range(world_size) for s in order.streams_of(rank, world_size)]
    assert found == list(range(order.streams))


@given(orders, st.data())
@settings(max_examples=100, deadline=None)
def test_any_rows_of_a_stream_can_be_looked_up_without_those_before(order, data):
    epoch = order.epoch(2)
    stream = data.draw(st.integers(0, order.streams - 1))
    rows = order.stream_rows(stream)
    start = data.draw(st.integers(0, rows))
    stop = data.draw(st.integers(start, rows))
    assert epoch.rows(stream, start, stop).tolist() == epoch.rows(stream, 0, rows)[start:stop].tolist()


@given(orders)
@settings(max_examples=60, deadline=None)
def test_a_shuffle_stays_inside_its_window(order):
    epoch = order.epoch(0)
    base = np.concatenate([[0], np.cumsum(order.row_groups)])
    for stream in range(order.streams):
        rows = order.stream_rows(stream)
        pieces = epoch.pieces(stream, 0, rows)
        plain = [row for p in pieces for row in range(base[p.row_group] + p.start, base[p.row_group] + p.stop)]
        window = order.window if order.shuffle else 1
        for start in range(0, rows, window):
            stop = min(start + window, rows)
            assert sorted(epoch.rows(stream, start, stop)) == sorted(plain[start:stop])


def test_evaluation_reads_in_file_order_whatever_the_epoch():
    order = Order(row_groups=(5, 0, 9, 3), streams=1, batch_size=4, shuffle=False, window=8, seed=3)
    rows = np.concatenate(batches(order, 5))
    assert rows[rows >= 0].tolist() == list(range(17))


def test_epochs_seeds_and_streams_differ_and_repeat():
    def first(seed: int, epoch: int, stream: int = 0) -> list[int]:
        order = Order(row_groups=(64,) * 16, streams=2, batch_size=2, seed=seed, window=256)
        return order.epoch(epoch).rows(stream, 0, 512).tolist()

    assert first(1, 0) == first(1, 0)
    assert len({tuple(first(seed, epoch)) for seed in range(3) for epoch in range(4)}) == 12
    one, two = (Order(row_groups=(512, 512), streams=2, batch_size=2, seed=1, window=512).epoch(0),) * 2
    assert one.shuffled(0, 0, 512).tolist() != two.shuffled(1, 0, 512).tolist()


def test_the_order_is_written_in_stone():
    """A resumed run must see the rows of the run that it goes on: these numbers may not change with any library."""
    order = Order(row_groups=(7, 5, 4, 8), streams=2, batch_size=4, seed=1, window=6)
    assert [b.tolist() for b in batches(order, 0)[:3]] == [[16, 19, 11, 8], [20, 21, 0, 7], [17, 18, 10, 9]]
    large = permutations(key_of(1, 2, 3), 0, 2, 5000)
    assert int((large[1] * np.arange(5000)).sum() % 1000003) == 606681


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, SORTED_WINDOW, SORTED_WINDOW + 1, 4096, 5000])
def test_permutations_are_permutations(size):
    found = permutations(key_of(9), 3, 4, size)
    assert found.shape == (4, size)
    assert (np.sort(found, axis=1) == np.arange(size)).all()
    alone = permutations(key_of(9), 5, 1, size)
    assert (found[2] == alone[0]).all(), "a window's permutation depends on its number alone"


@pytest.mark.parametrize("size", [SORTED_WINDOW + 1, 4096, 5000])
def test_large_windows_are_the_bijection_without_values_outside(size):
    key = hash64(key_of(9) + np.arange(3, 4, dtype=np.uint64))
    constants = hash64(key + np.arange(10, dtype=np.uint64)).astype(np.uint32).tolist()
    bits = (size - 1).bit_length()
    found = []
    for x in range(1 << bits):
        for times, plus in zip(constants[::2], constants[1::2], strict=True):
            x = (x * (times | 1) + plus) % (1 << bits)
            x ^= x >> (bits + 1) // 2
        found += [x] if x < size else []
    assert permutations(key_of(9), 3, 1, size).tolist() == [found]


def test_large_windows_are_shuffled_as_well_as_a_fair_shuffle_would():
    """Five standard deviations of a fair shuffle of n: mean distance n/3, correlations 1/sqrt(n), one fixed point."""
    n, trials = 4096, 200
    found = permutations(key_of(4), 0, trials, n).astype(float)
    place = np.arange(n)
    distance = np.abs(found - place).mean(1) / n
    assert abs(distance.mean() - 1 / 3) < 5 * 0.0033 / np.sqrt(trials)
    neighbours = np.array([np.corrcoef(p[:-1], p[1:])[0, 1] for p in found])
    assert abs(neighbours.mean()) < 5 / np.sqrt(n * trials) and neighbours.std() < 1.3 / np.sqrt(n)
    assert abs((found == place).sum(1).mean() - 1) < 5 / np.sqrt(trials)
    assert abs((np.diff(found, axis=1) == 1).sum(1).mean() - 1) < 5 / np.sqrt(trials)
    # where the first row of a window goes is uniform over the window: chi-square with 7 degrees of freedom
    counts = np.bincount(
        (np.argsort(permutations(key_of(5), 0, 800, n), axis=1)[:, 0] // (n // 8)).astype(int), minlength=8
    )
    assert ((counts - 100) ** 2 / 100).sum() < 30


def test_small_windows_have_every_permutation():
    found = {tuple(p) for p in permutations(key_of(6), 0, 400, 4)}
    assert len(found) == 24


def test_keys_tell_tuples_apart():
    keys = {int(key_of(a, b, c)) for a in range(8) for b in range(8) for c in range(8)}
    assert len(keys) == 512
    x = np.arange(4096, dtype=np.uint64)
    assert len(set(hash64(x).tolist())) == 4096


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch_size": 10}, "does not divide over streams = 4; use 8 or 12"),
        ({"batch_size": 2}, "streams = 4; use 4$"),
        ({"streams": 0}, "streams = 0: must be at least 1"),
        ({"window": 0}, "window = 0"),
        ({"window": 2**31 + 1}, "at most 2\\*\\*31"),
    ],
)
def test_wrong_orders_say_what_would_be_right(wrong, message):
    with pytest.raises(UserError, match=message):
        Order(**({"row_groups": (5,), "streams": 4, "batch_size": 8} | wrong))


def test_ranks_outside_the_world_are_refused():
    with pytest.raises(UserError, match="rank 2 of 2"):
        Order(row_groups=(5,), streams=4, batch_size=8).streams_of(2, 2)
