"""What would help where no plan fits, each checked by planning again.

    ways_out(work, topology, rules=..., limits=...) -> [WayOut, ...]

First those that leave the model as it is (rules lifted, a larger limit, more devices, a smaller batch), then those that
change it: rows of 16 or 8 bits, fewer rows, fewer columns; launch/ways_by_kind.py has the table kinds.  Of a number the
smallest change that helps is searched by halving the distance: if one helps, all larger ones do.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from kernels.errors import UserError
from sharding.cost import TIERS
from sharding.planner import Limits, Rule, gib, has_plan, solve
from sharding.skew import Skew
from sharding.tables.base import ROW_SCALES, ROW_TYPES, SHARDING_TYPES
from sharding.topology import Topology
from sharding.work import TableLoad, Work

BY_COLUMNS = frozenset({"column_wise", "table_column_wise", "grid_shard"})
CUTS = 128  # how finely the share of the rows that is left is searched
MOST_RANKS = 4096  # what the planner has been tried on
GIB = 2.0**30
SCALES = (0.75, 0.5, 0.25, 0.125)  # of the columns


@dataclass(frozen=True, kw_only=True)
class WayOut:
    """A change after which a plan exists, tried by planning again.

    how: in words.  step: seconds of the plan it gives.  change: the same for programs.
    """

    how: str
    step: float
    change: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _Asked:
    work: Work
    topology: Topology
    rules: Mapping[str, Rule]
    limits: Limits

    def possible(self) -> bool:
        return has_plan(self.work, self.topology, rules=self.rules, limits=self.limits)

    def seconds(self) -> float | None:
        """Of a step of the plan; None where there is none."""
        try:
            found = solve(self.work, self.topology, rules=self.rules, limits=self.limits)
        except UserError:
            return None
        return found.load.step_seconds


@dataclass(frozen=True)
class _Try:
    how: str
    change: Mapping[str, object]
    asked: _Asked


def ways_out(work: Work, topology: Topology, *, rules: Mapping[str, Rule], limits: Limits) -> list[WayOut]:
    """The ways out where no plan fits, in the order above."""
    asked = _Asked(work=work, topology=topology, rules=rules, limits=limits)
    found = []
    for attempts in (
        *_rules_lifted(asked),
        *_larger_limits(asked),
        _more_devices(asked),
        _smaller_batches(asked),
        *(_small_rows(asked, row_type) for row_type in ("bf16", "int8")),
        _fewer_rows(asked, max(work.tables, key=lambda t: t.bytes)),
        _fewer_rows(asked, None) if len(work.tables) > 1 else [],
        _fewer_columns(asked),
    ):
        helps = _first_that_helps(attempts)
        seconds = helps and helps.asked.seconds()
        if helps and seconds is not None:
            found.append(WayOut(how=helps.how, step=seconds, change=helps.change))
    return found


def _first_that_helps(attempts: Sequence[_Try]) -> _Try | None:
    """attempts: the smallest change first."""
    if not attempts or not attempts[-1].asked.possible():
        return None
    low, high = 0, len(attempts) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if attempts[middle].asked.possible() else (middle + 1, high)
    return attempts[low]


def _rules_lifted(asked: _Asked) -> Iterator[list[_Try]]:
    """Columns in parts for tables that may not have them, other memory for tables that may not use it; then all rules
    lifted, where neither helps alone."""

    def lifted(applies: Callable[[Rule], bool], change: Callable[[Rule], Rule], words: str, key: str) -> list[_Try]:
        names = [name for name, rule in asked.rules.items() if applies(rule)]
        if not names:
            return []
        named = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        rules = {name: change(rule) if name in names else rule for name, rule in asked.rules.items()}
        return [_Try(words.format(named), {key: names}, replace(asked, rules=rules))]

    columns = lifted(
        lambda rule: rule.shardings is not None and not rule.shardings & BY_COLUMNS and rule.can_shardings & BY_COLUMNS,
        lambda rule: replace(rule, shardings=rule.shardings | (BY_COLUMNS & rule.can_shardings)),
        "column-splitting: let {} have its columns in parts (column_wise)",
        "column_split",
    )
    gained = [r.can_tiers - r.tiers for r in asked.rules.values() if r.tiers is not None and r.tiers < r.can_tiers]
    added = frozenset[str].intersection(*gained) if gained else frozenset()
    tiers = lifted(
        lambda rule: rule.tiers is not None and rule.tiers < rule.can_tiers,
        lambda rule: replace(rule, tiers=rule.can_tiers),
        f"another tier: let {{}} be in {memory_words(added)}",
        "tier",
    )
    yield columns
    yield tiers
    if not any(attempt.asked.possible() for attempt in (*columns, *tiers)):
        yield lifted(
            lambda rule: rule.shardings not in (None, rule.can_shardings) or rule.tiers not in (None, rule.can_tiers),
            _open,
            "leave the sharding and tier of {} to the planner (rows or columns in parts)",
            "rules",
        )


def memory_words(tiers: frozenset[str]) -> str:
    """ "host memory, with or without a cache"."""
    host = {
        frozenset({"host", "cache"}): "host memory, with or without a cache",
        frozenset({"host"}): "host memory",
        frozenset({"cache"}): "host memory with a cache",
    }.get(tiers - {"device"})
    found = [*(["the device's memory"] if "device" in tiers else []), *([host] if host else [])]
    return " or ".join(found) or "any memory that its kind can have"


def _open(rule: Rule) -> Rule:
    """All that the table can be."""
    shardings = None if rule.can_shardings == frozenset(SHARDING_TYPES) else rule.can_shardings
    tiers = None if rule.can_tiers == frozenset(TIERS) else rule.can_tiers
    can = {"can_shardings": rule.can_shardings, "can_tiers": rule.can_tiers}
    return Rule(shardings=shardings, tiers=tiers, **can, said=rule.said)


def _larger_limits(asked: _Asked) -> Iterator[list[_Try]]:
    """Limits above the ones given, up to what the device, or the host, has; then both, where neither helps alone."""
    device, host = asked.limits.device, asked.limits.host
    most_of_device, most_of_host = Limits().of(asked.topology)
    alone = [
        [_with_limits(asked, size, host) for size in _up_to(device, most_of_device)],
        [_with_limits(asked, device, size) for size in _up_to(host, most_of_host)],
    ]
    yield from alone
    if all(alone) and not any(attempts[-1].asked.possible() for attempts in alone):
        yield [_with_limits(asked, most_of_device, size) for size in _up_to(host, most_of_host)]


def _up_to(given: float | None, most: float) -> list[float]:
    """Limits above the one given: an eighth more each, in whole GiB, and at last all that there is."""
    if given is None or given >= most:
        return []
    found, size = [], given
    while (size := size * 1.125) < most:
        found.append(np.ceil(size / GIB) * GIB if size > GIB else size)
    return [*dict.fromkeys(s for s in found if s < most), most]


def _with_limits(asked: _Asked, device: float | None, host: float | None) -> _Try:
    """What is larger than it was, told."""
    how, change = [], {}
    for new, old, words, name in (
        (device, asked.limits.device, "a rank", "device_bytes"),
        (host, asked.limits.host, "a host for tables", "host_bytes"),
    ):
        if new is not None and old is not None and new > old:
            how.append(f"{gib(new)} {words} instead of {gib(old)}")
            change[name] = int(new)
    limits = Limits(device=device, host=host)
    return _Try(f"a memory limit of {' and of '.join(how)}", change, replace(asked, limits=limits))


def _more_devices(asked: _Asked) -> list[_Try]:
    """More hosts that the batch divides over: every number of them up to 8 more, then doubling."""
    old, local = asked.topology.hosts, asked.topology.ranks_per_host
    numbers = {*range(old + 1, old + 9), *(old * 2**i for i in range(1, 12))}
    found = []
    for hosts in sorted(n for n in numbers if n * local <= MOST_RANKS and asked.work.batch_size % (n * local) == 0):
        cluster = f"{asked.topology.name}:{hosts}x{local}"
        found.append(
            _Try(
                f"more devices: {cluster} ({hosts * local} ranks instead of {old * local})",
                {"cluster": cluster},
                replace(asked, topology=asked.topology.sized(hosts=hosts, ranks_per_host=local)),
            )
        )
    return found


def _smaller_batches(asked: _Asked) -> list[_Try]:
    size, world = asked.work.batch_size, asked.topology.world_size
    return [
        _Try(
            f"a smaller batch: train.batch_size = {size // by:,} instead of {size:,}",
            {"batch_size": size // by},
            replace(asked, work=replace(asked.work, batch_size=size // by)),
        )
        for by in (2, 4, 8, 16)
        if size % by == 0 and size // by and size // by % world == 0
    ]


def _small_rows(asked: _Asked, row_type: str) -> list[_Try]:
    """Rows of fewer bits in all tables that may have them: a copy on every rank has none of them
    (sharding/own_sharding.py), and of the kernels those of a CPU alone have int8 (docs/tables.md)."""
    if row_type == "int8" and asked.topology.device != "cpu":
        return []
    copies = frozenset({"data_parallel"})
    element, scale = ROW_TYPES[row_type], ROW_SCALES[row_type]
    tables, rules, kept, saved = [], dict(asked.rules), [], 0
    for table in asked.work.tables:
        rule = asked.rules.get(table.name, Rule())
        smaller = replace(table, element=element, scale=scale)
        if smaller.bytes >= table.bytes or rule.shardings == copies:
            tables.append(table)
            kept += [table.name] if rule.shardings == copies else []
            continue
        tables.append(smaller)
        saved += table.bytes - smaller.bytes
        rules[table.name] = replace(rule, shardings=(rule.shardings or frozenset(SHARDING_TYPES)) - copies)
    if not saved:
        return []
    but = f", but for {', '.join(kept[:4])}{' and others' if len(kept) > 4 else ''}" if kept else ""
    how = f'rows of {8 * element} bits: tables.row_type = "{row_type}"{but} ({gib(saved)} less)'
    changed = replace(asked, work=replace(asked.work, tables=tuple(tables)), rules=rules)
    return [_Try(how, {"row_type": row_type}, changed)]


def _fewer_rows(asked: _Asked, only: TableLoad | None) -> list[_Try]:
    """One table, or all, with a share of the rows."""
    found = []
    for part in range(CUTS - 1, 0, -1):
        work = _scaled(asked.work, rows=part / CUTS, only=only)
        fewer = sum(t.rows for t in asked.work.tables) - sum(t.rows for t in work.tables)
        if only is None:
            how = f"all of them with {part / CUTS:.1%} of their rows ({fewer:,} rows fewer)"
            change: dict[str, object] = {"rows_share": part / CUTS}
        else:
            left = only.rows - fewer
            how = f"{only.name!r} with {left:,} rows instead of {only.rows:,} ({fewer:,} fewer)"
            change = {"table": only.name, "rows": left}
        found.append(_Try(f"fewer rows: {how}", change, replace(asked, work=work)))
    return found


def _fewer_columns(asked: _Asked) -> list[_Try]:
    widest = max(t.dim for t in asked.work.tables)
    return [
        _Try(
            f"a smaller dimension: {_columns(widest, scale)} instead of {widest}",
            {"dim": _columns(widest, scale)},
            replace(asked, work=_scaled(asked.work, columns=scale)),
        )
        for scale in SCALES
        if _columns(widest, scale) < widest
    ]


def _columns(dim: int, scale: float) -> int:
    return max(4, int(dim * scale) // 4 * 4)


def _scaled(work: Work, *, rows: float = 1.0, columns: float = 1.0, only: TableLoad | None = None) -> Work:
    """The same with a share of the rows or columns of all tables, or of one."""
    tables = []
    for t in work.tables:
        if only is not None and t.name != only.name:
            tables.append(t)
            continue
        fewer = max(1, int(t.rows * rows))
        skew = t.skew if fewer == t.rows or t.skew is None else Skew.of(rows=fewer)
        tables.append(replace(t, rows=fewer, dim=_columns(t.dim, columns), skew=skew))
    return replace(work, tables=tuple(tables))
