"""`tablemesh bench step`: a whole training step beside stock TorchRec, on one rank and on two.

26 tables x 100k x 64, one id per bag, bottom 13-512-256-64, top 512-512-256-1, batch 2048 on each rank.  Stock is
TorchRec as it comes, in float32 (benchmarks/workload.py); ours is measured in the precision that `precision = "auto"`
takes here, and in float32.  All start from the same weights and see the same batches; their ranks live side by side and
take turns of a few steps.  The first turn is not timed: its losses are compared, step by step.
"""

import statistics

import torch

from benchmarks.base import Row, Timed, rate_row, report
from benchmarks.ranks import Ranks
from benchmarks.workload import Workload, ours, stock
from trainer import precision

CHECKED = 6  # steps from the same weights; later the four batches are learnt by heart, and rounding errors grow
STEPS, TURNS = 5, 8
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-3}  # of the loss of each of the first CHECKED steps, relative


def main(*, json: bool = False) -> int:
    """Run everything, print it; the exit code."""
    auto = precision.choose("auto", torch.device("cpu"))
    rows = [row for ranks in (1, 2) for row in beside_stock(ranks, auto.name)]
    return report("step", rows, json=json, notes=(f"precision: {auto.name}, as {auto.why}",))


def beside_stock(world_size: int, auto: str) -> list[Row]:
    workload, names = Workload(), list(dict.fromkeys((auto, "fp32")))
    sides = {name: Ranks(ours, world_size, workload, name, tuned=True) for name in names}
    with Ranks(stock, world_size, workload) as theirs:
        try:
            expected = losses(theirs, CHECKED)
            worst = {name: apart(losses(side, CHECKED), expected) for name, side in sides.items()}
            turns = [({name: turn(side) for name, side in sides.items()}, turn(theirs)) for _ in range(TURNS)]
        finally:
            for side in sides.values():
                side.close()
    return [
        rate_row(
            f"{world_size}-rank step, {name}",
            [(mine[name], stock_turn) for mine, stock_turn in turns],
            count=world_size * workload.batch,
            unit="samples/s",
            baseline_name="stock TorchRec, fp32",
            correct=worst[name] < TOLERANCE[name],
        )
        for name in names
    ]


def losses(ranks: Ranks, steps: int) -> list[float]:
    """Of the global batch of each step: the mean over the ranks."""
    by_rank = [losses for _, losses in ranks.call("run", steps)]
    return [statistics.fmean(of_step) for of_step in zip(*by_rank, strict=True)]


def apart(one: list[float], two: list[float]) -> float:
    """The largest relative difference."""
    return max(abs(a - b) / abs(b) for a, b in zip(one, two, strict=True))


def turn(ranks: Ranks) -> Timed:
    """Seconds of one step: the mean over a turn, of the slowest rank."""
    seconds = max(statistics.fmean(seconds) for seconds, _ in ranks.call("run", STEPS))
    return Timed(seconds, seconds)
