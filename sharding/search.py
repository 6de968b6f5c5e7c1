"""A good plan, fast: choices of kinds by price, parts to ranks by longest-first, then improved one table at a time.

    search(options) -> Found or None       None where no choice of kinds was found that fits the memory

The kinds of all tables are the state of the search, and `place` decodes them into a plan; everything is deterministic.

Shapes: K kinds, T tables, W ranks, P positions.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sharding.bound import Options, group_seconds, priced_choice
from sharding.cost import Choice

FINER = (1.0, 0.6, 0.4, 0.25, 0.12)  # of the step aimed at: the largest part that a choice may have
CLOSE_ENOUGH = 0.01  # of the bound; farther from it more choices are tried:
AIMS = (0.0, 0.04, 0.1, 0.2)  # steps aimed at, between the bound and the best so far
SHARES = (0.5, 0.42, 0.34, 0.28, 0.22, 0.17, 0.12, 0.08)  # the largest part beside others, of what a rank has time for
ALONE = (0.8, 2.0)  # a part from here on may have a rank to itself; 2: none
WHOLE_OR_COLUMNS = ("table_wise", "column_wise", "table_column_wise")
FILLS = (1.0, 0.95, 0.85)  # shares of the memory that a choice may use, where it is short
DECODED = 40_000  # parts placed while improving, over all trials: about a second and a half
EVERYTHING = 400  # table and kind pairs; up to here every change of one table is tried


@dataclass(frozen=True, eq=False)
class Found:
    """kinds (T,): of each table.  choices: with their ranks.  step: seconds."""

    kinds: np.ndarray
    choices: tuple[Choice, ...]
    step: float


class Placer:
    """Puts the parts of chosen kinds on ranks: fixed ones first, then those that need a host, then the longest first,
    each on the rank that has least so far and room for it."""

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
        used = list(dict.fromkeys(self.prices.kinds[k].kind.sharding for k in chosen))
        group = group_seconds(self.prices, used)
        main = np.full(self.world, self.prices.base_seconds + group[0])
        hidden = np.full(self.world, group[1])
        device, host = np.zeros(self.world), np.zeros(self.world)
        ranks: list[tuple[int, ...]] = [()] * len(chosen)
        largest = np.array([self.main[k][t].max() for t, k in enumerate(chosen)])
        size = np.array([self.device[k][t].max() for t, k in enumerate(chosen)])
        scale = (self.options.main[chosen, np.arange(len(chosen))].sum() / self.world or 1.0, self.options.device_limit)
        order = np.maximum(largest / scale[0], size / scale[1]) if by_memory else largest
        by_place: dict[str, list[int]] = {}
        for t in np.lexsort((np.arange(len(chosen)), -order)):
            by_place.setdefault(self.places[chosen[t]], []).append(int(t))
        for t in by_place.get("all", ()):
            k = chosen[t]
            for total, part in ((main, self.main), (hidden, self.input), (device, self.device), (host, self.host)):
                total += part[k][t]
            ranks[t] = tuple(range(self.world))
        for t in [*by_place.get("hosts", ()), *by_place.get("host", ()), *by_place.get("distinct_on_host", ())]:
            where = self._hosts_for(t, chosen[t], main, hidden, device)
            if where is None:
                return None
            ranks[t] = where
        free = sorted([*by_place.get("one", ()), *by_place.get("distinct", ())], key=lambda t: (-order[t], t))
        if not self._spread(free, chosen, main, hidden, device, host, ranks, scale if by_memory else None):
            return None
        if (device > self.options.device_limit * (1 + 1e-12)).any():
            return None
        if (host.reshape(self.hosts, self.local).sum(1) > self.options.host_limit).any():
            return None
        choices = tuple(Choice(int(k), where) for k, where in zip(chosen, ranks, strict=True))
        return Found(np.array(chosen), choices, float(np.maximum(main, hidden).max()))

    def _hosts_for(
        self, t: int, k: int, main: np.ndarray, hidden: np.ndarray, device: np.ndarray
    ) -> tuple[int, ...] | None:
        """Ranks for a table of which a part stands on each rank of a host, on those with least; changes the loads."""
        kind, place = self.prices.kinds[k].kind, self.places[k]
        shape = (self.hosts, self.local)
        if place == "distinct_on_host":
            by_load = np.argsort(np.maximum(main, hidden).reshape(shape), axis=1, kind="stable")[:, : kind.column_parts]
            at = by_load + np.arange(self.hosts)[:, None] * self.local
        else:
            at = np.arange(self.world).reshape(shape)
        after = np.maximum(main[at] + self.main[k][t], hidden[at] + self.input[k][t]).max(1)
        room = (device[at] + self.device[k][t] <= self.options.device_limit).all(1)
        after = np.where(room, after, np.inf)
        count = kind.column_parts if place == "hosts" else 1
        best = np.argsort(after, kind="stable")[:count]
        if len(best) < count or not np.isfinite(after[best]).all():
            return None
        where = at[best]
        main[where] += self.main[k][t]
        hidden[where] += self.input[k][t]
        device[where] += self.device[k][t]
        return tuple(int(r) for r in where.ravel())

    def _spread(
        self,
        tables: Sequence[int],
        chosen: np.ndarray,
        main: np.ndarray,
        hidden: np.ndarray,
        device: np.ndarray,
        host: np.ndarray,
        ranks: list[tuple[int, ...]],
        scale: tuple[float, float] | None,
    ) -> bool:
        """Put parts that may stand on any distinct ranks, in this order; False where one finds no room."""
        a, b, d, h = main.tolist(), hidden.tolist(), device.tolist(), host.tolist()
        limit = self.options.device_limit
        start = min(a)

        def key(rank: int) -> float:
            time = max(a[rank], b[rank])
            return time if scale is None else max((time - start) / scale[0], d[rank] / scale[1])

        heap = [(key(rank), rank) for rank in range(self.world)]
        heapq.heapify(heap)
        for t in tables:
            k = chosen[t]
            part = (self.main[k][t, 0], self.input[k][t, 0], self.device[k][t, 0], self.host[k][t, 0])
            count = self.prices.kinds[k].kind.column_parts
            taken: list[int] = []
            full: list[tuple[float, int]] = []
            while heap and len(taken) < count:
                entry = heapq.heappop(heap)
                rank = entry[1]
                if d[rank] + part[2] > limit:
                    full.append(entry)
                    continue
                taken.append(rank)
            if len(taken) < count:
                return False
            for rank in taken:
                a[rank] += part[0]
                b[rank] += part[1]
                d[rank] += part[2]
                h[rank] += part[3]
                heapq.heappush(heap, (key(rank), rank))
            for entry in full:
                heapq.heappush(heap, entry)
            ranks[t] = tuple(taken)
            self.parts_placed += count
        main[:], hidden[:], device[:], host[:] = a, b, d, h
        return True


def search(options: Options, *, aim: float) -> Found | None:
    """The best plan found.  aim: a step that no plan is below, in seconds."""
    placer = Placer(options)
    best: Found | None = None
    for chosen, by_memory in _starts(options, aim):
        found = placer.place(chosen, by_memory=by_memory)
        if found is not None and (best is None or found.step < best.step):
            best = found
    if best is None:
        return None
    if best.step > aim * (1 + CLOSE_ENOUGH):
        for chosen in _finer(options, aim, best.step):
            found = placer.place(chosen)
            if found is not None and found.step < best.step:
                best = found
    return _improve(options, placer, best)


def _finer(options: Options, aim: float, upper: float):
    """More choices of kinds for when the parts are nearly as large as what a rank has time for.

    Steps between the bound and the best so far are aimed at.  A part either nearly fills a rank alone, or is at most a
    share of it, so that such parts fill up what others leave.
    """
    types = options.shardings()
    sets = [tuple(types), tuple(t for t in types if t in WHOLE_OR_COLUMNS)]
    sets += [(*sets[1], "table_row_wise")] if "table_row_wise" in types else []
    base = options.prices.base_seconds
    for subset in dict.fromkeys(s for s in sets if s):
        allowed = options.only(subset)
        if not allowed.any(0).all():
            continue
        group = min(group_seconds(options.prices, (t,))[0] for t in subset)
        seen: set[bytes] = set()
        for factor in AIMS:
            step = aim * (1 - factor) + upper * factor
            room = max(step - base - group, 1e-12)
            for share in SHARES:
                for alone in ALONE:
                    fits = allowed & (
                        (options.main_max <= share * room)
                        | ((options.main_max >= alone * room) & (options.main_max <= room))
                    )
                    finest = np.where(allowed, options.main_max, np.inf)
                    fits |= allowed & ~fits.any(0) & (finest <= finest.min(0))
                    chosen, _ = priced_choice(options, options.main, fits, fill=0.97, inside=True)
                    if chosen.tobytes() not in seen:
                        seen.add(chosen.tobytes())
                        yield chosen


def _starts(options: Options, aim: float):
    """Choices of kinds to begin with: the cheapest with parts no larger than a share of the step, over the sets of
    sharding types that pay for their collectives."""
    seen: set[bytes] = set()
    types = options.shardings()
    sets = [tuple(types)]
    sets += [tuple(t for t in types if t != left_out) for left_out in types if len(types) > 1]
    sets += [pair for pair in (("table_wise",), ("table_wise", "data_parallel"), ("table_wise", "column_wise")) if
             set(pair) <= set(types)]  # fmt: skip
    sets += [(t,) for t in types]
    base = options.prices.base_seconds
    for subset in dict.fromkeys(sets):
        allowed = options.only(subset)
        if not allowed.any(0).all():
            continue
        group = group_seconds(options.prices, subset)
        room = max(aim - base - group[0], 1e-12)
        for share in FINER:
            small = allowed & (options.main_max <= share * room * (1 + 1e-9))
            # A table that has nothing so fine takes its finest.
            finest = np.where(allowed, options.main_max, np.inf)
            small |= allowed & ~small.any(0) & (finest <= finest.min(0))
            for fill in FILLS:
                chosen, multiplier = priced_choice(options, options.main, small, fill=fill, inside=True)
                for by_memory in (False, True) if multiplier else (False,):
                    mark = chosen.tobytes() + bytes([by_memory])
                    if mark not in seen:
                        seen.add(mark)
                        yield chosen, by_memory
                if not multiplier:
                    break


def _improve(options: Options, placer: Placer, best: Found) -> Found:
    """Change the kind of one table at a time, as long as that makes the step shorter and the budget lasts."""
    allowed = options.allowed
    budget = placer.parts_placed + DECODED
    tables = len(best.kinds)
    while placer.parts_placed < budget:
        candidates = range(tables) if int(allowed.sum()) <= EVERYTHING else _on_slowest(placer, best)
        better = None
        for t in candidates:
            for k in np.flatnonzero(allowed[:, t]):
                if k == best.kinds[t]:
                    continue
                tried = best.kinds.copy()
                tried[t] = k
                found = placer.place(tried)
                placer.parts_placed += 1
                if found is not None and found.step < best.step * (1 - 1e-9):
                    better = best = found
                if placer.parts_placed >= budget:
                    break
            if placer.parts_placed >= budget:
                break
        if better is None:
            break
    return polish(placer, best)


def _on_slowest(placer: Placer, found: Found) -> list[int]:
    """The tables with a part on the slowest rank, the largest first."""
    seconds = np.zeros(placer.world)
    for t, choice in enumerate(found.choices):
        seconds[list(choice.ranks)] += placer.main[choice.kind][
            t, np.arange(len(choice.ranks)) % placer.main[choice.kind].shape[1]
        ]
    worst = int(seconds.argmax())
    mine = [t for t, choice in enumerate(found.choices) if worst in choice.ranks]
    return sorted(mine, key=lambda t: -placer.main[found.choices[t].kind][t].max())[:24]


def polish(placer: Placer, found: Found) -> Found:
    """Move parts off the slowest rank, or change them for parts of another, while that helps."""
    options, world = placer.options, placer.world
    choices = [list(c.ranks) for c in found.choices]
    kinds = found.kinds
    main, hidden = np.zeros(world), np.zeros(world)
    device, host = np.zeros(world), np.zeros(world)
    movable: list[list[tuple[int, int]]] = [[] for _ in range(world)]  # rank -> (table, part)
    for t, ranks in enumerate(choices):
        k = kinds[t]
        at = np.arange(len(ranks)) % placer.main[k].shape[1]
        for total, part in ((main, placer.main), (hidden, placer.input), (device, placer.device), (host, placer.host)):
            np.add.at(total, ranks, part[k][t, at])
        if placer.places[k] in ("one", "distinct"):
            for i, rank in enumerate(ranks):
                movable[rank].append((t, i))
    used = list(dict.fromkeys(options.prices.kinds[k].kind.sharding for k in kinds))
    group = group_seconds(options.prices, used)
    main += options.prices.base_seconds + group[0]
    hidden += group[1]

    def part(t: int) -> np.ndarray:
        k = kinds[t]
        return np.array([placer.main[k][t, 0], placer.input[k][t, 0], placer.device[k][t, 0], placer.host[k][t, 0]])

    loads = np.stack([main, hidden, device, host])
    for _ in range(300):
        time = loads[:2].max(0)
        worst = int(time.argmax())
        lightest = [int(r) for r in np.argsort(time, kind="stable")[:24] if r != worst]
        best: tuple[float, int, int, tuple[int, int], tuple[int, int] | None] | None = None
        for one in movable[worst]:
            a = part(one[0])
            for rank in lightest:
                if rank in choices[one[0]]:
                    continue
                for other in (None, *movable[rank]):
                    if other is not None and worst in choices[other[0]]:
                        continue
                    b = part(other[0]) if other is not None else 0.0
                    left, right = loads[:, worst] - a + b, loads[:, rank] + a - b
                    if max(left[2], right[2]) > options.device_limit or (host.any() and placer.hosts > 1):
                        continue
                    after = max(left[0], left[1], right[0], right[1])
                    if after < time[worst] * (1 - 1e-9) and (best is None or after < best[0]):
                        best = (after, rank, worst, one, other)
        if best is None:
            break
        _, rank, _, one, other = best
        for moved, source, target in ((one, worst, rank), (other, rank, worst)):
            if moved is None:
                continue
            t, i = moved
            loads[:, source] -= part(t)
            loads[:, target] += part(t)
            choices[t][i] = target
            movable[source].remove(moved)
            movable[target].append(moved)
    step = float(loads[:2].max())
    if step >= found.step:
        return found
    made = tuple(Choice(c.kind, tuple(ranks)) for c, ranks in zip(found.choices, choices, strict=True))
    return Found(kinds, made, step)
