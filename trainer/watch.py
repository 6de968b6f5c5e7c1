"""The thread of a rank that watches all ranks, and ends this one with a named report when one has died or hangs.

A rank that waits for a dead or hung one stands in a collective, where Python runs no signal handler; the collective's
own time limit is minutes. This thread looks at the board (trainer/pulse.py) a few times a second instead.

Ranks of other hosts: every host's first rank puts its host's rows into the process group's store once a second, and
every rank reads those of the other hosts; only ages travel, as clocks of hosts are not compared. A host of which
nothing new arrives is silent, and its ranks with it. A second thread does that: a call to the store waits for as long
as TCP does when the network is gone, a quarter of an hour, and the first thread must go on looking.
"""

import json
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from trainer.pulse import SILENT_SECONDS, Pulse, Seen, Verdict, judge

_OURS = str(Path(__file__).parent)
LOOK_SECONDS = 0.25
EXCHANGE_SECONDS = 1.0
MEET_SECONDS = 10.0  # for all hosts to be heard of, when all ranks have just found each other
MEETING_SECONDS = 0.05  # between two looks until then
WARN_SHARE = 6  # a rank that others wait for is named on the screen after this part of its limit


class Watch(threading.Thread):
    """pulse: this process's. rank, local_rank: this one's.
    on_verdict(verdict, mine): called once in the thread, when ranks have died or hang; it ends the process.
        mine: this rank is one of them.
    """

    def __init__(
        self, pulse: Pulse, *, rank: int, local_rank: int, on_verdict: Callable[[Verdict, bool], None]
    ) -> None:
        super().__init__(name="watch", daemon=True)
        self.pulse, self._rank, self._first_rank = pulse, rank, rank - local_rank
        self._on_verdict = on_verdict
        self._main = threading.main_thread().ident
        self._hosts: Hosts | None = None
        self._warned: tuple[int, ...] = ()
        self._over = threading.Event()

    def join_hosts(self, store: Any, *, world_size: int) -> None:
        """Watch the ranks of other hosts too, over the process group's store. Called once, by all ranks."""
        if world_size > self.pulse.board.ranks:
            hosts = Hosts(store, first_rank=self._first_rank, ranks=self.pulse.board.ranks, size=world_size)
            threading.Thread(target=self._exchange, args=(hosts,), name="hosts", daemon=True).start()
            hosts.met.wait(MEET_SECONDS)  # of a host never heard of nobody could say that it has gone silent
            self._hosts = hosts

    def stop(self) -> None:
        self._over.set()

    def seen(self) -> list[Seen]:
        """What is known of every rank now."""
        rows = self.pulse.board.seen(self._first_rank)
        return sorted(rows + self._hosts.seen(), key=lambda r: r.rank) if self._hosts else rows

    def run(self) -> None:
        before: Verdict | None = None
        while not self._over.wait(LOOK_SECONDS):
            self.pulse.alive(waits=self._waits())
            seen = self.seen()
            verdict = judge(seen)
            # A row that is being written can be read half old and half new, but hardly twice in a row.
            if verdict and before and _names(verdict) == _names(before) and not self._over.is_set():
                self._on_verdict(verdict, self._rank in _names(verdict))
                return
            before = verdict
            self._warn(seen)

    def stack(self) -> str:
        """Where the main thread stands, as a traceback."""
        frame = sys._current_frames().get(self._main or 0)
        return "".join(traceback.format_stack(frame)) if frame else ""

    def _exchange(self, hosts: "Hosts") -> None:
        while True:
            hosts.exchange(self.pulse.board.seen(self._first_rank), publish=self._rank == self._first_rank)
            if self._over.wait(EXCHANGE_SECONDS if hosts.met.is_set() else MEETING_SECONDS):
                return

    def _waits(self) -> bool:
        """The main thread stands in a collective, as far as Python's stack shows: a backward counts as one.

        Looked at are the frames inside the last one of ours, as TorchRec's pipeline calls us from its own.
        """
        frame = sys._current_frames().get(self._main or 0)
        while frame is not None and not frame.f_code.co_filename.startswith(_OURS):
            if "/distributed/" in frame.f_code.co_filename or frame.f_code.co_name == "_engine_run_backward":
                return True
            frame = frame.f_back
        return False

    def _warn(self, seen: list[Seen]) -> None:
        """Name those that the others wait for, once for each stay; the command shows a rank's stderr."""
        late = judge(replace(r, limit=r.limit / WARN_SHARE, ended=0) for r in seen)
        if late is None:
            self._warned = ()
        elif _names(late) != self._warned and _first(seen) == self._rank:
            self._warned = _names(late)
            limit = max(r.limit for r in late.ranks) * WARN_SHARE
            print(f"{late.message()}; the run ends when that lasts {limit:.0f} s", file=sys.stderr, flush=True)


class Hosts:
    """Rows of the ranks of other hosts, through the store."""

    def __init__(self, store: Any, *, first_rank: int, ranks: int, size: int) -> None:
        self._store = store.clone() if hasattr(store, "clone") else store  # the main thread may wait in its own
        self._store.set_timeout(timedelta(seconds=EXCHANGE_SECONDS))
        self._key = f"pulse/{first_rank}"
        self._others = [f"pulse/{first}" for first in range(0, size, ranks) if first != first_rank]
        self._heard: dict[str, tuple[int, float, list[Seen]]] = {}  # number of the message, when it came, rows
        self._count = 0
        self.met = threading.Event()  # every other host has been heard of

    def exchange(self, rows: list[Seen], *, publish: bool) -> None:
        """Once every EXCHANGE_SECONDS."""
        try:
            if publish:
                self._count += 1
                self._store.set(self._key, json.dumps([self._count, [asdict(r) for r in rows]]))
            if self._store.check(self._others):
                for key, text in zip(self._others, self._store.multi_get(self._others), strict=True):
                    count, rows_there = json.loads(text)
                    if key not in self._heard or self._heard[key][0] != count:
                        self._heard[key] = (count, time.monotonic(), [Seen(**r) for r in rows_there])
                self.met.set()
        except RuntimeError:  # torch.distributed's errors: the store's host does not answer, so what it said gets old
            pass

    def seen(self) -> list[Seen]:
        found = []
        for _, came, rows in list(self._heard.values()):
            since = max(0.0, time.monotonic() - came - EXCHANGE_SECONDS)
            # Within two messages nothing more is known; after that the rows age with the silence.
            late = since if since > SILENT_SECONDS else 0.0
            found += [replace(r, age=r.age + late, silent=r.silent + late, far=True) for r in rows]
        return found


def end_in_words(code: int) -> str:
    """-9 -> SIGKILL; 1 -> exit code 1"""
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _names(verdict: Verdict) -> tuple[int, ...]:
    return tuple(r.rank for r in verdict.ranks)


def _first(seen: list[Seen]) -> int:
    """The first rank that is alive and not frozen: the one that speaks."""
    return next((r.rank for r in seen if r.silent <= SILENT_SECONDS and r.phase != "done"), -1)
