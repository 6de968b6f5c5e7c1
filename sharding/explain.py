"""A solution in figures and words, for `tablemesh plan` in all its forms.

    explain(solution) -> dict      what `tablemesh plan --json` prints: milliseconds, bytes, words

Shapes: T tables, W ranks.
"""

from typing import Any

import numpy as np

from sharding.bound import Options
from sharding.cost import BYTES, PARTS, VOLUMES, Kind, Load
from sharding.planner import Solution
from sharding.work import ELEMENT

WORDS = {
    "host": "host work of the step: launching operations, TorchRec's bookkeeping",
    "dense": "the dense layers, forward and backward",
    "all-reduce": "averaging the dense gradients over the ranks, as far as the backward does not hide it",
    "dense update": "the dense optimizer",
    "groups": "the collectives and modules of each sharding type in use",
    "input": "sending ids to the ranks that own their rows",
    "lookup": "reading table rows and pooling them",
    "output": "sending pooled vectors to the ranks whose samples they are",
    "gradients": "sending the gradients of pooled vectors back",
    "update": "updating table rows and their optimizer state",
}
SHORT = {
    "host": "host work",
    "dense": "dense layers",
    "all-reduce": "averaging dense gradients",
    "dense update": "dense optimizer",
    "groups": "collectives' latency",
    "input": "sending ids",
    "lookup": "looking up rows",
    "output": "sending pooled vectors",
    "gradients": "sending their gradients",
    "update": "updating rows",
}
BOUNDS = {
    "host": "the host: launching the step's operations",
    "ids": "sending ids, more than is hidden",
    "links": "the links: all bytes that a rank sends",
}
ORDER = ("host", "input", "lookup", "output", "groups", "dense", "all-reduce", "gradients", "update", "dense update")


def explain(solution: Solution) -> dict[str, Any]:
    """Everything that is known about the plan; numbers for programs, `bottleneck` and `planner` in words."""
    found, prices = solution.load, solution.prices
    step = found.step_seconds
    cpu = prices.topology.device == "cpu"
    slowest = int(found.rank_seconds.argmax())
    return {
        "feasible": True,
        "cluster": prices.topology.title,
        "world_size": prices.topology.world_size,
        "batch_size": prices.work.batch_size,
        "predicted": {"step_ms": 1e3 * step, "samples_per_second": prices.work.batch_size / step},
        "bound": {"step_ms": 1e3 * solution.bound},
        "gap": solution.gap,
        "proved": solution.proved,
        "bottleneck": bottleneck(solution),
        "slowest_rank": slowest,
        "timeline": timeline(found, slowest),
        "ranks": [_rank(found, r, cpu) for r in range(prices.topology.world_size)],
        "tables": tables(solution),
        "volumes": volumes(found),
        "fixed_bytes": {name: int(n) for name, n in prices.fixed_bytes.items()},
        "estimates": prices.topology.estimates,
        "guessed": prices.topology.guessed,
        "limits": {"device_bytes": int(solution.options.device_limit + prices.base_bytes)},
    }


def parts_of(found: Load, rank: int) -> dict[str, float]:
    """Seconds of every part of a rank's step, in the order of ORDER."""
    prices = found.prices
    groups = sum(prices.group[s][0] for s in found.shardings)
    hidden_groups = sum(prices.group[s][1] for s in found.shardings)
    parts = dict(prices.fixed) | {"groups": groups}
    parts |= {name: float(found.seconds[i, rank]) for i, name in enumerate(PARTS)}
    parts["input"] += hidden_groups
    return {name: parts[name] for name in ORDER}


def timeline(found: Load, rank: int) -> list[dict[str, Any]]:
    """The parts of one rank's step with their start; where that is hidden the next batch's ids travel beside it."""
    now, events = 0.0, []
    for name, seconds in parts_of(found, rank).items():
        beside = name == "input" and found.prices.hidden
        events.append(
            {
                "name": name,
                "words": WORDS[name],
                "start_ms": 0.0 if beside else 1e3 * now,
                "ms": 1e3 * seconds,
                "beside": beside,
            }
        )
        now += 0.0 if beside else seconds
    return events


def bottleneck(solution: Solution) -> str:
    """What bounds the step, in a sentence or two."""
    found, prices = solution.load, solution.prices
    rank = int(found.rank_seconds.argmax())
    parts = parts_of(found, rank)
    step = found.step_seconds
    if found.hidden[rank] > found.main[rank]:
        return (
            f"rank {rank} waits for ids: {1e3 * found.hidden[rank]:.2f} ms of all-to-alls do not fit behind "
            f"{1e3 * found.main[rank]:.2f} ms of other work"
        )
    name = max((p for p in parts if not (p == "input" and prices.hidden)), key=parts.__getitem__)
    words = f"{WORDS[name]}: {1e3 * parts[name]:.2f} of {1e3 * step:.2f} ms ({parts[name] / step:.0%})"
    if name in PARTS:
        at = [(t, _seconds_on(solution, t, rank)) for t in range(len(prices.tables))]
        table, most = max(at, key=lambda pair: pair[1])
        total = found.main[rank] - prices.base_seconds - sum(prices.group[s][0] for s in found.shardings)
        if total > 0:
            words += f"; on rank {rank}, where {prices.tables[table].name!r} has {most / total:.0%} of the tables' time"
    spread = found.rank_seconds.max() / max(found.rank_seconds.mean(), 1e-12) - 1
    if spread > 0.02:
        words += f"; the slowest rank takes {spread:.0%} longer than the mean"
    return words


def bound_words(solution: Solution, bound_by: str) -> str:
    """What bounds a simulated step (sharding/simulate.py), in a few words; of the device's path its longest part."""
    if bound_by != "device":
        return {"host": "launching (host)", "ids": "sending ids", "links": "all that is sent"}[bound_by]
    parts = parts_of(solution.load, int(solution.load.main.argmax()))
    if solution.prices.hidden:
        del parts["input"]
    return SHORT[max(parts, key=parts.__getitem__)]


def _seconds_on(solution: Solution, table: int, rank: int) -> float:
    choice = solution.choices[table]
    seconds = solution.prices.main_seconds(choice.kind)[table]
    return float(sum(seconds[i % len(seconds)] for i, r in enumerate(choice.ranks) if r == rank))


def _rank(found: Load, r: int, cpu: bool) -> dict[str, Any]:
    device, host = int(found.rank_bytes[r]), int(found.host_rank_bytes[r])
    memory = {name: int(found.device[i, r]) for i, name in enumerate(BYTES)}
    return {
        "rank": r,
        "hbm_bytes": 0 if cpu else device,
        "host_bytes": device if cpu else host,
        "step_ms": 1e3 * float(found.rank_seconds[r]),
        "main_ms": 1e3 * float(found.main[r]),
        "hidden_ms": 1e3 * float(found.hidden[r]),
        "parts_ms": {name: 1e3 * float(found.seconds[i, r]) for i, name in enumerate(PARTS)},
        "memory": memory | {"fixed": int(found.prices.base_bytes)},
    }


def tables(solution: Solution) -> list[dict[str, Any]]:
    """Where every table is, what it costs, and what the next best way would add to the step."""
    prices = solution.prices
    others = _RunnersUp(solution)
    found = []
    for t, (table, choice) in enumerate(zip(prices.tables, solution.choices, strict=True)):
        kind = prices.kinds[choice.kind]
        at = np.arange(len(choice.ranks)) % kind.seconds.shape[2]
        seconds = kind.seconds[:, t, at].sum(1)
        held = (kind.device + kind.host)[:, t, at].sum(1)
        other = others.of(t)
        found.append(
            {
                "name": table.name,
                "rows": table.rows,
                "dim": table.dim,
                "ids_per_sample": table.ids,
                "sharding": kind.kind.sharding,
                "label": kind.kind.label,
                "tier": "host" if prices.topology.device == "cpu" else kind.kind.tier,
                "cache_share": kind.kind.cache_share,
                "column_parts": kind.kind.column_parts,
                "row_parts": kind.kind.row_parts,
                "ranks": list(choice.ranks),
                "bytes": int(held[0]),
                "state_bytes": int(held[1]),
                "ms": {name: 1e3 * float(seconds[i]) for i, name in enumerate(PARTS)},
                "ms_total": 1e3 * float(seconds.sum()),
                "runner_up": None if other is None else {
                    "label": other[0].label, "sharding": other[0].sharding, "tier": other[0].tier,
                    "price_ms": 1e3 * other[1],
                },
            }
        )  # fmt: skip
    return found


def volumes(found: Load) -> dict[str, Any]:
    """Bytes that all ranks send in a step, by what they are."""
    totals = found.volume.sum(1)
    world = found.prices.topology.world_size
    dense = 2 * (world - 1) * ELEMENT * found.prices.work.dense.parameters
    by = {name: int(n) for name, n in zip(VOLUMES, totals, strict=True)}
    return {
        "ids_bytes": by["ids"],
        "vectors_bytes": by["vectors"],
        "gradients_bytes": by["vectors"],
        "data_parallel_bytes": by["averages"],
        "dense_all_reduce_bytes": int(dense),
        "most_of_a_rank_bytes": int((found.volume[0] + 2 * found.volume[1] + found.volume[2]).max()),
    }


class _RunnersUp:
    """For each table the cheapest kind of another sharding or tier, all other tables staying where they are."""

    def __init__(self, solution: Solution) -> None:
        self.solution, self.prices = solution, solution.prices
        self.options: Options = solution.options
        found = solution.load
        self.main, self.hidden, self.device = found.main, found.hidden, found.device.sum(0)
        self.used = [self.prices.kinds[c.kind].kind.sharding for c in solution.choices]

    def of(self, t: int) -> tuple[Kind, float] | None:
        """(kind, seconds that the step grows by); None where nothing else fits."""
        prices, choice = self.prices, self.solution.choices[t]
        own = prices.kinds[choice.kind].kind
        main, hidden, device = self.main.copy(), self.hidden.copy(), self.device.copy()
        ranks = np.array(choice.ranks)
        self._add(main, hidden, device, t, choice.kind, ranks, -1.0)
        best: tuple[Kind, float] | None = None
        cheapest: dict[tuple[str, str], int] = {}  # of each sharding and tier
        for k in sorted(np.flatnonzero(self.options.allowed[:, t]), key=lambda k: self.options.main[k, t]):
            cheapest.setdefault((prices.kinds[k].kind.sharding, prices.kinds[k].kind.tier), int(k))
        cheapest.pop((own.sharding, own.tier), None)
        for k in cheapest.values():
            kind = prices.kinds[k].kind
            where = self._best(t, k, main, hidden, device)
            if where is None:
                continue
            after, beside, held = main.copy(), hidden.copy(), device.copy()
            self._add(after, beside, held, t, k, where, 1.0)
            group = self._group(own.sharding, kind.sharding)
            step = max(float((after + group[0]).max()), float((beside + group[1]).max()))
            grows = step - self.solution.load.step_seconds
            if best is None or grows < best[1]:
                best = (kind, grows)
        return best

    def _add(self, main, hidden, device, t: int, k: int, ranks: np.ndarray, sign: float) -> None:
        kind = self.prices.kinds[k]
        at = np.arange(len(ranks)) % kind.seconds.shape[2]
        np.add.at(main, ranks, sign * self.prices.main_seconds(k)[t, at])
        np.add.at(hidden, ranks, sign * self.prices.input_seconds(k)[t, at])
        np.add.at(device, ranks, sign * kind.device[:, t, at].sum(0))

    def _group(self, old: str, new: str) -> tuple[float, float]:
        """What the sharding types in use cost more if this table goes from the old one to the new one."""
        plus = self.prices.group[new] if new not in self.used else (0.0, 0.0)
        minus = self.prices.group[old] if self.used.count(old) == 1 and new != old else (0.0, 0.0)
        return plus[0] - minus[0], plus[1] - minus[1]

    def _best(self, t: int, k: int, main, hidden, device) -> np.ndarray | None:
        """The least loaded ranks that the kind may have and that have room."""
        topology = self.prices.topology
        kind, place = self.prices.kinds[k], self.prices.kinds[k].kind.place
        world, local, hosts = topology.world_size, topology.ranks_per_host, topology.hosts
        held = kind.device[:, t].sum(0)
        time = np.maximum(main, hidden)
        if place == "all":
            ranks = np.arange(world)
            return ranks if (device + held <= self.options.device_limit).all() else None
        if place in ("one", "distinct"):
            room = np.where(device + held[0] <= self.options.device_limit, time, np.inf)
            ranks = np.argsort(room, kind="stable")[: kind.kind.column_parts]
            return ranks if np.isfinite(room[ranks]).all() else None
        by_host = time.reshape(hosts, local)
        need = kind.kind.column_parts if place == "distinct_on_host" else local
        order = np.argsort(by_host, axis=1, kind="stable")[:, :need]
        key = np.take_along_axis(by_host, order, 1).max(1)
        full = (device.reshape(hosts, local) + held.max() > self.options.device_limit).any(1)
        key = np.where(full, np.inf, key)
        chosen = np.argsort(key, kind="stable")[: kind.kind.column_parts if place == "hosts" else 1]
        if not np.isfinite(key[chosen]).all():
            return None
        if place == "distinct_on_host":
            return chosen[0] * local + order[chosen[0]]
        return (chosen[:, None] * local + np.arange(local)).ravel()
