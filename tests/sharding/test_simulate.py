"""The simulated step: its paths by hand, programs, several clusters beside each other."""

from dataclasses import replace

import pytest

from sharding.cost import allreduce_seconds, collective_latency, load
from sharding.planner import Rule, solve
from sharding.simulate import (
    GRAPH_OP_SECONDS,
    TABLEMESH,
    Point,
    Program,
    Step,
    point,
    simulate,
    stops_at,
    with_efficiency,
)
from sharding.topology import parse
from sharding.work import DenseWork, TableLoad, Work

DENSE = DenseWork(flops_per_row=1e8, bytes_per_row=1e5, ops=50, parameters=1e7)
TABLES = tuple(TableLoad(name=f"t{i}", rows=10_000 * (i + 1), dim=64, ids=3.0) for i in range(12))
GRAPHED = Program(name="graphed", graphed=True)


def work(batch: int = 65_536) -> Work:
    return Work(tables=TABLES, batch_size=batch, dense=DENSE, bf16=True)


def test_a_step_is_its_longest_path():
    cluster = parse("h100-80gb:2x8")
    found = solve(work(), cluster).load
    step = simulate(found)
    assert step.paths["device"] == found.main.max() and step.paths["ids"] == found.hidden.max()
    assert step.paths["host"] == cluster.launch_seconds > step.paths["device"]
    assert step.seconds == cluster.launch_seconds and step.bound_by == "host"
    slow = simulate(found, Program(name="reads in the loop", row_seconds=1e-5))
    assert slow.paths["host"] == pytest.approx(cluster.launch_seconds + 4096 * 1e-5)
    sent = found.hidden + found.seconds[2] + found.seconds[3]
    averaged = allreduce_seconds(cluster, 4e7) + collective_latency(cluster)
    assert step.paths["links"] == pytest.approx(sent.max() + averaged)


def test_a_step_is_never_shorter_than_what_the_planner_says():
    for cluster in ("h100-80gb:1x1", "h100-80gb:1x8", "a100-40gb:4x8", "l4:1x4", "cpu:1x2"):
        found = solve(work(), parse(cluster)).load
        assert simulate(found).seconds >= found.step_seconds * (1 - 1e-12)
    assert simulate(found).seconds == found.step_seconds  # on a CPU the host's work is the step's


def test_a_recorded_step_costs_the_host_nothing_and_its_kernels_stand_closer():
    cluster = parse("h100-80gb:2x8")
    recorded = GRAPHED.on(cluster)
    assert recorded.launch_seconds == recorded.step_seconds == 0
    assert recorded.op_seconds == pytest.approx(GRAPH_OP_SECONDS)
    assert recorded.group_seconds == pytest.approx(cluster.group_seconds * GRAPH_OP_SECONDS / cluster.op_seconds)
    assert recorded.memory_bandwidth == cluster.memory_bandwidth and TABLEMESH.on(cluster) is cluster
    eager, graphed = point(work(), cluster), point(work(), cluster, program=GRAPHED)
    assert graphed.step.paths["device"] < eager.step.paths["device"]
    assert graphed.step.bound_by != "host" and graphed.samples_per_second > eager.samples_per_second


def test_a_cluster_without_a_plan_says_why():
    missing = point(work(65_537), parse("h100-80gb:1x8"))
    assert missing.step is None and missing.samples_per_second == 0
    assert "does not divide over the 8 ranks" in missing.why
    rules = {"t0": Rule(shardings=frozenset(["row_wise"]), said="a rule")}
    assert point(work(), parse("h100-80gb:1x8"), rules=rules).step is not None


def points(rates: list[float], ranks: list[int]) -> list[Point]:
    """Points of these samples/s; 0: no plan."""
    made = []
    for rate, n in zip(rates, ranks, strict=True):
        step = Step(paths={"device": 1000 / rate}) if rate else None
        made.append(Point(topology=parse(f"h100-80gb:{n}x1"), batch_size=1000, step=step))
    return made


@pytest.mark.parametrize(
    ("rates", "ranks", "stops"),
    [
        ([100, 180, 200], [1, 2, 4], 2),
        ([200, 100, 180], [4, 1, 2], 2),  # in any order
        ([100, 200, 400], [1, 2, 4], None),
        ([100, 150], [1, 2], None),  # half of a rank's worth is just enough
        ([100, 149], [1, 2], 1),
        ([0, 100, 190, 0], [1, 2, 4, 8], 4),
        ([0, 0], [1, 2], None),
        ([100], [1], None),
    ],
)
def test_where_scaling_stops(rates, ranks, stops):
    found = stops_at(points(rates, ranks))
    assert (None if found is None else found.topology.world_size) == stops


def test_efficiency_is_beside_the_first_cluster_with_a_plan():
    found = with_efficiency(points([0, 100, 150], [1, 2, 4]))
    assert [p.efficiency for p in found] == pytest.approx([0, 1, 0.75])
    assert with_efficiency(points([0], [1]))[0].efficiency == 0


def test_weak_scaling_to_thousands_of_ranks():
    """Twice the ranks with twice the batch never take less time, and the links' share grows."""
    graphed = [
        point(replace(work(), batch_size=4096 * 8 * hosts), parse(f"h100-80gb:{hosts}x8"), program=GRAPHED)
        for hosts in (1, 8, 64)
    ]
    seconds = [p.step.seconds for p in graphed]
    assert seconds == sorted(seconds)
    assert [p.solution.load.prices.topology.world_size for p in graphed] == [8, 64, 512]


def test_equal_inputs_give_equal_steps():
    once, again = (point(work(), parse("h100-80gb:8x8")) for _ in range(2))
    assert once.step == again.step and once.solution.choices == again.solution.choices
    prices = once.solution.prices
    assert simulate(load(prices, once.solution.choices)) == once.step
