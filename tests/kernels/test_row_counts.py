"""The compiled count of updated rows against torch's unique, and its plain twin."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import row_counts
from kernels.row_counts import MOST, RowCounter, add_once

ROWS, FEATURES = (7, 300, 1), (0, 1, 1, None, 2)


def ids_of(draw, dtype):
    limits = [1000 if t is None else ROWS[t] for t in FEATURES]
    lists = [draw(st.lists(st.integers(0, limit - 1), max_size=40)) for limit in limits]
    ends = [0]
    for of_feature in lists:
        ends.append(ends[-1] + len(of_feature))
    return torch.tensor([i for of_feature in lists for i in of_feature], dtype=dtype), ends


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from([torch.int32, torch.int64]), st.sampled_from([0, 8]))
def test_every_row_of_a_step_counts_once(data, dtype, nanoseconds):
    """nanoseconds 0: one thread has all features; 8, of few ids, too: the cuts are tried below."""
    counter, twin = (RowCounter(rows=ROWS, features=FEATURES, device=torch.device("cpu")) for _ in range(2))
    expected = [torch.zeros(rows, dtype=torch.int32) for rows in ROWS]
    row_counts.NANOSECONDS = nanoseconds
    for _ in range(3):
        ids_N, ends = ids_of(data.draw, dtype)
        counter.add(ids_N, ends)
        per_table = [
            torch.cat([ids_N[ends[f] : ends[f + 1]].long() for f, owner in enumerate(FEATURES) if owner == t])
            for t in range(len(ROWS))
        ]
        for t, rows_N in enumerate(per_table):
            expected[t][rows_N.unique()] += 1
            add_once(twin.counts[t], rows_N)
    row_counts.NANOSECONDS = 8
    for t in range(len(ROWS)):
        assert torch.equal(counter.counts[t], expected[t]) and torch.equal(twin.counts[t], expected[t])


def test_threads_share_no_table():
    torch.manual_seed(0)
    features = (0, 0, 1, 2, 2, 2, 3)
    counter = RowCounter(rows=(50, 60, 70, 80), features=features, device=torch.device("cpu"))
    ids_N = torch.randint(0, 50, (len(features) * 9000,))
    ends = [9000 * f for f in range(len(features) + 1)]
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        shares = counter._shares(ends)
        counter.add(ids_N, ends)
    finally:
        torch.set_num_threads(threads)
    assert shares == [(0, 3), (3, 6), (6, 7)]
    assert all(torch.equal(counts[:50], torch.ones(50, dtype=torch.int32)) for counts in counter.counts)


@pytest.mark.parametrize("ids", [[0, 0], [0]])
def test_a_count_stops_at_the_most(ids):
    counter = RowCounter(rows=(2,), features=(0,), device=torch.device("cpu"))
    counter.flat[0] = MOST - 1
    twin = counter.flat.clone()
    for _ in range(3):
        counter.add(torch.tensor(ids), [0, len(ids)])
        add_once(twin, torch.tensor(ids))
        assert counter.flat.tolist() == twin.tolist() == [MOST, 0]


def test_ids_beyond_a_table_are_left_to_the_look_up():
    counter = RowCounter(rows=(2, 3), features=(0, 1), device=torch.device("cpu"))
    counter.add(torch.tensor([1, 2, -1, 2]), [0, 3, 4])
    assert [counts.tolist() for counts in counter.counts] == [[0, 1], [0, 0, 1]]
