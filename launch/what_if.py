"""`tablemesh plan --what-if`: the same work on several clusters, planned and simulated on each.

clusters(text, profiles) -> [Topology]      "h100-80gb:1..64x8,h200:8x8"
what_if(asked, clusters, ...) -> dict       what --json prints
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from kernels.errors import UserError
from launch.plan import Asked
from sharding import topology
from sharding.explain import bound_words
from sharding.simulate import TABLEMESH, Point, Program, point, stops_at, with_efficiency
from sharding.topology import Topology
from sharding.ways_out import MOST_RANKS


def clusters(text: str, profiles: Mapping[str, Topology]) -> list[Topology]:
    """Clusters separated by commas; A..B hosts are A, 2A, 4A ... up to B.

    "h100-80gb:1..8x8,h200:4x8" -> h100-80gb:1x8, :2x8, :4x8, :8x8 and h200:4x8.
    """
    found = [topology.parse(each, profiles) for each in titles(text)]
    for cluster in found:
        if cluster.world_size > MOST_RANKS:
            raise UserError(
                f"--what-if {text}: {cluster.title} has {cluster.world_size:,} ranks; at most {MOST_RANKS:,} are "
                "planned"
            )
    return list(dict.fromkeys(found))


def titles(text: str) -> list[str]:
    """Each of these clusters as text, ranges told out."""
    return [each for part in text.split(",") for each in _doublings(part.strip())]


def around(cluster: Topology) -> list[Topology]:
    """A quarter, a half, twice and four times as many hosts, and the cluster itself; as far as there are such."""
    hosts = [cluster.hosts * factor // 4 for factor in (1, 2, 4, 8, 16) if cluster.hosts * factor % 4 == 0]
    sizes = [cluster.sized(hosts=n, ranks_per_host=cluster.ranks_per_host) for n in hosts]
    return [c for c in sizes if c.world_size <= MOST_RANKS] or [cluster]


def _doublings(text: str) -> list[str]:
    """ "cpu:1..4x2" -> cpu:1x2, cpu:2x2, cpu:4x2."""
    match = re.fullmatch(r"(.+):(\d+)\.\.(\d+)(x\d+)?", text)
    if match is None:
        return [text]
    name, first, last, ranks = match[1], int(match[2]), int(match[3]), match[4] or ""
    if not 1 <= first <= last:
        raise UserError(f"cluster {text!r}: {first}..{last} hosts is not a range, such as {name}:1..64{ranks}")
    return [f"{name}:{first << i}{ranks}" for i in range((last // first).bit_length())]


def what_if(
    asked: Asked, clusters: Sequence[Topology], *, weak: bool = False, program: Program = TABLEMESH
) -> dict[str, Any]:
    """Every cluster's best plan and simulated step.

    weak: each rank keeps the rows that it has on `asked`'s cluster; otherwise the global batch stays.
    """
    found = with_efficiency([_point(asked, cluster, weak=weak, program=program) for cluster in clusters])
    by_profile: dict[str, list[Point]] = {}
    for each in found:
        by_profile.setdefault(each.topology.name, []).append(each)
    stops = {}
    for name, sizes in by_profile.items():
        if len(sizes) > 1 and any(p.step for p in sizes):
            stop = stops_at(sizes)
            stops[name] = stop.topology.title if stop else None
    return {
        "mode": "weak" if weak else "strong",
        "program": program.name,
        "clusters": [_described(p) for p in found],
        "stops": stops,
    }


def _point(asked: Asked, cluster: Topology, *, weak: bool, program: Program) -> Point:
    batch = asked.work.batch_size
    if weak:
        batch = max(1, batch // asked.cluster.world_size) * cluster.world_size
    try:
        there = asked.again(cluster)
    except UserError as error:
        return Point(topology=cluster, batch_size=batch, why=str(error))
    work = replace(there.work, batch_size=batch)
    return point(work, cluster, rules=there.rules, limits=there.limits, program=program)


def _described(p: Point) -> dict[str, Any]:
    found: dict[str, Any] = {
        "cluster": p.topology.title,
        "ranks": p.topology.world_size,
        "batch_size": p.batch_size,
        "feasible": p.step is not None,
        "why": p.why,
    }
    if p.step is None or p.solution is None:
        return found
    return found | {
        "samples_per_second": p.samples_per_second,
        "efficiency": p.efficiency,
        "step_ms": 1e3 * p.step.seconds,
        "paths_ms": {name: 1e3 * seconds for name, seconds in p.step.paths.items()},
        "bound_by": p.step.bound_by,
        "bottleneck": bound_words(p.solution, p.step.bound_by),
        "most_bytes": int(p.solution.load.rank_bytes.max()),
        "limit_bytes": int(p.solution.options.device_limit + p.solution.prices.base_bytes),
        "gap": p.solution.gap,
    }
