"""kernels/threads.py: torch's OpenMP team and Python's threads do the same work."""

import ctypes
import threading

import pytest
import torch

from kernels import threads


def on_team(work, parts):
    team = threads.openmp()
    assert team is not None, "torch's wheels for Linux have OpenMP"
    return threads.run_on_team(team, work, parts)


EITHER = pytest.mark.parametrize("run", [threads.run, threads.run_on_pool, on_team], ids=["run", "pool", "team"])


@EITHER
@pytest.mark.parametrize("count", [2, 3, 7, 40])
def test_every_part_is_done_once_whatever_the_team(run, count):
    for _ in range(20):
        seen = []
        parts = [(k, seen) for k in range(count)]
        assert run(lambda k, seen: seen.append(k) or 2 * k, parts) == list(range(0, 2 * count, 2))
        assert sorted(seen) == list(range(count))


@EITHER
@pytest.mark.parametrize("bad", [0, 1, 2])
def test_an_error_of_any_part_reaches_the_caller(run, bad):
    def work(k):
        if k == bad:
            raise IndexError(f"part {k}")

    with pytest.raises(IndexError, match=f"part {bad}"):
        run(work, [(k,) for k in range(3)])
    assert run(lambda k: k, [(1,), (2,)]) == [1, 2]


def test_parts_run_side_by_side_on_the_team():
    both = threading.Barrier(2, timeout=60)
    on_team(lambda _: both.wait(), [(0,), (1,)])


def test_a_team_within_a_team_and_from_a_thread_that_is_not_the_main_one():
    def inner(k):
        return sum(threads.run(lambda x: x, [(k,), (1,)]))

    assert on_team(inner, [(1,), (2,), (3,)]) == [2, 3, 4]
    found = []
    other = threading.Thread(target=lambda: found.extend(threads.run(inner, [(1,), (2,), (3,)])))
    other.start()
    other.join(60)
    assert found == [2, 3, 4]


def test_the_team_is_the_one_whose_size_torch_sets():
    before = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert ctypes.CDLL(None).omp_get_max_threads() == count
    finally:
        torch.set_num_threads(before)
