"""What this machine reaches in loops of one kind of work each: the first stage of `tablemesh bench calibrate`.

with Ranks(Machine, nproc, cases, tuned=True) as ranks:
    measured = {name: of_ranks(ranks.call("measure", name)) for name in Machine.MEASURES}
with_rates(base, measured) -> Topology         what they mean in a profile's fields
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import cycle
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from scipy.optimize import nnls

from benchmarks.planned import Cases
from kernels.linear import Linear
from kernels.ops import Optimizer, Spec, Table, TableBatchedEmbeddingBag
from sharding.topology import Topology

WIDTHS = (8, 16, 32, 64, 128)  # columns
FAR, NEAR = 128 << 20, 512 << 10  # bytes of a table that lies in memory, and of one that stays in a core's cache
IDS, BAG = 40_000, 20
SIZES = tuple(1 << n for n in range(12, 25, 2))  # bytes of a collective
LEAST = 1e-12  # what stands for zero: a profile's numbers are above it


class Machine(Cases):
    """The loops of the first stage, on one rank; `measure` gives their result."""

    MEASURES = ("lookups", "updates", "products", "elementwise", "dense_update", "all_to_all", "all_reduce")

    def measure(self, name: str) -> Any:
        if dist.get_world_size() > 1:
            dist.barrier()
        return getattr(self, name)()

    def lookups(self) -> dict[str, dict[int, float]]:
        """Seconds an id, of a table in memory and of one in cache, by width; pooling's output taken off."""
        found: dict[str, dict[int, float]] = {}
        for place, size in (("far", FAR), ("near", NEAR)):
            found[place] = {}
            for width in WIDTHS:
                bags, ids_N, offsets = _bags(size // (4 * width), width)
                with torch.no_grad():
                    found[place][width] = seconds(lambda: bags(ids_N, offsets)) / IDS  # noqa: B023
        return found

    def updates(self) -> dict[str, dict[int, float]]:
        """Seconds an id of forward and backward, by width: of ids that all differ, and of a few repeated ones."""
        found: dict[str, dict[int, float]] = {"different": {}, "repeated": {}}
        for width in WIDTHS:
            for name, rows in (("different", FAR // (4 * width)), ("repeated", 100)):
                bags, ids_N, offsets = _bags(rows, width)
                grad = torch.ones(IDS // BAG, width)
                both = seconds(lambda: bags(ids_N, offsets).backward(grad))  # noqa: B023
                with torch.no_grad():
                    forward = seconds(lambda: bags(ids_N, offsets))  # noqa: B023
                found[name][width] = max(0.0, both - forward) / IDS
        return found

    def products(self) -> dict[str, float]:
        """FLOP/s of layers forward and backward, float32 and bf16."""
        found = {}
        for name in ("matrix_fp32", "matrix_bf16"):
            layers = torch.nn.Sequential(Linear(2048, 1024, relu=True), Linear(1024, 256, relu=True))
            x_BN = torch.randn(512, 2048)
            with torch.autocast("cpu", torch.bfloat16, enabled=name.endswith("bf16")):
                taken = seconds(lambda: layers(x_BN).sum().backward())  # noqa: B023
            flops = 2 * 512 * (2048 * 1024 * 2 + 1024 * 256 * 3)  # the input has no gradient
            found[name] = flops / taken
        return found

    def elementwise(self) -> float:
        """Bytes/s that an operation reads and writes."""
        turns = cycle(
            [(torch.randn(1 << 19), torch.empty(1 << 19)) for _ in range(16)]
        )  # 64 MiB, as of a step's tensors

        def add() -> None:
            one, out = next(turns)
            torch.add(one, 1.0, out=out)

        return 8 * (1 << 19) / seconds(add)

    def dense_update(self) -> float:
        """Bytes/s of a dense optimizer, as the cost model counts them."""
        weights = torch.nn.Parameter(torch.randn(1 << 21))
        weights.grad = torch.randn(1 << 21)
        optimizer = torch.optim.Adam([weights], fused=True)
        return (12 + 2 * 8) * (1 << 21) / seconds(optimizer.step)

    def all_to_all(self) -> dict[int, float]:
        """Seconds by bytes that a rank gives away."""
        return self._collective(lambda out, given: dist.all_to_all_single(out, given))

    def all_reduce(self) -> dict[int, float]:
        return self._collective(lambda out, given: dist.all_reduce(given))

    def _collective(self, call: Callable[[Any, Any], Any]) -> dict[int, float]:
        world = dist.get_world_size()
        if world == 1:
            return {}
        found = {}
        for size in SIZES:
            given = torch.ones(size // 4 // (world * 8) * world * 8)
            out = torch.empty_like(given)
            times = []
            for _ in range(9 if size < 1 << 20 else 5):
                dist.barrier()
                started = time.perf_counter()
                call(out, given)
                times.append(time.perf_counter() - started)
            found[size] = statistics.median(times[1:])
        return found


def _bags(rows: int, width: int) -> tuple[TableBatchedEmbeddingBag, torch.Tensor, torch.Tensor]:
    spec = Spec(tables=(Table(rows=rows, dim=width),), optimizer=Optimizer(kind="rowwise_adagrad"))
    bags = TableBatchedEmbeddingBag(spec)
    bags.state.weights.fill_(0.01)
    rng = torch.Generator().manual_seed(1)
    return bags, torch.randint(0, rows, (IDS,), generator=rng), torch.arange(0, IDS + 1, BAG)


def seconds(work: Callable[[], object], *, budget: float = 0.12) -> float:
    """The median of repeated runs, after two that do not count."""
    work()
    work()
    times: list[float] = []
    end = time.perf_counter() + budget
    while len(times) < 5 or time.perf_counter() < end:
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def of_ranks(by_rank: Sequence[Any]) -> Any:
    """The mean over ranks of a number, or of every number of a dict."""
    first = by_rank[0]
    if isinstance(first, dict):
        return {key: of_ranks([rank[key] for rank in by_rank]) for key in first}
    return statistics.fmean(by_rank)


def _line(points: dict[int, float], size_of: Callable[[int], float]) -> tuple[float, float]:
    """(seconds, seconds a byte) of the line through the points, with equal relative weights, both positive."""
    sizes = np.array([size_of(n) for n in points])
    times = np.array(list(points.values()))
    found, _ = nnls(np.stack([1 / times, sizes / times], 1), np.ones(len(times)))
    return max(LEAST, found[0]), max(1e-15, found[1])


def with_rates(base: Topology, measured: dict[str, Any]) -> Topology:
    """What the first stage found, in a profile's fields."""
    vector = measured["elementwise"]
    pooled = {w: 4 * w / BAG / vector for w in WIDTHS}  # writing the vectors, an id
    far = _line({w: max(LEAST, t - pooled[w]) for w, t in measured["lookups"]["far"].items()}, lambda w: 4 * w)
    near = _line({w: max(LEAST, t - pooled[w]) for w, t in measured["lookups"]["near"].items()}, lambda w: 4 * w)
    repeated, different = measured["updates"]["repeated"], measured["updates"]["different"]
    cached = {w: near[0] + 4 * w * near[1] for w in WIDTHS}
    sorting = statistics.median(max(LEAST, repeated[w] - cached[w] - pooled[w]) for w in WIDTHS)
    update = _line(
        {w: max(LEAST, different[w] - sorting - cached[w] - pooled[w]) for w in WIDTHS}, lambda w: 2 * (4 * w + 4)
    )
    changes: dict[str, float] = {
        "row_seconds": far[0], "row_bandwidth": 1 / far[1],
        "cached_row_seconds": near[0], "cached_row_bandwidth": 1 / near[1],
        "update_row_seconds": update[0], "update_row_bandwidth": 1 / update[1],
        "id_seconds": sorting,
        "memory_bandwidth": 1 / far[1],
        "vector_bandwidth": vector,
        "update_dense_bandwidth": measured["dense_update"],
        **measured["products"],
    }  # fmt: skip
    if measured["all_to_all"]:
        world = base.world_size
        first, byte = _line(measured["all_to_all"], lambda n: n * (world - 1) / world)
        _, reduced = _line(measured["all_reduce"], lambda n: 2 * n * (world - 1) / world)
        changes |= {
            "intra_latency": max(LEAST, first - base.peer_seconds * (world - 1)),
            "intra_bandwidth": 1 / byte,
            "inter_bandwidth": 1 / byte,
            "reduce_efficiency": byte / reduced,
        }
    return replace(base, **changes)
