"""The benchmark of the planner: TorchRec's plan is read right, and ours is not slower."""

import math

from benchmarks import plan
from sharding.planner import solve
from sharding.topology import parse


def test_ours_is_not_slower_than_torchrecs_plan():
    cluster = parse("h100-80gb:1x4")
    for work in (plan.random_tables(8, 7), plan.tables_of([100_000, 50, 4_000_000], 64, [1, 3, 50])):
        ours, theirs = solve(work, cluster), plan.stock(work, cluster)
        assert math.isfinite(theirs) and ours.load.step_seconds <= theirs * (1 + 1e-9)


def test_every_case_divides_over_its_ranks():
    names = [name for name, work, cluster in plan.cases() if work.batch_size % cluster.world_size == 0]
    assert len(names) == len(list(plan.cases())) >= 9
