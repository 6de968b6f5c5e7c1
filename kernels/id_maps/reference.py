"""An id map as a dict, its filter in Python's integers: slow and true.  kernels/id_maps/base.py has the contract."""

from dataclasses import replace

import torch
from torch import Tensor

from kernels.hashing import mix64_of
from kernels.id_maps.base import (
    COUNTERS,
    EVICTED_AT_LEAST,
    HASHES,
    HOST,
    MOST_OCCURRENCES,
    MOST_USES,
    PARTS,
    Admitted,
    Counts,
    Policy,
    State,
    full,
)

SPEED = {"cpu": 1, "cuda": 1}


def available() -> bool:
    return True


def supports(policy: Policy, device: torch.device) -> str | None:
    return None


class Store:
    def __init__(self, policy: Policy, *, first_part: int, parts: int, name: str, device: torch.device) -> None:
        self.policy, self.first_part, self.name, self.device = policy, first_part, name, HOST
        self.limit = policy.share(first_part, parts)
        self.of: dict[int, list[int]] = {}  # id -> row, clock, uses
        self.free: list[int] = []
        self.top = 0
        self.filter = [[[0] * (policy.lines * COUNTERS) for _ in range(2)] for _ in range(parts)]
        self.counted = [0] * parts
        self.counts = Counts()

    @property
    def size(self) -> int:
        return len(self.of)

    def find(self, ids_N: Tensor) -> Tensor:
        return _ints(self.of[i][0] if i in self.of else 0 for i in ids_N.tolist())

    def admit(self, ids_N: Tensor, clock: int) -> Admitted:
        ids = ids_N.tolist()
        known = set(self.of)
        for i in ids:
            if i in known:
                self._see(i, clock)
        new: list[int] = []
        own = [i in known for i in ids]
        for n, i in enumerate(ids):
            if i in known:
                continue
            if i in self.of:
                self._see(i, clock)
                own[n] = True
            elif self._count(i) >= self.policy.admit_after:
                self.of[i] = [0, clock, 1 if self.policy.evict == "lfu" else 0]
                new.append(i)
                own[n] = True
        try:
            self._give(new, clock)
        except ValueError:
            for i in new:
                del self.of[i]
            raise
        rows = [self.of[i][0] if has else 0 for i, has in zip(ids, own, strict=True)]
        self.counts.occurrences += len(ids)
        self.counts.defaulted += rows.count(0)
        self.counts.admitted += len(new)
        return Admitted(rows_N=_ints(rows), new_ids_K=_ints(new), new_rows_K=_ints(self.of[i][0] for i in new))

    def _see(self, i: int, clock: int) -> None:
        self.of[i][1] = clock
        if self.policy.evict == "lfu":
            self.of[i][2] = min(self.of[i][2] + 1, MOST_USES)

    def _give(self, new: list[int], clock: int) -> None:
        """Rows for new ids, which stand in `of` with row 0."""
        at_hand = len(self.free) + self.limit - self.top
        missing = len(new) - at_hand
        evicted: list[int] = []
        if missing > 0:
            old = {i: entry for i, entry in self.of.items() if entry[1] < clock}
            if self.policy.evict == "off" or len(old) < missing:
                top_up = at_hand + (0 if self.policy.evict == "off" else len(old))
                raise full(
                    self.name, wanted=len(new), limit=self.limit, top_up=top_up, evict=self.policy.evict
                ) from None
            lfu = self.policy.evict == "lfu"
            order = sorted(old, key=lambda i: (old[i][2], old[i][1], old[i][0]) if lfu else (old[i][1], old[i][0]))
            for i in order[: max(missing, self.limit // EVICTED_AT_LEAST)]:
                evicted.append(self.of.pop(i)[0])
            self.counts.evicted += len(evicted)
        evicted.sort()
        for i in new:
            if self.free:
                row = self.free.pop()
            elif self.top < self.limit:
                self.top += 1
                row = self.top
            else:
                row = evicted.pop(0)
            self.of[i][0] = row
        self.free += reversed(evicted)

    def _count(self, i: int) -> int:
        """Count one more occurrence; how many there were in the window."""
        if self.policy.admit_after == 1:
            return 1
        h = mix64_of(i ^ self.policy.seed)
        line = (h >> 32) * (PARTS * self.policy.lines) >> 32
        part = line // self.policy.lines - self.first_part
        base = line % self.policy.lines * COUNTERS
        places = [base + (h >> 6 * k) % COUNTERS for k in range(HASHES)]
        newer, older = self.filter[part]
        count = min(newer[p] for p in places) + 1
        for p in places:
            newer[p] = max(newer[p], min(count, MOST_OCCURRENCES))
        total = count + min(older[p] for p in places)
        self.counted[part] += 1
        if self.counted[part] >= self.policy.part_window:
            self.filter[part] = [[0] * len(older), newer]
            self.counted[part] = 0
        return total

    def expire(self, before: int) -> Tensor:
        gone = [i for i, (_, clock, _) in self.of.items() if clock < before]
        rows = sorted(self.of.pop(i)[0] for i in gone)
        self.free += reversed(rows)
        self.counts.expired += len(rows)
        return _ints(rows)

    def state(self) -> State:
        entries = sorted(self.of.items(), key=lambda item: item[1])
        shape = (len(self.filter), 2, self.policy.lines, COUNTERS)
        return State(
            ids_K=_ints(i for i, _ in entries),
            rows_K=_ints(row for _, (row, _, _) in entries),
            clocks_K=_ints(clock for _, (_, clock, _) in entries),
            uses_K=_ints(uses for _, (_, _, uses) in entries),
            free_J=_ints(self.free),
            top=self.top,
            filter_PHLC=torch.tensor(self.filter, dtype=torch.uint8).view(shape),
            counted_P=_ints(self.counted),
            counts=replace(self.counts),
        )

    def load(self, state: State) -> None:
        entries = zip(
            state.rows_K.tolist(), state.clocks_K.tolist(), state.uses_K.clamp(max=MOST_USES).tolist(), strict=True
        )
        self.of = dict(zip(state.ids_K.tolist(), map(list, entries), strict=True))
        self.free, self.top = state.free_J.tolist(), state.top
        self.filter = state.filter_PHLC.flatten(2).tolist()
        self.counted, self.counts = state.counted_P.tolist(), replace(state.counts)


def _ints(values) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int64)
