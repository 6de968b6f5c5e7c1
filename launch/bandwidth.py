"""How fast the ranks' links and collectives are, against each other and against the planner's profile of the cluster.

Each rank sends to the next one, one link after the other; then all of them reduce and exchange together. A link is bad
when it is slower than SLOW_SHARE of the median of its kind (within a host, between hosts), than PROFILE_SHARE of
what the profile promises, or than MIN_GBPS. A bad link within a host names that host; between hosts it does not say
which end is at fault, so a host is named when all its links to others are bad.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist

from sharding.cost import allreduce_seconds, collective_latency
from sharding.topology import Topology
from trainer.world import World

PAYLOAD_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
REPEATS = 5
SLOW_SHARE = 0.25  # of the median; gloo on a busy host varies by a factor of two
PROFILE_SHARE = 0.25  # a network that NCCL does not find, or NVLink turned off, leaves a tenth; a good one half or more
MIN_GBPS = 0.05  # gigabits a second: below it is a broken link, not a slow one


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What a profile promises. Links: gigabits a second of one rank; collectives: gigabytes a second (`measure`)."""

    profile: str
    intra_gbps: float  # to a rank of the same host
    inter_gbps: float  # to another host
    all_reduce_gb_s: float
    all_to_all_gb_s: float


def expected(cluster: Topology, payload_bytes: int) -> Expected:
    """What the ranks of `cluster` should reach with so many bytes each; of two ranks at least."""
    world, local = cluster.world_size, cluster.ranks_per_host
    share, latency = (world - 1) / world, collective_latency(cluster)
    intra, inter = (rate * cluster.link_efficiency for rate in (cluster.intra_bandwidth, cluster.inter_bandwidth))
    # Both kinds of link work at once (sharding/cost.py).
    exchange = payload_bytes * max((local - 1) / world / intra, (world - local) / world / inter)
    return Expected(
        profile=cluster.name,
        intra_gbps=intra * 8 / 1e9,
        inter_gbps=inter * 8 / 1e9,
        all_reduce_gb_s=2 * share * payload_bytes / (float(allreduce_seconds(cluster, payload_bytes)) + latency) / 1e9,
        all_to_all_gb_s=share * payload_bytes / (exchange + latency) / 1e9,
    )


def measure(world: World, hosts: Sequence[str], promised: Expected | None) -> dict[str, Any]:
    """links_gbit_s: from each rank to the next one. all_reduce_gb_s, all_to_all_gb_s: bus bandwidth of each rank, as
    NCCL's tests count. expected: of the profile, or None. complaints: lines that name what is bad. Equal on all ranks.

    hosts: of the ranks, in their order. promised: equal on all ranks; None compares the links with each other alone.
    """
    if world.size < 2:
        return {"links_gbit_s": [], "expected": None, "complaints": []}
    gbps = _links(world)
    if slow(hosts, gbps, promised):  # once more: something else may just have used the link
        gbps = [max(pair) for pair in zip(gbps, _links(world), strict=True)]
    found = _collectives(world)
    lines = slow(hosts, gbps, promised) or disappointing(found, promised)
    return {"links_gbit_s": gbps, **found, "expected": promised and vars(promised), "complaints": lines}


def slow(hosts: Sequence[str], gbps: Sequence[float], promised: Expected | None = None) -> list[str]:
    """Lines that name hosts whose links are slow. gbps[r]: from rank r to rank r + 1 (the last one's to rank 0).

    >>> slow(["a", "b", "c", "d"], [10.0, 1.0, 1.0, 10.0])
    ["rank 2 on c: 1.00 and 1.00 Gbit/s to its neighbours; the median of such links is 5.50 Gbit/s"]
    """
    count = len(gbps)
    if count < 2:
        return []
    within = [r for r in range(count) if hosts[r] == hosts[(r + 1) % count]]
    between = [r for r in range(count) if r not in within]
    bad_within, said = _bad(gbps, within, promised and promised.intra_gbps, promised)
    lines = [
        f"rank {r} on {hosts[r]}: {gbps[r]:.2f} Gbit/s to rank {(r + 1) % count} on the same host; {said}"
        for r in bad_within
    ]
    bad_between, said = _bad(gbps, between, promised and promised.inter_gbps, promised)
    # Runs of ranks on one host, in a ring; link i leads from run i to the next one.
    runs = [[r for r, _ in run] for _, run in groupby(enumerate(hosts), key=lambda pair: pair[1])]
    bad = [run[-1] in bad_between for run in runs]
    for i, run in enumerate(runs):
        # Of three in a row that have only bad links, the outer two explain those of the middle one.
        explained = len(runs) > 2 and bad[i - 2] and bad[(i + 1) % len(runs)] and not all(bad)
        if bad[i] and bad[i - 1] and not explained:
            who = f"rank {run[0]}" if len(run) == 1 else f"ranks {run[0]}-{run[-1]}"
            speeds = f"{gbps[runs[i - 1][-1]]:.2f} and {gbps[run[-1]]:.2f} Gbit/s"
            lines.append(f"{who} on {hosts[run[0]]}: {speeds} to its neighbours; {said}")
    return lines


def _bad(
    gbps: Sequence[float], links: list[int], rate: float | None, promised: Expected | None
) -> tuple[list[int], str]:
    """Which of these links, all of one kind, are bad, and what they are held against."""
    if not links:
        return [], ""
    median = statistics.median(gbps[r] for r in links)
    said = f"the median of such links is {median:.2f} Gbit/s"
    limit = max(MIN_GBPS, SLOW_SHARE * median)
    if rate is not None and promised is not None:
        limit = max(limit, PROFILE_SHARE * rate)
        said += f", profile {promised.profile} has {rate:.2f}"
    return [r for r in links if gbps[r] < limit], said


def disappointing(found: dict[str, float], promised: Expected | None) -> list[str]:
    """Collectives that are far below the profile, though every link by itself is not."""
    if promised is None:
        return []
    return [
        f"{name}: {found[key]:.2f} GB/s a rank, {found[key] / wanted:.0%} of the {wanted:.2f} of profile "
        f"{promised.profile}, though each link alone is fast enough: NCCL_DEBUG=INFO tells what is used; "
        "or correct the profile with plan.profiles"
        for name, key in (("all-reduce", "all_reduce_gb_s"), ("all-to-all", "all_to_all_gb_s"))
        if found[key] < PROFILE_SHARE * (wanted := getattr(promised, key))
    ]


def _links(world: World) -> list[float]:
    """Gigabits a second from each rank to the next one, one link after the other."""
    buffer = torch.zeros(PAYLOAD_BYTES[world.device.type], dtype=torch.uint8, device=world.device)
    mine = 0.0
    for sender in range(world.size):
        receiver = (sender + 1) % world.size
        dist.barrier()
        if world.rank not in (sender, receiver):
            continue
        move = dist.send if world.rank == sender else dist.recv
        peer = receiver if world.rank == sender else sender
        seconds = _median_seconds(lambda move=move, peer=peer: move(buffer, peer), world.device)
        if world.rank == sender:
            mine = buffer.numel() * 8 / 1e9 / seconds
    return _gather(mine, world)


def _collectives(world: World) -> dict[str, float]:
    """The slowest rank's, which is the one that the others wait for."""
    numel = PAYLOAD_BYTES[world.device.type] // 4 // world.size * world.size
    buffer = torch.ones(numel, device=world.device)
    out = torch.empty_like(buffer)
    bytes_, share = numel * 4, (world.size - 1) / world.size
    reduce_s = _median_seconds(lambda: dist.all_reduce(buffer), world.device)
    exchange_s = _median_seconds(lambda: dist.all_to_all_single(out, buffer), world.device)
    return {
        "all_reduce_gb_s": min(_gather(2 * share * bytes_ / reduce_s / 1e9, world)),
        "all_to_all_gb_s": min(_gather(share * bytes_ / exchange_s / 1e9, world)),
    }


def _median_seconds(work: Callable[[], Any], device: torch.device) -> float:
    seconds = []
    for _ in range(REPEATS + 1):  # the first one sets up connections
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def _gather(value: float, world: World) -> list[float]:
    found: list[Any] = [None] * world.size
    dist.all_gather_object(found, value)
    return found
