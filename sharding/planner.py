"""The plan that minimises the slowest rank's step, with a bound on what any plan could reach.

    solve(work, topology, rules=..., limits=...) -> Solution      or raises Infeasible

Small cases are solved exactly (sharding/exact.py), large ones by search (sharding/search.py); either way the solution
says how far it can be from the best: `gap`.  Equal inputs give equal plans.  No torch, no process group.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import numpy as np

from kernels import registry
from kernels.errors import UserError
from sharding import exact
from sharding.bound import Options, lower_bound
from sharding.cost import CACHE_SHARES, TIERS, Choice, Kind, Load, Prices, TableLoad, Work, load, price
from sharding.placing import Found, Placer
from sharding.search import polish, search
from sharding.skew import Skew
from sharding.tables.base import SHARDING_TYPES
from sharding.topology import Topology

SPARE = 0.05  # of a device's memory, left to the allocator's fragments where nobody says how much to use
SOLVED = 5e-4  # a gap from which nothing is gained by an exact solution


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What a table may become; None leaves it open.  column_parts: the number of parts by columns.

    said: where that was asked for, for messages.
    """

    shardings: frozenset[str] | None = None
    tiers: frozenset[str] | None = None
    column_parts: int | None = None
    said: str = ""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """device: bytes of each rank; host: of each host for tables.  None: what the topology has, with some spare."""

    device: float | None = None
    host: float | None = None

    def of(self, topology: Topology) -> tuple[float, float]:
        device = self.device if self.device is not None else topology.device_memory * (1 - SPARE)
        host = self.host if self.host is not None else topology.host_memory * 0.8
        return device, host


@dataclass(frozen=True, eq=False)
class Solution:
    """choices: one per table.  load: its price.  bound: seconds no plan is below.  proved: found to be the best.

    options: what every table could have become.
    """

    prices: Prices
    options: Options
    choices: tuple[Choice, ...]
    load: Load
    bound: float
    proved: bool

    @property
    def gap(self) -> float:
        """0.03: within 3% of the best possible."""
        return max(0.0, self.load.step_seconds / self.bound - 1) if self.bound > 0 else 0.0


class Infeasible(UserError):
    """No plan fits.

    short_by: bytes.  who: the table, the rank or the ranks that are short, in words.  table: its name, where it is one.
    """

    def __init__(self, message: str, *, short_by: int, who: str, table: str | None = None) -> None:
        super().__init__(message)
        self.short_by, self.who, self.table = short_by, who, table


def solve(
    work: Work,
    topology: Topology,
    *,
    rules: Mapping[str, Rule] | None = None,
    limits: Limits = Limits(),
) -> Solution:
    """The best plan found for these tables.

    rules: by table name.  Raises Infeasible where memory is short, UserError where a rule cannot be met.
    """
    _check(work, topology)
    rules = rules or {}
    prices = price(work, topology, extra=asked_kinds(work, topology, rules))
    return solve_prices(prices, rules=rules, limits=limits)


def solve_prices(prices: Prices, *, rules: Mapping[str, Rule], limits: Limits) -> Solution:
    """The same with prices made before."""
    device, host = limits.of(prices.topology)
    options = Options.of(prices, _allowed(prices, rules), device_limit=device, host_limit=host)
    _check_each(prices, options, device)
    aim = lower_bound(options, upper=np.inf)
    found = search(options, aim=aim)
    bound, proved = aim, False
    if found is not None:
        bound = max(bound, lower_bound(options, upper=found.step))
    if (found is None or found.step > bound * (1 + SOLVED)) and exact.variables(options) <= exact.MAX_VARIABLES:
        best = exact.solve(options)
        bound = max(bound, min(best.bound, best.step) * (1 - 1e-6))
        if best.choices is not None:
            found, proved = _better(options, found, best), best.proved
    if found is None:
        raise _short(prices, options, device, host)
    bound = min(bound, found.step)
    return Solution(prices, options, found.choices, load(prices, found.choices), bound, proved or found.step <= bound)


def _better(options: Options, found: Found | None, best: exact.Exact) -> Found:
    """The faster of the two, with its price from the cost model and not from the solver's tolerances."""
    priced = load(options.prices, best.choices)
    made = Found(np.array([c.kind for c in best.choices]), best.choices, priced.step_seconds)
    fits = (priced.rank_bytes <= (options.device_limit + options.prices.base_bytes) * (1 + 1e-5)).all()
    made = polish(Placer(options), made) if fits else made
    if found is None or (fits and made.step < found.step):
        return made
    return found


def rules_from(
    tables: Sequence[str], constraints: Sequence[tuple[Sequence[str], Rule]], own: Mapping[str, Rule]
) -> dict[str, Rule]:
    """The rules of all tables: every constraint whose patterns match, and the table's own, together.

    constraints: (names or shell patterns, rule).  UserError where a pattern matches nothing or two rules contradict.
    """
    rules = dict(own)
    for patterns, rule in constraints:
        for pattern in patterns:
            matched = [name for name in tables if fnmatchcase(name, pattern)]
            if not matched:
                raise UserError(
                    f"{rule.said}: match = {pattern!r} matches no table; {registry.nearest(pattern, list(tables))}"
                )
            for name in matched:
                rules[name] = _both(name, rules.get(name), rule)
    return rules


def _both(name: str, one: Rule | None, two: Rule) -> Rule:
    if one is None:
        return two

    def meet(what: str, a: frozenset[str] | None, b: frozenset[str] | None) -> frozenset[str] | None:
        if a is None or b is None:
            return b if a is None else a
        if not a & b:
            raise UserError(
                f"table {name!r}: {one.said} allows {what} {', '.join(sorted(a))}, {two.said} {', '.join(sorted(b))}; "
                "no choice meets both: change one of them"
            )
        return a & b

    return Rule(
        shardings=meet("sharding", one.shardings, two.shardings),
        tiers=meet("tier", one.tiers, two.tiers),
        column_parts=one.column_parts or two.column_parts,
        said=f"{one.said} and {two.said}",
    )


def _check(work: Work, topology: Topology) -> None:
    if not work.tables:
        raise UserError("there is no table to place")
    for t in work.tables:
        if t.rows < 1:
            raise UserError(f"table {t.name!r} has {t.rows} rows; a table has at least one")
        if t.dim < 4 or t.dim % 4:
            raise UserError(f"table {t.name!r} is stored with {t.dim} columns; that is a multiple of 4")
    if work.batch_size % topology.world_size:
        world = topology.world_size
        raise UserError(
            f"train.batch_size = {work.batch_size} does not divide over the {world} ranks of {topology.title}; "
            f"use {max(1, work.batch_size // world) * world}"
        )


def asked_kinds(work: Work, topology: Topology, rules: Mapping[str, Rule]) -> list[Kind]:
    """Kinds that rules ask for: some come to the same as another on this cluster, some cut the columns as asked."""
    found = []
    local, hosts = topology.ranks_per_host, topology.hosts
    tiers = TIERS if topology.device == "cuda" else ("device",)
    for rule in rules.values():
        for sharding in sorted(rule.shardings or ()):
            parts = rule.column_parts or 1
            if sharding == "row_wise":
                kinds = [Kind(sharding=sharding, row_parts=topology.world_size)]
            elif sharding == "table_row_wise":
                kinds = [Kind(sharding=sharding, row_parts=local)]
            elif sharding in ("column_wise", "table_column_wise"):
                kinds = [Kind(sharding=sharding, column_parts=parts)]
            elif sharding == "grid_shard":
                kinds = [Kind(sharding=sharding, column_parts=min(parts, hosts), row_parts=local)]
            else:
                kinds = []
            if sharding in ("column_wise", "row_wise"):
                kinds += [
                    replace(kind, tier=tier, cache_share=share)
                    for kind in kinds
                    for tier in tiers[1:]
                    for share in (CACHE_SHARES if tier == "cache" else (0.0,))
                ]
            found += kinds
    return found


def _allowed(prices: Prices, rules: Mapping[str, Rule]) -> np.ndarray:
    """(K, T).  UserError for a rule that no kind meets."""
    kinds = [kind.kind for kind in prices.kinds]
    single = prices.topology.hosts == 1
    # On one host these equal row_wise and column_wise, on one rank all but data_parallel equal table_wise.
    twins = {"table_row_wise", "table_column_wise", "grid_shard"} if single else set()
    if prices.topology.world_size == 1:
        twins |= {"row_wise", "column_wise"}
    usual = np.array([k.sharding not in twins and (k.column_parts > 1 or ("column" not in k.sharding
                      and k.sharding != "grid_shard")) for k in kinds])  # fmt: skip
    allowed = np.tile(usual[:, None], (1, len(prices.tables)))
    valid = np.array([kind.valid for kind in prices.kinds])
    for t, table in enumerate(prices.tables):
        rule = rules.get(table.name)
        if rule is None:
            continue
        fits = np.array([_meets(k, rule) for k in kinds])
        allowed[:, t] = fits & (usual if rule.shardings is None else True)
        if not (allowed[:, t] & valid[:, t]).any():
            asked = ", ".join(sorted(rule.shardings or SHARDING_TYPES))
            on = f" on tier {', '.join(sorted(rule.tiers))}" if rule.tiers else ""
            raise UserError(
                f"table {table.name!r} ({table.rows:,} rows, {table.dim} columns): {rule.said} asks for {asked}{on}, "
                f"which {prices.topology.title} cannot give it; allow another sharding or tier"
            )
    return allowed


def _meets(kind: Kind, rule: Rule) -> bool:
    return (
        (rule.shardings is None or kind.sharding in rule.shardings)
        and (rule.tiers is None or kind.tier in rule.tiers)
        and (
            rule.column_parts is None
            or kind.sharding not in ("column_wise", "table_column_wise", "grid_shard")
            or kind.column_parts == rule.column_parts
        )
    )


def _check_each(prices: Prices, options: Options, device: float) -> None:
    """Infeasible when even its smallest part of some table does not fit a rank, or nothing does."""
    if options.device_limit <= 0:
        short = int(np.ceil(-options.device_limit))
        raise Infeasible(
            f"each rank needs {_gib(prices.base_bytes)} beside the tables (dense layers, activations, batches), and "
            f"has {_gib(device)}: short by {_gib(short)} ({short:,} bytes); use a smaller "
            "train.batch_size or more memory",
            short_by=short,
            who="every rank, before any table",
        )
    world = prices.topology.world_size
    for t in np.flatnonzero(~options.allowed.any(0)):
        table = prices.tables[t]
        wanted = np.flatnonzero(options.wanted[:, t])
        least = int(wanted[options.device_max[wanted, t].argmin()])
        smallest = options.device_max[least, t]
        short = int(np.ceil(smallest - options.device_limit))
        raise Infeasible(
            f"table {table.name!r} ({table.rows:,} rows, {table.dim} columns, {_gib(table.bytes)}): at its smallest, "
            f"{prices.kinds[least].kind.label}, a part takes {_gib(smallest)} of a rank that has "
            f"{_gib(options.device_limit)} for tables on {world} ranks: short by {_gib(short)} ({short:,} bytes); "
            "`tablemesh plan` lists the ways out",
            short_by=max(short, 1),
            who=f"table {table.name!r}",
            table=table.name,
        )


def _short(prices: Prices, options: Options, device: float, host: float) -> Infeasible:
    """What is missing: by all ranks together, or by the way the parts fall on them."""
    least = np.where(options.allowed, options.device, np.inf).min(0).sum()
    world = prices.topology.world_size
    names = [t.name for t in prices.tables]
    largest = max(prices.tables, key=lambda t: t.bytes)
    short = int(np.ceil(least - options.device_total))
    if short > 0:
        return Infeasible(
            f"the {len(names)} tables need at least {_gib(least)}, the {world} ranks of {prices.topology.title} have "
            f"{_gib(options.device_total)} for tables ({_gib(device)} each): short by {_gib(short)} ({short:,} bytes); "
            f"the largest table is {largest.name!r} with {_gib(largest.bytes)}; `tablemesh plan` lists the ways out",
            short_by=short,
            who="all ranks together",
        )
    # The volume fits but no placement was found: how much more of a rank would do.
    low, high = 1.0, 2.0
    while high < 64 and not _places(options, high):
        low, high = high, high * 2
    for _ in range(12):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if _places(options, middle) else (middle, high)
    short = max(1, int(np.ceil((high - 1) * options.device_limit)))
    return Infeasible(
        f"the {len(names)} tables fit the {world} ranks of {prices.topology.title} in sum, but not in whole parts: "
        f"with {_gib(device)} a rank (and {_gib(host)} a host for tables outside the device) the fullest is short by "
        f"{_gib(short)} ({short:,} bytes); `tablemesh plan` lists the ways out",
        short_by=short,
        who="the fullest rank",
    )


def _places(options: Options, factor: float) -> bool:
    wider = replace(options, device_limit=options.device_limit * factor)
    least = np.where(wider.allowed, wider.device_max, np.inf).argmin(0)
    placer = Placer(wider)
    return placer.place(least, by_memory=True) is not None or search(wider, aim=0.0) is not None


@dataclass(frozen=True, kw_only=True)
class WayOut:
    """A change after which a plan exists, tried by planning again.

    how: in words.  step: seconds of the plan it gives.  change: the same for programs.
    """

    how: str
    step: float
    change: Mapping[str, object] = field(default_factory=dict)


def ways_out(
    work: Work, topology: Topology, *, rules: Mapping[str, Rule], limits: Limits, short: Infeasible
) -> list[WayOut]:
    """What would help, the cheapest first: rules lifted, another tier, a smaller dimension, fewer rows, a smaller
    batch, more devices.  Each is checked by solving again."""
    found: list[WayOut] = []

    def tried(how: str, change: dict[str, object], **changed: object) -> bool:
        asked: dict[str, object] = {"work": work, "topology": topology, "rules": rules, "limits": limits} | changed
        try:
            solution = solve(asked["work"], asked["topology"], rules=asked["rules"], limits=asked["limits"])
        except UserError:
            return False
        found.append(WayOut(how=how, step=solution.load.step_seconds, change=change))
        return True

    def first_that(values: Sequence[float], attempt) -> None:
        """The first value that helps, by bisection: if one helps, all after it do."""
        values = list(values)
        if not values or not attempt(values[-1], keep=False):
            return
        low, high = 0, len(values) - 1
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if attempt(values[middle], keep=False) else (middle + 1, high)
        attempt(values[low], keep=True)

    def attempt_with(how, change, changed):
        def attempt(value: float, *, keep: bool) -> bool:
            worked = tried(how(value), change(value), **changed(value))
            if worked and not keep:
                found.pop()
            return worked

        return attempt

    if any(r.shardings is not None or r.tiers is not None for r in rules.values()):
        asked = [name for name, r in rules.items() if r.shardings is not None or r.tiers is not None]
        named = ", ".join(asked[:4]) + (f" and {len(asked) - 4} more" if len(asked) > 4 else "")
        tried(
            f"leave the sharding and tier of {named} to the planner (rows or columns in parts)",
            {"rules": None},
            rules={},
        )
    dims = sorted({t.dim for t in work.tables}, reverse=True)
    scales = [d for d in (0.75, 0.5, 0.25, 0.125) if int(dims[0] * d) >= 4]
    first_that(
        scales,
        attempt_with(
            lambda s: f"a smaller dimension: {int(dims[0] * s) // 4 * 4} instead of {dims[0]}",
            lambda s: {"dim": int(dims[0] * s) // 4 * 4},
            lambda s: {"work": _with(work, dim=s)},
        ),
    )
    largest = max(work.tables, key=lambda t: t.bytes)
    cuts = [1 - 0.05 * i for i in range(1, 20)] + [0.02, 0.01]
    first_that(
        cuts,
        attempt_with(
            lambda s: (
                f"compositional or hashed tables: {largest.name!r} with {int(largest.rows * s):,} rows instead of "
                f"{largest.rows:,} ({largest.rows - int(largest.rows * s):,} fewer)"
            ),
            lambda s: {"table": largest.name, "rows": int(largest.rows * s)},
            lambda s: {"work": _with(work, rows=s, only=largest.name)},
        ),
    )
    if len(work.tables) > 1:
        first_that(
            cuts,
            attempt_with(
                lambda s: (
                    f"compositional or hashed tables: all of them with {s:.0%} of their rows "
                    f"({sum(t.rows - max(1, int(t.rows * s)) for t in work.tables):,} rows fewer)"
                ),
                lambda s: {"rows_share": round(s, 4)},
                lambda s: {"work": _with(work, rows=s)},
            ),
        )
    more = [n for n in (*range(topology.hosts + 1, topology.hosts + 9), *(topology.hosts * 2**i for i in range(1, 11)))
            if n > topology.hosts]  # fmt: skip
    more = [
        n
        for n in sorted(set(more))
        if work.batch_size % (n * topology.ranks_per_host) == 0 and n * topology.ranks_per_host <= 4096
    ]
    first_that(
        more,
        attempt_with(
            lambda n: (
                f"more devices: {topology.name}:{n}x{topology.ranks_per_host} "
                f"({n * topology.ranks_per_host} ranks instead of {topology.world_size})"
            ),
            lambda n: {"cluster": f"{topology.name}:{n}x{topology.ranks_per_host}"},
            lambda n: {"topology": topology.sized(hosts=int(n), ranks_per_host=topology.ranks_per_host)},
        ),
    )
    device, _ = limits.of(topology)
    if limits.device is not None and limits.device < topology.device_memory * (1 - SPARE):
        need = device + short.short_by * 1.001
        for memory in (need, need * 1.1, need * 1.5, topology.device_memory * (1 - SPARE)):
            if memory <= topology.device_memory * (1 - SPARE) and tried(
                f"a memory limit of {_gib(memory)} a rank instead of {_gib(device)}",
                {"device_bytes": int(memory)},
                limits=replace(limits, device=memory),
            ):
                break
    batches = [work.batch_size // d for d in (2, 4, 8, 16) if work.batch_size // d % topology.world_size == 0]
    first_that(
        [b for b in batches if b],
        attempt_with(
            lambda b: f"a smaller batch: train.batch_size = {b:,} instead of {work.batch_size:,}",
            lambda b: {"batch_size": b},
            lambda b: {"work": replace(work, batch_size=int(b))},
        ),
    )
    return found


def _with(work: Work, *, rows: float = 1.0, dim: float = 1.0, only: str | None = None) -> Work:
    """The same with a share of the rows or columns of all tables, or of one."""
    tables = []
    for t in work.tables:
        if only is not None and t.name != only:
            tables.append(t)
            continue
        fewer = max(1, int(t.rows * rows))
        skew = t.skew if fewer == t.rows or t.skew is None else Skew.of(rows=fewer)
        tables.append(replace(t, rows=fewer, dim=max(4, int(t.dim * dim) // 4 * 4), skew=skew))
    return replace(work, tables=tuple(tables))


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


__all__ = ["Infeasible", "Limits", "Rule", "Solution", "TableLoad", "WayOut", "rules_from", "solve",
           "ways_out"]  # fmt: skip
