"""The kinds of many tables by a linear program over all ways to fill a rank, and a proof where there is no way.

    relax(options, shardings, step) -> Relaxation or None

Gilmore and Gomory's program for cutting stock ("A linear programming approach to the cutting-stock problem", 1961),
with a choice of kinds: every table has kinds in shares that sum to 1, every rank one configuration, a set of parts that
fits into the step; the fewest ranks that hold all parts are sought.  Its dual prices a part by its size so that no
configuration is worth more than 1; a table is then worth its cheapest kind, and the sum over the tables is a number of
ranks that no plan does without.  Configurations are generated where prices violate them, by a knapsack over sizes.

Sizes are rounded down to CELLS cells of what a rank has time for, and tables that then are alike are one class, so that
thousands of tables make a program of a few hundred rows.  Rounding down, leaving out the memory, and letting parts of a
table stand together make the program easier than the planner's, so its proof holds for that.

Shapes: C classes, O (class, kind) pairs, S sizes, G cells.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_array

from sharding.bound import SLACK, Options, group_seconds

CELLS = 300
ROUNDS = 60
WORTH = 1e-6  # by which prices may violate a configuration


Demand = tuple[tuple[int, int], ...]  # ((cells, how many), ...): parts of a table, or of a configuration


@dataclass(frozen=True, eq=False)
class Relaxation:
    """ranks: that no plan of this step does without.  kinds: [(T,), ...], shares rounded in some ways, the nearest
    first; none where the program is not solved."""

    ranks: float
    kinds: tuple[np.ndarray, ...]


def relax(
    options: Options,
    shardings: Sequence[str],
    step: float,
    *,
    cells: int = CELLS,
    spare: float = 0.0,
    roundings: int = 1,
) -> Relaxation:
    """The program for steps of `step` seconds with these sharding types; it ends when it fits the ranks, or cannot.

    spare: share of a rank's time to leave free.  roundings: how many to make of the shares.
    """
    prices, world = options.prices, options.prices.topology.world_size
    group = group_seconds(prices, shardings)
    room = (step - prices.base_seconds - group[0]) * (1 - spare) * (1 + SLACK)
    hidden = (step - group[1]) * (1 + SLACK)
    fits = options.only(shardings) & (options.main_max <= room) & (options.input_max <= hidden)
    if room <= 0 or not fits.any(0).all():
        return Relaxation(np.inf, ())
    program = _Program(options, fits, room, cells)
    return program.solve(world, roundings)


class _Program:
    def __init__(self, options: Options, fits: np.ndarray, room: float, cells: int) -> None:
        prices, self.cells = options.prices, cells
        self.tables = fits.shape[1]
        by_kind: list[list[Demand]] = []  # [kind][table]
        sizes_KTP = [np.floor(prices.main_seconds(k) / room * cells * (1 - 1e-9)).astype(int) for k in range(len(fits))]
        fits = _undominated(options, fits, sizes_KTP)
        for kind, size_TP, fit_T in zip(prices.kinds, sizes_KTP, fits, strict=True):
            copies_P = kind.copies(prices.topology.world_size)
            by_kind.append([_counted(size_P, copies_P) if fit else () for size_P, fit in zip(size_TP, fit_T)])  # noqa: B905
        classes: dict[tuple[Demand, ...], list[tuple[int, tuple[int, ...]]]] = {}
        for t in range(self.tables):
            found: dict[Demand, int] = {}
            for k in sorted(np.flatnonzero(fits[:, t]), key=lambda k: (options.main[k, t], k)):
                found.setdefault(by_kind[k][t], int(k))
            order = sorted(found)
            classes.setdefault(tuple(order), []).append((t, tuple(found[o] for o in order)))
        self.members = list(classes.values())
        self.options = [(c, demand) for c, of_class in enumerate(classes) for demand in of_class]
        self.sizes_S = np.array(sorted({s for _, demand in self.options for s, _ in demand if s}), int)
        self.column = {int(s): len(classes) + i for i, s in enumerate(self.sizes_S)}
        # Rows of the dual, each at most its limit: the worth of a class beyond one of its kinds; then configurations.
        self.rows: list[dict[int, float]] = [
            {c: 1.0} | {self.column[s]: -float(n) for s, n in demand if s} for c, demand in self.options
        ]
        self.counts_C = np.array([len(m) for m in self.members], float)
        self.known: set[Demand] = set()
        self._add({((int(s), cells // int(s)),) for s in self.sizes_S})

    def solve(self, world: int, roundings: int) -> Relaxation:
        proved = 0.0
        for _ in range(ROUNDS):
            ranks, worth_G, shares_O = self._dual()
            worth_G = np.maximum.accumulate(worth_G)  # a larger part is worth as much: it may stand for the smaller
            best_G, last_G = _knapsack(worth_G)
            # Prices that are divided by the worth of the best configuration violate none.
            proved = max(proved, self._value(worth_G) / max(1.0, best_G[-1] * (1 + WORTH)))
            if ranks <= world or proved > world * (1 + WORTH) or best_G[-1] <= 1 + WORTH:
                return Relaxation(proved, self._roundings(shares_O, roundings) if ranks <= world * (1 + WORTH) else ())
            if not self._add(self._violated(worth_G, best_G, last_G)):
                break
        return Relaxation(proved, ())

    def _dual(self) -> tuple[float, np.ndarray, np.ndarray]:
        """(ranks, worth of a part by its cells, shares of the kinds) with the configurations known so far."""
        entries = [(r, c, v) for r, row in enumerate(self.rows) for c, v in row.items()]
        r, c, v = zip(*entries, strict=True)
        classes, pairs = len(self.members), len(self.options)
        matrix = coo_array((v, (r, c)), shape=(len(self.rows), classes + len(self.sizes_S))).tocsr()
        limits = np.append(np.zeros(pairs), np.ones(len(self.rows) - pairs))
        objective = np.append(-self.counts_C, np.zeros(len(self.sizes_S)))
        found = linprog(objective, A_ub=matrix, b_ub=limits, bounds=(0, None), method="highs")
        assert found.x is not None, found.message
        worth_G = np.zeros(self.cells + 1)
        worth_G[self.sizes_S] = found.x[classes:]
        return -float(found.fun), worth_G, -found.ineqlin.marginals[:pairs]

    def _value(self, worth_G: np.ndarray) -> float:
        """What the tables are worth, each its cheapest kind, whatever the solver's tolerances."""
        least_C = np.full(len(self.members), np.inf)
        for c, demand in self.options:
            least_C[c] = min(least_C[c], sum(n * worth_G[s] for s, n in demand))
        return float(least_C @ self.counts_C)

    def _add(self, configurations: set[Demand]) -> int:
        new = sorted(configurations - self.known)
        self.known.update(new)
        self.rows += [{self.column[s]: float(n) for s, n in one} for one in new]
        return len(new)

    def _violated(self, worth_G: np.ndarray, best_G: np.ndarray, last_G: np.ndarray) -> set[Demand]:
        """For every size the best configuration that has it, where that is worth more than 1."""
        found = set()
        for first in map(int, self.sizes_S):
            if worth_G[first] + best_G[self.cells - first] <= 1 + WORTH:
                continue
            has, left = {first: 1}, self.cells - first
            while left > 0:
                size = int(last_G[left])
                if size:
                    has[size] = has.get(size, 0) + 1
                left -= size or 1
            found.add(tuple(sorted(has.items())))
        return found

    def _roundings(self, shares_O: np.ndarray, count: int) -> tuple[np.ndarray, ...]:
        """Up to `count` different (T,) kinds for every table: of each class as many of a kind as its share says.

        What is left of the shares goes to the largest rests first; then, where a class has several, to kinds drawn by
        their rests (Raghavan and Thompson, "Randomized rounding", 1987), from a fixed seed.
        """
        rng = np.random.default_rng(0)
        found = {self._rounded(shares_O, None).tobytes(): None}
        for _ in range(2 * count):
            if len(found) >= count:
                break
            found[self._rounded(shares_O, rng).tobytes()] = None
        return tuple(np.frombuffer(kinds, int) for kinds in found)

    def _rounded(self, shares_O: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        """(T,) rng: draws who gets what is left of the shares; None: the largest rests do."""
        kinds = np.zeros(self.tables, int)
        start = 0
        for members in self.members:
            demands = len(members[0][1])
            share = np.maximum(shares_O[start : start + demands], 0.0)
            share *= len(members) / max(share.sum(), 1e-12)
            many = np.floor(share + 1e-6).astype(int)
            rest, left = np.maximum(share - many, 0.0), len(members) - int(many.sum())
            if rng is not None and left and rest.sum() > 0:
                many += rng.multinomial(left, rest / rest.sum())
            else:
                for o in np.argsort(-rest, kind="stable")[:left]:
                    many[o] += 1
            chosen = np.repeat(np.arange(demands), many)
            for (t, of_table), o in zip(members, chosen, strict=True):
                kinds[t] = of_table[o]
            start += demands
        return kinds


def _undominated(options: Options, fits: np.ndarray, sizes_KTP: Sequence[np.ndarray]) -> np.ndarray:
    """(K, T) the kinds without those that another of the same parts, on another tier, is as good as."""
    kept = fits.copy()
    alike: dict[tuple[str, int, int], list[int]] = {}
    for k, kind in enumerate(options.prices.kinds):
        alike.setdefault((kind.kind.sharding, kind.kind.column_parts, kind.kind.row_parts), []).append(k)
    for kinds in alike.values():
        for at, k in enumerate(kinds):
            for other in kinds[:at]:
                kept[k] &= ~(kept[other] & (sizes_KTP[other] <= sizes_KTP[k]).all(1))
    return kept


def _counted(size_P: np.ndarray, copies_P: np.ndarray) -> Demand:
    """((cells, how many), ...) of the parts of a table.

    sizes 3 3 2 with one copy of each: ((2, 1), (3, 2))
    """
    found: dict[int, int] = {}
    for size, copies in zip(size_P.tolist(), copies_P.tolist(), strict=True):
        found[size] = found.get(size, 0) + int(copies)
    return tuple(sorted(found.items()))


def _knapsack(worth_G: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(worth of the best configuration of at most g cells, the size that was put in last or 0), for g from 0."""
    cells = len(worth_G) - 1
    best_G, last_G = np.zeros(cells + 1), np.zeros(cells + 1, int)
    sizes = np.flatnonzero(worth_G > 0)
    for g in range(1, cells + 1):
        best_G[g] = best_G[g - 1]
        there = sizes[: np.searchsorted(sizes, g, side="right")]
        if len(there):
            worth = best_G[g - there] + worth_G[there]
            at = int(worth.argmax())
            if worth[at] > best_G[g]:
                best_G[g], last_G[g] = worth[at], there[at]
    return best_G, last_G
