"""Puts the parts of chosen kinds on ranks.

    Placer(options).place(kinds) -> Found or None         longest first, each on the rank that has least so far
    Placer(options).fill(kinds, step) -> Found or None    one rank after the other, each as full as the step allows

Longest first is good where parts are small beside what a rank has time for.  Where they are not, a rank takes the
largest part left and, of the others, the set that comes nearest to filling it (Gupta and Ho, "A new heuristic algorithm
for the one-dimensional bin-packing problem", 1999: minimum bin slack).

Shapes: K kinds, T tables, W ranks, P positions.
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from sharding.bound import Options, group_seconds
from sharding.cost import Choice

HOST_WORK = 25  # finding a host for a table takes as long as placing this many parts
CELLS = 1 << 13  # of a whole rank's capacity, in which `fill` counts sizes; a set of sums is the bits of a number


@dataclass(frozen=True, eq=False)
class Found:
    """kinds (T,): of each table.  choices: with their ranks.  step: seconds."""

    kinds: np.ndarray
    choices: tuple[Choice, ...]
    step: float


@dataclass(eq=False)
class _Loads:
    """What stands where so far.  main, hidden (W,) seconds; device, host (W,) bytes; ranks: of every table's parts."""

    main: np.ndarray
    hidden: np.ndarray
    device: np.ndarray
    host: np.ndarray
    ranks: list[tuple[int, ...]] = field(default_factory=list)


class Placer:
    """Fixed parts first, then those that need a host, then those that may stand on any distinct ranks."""

    def __init__(self, options: Options) -> None:
        self.options, self.prices = options, options.prices
        topology = self.prices.topology
        self.world, self.local, self.hosts = topology.world_size, topology.ranks_per_host, topology.hosts
        kinds = self.prices.kinds
        self.main = [self.prices.main_seconds(k) for k in range(len(kinds))]
        self.input = [self.prices.input_seconds(k) for k in range(len(kinds))]
        self.device = [kind.device.sum(0) for kind in kinds]
        self.host = [kind.host.sum(0) for kind in kinds]
        self.places = [kind.kind.place for kind in kinds]
        self.parts_placed = 0

    def place(self, chosen: np.ndarray, *, by_memory: bool = False) -> Found | None:
        """A plan with these kinds, or None where a part finds no room.

        by_memory: a rank's load is the larger of its shares of the time and of the memory, for when memory is short.
        """
        order = np.array([self.main[k][t].max() for t, k in enumerate(chosen)])
        scale = self.options.main[chosen, np.arange(len(chosen))].sum() / self.world or 1.0
        if by_memory:
            device = np.array([self.device[k][t].max() for t, k in enumerate(chosen)]) / self.options.device_limit
            host = np.array([self.host[k][t].max() for t, k in enumerate(chosen)]) / self.options.host_limit
            order = np.max([order / scale, device, host], 0)
        started = self._started(chosen, order)
        if started is None:
            return None
        loads, free = started
        if not self._spread(free, chosen, loads, scale if by_memory else None):
            return None
        return self._made(chosen, loads)

    def fill(self, chosen: np.ndarray, step: float) -> Found | None:
        """A plan with these kinds that takes no longer than `step`, or None where none was found."""
        order = np.array([self.main[k][t].max() for t, k in enumerate(chosen)])
        whole_hosts = any(self.places[k] in ("host", "hosts") for k in chosen)
        for filled in (True, False) if whole_hosts else (False,):
            found = self._filled(chosen, order, step, hosts_filled=filled)
            if found is not None:
                return found
        return None

    def _filled(self, chosen: np.ndarray, order: np.ndarray, step: float, *, hosts_filled: bool) -> Found | None:
        """hosts_filled: put the parts that take a whole host on one host after the other too, else on those with least
        so far."""
        started = self._started(chosen, order, step=step if hosts_filled else None)
        if started is None:
            return None
        loads, free = started
        if not self._fill_ranks(free, chosen, loads, step):
            return None
        return self._made(chosen, loads)

    def _room(self, loads: _Loads, step: float) -> tuple[np.ndarray, np.ndarray]:
        """((4,) what an empty rank has for parts, (W,) the share of it that each rank has left)."""
        # Of a host's memory every rank has an equal share here.
        limits = np.array([step, step, self.options.device_limit, self.options.host_limit / self.local])
        used = np.array([loads.main, loads.hidden, loads.device, loads.host])
        whole = limits - [loads.main.min(), loads.hidden.min(), 0.0, 0.0]
        left_W = ((limits[:, None] - used) / whole[:, None]).min(0) if whole.min() > 0 else np.array([-1.0])
        return whole, left_W

    def _sizes(self, tables: Sequence[int], chosen: np.ndarray, whole: np.ndarray) -> list[int]:
        """In cells, the largest share of the four that a part takes: parts whose shares sum to at most what is left
        exceed none of them."""
        shares = [
            max((self.main[k][t].max(), self.input[k][t].max(), self.device[k][t].max(), self.host[k][t].max()) / whole)
            for t, k in ((t, chosen[t]) for t in tables)
        ]
        return np.ceil(np.array(shares) * CELLS * (1 - 1e-12)).astype(int).tolist()

    def _fill_ranks(self, tables: Sequence[int], chosen: np.ndarray, loads: _Loads, step: float) -> bool:
        """Put parts that may stand on any distinct ranks, the largest first; False where they find no room."""
        whole, left_W = self._room(loads, step)
        if left_W.min() < -1e-12:
            return False
        counts = [self.prices.kinds[chosen[t]].kind.column_parts for t in tables]
        capacities = np.floor(left_W * CELLS + 1e-6).astype(int).tolist()
        filled = _fill(self._sizes(tables, chosen, whole), counts, capacities)
        if filled is None:
            return False
        for t, ranks in zip(tables, filled, strict=True):
            k, at = chosen[t], list(ranks)
            for total, part in self._parts(loads):
                total[at] += part[k][t, 0]
            loads.ranks[t] = ranks
        self.parts_placed += sum(counts)
        return True

    def _fill_hosts(self, tables: Sequence[int], chosen: np.ndarray, loads: _Loads, step: float) -> bool:
        """The same for tables of which a part stands on each rank of one host or of several."""
        whole, left_W = self._room(loads, step)
        if left_W.min() < -1e-12:
            return False
        left_H = left_W.reshape(self.hosts, self.local).min(1)
        kinds = [self.prices.kinds[chosen[t]].kind for t in tables]
        counts = [kind.column_parts for kind in kinds]
        capacities = np.floor(left_H * CELLS + 1e-6).astype(int).tolist()
        filled = _fill(self._sizes(tables, chosen, whole), counts, capacities)
        if filled is None:
            return False
        for t, hosts in zip(tables, filled, strict=True):
            at_HL = np.array(hosts)[:, None] * self.local + np.arange(self.local)
            for total, part in self._parts(loads):
                total[at_HL] += part[chosen[t]][t]
            loads.ranks[t] = tuple(at_HL.ravel().tolist())
        self.parts_placed += HOST_WORK * len(filled)
        return True

    def _parts(self, loads: _Loads) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
        yield from ((loads.main, self.main), (loads.hidden, self.input), (loads.device, self.device))
        yield loads.host, self.host

    def _started(
        self, chosen: np.ndarray, order: np.ndarray, *, step: float | None = None
    ) -> tuple[_Loads, list[int]] | None:
        """The loads with the parts that have no choice of ranks or one of hosts, and the other tables, the largest by
        `order` first.  step: fill hosts up to it with tables that stand on whole ones."""
        used = list(dict.fromkeys(self.prices.kinds[k].kind.sharding for k in chosen))
        group = group_seconds(self.prices, used)
        loads = _Loads(
            main=np.full(self.world, self.prices.base_seconds + group[0]),
            hidden=np.full(self.world, group[1]),
            device=np.zeros(self.world),
            host=np.zeros(self.world),
            ranks=[()] * len(chosen),
        )
        by_place: dict[str, list[int]] = {}
        for t in np.lexsort((np.arange(len(chosen)), -order)):
            by_place.setdefault(self.places[chosen[t]], []).append(int(t))
        for t in by_place.get("all", ()):
            for total, part in self._parts(loads):
                total += part[chosen[t]][t]
            loads.ranks[t] = tuple(range(self.world))
        whole = [*by_place.get("hosts", ()), *by_place.get("host", ())]
        if step is not None:
            if not self._fill_hosts(sorted(whole, key=lambda t: (-order[t], t)), chosen, loads, step):
                return None
            whole = []
        for t in [*whole, *by_place.get("distinct_on_host", ())]:
            where = self._hosts_for(t, chosen[t], loads)
            if where is None:
                return None
            loads.ranks[t] = where
            self.parts_placed += HOST_WORK
        return loads, sorted([*by_place.get("one", ()), *by_place.get("distinct", ())], key=lambda t: (-order[t], t))

    def _made(self, chosen: np.ndarray, loads: _Loads) -> Found | None:
        """None where the memory is short."""
        if (loads.device > self.options.device_limit * (1 + 1e-12)).any():
            return None
        if (loads.host.reshape(self.hosts, self.local).sum(1) > self.options.host_limit).any():
            return None
        choices = tuple(Choice(int(k), where) for k, where in zip(chosen, loads.ranks, strict=True))
        return Found(np.array(chosen), choices, float(np.maximum(loads.main, loads.hidden).max()))

    def _hosts_for(self, t: int, k: int, loads: _Loads) -> tuple[int, ...] | None:
        """Ranks for a table of which a part stands on each rank of a host, on those with least; changes the loads."""
        kind, place = self.prices.kinds[k].kind, self.places[k]
        shape = (self.hosts, self.local)
        if place == "distinct_on_host":
            time = np.maximum(loads.main, loads.hidden).reshape(shape)
            by_load = np.argsort(time, axis=1, kind="stable")[:, : kind.column_parts]
            at = by_load + np.arange(self.hosts)[:, None] * self.local
        else:
            at = np.arange(self.world).reshape(shape)
        after = np.maximum(loads.main[at] + self.main[k][t], loads.hidden[at] + self.input[k][t]).max(1)
        room = (loads.device[at] + self.device[k][t] <= self.options.device_limit).all(1)
        after = np.where(room, after, np.inf)
        count = kind.column_parts if place == "hosts" else 1
        best = np.argsort(after, kind="stable")[:count]
        if len(best) < count or not np.isfinite(after[best]).all():
            return None
        where = at[best]
        loads.main[where] += self.main[k][t]
        loads.hidden[where] += self.input[k][t]
        loads.device[where] += self.device[k][t]
        return tuple(int(r) for r in where.ravel())

    def _spread(self, tables: Sequence[int], chosen: np.ndarray, loads: _Loads, scale: float | None) -> bool:
        """Put parts that may stand on any distinct ranks, in this order; False where one finds no room.

        scale: seconds that count as much as a memory that is full; None: memory only has to have room.
        """
        a, b, d, h = loads.main.tolist(), loads.hidden.tolist(), loads.device.tolist(), loads.host.tolist()
        on_host = loads.host.reshape(self.hosts, self.local).sum(1).tolist()
        limit, host_limit, local = self.options.device_limit, self.options.host_limit, self.local
        start = min(a)

        def key(rank: int) -> float:
            time = max(a[rank], b[rank])
            if scale is None:
                return time
            return max((time - start) / scale, d[rank] / limit, on_host[rank // local] / host_limit)

        heap = [(key(rank), rank) for rank in range(self.world)]
        heapq.heapify(heap)
        for t in tables:
            k = chosen[t]
            part = (self.main[k][t, 0], self.input[k][t, 0], self.device[k][t, 0], self.host[k][t, 0])
            count = self.prices.kinds[k].kind.column_parts
            taken: list[int] = []
            full: list[tuple[float, int]] = []
            while heap and len(taken) < count:
                was, rank = heapq.heappop(heap)
                if scale is not None and key(rank) > was:  # another rank of its host has taken memory since
                    heapq.heappush(heap, (key(rank), rank))
                elif d[rank] + part[2] > limit or on_host[rank // local] + part[3] > host_limit:
                    full.append((was, rank))
                else:
                    taken.append(rank)
                    on_host[rank // local] += part[3]
            if len(taken) < count:
                return False
            for rank in taken:
                a[rank] += part[0]
                b[rank] += part[1]
                d[rank] += part[2]
                h[rank] += part[3]
            for entry in [(key(rank), rank) for rank in taken] + full:
                heapq.heappush(heap, entry)
            loads.ranks[t] = tuple(taken)
            self.parts_placed += count
        loads.main[:], loads.hidden[:], loads.device[:], loads.host[:] = a, b, d, h
        return True


def _fill(sizes: Sequence[int], counts: Sequence[int], capacities: Sequence[int]) -> list[tuple[int, ...]] | None:
    """The ranks of every item, which stands counts[i] times on distinct ranks; None where not all find room.

    sizes: the largest first.  capacities: of every rank.
    sizes 5 3 2, counts 1 2 1, capacities 7 3 3: the first rank takes 5 and 2, the others a 3 each.
    """
    sizes_I, left_I = np.array(sizes, dtype=np.int64), np.array(counts, dtype=np.int64)
    found: list[list[int]] = [[] for _ in sizes]
    by_capacity: dict[int, list[int]] = {}
    for rank in sorted(range(len(capacities)), key=lambda r: (capacities[r], r)):
        by_capacity.setdefault(capacities[rank], []).append(rank)
    ranks_left = len(capacities)
    for capacity, ranks in by_capacity.items():  # the fullest ranks first: little fits there
        while ranks:
            taken = _nearest(sizes_I, left_I, capacity, ranks_left)
            if taken is None:
                return None
            # As many ranks alike as there are parts of all of these; not so many that another part must stand on one.
            others = left_I > 0
            others[taken] = False
            spare = ranks_left - int(left_I[others].max(initial=0))
            alike = max(1, min([len(ranks), spare, *left_I[taken].tolist()]))
            left_I[taken] -= alike
            for i in taken:
                found[i] += ranks[:alike]
            ranks_left -= alike
            del ranks[:alike]
    return None if left_I.any() else [tuple(sorted(ranks)) for ranks in found]


def _nearest(sizes_I: np.ndarray, left_I: np.ndarray, capacity: int, ranks_left: int) -> list[int] | None:
    """Items for a rank: those that have as many parts left as there are ranks, the largest that fits, and of the others
    the set whose sizes sum to the most that still fits.  None where the first do not fit."""
    free = left_I < ranks_left
    taken = np.flatnonzero(~free).tolist()
    room = capacity - int(sizes_I[~free].sum())
    if room < 0:
        return None
    fitting_F = np.flatnonzero(free & (left_I > 0) & (sizes_I <= room))
    if len(fitting_F) and not taken:
        taken.append(int(fitting_F[0]))
        room -= int(sizes_I[taken[0]])
        fitting_F = fitting_F[1:][sizes_I[fitting_F[1:]] <= room]
    fitting = list(zip(fitting_F.tolist(), sizes_I[fitting_F].tolist(), strict=True))
    mask, reached, sums = (1 << (room + 1)) - 1, 1, []
    for _, size in reversed(fitting):  # the smallest first, so that going back the largest are preferred
        sums.append(reached)
        reached |= (reached << size) & mask
    at = reached.bit_length() - 1
    for (i, size), before in zip(fitting, reversed(sums), strict=True):
        if size <= at and before >> (at - size) & 1:
            taken.append(i)
            at -= size
    return taken
