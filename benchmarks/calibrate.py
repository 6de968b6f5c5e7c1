"""`tablemesh bench calibrate`: measures this machine, and keeps what it found for the planner.

Two stages, both on as many ranks as are asked for, over gloo, all working at once as they do in training:

1. rates, each in a loop of its own: reading table rows and updating them by width, from memory and from cache; the
   layers' products in float32 and bf16; elementwise work; a dense optimizer step; all-to-all and all-reduce over sizes.
2. what TorchRec and the host add to that.  Small models are trained for some steps; the cost model is linear in the
   constants of OVERHEADS, so non-negative least squares finds them from the measured steps.

The profile goes to sharding.topology.calibration_file, where `detect` looks for it.

Shapes: C cases, O overheads.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from itertools import cycle
from typing import Any

import numpy as np
import tomli_w
import torch
import torch.distributed as dist
from scipy.optimize import nnls

from benchmarks.base import Row, report, usable_cores
from benchmarks.planned import Case, Cases, predicted
from benchmarks.ranks import Ranks
from kernels.linear import Linear
from kernels.ops import Optimizer, Spec, Table, TableBatchedEmbeddingBag
from sharding import topology
from sharding.topology import Topology
from trainer.report import hardware, versions

WIDTHS = (8, 16, 32, 64, 128)  # columns
FAR, NEAR = 128 << 20, 512 << 10  # bytes of a table that lies in memory, and of one that stays in a core's cache
IDS, BAG = 40_000, 20
SIZES = tuple(1 << n for n in range(12, 25, 2))  # bytes of a collective
STEPS, WARM_UP = 14, 4
LEAST = 1e-12  # what stands for zero: a profile's numbers are above it
OVERHEADS = (
    "step_seconds", "feature_seconds", "part_seconds", "rows_seconds", "group_seconds", "replica_seconds",
    "bucket_seconds", "bag_seconds", "op_seconds",
)  # fmt: skip
RATES = (
    "matrix_fp32", "matrix_bf16", "vector_bandwidth", "update_dense_bandwidth", "intra_bandwidth", "inter_bandwidth",
    "row_bandwidth", "cached_row_bandwidth", "update_row_bandwidth", "memory_bandwidth",
)  # fmt: skip


def main(*, nproc: int | None = None, json: bool = False) -> int:
    """Measure, write the profile, print it; the exit code."""
    nproc = nproc or max(1, min(2, usable_cores()))
    base = topology.CPU_HOST.sized(hosts=1, ranks_per_host=nproc)
    started = time.perf_counter()
    cases = small_cases(nproc)
    with Ranks(Machine, nproc, cases, tuned=True) as ranks:
        measured = {name: _slowest(ranks.call("measure", name)) for name in Machine.MEASURES}
        rated = with_rates(base, measured)
        steps = {case.name: slowest_step(ranks.call("run", case.name, STEPS, WARM_UP)) for case in cases}
    found = fitted(rated, cases, steps)
    file = topology.calibration_file(nproc)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(as_toml(found, nproc))
    rows = [
        Row(
            name=name,
            unit=unit,
            ours=scale * getattr(found, name),
            baseline=scale * getattr(base, name),
            baseline_name="built-in",
            ratio=(getattr(found, name) / getattr(base, name)) ** (1 if name in RATES else -1),
            correct=True,
        )
        for name in (*RATES, "row_seconds", "cached_row_seconds", "update_row_seconds", "id_seconds", "intra_latency",
                     *OVERHEADS)
        for unit, scale in [("G/s", 1e-9) if name in RATES else ("us", 1e6)]
    ]  # fmt: skip
    fits = [(name, 1e3 * predicted(case, found).step_seconds, 1e3 * steps[name]) for name, case in
            ((c.name, c) for c in cases)]  # fmt: skip
    notes = [
        f"{name}: fitted {mine:.2f} ms, measured {real:.2f} ms ({mine / real - 1:+.0%})" for name, mine, real in fits
    ]
    notes.append(f"{file}: used from now on for {nproc} ranks; measured in {time.perf_counter() - started:.0f} s")
    extra = {
        "file": str(file),
        "nproc": nproc,
        "fits": [{"name": n, "fitted_ms": a, "measured_ms": b} for n, a, b in fits],
    }
    return report("calibrate", rows, json=json, notes=tuple(notes), extra=extra)


def small_cases(ranks: int) -> tuple[Case, ...]:
    """Models that differ in what each constant of OVERHEADS is multiplied with; none of them is one that
    `bench plan --measure` predicts."""

    def case(name: str, *shardings: str, **values: Any) -> Case:
        usual = {"rows": 2000, "dim": 8, "batch": 64, "bottom": (16, 8), "top": (16, 1)}
        return Case(name=name, shardings=shardings, ranks=ranks, **{**usual, **values})

    found = [
        case("4 tables whole", *["table_wise"] * 4),
        case("24 tables whole", *["table_wise"] * 24),
        case("a table of 24 features", "table_wise", features=24),
        case("12 tables as copies", *["data_parallel"] * 12),
        case("8 tables whole, deep layers", *["table_wise"] * 8, bottom=(16,) * 8 + (8,), top=(16,) * 12 + (1,)),
        case("8 tables whole, 2048 rows, wide layers", *["table_wise"] * 8, batch=2048, bottom=(256, 64),
             top=(256, 128, 1), rows=50_000, dim=32),
        case("16 tables whole, 1024 rows", *["table_wise"] * 16, batch=1024, rows=20_000, dim=32),
    ]  # fmt: skip
    if ranks > 1:
        found += [
            case("4 tables by rows", *["row_wise"] * 4),
            case("20 tables by rows", *["row_wise"] * 20),
            case("6 tables by rows, 10 whole", *["row_wise"] * 6, *["table_wise"] * 10),
            case("8 tables by rows, 2048 rows, 20 ids", *["row_wise"] * 8, batch=2048, ids=20, rows=50_000, dim=16),
        ]
    return tuple(found)


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
            layers = torch.nn.Sequential(Linear(256, 256, relu=True), Linear(256, 128, relu=True), Linear(128, 64))
            x_BN = torch.randn(1024, 256)
            with torch.autocast("cpu", torch.bfloat16, enabled=name.endswith("bf16")):
                taken = seconds(lambda: layers(x_BN).sum().backward())  # noqa: B023
            flops = 2 * 1024 * (256 * 256 * 2 + 256 * 128 * 3 + 128 * 64 * 3)  # the input has no gradient
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


def _slowest(by_rank: Sequence[Any]) -> Any:
    """The mean over ranks of a number, or of every number of a dict."""
    first = by_rank[0]
    if isinstance(first, dict):
        return {key: _slowest([rank[key] for rank in by_rank]) for key in first}
    return statistics.fmean(by_rank)


def slowest_step(by_rank: Sequence[list[float]]) -> float:
    """Seconds of a step: the median of the steps, each that of its slowest rank."""
    return statistics.median(max(of_step) for of_step in zip(*by_rank, strict=True))


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


def fitted(rated: Topology, cases: Sequence[Case], steps: dict[str, float]) -> Topology:
    """The overheads with which the cost model comes nearest to the measured steps, relatively."""
    nothing = replace(rated, **dict.fromkeys(OVERHEADS, LEAST))
    found = replace(rated)
    for _ in range(3):  # a step is its slowest rank's, and which one that is depends on the constants
        slowest = [int(predicted(case, found).rank_seconds.argmax()) for case in cases]
        rest_C = np.array([predicted(c, nothing).rank_seconds[r] for c, r in zip(cases, slowest, strict=True)])
        slopes = []
        for name in OVERHEADS:
            one = replace(nothing, **{name: 1.0})
            slopes.append([predicted(c, one).rank_seconds[r] for c, r in zip(cases, slowest, strict=True)])
        real_C = np.array([steps[case.name] for case in cases])
        slopes_CO = np.array(slopes).T - rest_C[:, None]
        values_O, _ = nnls(slopes_CO / real_C[:, None], np.maximum(0.0, real_C - rest_C) / real_C)
        found = replace(rated, **{n: max(LEAST, float(v)) for n, v in zip(OVERHEADS, values_O, strict=True)})
    return found


def as_toml(found: Topology, nproc: int) -> str:
    """The profile as `load_profiles` reads it."""
    units = {"bytes": "B", "bytes/s": "B/s", "FLOP/s": "FLOP/s", "s": "s", "share": "%"}
    base = topology.CPU_HOST
    section: dict[str, str | int] = {"like": "cpu", "ranks_per_host": nproc}
    for name, kind in topology.QUANTITIES.items():
        value = getattr(found, name)
        if value != getattr(base, name) and name not in ("device_memory", "host_memory"):
            section[name] = f"{value * (100 if kind == 'share' else 1):.6g}{units[kind]}"
    made = datetime.now(UTC).strftime("%Y-%m-%d")
    which = ", ".join(f"{name} {version}" for name, version in versions().items())
    head = f"# Measured by `tablemesh bench calibrate` on {made}: {hardware()['cpu']}, {nproc} ranks; {which}.\n"
    return head + tomli_w.dumps({"profiles": {f"cpu-{nproc}": section}})
