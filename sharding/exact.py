"""The best plan of a small case, proved: a mixed-integer program solved by HiGHS (scipy.optimize.milp).

Variables are x[t, k] (table t has kind k), where its parts stand (n[t, k, rank] or n[t, k, host]), y[type] (a sharding
type is in use), and the step z.  Every rank's time and memory, and every host's memory, are rows; z is minimised.
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from sharding.bound import Options
from sharding.cost import Choice

MAX_VARIABLES = 700
NODES = 2_000  # of the search tree; not seconds, so that equal inputs give equal plans


@dataclass(frozen=True)
class Exact:
    """choices, step: the plan, or None where no plan fits.  bound: seconds no plan is below.  proved: HiGHS ended."""

    choices: tuple[Choice, ...] | None
    step: float
    bound: float
    proved: bool


def variables(options: Options) -> int:
    """How many variables the program has."""
    topology = options.prices.topology
    per_place = {"all": 0, "one": topology.world_size, "distinct": topology.world_size, "host": topology.hosts,
                 "hosts": topology.hosts, "distinct_on_host": topology.hosts + topology.world_size}  # fmt: skip
    counts = [1 + per_place[kind.kind.place] for kind in options.prices.kinds]
    return int((options.allowed.sum(1) * np.array(counts)).sum())


def solve(options: Options, *, nodes: int = NODES, gap: float = 1e-6) -> Exact:
    return _Program(options).solve(nodes=nodes, gap=gap)


class _Program:
    def __init__(self, options: Options) -> None:
        self.options, self.prices = options, options.prices
        topology = self.prices.topology
        self.world, self.local, self.hosts = topology.world_size, topology.ranks_per_host, topology.hosts
        self.scale = max(float(np.where(options.allowed, options.main, 0.0).max(0).sum()), 1e-12) / self.world
        self.count = 1  # variable 0 is z, in units of self.scale
        self.whole: list[int] = []
        self.entries: list[tuple[int, int, float]] = []
        self.lower: list[float] = []
        self.upper: list[float] = []
        self.where: dict[tuple[int, int], tuple[int, list[int]]] = {}

    def solve(self, *, nodes: int, gap: float) -> Exact:
        options, prices = self.options, self.prices
        time = [self._row(-np.inf, -prices.base_seconds / self.scale) for _ in range(self.world)]
        hidden = [self._row(-np.inf, 0.0) for _ in range(self.world)] if prices.hidden else []
        room = [self._row(-np.inf, 1.0) for _ in range(self.world)]
        host_room = [self._row(-np.inf, 1.0) for _ in range(self.hosts)]
        for row in (*time, *hidden):
            self._add(row, 0, -1.0)
        types = {s: self._variable() for s in options.shardings()}
        for sharding, y in types.items():
            main, ids = prices.group[sharding]
            for row in time:
                self._add(row, y, main / self.scale)
            for row in hidden:
                self._add(row, y, ids / self.scale)
        for t in range(len(prices.tables)):
            one = self._row(1.0, 1.0)
            for k in np.flatnonzero(options.allowed[:, t]):
                x = self._variable()
                self._add(one, x, 1.0)
                use = self._row(-np.inf, 0.0)  # x <= y
                self._add(use, x, 1.0)
                self._add(use, types[prices.kinds[k].kind.sharding], -1.0)
                self._place(t, int(k), x, (time, hidden, room, host_room))
        return self._run(nodes, gap)

    def _place(self, t: int, k: int, x: int, rows: tuple[list[int], ...]) -> None:
        """The variables and rows of where the parts of table t stand if it has kind k."""
        kind = self.prices.kinds[k].kind
        place, parts = kind.place, kind.column_parts
        if place == "all":
            for rank in range(self.world):
                self._charge(t, k, rank, x, rank, rows)
            self.where[t, k] = (x, [])
            return
        if place in ("host", "hosts"):
            at = [self._variable() for _ in range(self.hosts)]
            self._sum_to(at, x, parts if place == "hosts" else 1)
            for host, n in enumerate(at):
                for i in range(self.local):
                    self._charge(t, k, i, n, host * self.local + i, rows)
        else:
            at = [self._variable() for _ in range(self.world)]
            self._sum_to(at, x, parts)
            for rank, n in enumerate(at):
                self._charge(t, k, 0, n, rank, rows)
            if place == "distinct_on_host":
                on = [self._variable() for _ in range(self.hosts)]
                self._sum_to(on, x, 1)
                for rank, n in enumerate(at):
                    row = self._row(-np.inf, 0.0)
                    self._add(row, n, 1.0)
                    self._add(row, on[rank // self.local], -1.0)
        self.where[t, k] = (x, at)

    def _charge(self, t: int, k: int, position: int, variable: int, rank: int, rows: tuple[list[int], ...]) -> None:
        time, hidden, room, host_room = rows
        kind = self.prices.kinds[k]
        position %= kind.seconds.shape[2]
        self._add(time[rank], variable, self.prices.main_seconds(k)[t, position] / self.scale)
        if hidden:
            self._add(hidden[rank], variable, self.prices.input_seconds(k)[t, position] / self.scale)
        self._add(room[rank], variable, kind.device[:, t, position].sum() / self.options.device_limit)
        self._add(host_room[rank // self.local], variable, kind.host[:, t, position].sum() / self.options.host_limit)

    def _sum_to(self, variables: list[int], x: int, times: int) -> None:
        row = self._row(0.0, 0.0)
        for n in variables:
            self._add(row, n, 1.0)
        self._add(row, x, -float(times))

    def _variable(self) -> int:
        self.count += 1
        return self.count - 1

    def _row(self, lower: float, upper: float) -> int:
        self.lower.append(lower)
        self.upper.append(upper)
        return len(self.lower) - 1

    def _add(self, row: int, variable: int, value: float) -> None:
        if value:
            self.entries.append((row, variable, value))

    def _run(self, nodes: int, gap: float) -> Exact:
        rows, columns, values = zip(*self.entries, strict=True)
        matrix = csr_array((values, (rows, columns)), shape=(len(self.lower), self.count))
        objective = np.zeros(self.count)
        objective[0] = 1.0
        whole = np.ones(self.count)
        whole[0] = 0
        bounds = Bounds(np.zeros(self.count), np.append(np.inf, np.ones(self.count - 1)))
        found = milp(
            objective,
            integrality=whole,
            bounds=bounds,
            constraints=LinearConstraint(matrix, np.array(self.lower), np.array(self.upper)),
            options={"node_limit": nodes, "mip_rel_gap": gap},
        )
        dual = getattr(found, "mip_dual_bound", None)
        bound = 0.0 if dual is None or not np.isfinite(dual) else dual * self.scale
        if found.x is None:
            return Exact(None, np.inf, np.inf if found.status == 2 else bound, found.status == 2)
        choices: list[Choice] = []
        for t in range(len(self.prices.tables)):
            k, at = next((k, at) for (table, k), (x, at) in self.where.items() if table == t and found.x[x] > 0.5)
            choices.append(Choice(k, self._ranks(k, [i for i, n in enumerate(at) if found.x[n] > 0.5])))
        return Exact(tuple(choices), float(found.fun) * self.scale, bound, found.status == 0)

    def _ranks(self, k: int, at: list[int]) -> tuple[int, ...]:
        place = self.prices.kinds[k].kind.place
        if place == "all":
            return tuple(range(self.world))
        if place in ("host", "hosts"):
            return tuple(h * self.local + i for h in at for i in range(self.local))
        return tuple(at)
