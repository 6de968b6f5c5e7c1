"""Hosts tell each other where their ranks are, without comparing clocks."""

import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from kernels.errors import UserError
from trainer.__main__ import _classify
from trainer.pulse import SILENT_SECONDS, Board, Pulse, judge
from trainer.watch import EXCHANGE_SECONDS, Hosts, Watch, end_in_words

ROOT = Path(__file__).resolve().parent.parent.parent


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
    assert verdict.message().startswith("rank 2 is frozen, or the network to its host is down: nothing heard of it for")


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


def test_a_rank_that_waits_is_told_from_one_that_works(monkeypatch):
    def frames(*names):
        """The innermost first."""
        frame = None
        for name in reversed(names):
            file, _, function = name.partition(":")
            code = type("Code", (), {"co_filename": file, "co_name": function})
            frame = type("Frame", (), {"f_code": code, "f_back": frame})
        return frame

    watch = Watch(Pulse(Board.private(), 0, hang_seconds=1, first_seconds=1), rank=0, local_rank=0, on_verdict=print)
    pipeline = ("/torchrec/distributed/train_pipeline.py:progress", f"{ROOT}/trainer/trainer.py:_train")
    for innermost, waits in {
        ("/torch/distributed/distributed_c10d.py:all_reduce", f"{ROOT}/trainer/metrics.py:all_reduce"): True,
        ("/torch/autograd/graph.py:_engine_run_backward", f"{ROOT}/trainer/pipeline.py:_timed"): True,
        (f"{ROOT}/trainer/pipeline.py:_timed",): False,
        ("/threading.py:wait", f"{ROOT}/trainer/data/loader.py:result"): False,
    }.items():
        stack = frames(*innermost, *pipeline)
        monkeypatch.setattr(sys, "_current_frames", lambda stack=stack: {watch._main: stack})
        assert watch._waits() == waits, innermost


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError(), "memory"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"), "memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), "memory"),
        (RuntimeError("[../gloo/transport/tcp/pair.cc] Connection closed by peer [127.0.0.1]:1"), "peer"),
        (RuntimeError("Timed out waiting 300000ms for recv operation to complete"), "timeout"),
        (UserError("no such column"), "user"),
        (FloatingPointError("loss is NaN at step 7"), "nan"),
        (KeyError("x"), "internal"),
    ],
)
def test_kinds_of_errors(error, kind):
    assert _classify(error)[0] == kind
