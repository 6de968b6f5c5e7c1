"""The id map on the CPU, in Numba: kernels/id_maps/_slots.py has the loops, kernels/id_lines.py how ids lie in memory.

Ids that have rows, nearly all in a run that has settled, are found on as many threads as torch has, each on a stretch
of the batch.  The others are counted and admitted by one thread, in the order of the batch, as what the filter says and
which row comes next depend on it.  So results do not depend on the number of threads.

Memory: 16 bytes a slot at a load of at most 0.8, so 20 bytes for each id at the limit (while ids are added the table
grows twofold, so up to 40), both tables while one is built from the other; 4 bytes a row for "lfu"; and the filter.
"""

import importlib.util
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from kernels import threads
from kernels.id_lines import FEWEST_LINES, WORDS, lines_for, room
from kernels.id_maps.base import (
    COUNTERS,
    EVICTED_AT_LEAST,
    HOST,
    MOST_USES,
    Admitted,
    Counts,
    Policy,
    State,
    full,
)
from kernels.ops import blank

SPEED = {"cpu": 3, "cuda": 2}  # for a GPU ids and rows go to the host and back
PER_ID = 10  # ns of one thread, for the division of the work


def available() -> bool:
    return importlib.util.find_spec("numba") is not None


def supports(policy: Policy, device: torch.device) -> str | None:
    return None if available() else "needs Numba, which is not installed"


class Store:
    def __init__(self, policy: Policy, *, first_part: int, parts: int, name: str, device: torch.device) -> None:
        self.policy, self.first_part, self.name, self.device = policy, first_part, name, HOST
        _compile()
        self._start(policy, first_part, parts)

    def _start(self, policy: Policy, first_part: int, parts: int) -> None:
        import numpy as np

        self.np = np
        self.limit = policy.share(first_part, parts)
        self.seed = np.uint64(policy.seed & ((1 << 64) - 1))
        self.counting = policy.evict == "lfu"
        self.size = self.top = 0
        self.lines = 0
        self._lay(FEWEST_LINES)
        self.free = np.empty(0, np.int64)  # rows given before; the last one is given first
        self.uses = np.zeros(1, np.uint32)  # by row
        self.filter = _zeros(parts * 2 * policy.lines * COUNTERS, torch.uint8)
        self.newer, self.counted = np.zeros(parts, np.int64), np.zeros(parts, np.int64)
        self.counts = Counts()

    def find(self, ids_N: Tensor) -> Tensor:
        rows_N = torch.empty_like(ids_N)
        self._find(ids_N.numpy(), rows_N.numpy(), clock=0, touch=False)
        return rows_N

    def admit(self, ids_N: Tensor, clock: int) -> Admitted:
        np = self.np
        ids, rows_N = ids_N.numpy(), torch.empty_like(ids_N)
        rows = rows_N.numpy()
        new = np.empty(0, np.int64)
        new_rows = new
        missing = self._find(ids, rows, clock=clock, touch=True)
        if self.counting:
            count = len(threads.shares(len(ids), work=len(ids) * PER_ID))
            threads.run(_loops().count_uses, [(rows, self.uses, k, count) for k in range(count)])
        if missing:
            new, new_rows = self._admit_missing(ids, rows, missing, clock)
        self.counts.occurrences += len(ids)
        self.counts.defaulted += len(ids) - int(np.count_nonzero(rows)) if missing else 0
        self.counts.admitted += len(new)
        return Admitted(
            rows_N=rows_N, new_ids_K=torch.from_numpy(new.view(np.int64)), new_rows_K=torch.from_numpy(new_rows)
        )

    def expire(self, before: int) -> Tensor:
        np = self.np
        clocks = self._by_row()
        gone = np.flatnonzero((clocks >= 0) & (clocks < before))
        if len(gone):
            leaves = np.zeros(self.top + 1, np.bool_)
            leaves[gone] = True
            self.size -= len(gone)
            self._rebuild(self._lines(self.size), leaves=leaves)
            self.free = np.concatenate([self.free, gone[::-1]])
            self.counts.expired += len(gone)
        return torch.from_numpy(gone)

    def state(self) -> State:
        np = self.np
        ids = np.zeros(self.top + 1, np.uint64)
        clocks = self._by_row(ids)
        rows = np.flatnonzero(clocks >= 0)
        uses = self.uses[rows].astype(np.int64) if self.counting else np.zeros(len(rows), np.int64)
        halves = self.filter.reshape(len(self.newer), 2, self.policy.lines, COUNTERS)
        order = np.stack([self.newer, self.newer ^ 1], axis=1)
        return State(
            ids_K=torch.from_numpy(ids[rows].view(np.int64)),
            rows_K=torch.from_numpy(rows),
            clocks_K=torch.from_numpy(clocks[rows]),
            uses_K=torch.from_numpy(uses),
            free_J=torch.from_numpy(self.free.copy()),
            top=self.top,
            filter_PHLC=torch.from_numpy(halves[np.arange(len(order))[:, None], order]),
            counted_P=torch.from_numpy(self.counted.copy()),
            counts=replace(self.counts),
        )

    def load(self, state: State) -> None:
        np = self.np
        self.size, self.top = len(state.ids_K), state.top
        self._lay(self._lines(self.size))
        entries = (state.ids_K.numpy(), state.rows_K.numpy(), state.clocks_K.numpy())
        _loops().fill(self.slots, np.uint64(self.lines), self.seed, *entries)
        self.free = state.free_J.numpy().copy()
        self.uses = np.zeros(self.top + 1, np.uint32)
        self.uses[entries[1]] = state.uses_K.clamp(max=MOST_USES).numpy()
        self.filter = _zeros(state.filter_PHLC.numel(), torch.uint8)
        self.filter[:] = state.filter_PHLC.flatten().numpy()
        self.newer[:] = 0
        self.counted = state.counted_P.numpy().copy()
        self.counts = replace(state.counts)

    def _find(self, ids, rows, *, clock: int, touch: bool) -> int:
        np, find = self.np, _loops().find
        about = (np.uint64(clock), touch, rows)
        parts = threads.shares(len(ids), work=len(ids) * PER_ID)
        lines = np.uint64(self.lines)
        return sum(threads.run(find, [(self.slots, lines, self.seed, ids, *part, *about) for part in parts]))

    def _admit_missing(self, ids, rows, missing: int, clock: int):
        """Count the occurrences in `ids` whose row is 0, and admit; (new ids, their rows)."""
        np, policy = self.np, self.policy
        misses = np.flatnonzero(rows == 0)
        new = np.empty(missing, np.uint64)
        if self.counting and len(self.uses) <= self.top + missing:
            grown = np.zeros(self.top + missing + 1 + len(self.uses), np.uint32)
            grown[: len(self.uses)] = self.uses
            self.uses = grown
        at = given = 0
        while at < missing:
            at, given = _loops().admit(
                *(self.slots, np.uint64(self.lines), self.seed, ids, np.uint64(clock), rows, misses, at),
                *(room(self.lines) - self.size - given, self.free, self.top, given, new, self.uses),
                *(self.filter, self.newer, self.counted, np.uint64(self.first_part), np.uint64(policy.lines)),
                *(policy.part_window, policy.admit_after, self.counting),
            )
            if at < missing:
                self._rebuild(self._lines(self.size + given + 1))
        from_free = min(given, len(self.free))
        beyond = np.arange(self.top + 1, self.top + 1 + given - from_free)
        new_rows = np.concatenate([self.free[len(self.free) - from_free :][::-1], beyond])
        short = max(0, self.top + len(beyond) - self.limit)
        if short:
            evicted = self._evict(short, new_rows, clock)
            moved, left = evicted[:short], evicted[short:]
            over = rows > self.limit
            rows[over] = moved[rows[over] - self.limit - 1]
            new_rows[given - short :] = moved
            if self.counting:
                self.uses[moved] = self.uses[self.limit + 1 : self.limit + 1 + short]
            self.top, self.free = self.limit, left[::-1].copy()
            self.size += given - len(evicted)
            self.counts.evicted += len(evicted)
        else:
            self.top += len(beyond)
            self.free = self.free[: len(self.free) - from_free]
            self.size += given
        return new[:given], new_rows

    def _evict(self, short: int, new_rows, clock: int):
        """Rows of at least `short` ids that lose them, ascending; the ids admitted beyond the limit move there."""
        np = self.np
        clocks = self._by_row()
        old = np.flatnonzero((clocks >= 0) & (clocks < clock))
        if self.policy.evict == "off" or len(old) < short:
            leaves = np.zeros(int(new_rows.max()) + 1, np.bool_)
            leaves[new_rows] = True
            self._rebuild(self._lines(self.size), leaves=leaves)
            top_up = len(new_rows) - short + (0 if self.policy.evict == "off" else len(old))
            raise full(self.name, wanted=len(new_rows), limit=self.limit, top_up=top_up, evict=self.policy.evict)
        count = min(len(old), max(short, self.limit // EVICTED_AT_LEAST))
        value = clocks[old] + (self.uses[old].astype(np.int64) << 32) if self.counting else clocks[old]
        last = np.partition(value, count - 1)[count - 1]
        goes = value < last
        goes[np.flatnonzero(value == last)[: count - int(np.count_nonzero(goes))]] = True
        evicted = old[goes]
        leaves = np.zeros(self.limit + 1, np.bool_)
        leaves[evicted] = True
        lines = self._lines(self.size + len(new_rows) - count)
        self._rebuild(lines, leaves=leaves, moved=evicted[:short], moved_from=self.limit + 1)
        return evicted

    def _by_row(self, ids=None):
        """(top + 1,) clock of each row's id, -1 where it has none; of those given before this call."""
        np = self.np
        clocks = np.full(self.top + 1, -1, np.int64)
        _loops().spread(self.slots, np.empty(0, np.uint64) if ids is None else ids, clocks)
        return clocks

    def _lines(self, size: int) -> int:
        return lines_for(size, lines=self.lines, limit=self.limit)

    def _lay(self, lines: int) -> None:
        self.lines = lines
        self.slots = _zeros(WORDS * lines, torch.int64).view(self.np.uint64)

    def _rebuild(self, lines: int, *, leaves=None, moved=None, moved_from: int | None = None) -> None:
        """See _slots.rebuild."""
        np = self.np
        old = self.slots
        self._lay(lines)
        leaves = np.zeros(0, np.bool_) if leaves is None else leaves
        moved = np.zeros(0, np.int64) if moved is None else moved
        limits = (leaves, moved, moved_from or 1 << 32)
        _loops().rebuild(old, self.slots, np.uint64(lines), self.seed, *limits)


def _zeros(size: int, dtype: torch.dtype):
    return blank(size, dtype, torch.device("cpu")).zero_().numpy()


def _loops():
    from kernels.id_maps import _slots

    return _slots


@cache
def _compile() -> None:
    """Every loop, once in a process: a few seconds, then from Numba's cache on disk."""
    tiny = Store.__new__(Store)
    tiny.policy, tiny.first_part, tiny.name = Policy(limit=2, admit_after=2, evict="lfu"), 0, ""
    tiny._start(tiny.policy, 0, 256)
    tiny.admit(torch.tensor([1, 1, 2, 2]), 1)
    tiny.admit(torch.tensor([3, 3]), 2)
    tiny.expire(3)
    tiny.load(tiny.state())
