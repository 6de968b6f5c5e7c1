"""The plan that minimises the slowest rank's step, with a bound on what any plan could reach.

    solve(work, topology, rules=..., limits=...) -> Solution      or raises Infeasible

Small cases are solved exactly (sharding/exact.py), large ones by search (sharding/search.py); either way the solution
says how far it can be from the best: `gap`.  Equal inputs give equal plans.  No torch, no process group.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from kernels import registry
from kernels.errors import UserError
from sharding import exact
from sharding.bound import Options, lower_bound
from sharding.cost import CACHE_SHARES, FIXED, TIERS, Choice, Kind, Load, Prices, load, price
from sharding.placing import Found, Placer
from sharding.search import fits_somehow, polish, search
from sharding.tables.base import SHARDING_TYPES
from sharding.topology import Topology
from sharding.work import TableLoad, Work

SPARE = 0.05  # of a device's memory, left to the allocator's fragments where nobody says how much to use
FEW = 0.02  # of what a rank needs beside the tables: less than that is not worth a word
FEW_NODES = 20  # of the exact search, where only whether there is a plan is asked
SOLVED = 5e-4  # a gap from which nothing is gained by an exact solution


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What a table may become; None leaves it open.  column_parts: the number of parts by columns.

    can_shardings, can_tiers: what it could become if nobody asked for anything, which no way out goes beyond.
    said: where that was asked for, for messages.
    """

    shardings: frozenset[str] | None = None
    tiers: frozenset[str] | None = None
    column_parts: int | None = None
    can_shardings: frozenset[str] = frozenset(SHARDING_TYPES)
    can_tiers: frozenset[str] = frozenset(TIERS)
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
    words: the message for those who list the ways out themselves.  listed: whether `tablemesh plan` has some.
    """

    def __init__(self, words: str, *, short_by: int, who: str, table: str | None = None, listed: bool = True) -> None:
        super().__init__(f"{words}; `tablemesh plan` lists the ways out" if listed else words)
        self.words, self.short_by, self.who, self.table, self.listed = words, short_by, who, table, listed

    def __reduce__(self) -> tuple[Any, ...]:  # it travels between ranks
        return _infeasible, (self.words, self.short_by, self.who, self.table, self.listed)


def _infeasible(words: str, short_by: int, who: str, table: str | None, listed: bool) -> Infeasible:
    return Infeasible(words, short_by=short_by, who=who, table=table, listed=listed)


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
    options = _options(work, topology, rules or {}, limits)
    prices = options.prices
    device, host = limits.of(topology)
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


def has_plan(work: Work, topology: Topology, *, rules: Mapping[str, Rule], limits: Limits) -> bool:
    """Whether `solve` would find a plan, in less time."""
    try:
        options = _options(work, topology, rules, limits)
    except UserError:
        return False
    return fits_somehow(options) or (
        exact.variables(options) <= exact.MAX_VARIABLES and exact.solve(options, nodes=FEW_NODES).choices is not None
    )


def possible(work: Work, topology: Topology, rules: Mapping[str, Rule]) -> dict[str, Rule]:
    """Those of the rules that some kind meets on this cluster, whatever the memory."""
    _check(work, topology)
    prices = price(work, topology, extra=asked_kinds(work, topology, rules))
    kinds, valid = [k.kind for k in prices.kinds], np.array([k.valid for k in prices.kinds])
    place = {t.name: i for i, t in enumerate(work.tables)}
    return {
        name: rule
        for name, rule in rules.items()
        if (valid[:, place[name]] & np.array([_meets(k, rule) for k in kinds])).any()
    }


def _options(work: Work, topology: Topology, rules: Mapping[str, Rule], limits: Limits) -> Options:
    """What every table may become.  UserError where the input makes no sense or one table does not fit at all."""
    _check(work, topology)
    prices = price(work, topology, extra=asked_kinds(work, topology, rules))
    device, host = limits.of(topology)
    options = Options.of(prices, _allowed(prices, rules), device_limit=device, host_limit=host)
    _check_each(prices, options, device)
    return options


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
        can_shardings=one.can_shardings & two.can_shardings,
        can_tiers=one.can_tiers & two.can_tiers,
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
            f"use {max(1, work.batch_size // world) * world}, or a number of ranks that divides it"
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
                f"which {prices.topology.title} cannot give it{_why_not(table, rule, kinds)}; allow another sharding "
                "or tier"
            )
    return allowed


def _why_not(table: TableLoad, rule: Rule, kinds: Sequence[Kind]) -> str:
    """Where all that its rule leaves open has more parts than the table has rows, that."""
    fewest = min((k.row_parts for k in kinds if _meets(k, rule)), default=1)
    return f": {table.rows:,} rows do not make {fewest:,} parts" if table.rows < fewest else ""


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
            f"each rank needs {gib(prices.base_bytes)} beside the tables ({_largest(prices.fixed_bytes)}), and has "
            f"{gib(device)}: short by {gib(short)} ({short:,} bytes); {_less(prices.fixed_bytes)}",
            short_by=short,
            who="every rank, before any table",
            listed=False,
        )
    world = prices.topology.world_size
    for t in np.flatnonzero(~options.allowed.any(0)):
        table = prices.tables[t]
        wanted = np.flatnonzero(options.wanted[:, t])
        least = int(wanted[options.device_max[wanted, t].argmin()])
        smallest = options.device_max[least, t]
        short = int(np.ceil(smallest - options.device_limit))
        raise Infeasible(
            f"table {table.name!r} ({table.rows:,} rows, {table.dim} columns, {gib(table.bytes)}): at its smallest, "
            f"{prices.kinds[least].kind.label}, a part takes {gib(smallest)} of a rank that has "
            f"{gib(options.device_limit)} for tables on {world} ranks: short by {gib(short)} ({short:,} bytes)",
            short_by=max(short, 1),
            who=f"table {table.name!r}",
            table=table.name,
        )


def _largest(fixed: Mapping[str, float]) -> str:
    """ "the data's readers 0.73 GiB, libraries 0.59 GiB": what is at least FEW of all of them, the largest first."""
    least = FEW * sum(fixed.values())
    return ", ".join(
        f"{FIXED.get(name, name)} {gib(size)}"
        for name, size in sorted(fixed.items(), key=lambda each: -each[1])
        if size >= least
    )


def _less(fixed: Mapping[str, float]) -> str:
    """What makes less of it, by what most of it is for: libraries take what they take."""
    ways = {
        "readers": "fewer data.threads, a smaller data.prefetch or data.shuffle_window, files with smaller row groups",
        "dense": "smaller dense layers",
        "batch": "a smaller train.batch_size",
    }
    sizes = {name: fixed.get(name, 0.0) for name in ("readers", "dense")}
    sizes["batch"] = fixed["activations"] + fixed["batches"]
    helps = [ways[n] for n in sorted(sizes, key=lambda n: -sizes[n]) if sizes[n] >= FEW * sum(fixed.values())]
    return f"use {', '.join(helps)}{' or ' if helps else ''}more memory a rank"


def _short(prices: Prices, options: Options, device: float, host: float) -> Infeasible:
    """What is missing: by all ranks together, or by the way the parts fall on them."""
    least = np.where(options.allowed, options.device + options.host, np.inf).min(0).sum()
    world, total = prices.topology.world_size, options.device_total
    beyond = ""
    if (options.host[options.allowed] > 0).any():
        total += options.host_total
        beyond = f" and {gib(host)} of each host"
    names = [t.name for t in prices.tables]
    largest = max(prices.tables, key=lambda t: t.bytes)
    short = int(np.ceil(least - total))
    if short > 0:
        return Infeasible(
            f"the {len(names)} tables need at least {gib(least)}, the {world} ranks of {prices.topology.title} have "
            f"{gib(total)} for tables ({gib(device)} each{beyond}): short by {gib(short)} ({short:,} bytes); "
            f"the largest table is {largest.name!r} with {gib(largest.bytes)} of rows",
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
        f"with {gib(device)} a rank (and {gib(host)} a host for tables outside the device) the fullest is short by "
        f"{gib(short)} ({short:,} bytes)",
        short_by=short,
        who="the fullest rank",
    )


def _places(options: Options, factor: float) -> bool:
    wider = replace(options, device_limit=options.device_limit * factor)
    least = np.where(wider.allowed, wider.device_max, np.inf).argmin(0)
    return Placer(wider).place(least, by_memory=True) is not None or fits_somehow(wider)


def gib(size: float) -> str:
    """ "37.43 GiB"."""
    return f"{size / 2**30:.2f} GiB"
