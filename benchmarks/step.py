"""`tablemesh bench step`: a whole training step beside stock TorchRec, on one rank and on two.

26 tables x 100k x 64, one id per bag, bottom 13-512-256-64, top 512-512-256-1, batch 2048 on each rank.  Stock is
TorchRec as it comes (benchmarks/workload.py).  Both sides start from the same weights and see the same batches; their
ranks live side by side and take turns of a few steps.  The first turn is not timed: its losses are compared.
"""

import statistics

from benchmarks.base import Row, Timed, rate_row, report
from benchmarks.ranks import Ranks
from benchmarks.workload import Workload, ours, stock

CHECKED = 10  # steps from the same weights
STEPS, TURNS = 5, 8
TOLERANCE = {"fp32": 1e-5, "bf16": 5e-3}  # of the loss of each of the first CHECKED steps, relative


def main(*, json: bool = False) -> int:
    """Run everything, print it; the exit code."""
    rows = [row for ranks in (1, 2) for row in beside_stock(ranks)]
    return report("step", rows, json=json)


def beside_stock(world_size: int) -> list[Row]:
    workload = Workload()
    with Ranks(ours, world_size, workload) as mine, Ranks(stock, world_size, workload) as theirs:
        own, other = losses(mine, CHECKED), losses(theirs, CHECKED)
        worst = max(abs(a - b) / abs(b) for a, b in zip(own, other, strict=True))
        runs = [(turn(mine), turn(theirs)) for _ in range(TURNS)]
    return [
        rate_row(
            f"{world_size}-rank step, fp32",
            runs,
            count=world_size * workload.batch,
            unit="samples/s",
            baseline_name="stock TorchRec, fp32",
            correct=worst < TOLERANCE["fp32"],
        )
    ]


def losses(ranks: Ranks, steps: int) -> list[float]:
    """Of the global batch of each step: the mean over the ranks."""
    by_rank = [losses for _, losses in ranks.call("run", steps)]
    return [statistics.fmean(of_step) for of_step in zip(*by_rank, strict=True)]


def turn(ranks: Ranks) -> Timed:
    """Seconds of one step: the mean over a turn, of the slowest rank."""
    seconds = max(statistics.fmean(seconds) for seconds, _ in ranks.call("run", STEPS))
    return Timed(seconds, seconds)
