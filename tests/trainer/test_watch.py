"""Hosts tell each other where their ranks are, without comparing clocks."""

import time

import pytest
import torch.distributed as dist

from trainer.pulse import SILENT_SECONDS, Board, Pulse, judge
from trainer.watch import EXCHANGE_SECONDS, Hosts, Watch, end_in_words


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "monotonic_ns", lambda: int(now[0] * 1e9))
    return now


def test_a_host_that_is_heard_of_no_more_gets_silent(clock):
    store = dist.HashStore()
    hosts = [Hosts(store, first_rank=first, ranks=2, size=4) for first in (0, 2)]
    boards = [Board(Board.private()._memory, 1) for _ in hosts]
    pulses = [Pulse(board, 0, hang_seconds=60, first_seconds=60) for board in boards]
    pulses[1].mark("forward", 5)

    def exchange(*speaking):
        clock[0] += EXCHANGE_SECONDS
        for i in speaking:
            pulses[i].alive()
        for i in (0, 1):
            hosts[i].exchange(boards[i].seen(2 * i), publish=i in speaking)

    exchange(0, 1)
    exchange(0, 1)
    (seen,) = hosts[0].seen()
    assert (seen.rank, seen.where) == (2, "in forward of step 5 (4 completed)")
    assert seen.silent < SILENT_SECONDS and not judge([*boards[0].seen(0), seen])
    for _ in range(70):
        exchange(0)
    pulses[0].mark("backward", 5)
    pulses[0].mark("backward", 6)
    verdict = judge([*boards[0].seen(0), *hosts[0].seen()])
    assert [r.rank for r in verdict.ranks] == [2]
    assert verdict.message().startswith("rank 2 is frozen: nothing heard of it for")


def test_a_store_that_does_not_answer_is_silence(clock):
    class Gone:
        def set_timeout(self, limit):
            pass

        def set(self, key, value):
            raise dist.DistNetworkError("gone")

    hosts = Hosts(Gone(), first_rank=0, ranks=1, size=2)
    hosts.exchange([], publish=True)
    assert hosts.seen() == []


def test_the_thread_ends_with_the_first_verdict_it_sees_twice(tmp_path):
    board = Board.create(tmp_path / "board", 2)
    pulses = [Pulse(board, i, hang_seconds=60, first_seconds=300) for i in (0, 1)]
    verdicts = []
    watch = Watch(pulses[0], rank=0, local_rank=0, on_verdict=lambda verdict, mine: verdicts.append((verdict, mine)))
    watch.start()
    pulses[1].mark("data", 3)
    board.set_ended(1, -11)
    watch.join(60)
    ((verdict, mine),) = verdicts
    assert not mine
    assert verdict.message(end_in_words) == "rank 1 ended (SIGSEGV) in data of step 3 (2 completed)"
    assert "test_watch.py" in watch.stack()
