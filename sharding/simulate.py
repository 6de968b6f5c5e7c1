"""What a training step takes as a whole, on up to thousands of ranks: the planner's device time, and what else may
be slower than it.

    simulate(load) -> Step                a plan that sharding/cost.py has priced
    point(work, cluster, ...) -> Point    the best plan on a cluster, and its step
    with_efficiency, stops_at             several of them beside each other: where scaling stops

Pure arithmetic: no torch, no process group; equal inputs give equal figures.  Four things go on at once, and a step
takes as long as the longest of them:

    device   the slowest rank's main path: look-ups, dense layers, pooled vectors home, updates
    ids      the next batch's ids on their way, where they travel beside the rest
    links    all bytes that a rank sends: ids, pooled vectors, their gradients, dense gradients.  Parts of it are on the
             device's path too, but a link serves one after the other even what is hidden
    host     launching the operations of a step, and reading rows where the training process itself does that

docs/scaling.md holds this against published throughputs, and says which constants were fitted to which of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from kernels.errors import UserError
from sharding.cost import Load, allreduce_seconds, collective_latency
from sharding.planner import Infeasible, Limits, Rule, Solution, solve
from sharding.topology import Topology
from sharding.work import ELEMENT, Work

# Kernels of a recorded CUDA graph start this far apart: an assumption, for which no source was found.
GRAPH_OP_SECONDS = 1.5e-6
# Share of the smallest cluster's samples/s per rank that each further rank must add for a larger one to be worth it.
WORTH = 0.5


@dataclass(frozen=True, kw_only=True)
class Program:
    """How a training program drives its devices.

    graphed: the step is recorded once and replayed: the host launches nothing, and kernels follow each other closely.
    row_seconds: of the host for each of a rank's rows, where the training process itself makes the batches.
    """

    name: str
    graphed: bool = False
    row_seconds: float = 0.0

    def on(self, topology: Topology) -> Topology:
        """The cluster as this program finds it."""
        if not self.graphed:
            return topology
        closer = min(1.0, GRAPH_OP_SECONDS / topology.op_seconds)
        launches = ("op_seconds", "feature_seconds", "part_seconds", "rows_seconds", "group_seconds", "replica_seconds")
        shorter = {name: getattr(topology, name) * closer for name in launches}
        return replace(topology, launch_seconds=0.0, step_seconds=0.0, **shorter)


TABLEMESH = Program(name="tablemesh")  # TorchRec's pipeline, eager; batches are made by threads ahead of the step


@dataclass(frozen=True, kw_only=True)
class Step:
    """paths: seconds of each of "device", "ids", "links", "host"."""

    paths: Mapping[str, float]

    @property
    def seconds(self) -> float:
        return max(self.paths.values())

    @property
    def bound_by(self) -> str:
        return max(self.paths, key=self.paths.__getitem__)


def simulate(found: Load, program: Program = TABLEMESH) -> Step:
    """The step of a priced plan.  found: priced on `program.on(topology)`."""
    prices = found.prices
    topology, work = prices.topology, prices.work
    sent = found.seconds[0] if not prices.hidden else found.hidden
    dense = ELEMENT * work.dense.parameters
    averaged = allreduce_seconds(topology, dense) + (collective_latency(topology) if dense else 0.0)
    rows = work.batch_size / topology.world_size
    return Step(
        paths={
            "device": float(found.main.max()),
            "ids": float(found.hidden.max()),
            "links": float((sent + found.seconds[2] + found.seconds[3]).max()) + averaged,
            "host": topology.launch_seconds + rows * program.row_seconds,
        }
    )


@dataclass(frozen=True, kw_only=True)
class Point:
    """One cluster of a comparison.

    solution, step: None where there is no plan, and `why` says what was in the way.
    efficiency: samples/s per rank, of those of the first cluster with a plan; 0 without one.
    """

    topology: Topology
    batch_size: int
    solution: Solution | None = field(default=None, repr=False)
    step: Step | None = None
    why: str = ""
    efficiency: float = 0.0

    @property
    def samples_per_second(self) -> float:
        return self.batch_size / self.step.seconds if self.step else 0.0


def point(
    work: Work,
    topology: Topology,
    *,
    rules: Mapping[str, Rule] | None = None,
    limits: Limits = Limits(),
    program: Program = TABLEMESH,
) -> Point:
    """The best plan of this work on a cluster, and its step; a Point without a plan where none is possible."""
    try:
        solution = solve(work, program.on(topology), rules=rules, limits=limits)
    except UserError as error:
        return Point(
            topology=topology,
            batch_size=work.batch_size,
            why=error.words if isinstance(error, Infeasible) else str(error),
        )
    return Point(
        topology=topology, batch_size=work.batch_size, solution=solution, step=simulate(solution.load, program)
    )


def with_efficiency(points: Sequence[Point]) -> list[Point]:
    """The same with each one's samples/s per rank beside those of the first that has a plan."""
    first = next((p for p in points if p.step), None)
    if first is None:
        return list(points)
    ideal = first.samples_per_second / first.topology.world_size
    return [replace(p, efficiency=p.samples_per_second / p.topology.world_size / ideal) for p in points]


def stops_at(points: Sequence[Point]) -> Point | None:
    """The last cluster that is worth its ranks: on the next larger one each further rank adds less than WORTH of what a
    rank of the smallest does, or there is no plan.  None where every step up is worth it.

    100, 180, 200 samples/s on 1, 2, 4 ranks: 180 on 2, since the next 2 ranks add 10 each.
    """
    rising = sorted(points, key=lambda p: p.topology.world_size)
    rising = rising[next((i for i, p in enumerate(rising) if p.step), len(rising)) :]
    if not rising:
        return None
    ideal = rising[0].samples_per_second / rising[0].topology.world_size
    for small, large in zip(rising, rising[1:], strict=False):
        more = large.topology.world_size - small.topology.world_size
        if more and (large.samples_per_second - small.samples_per_second) / more < WORTH * ideal:
            return small
    return None
