"""`tablemesh bench rmc1|rmc2|rmc3`: the three classes of recommendation models of Gupta et al. (HPCA 2020).

Sizes from harvard-acc/DeepRecSys; `scale` is a factor on the rows of the tables, so that they fit.  RMC1 is small, RMC2
dominated by look-ups, RMC3 by its layers.  One rank, training; ours beside the same model on FBGEMM's kernels, in
float32.  Correct: in float32 both come to the same losses, in bf16 to the same first loss.  Ids are uniform.  Times are
of single steps, which the two sides take in turns of a few; the shares come from other steps, traced afterwards.
"""

import statistics
from dataclasses import replace

import torch

from benchmarks.base import Row, report
from benchmarks.ranks import Ranks
from benchmarks.step import apart
from benchmarks.workload import Workload, ours
from kernels.errors import UserError
from trainer import precision

MODELS = {
    "rmc1": Workload(
        tables=8, rows=4_000_000, dim=32, ids_per_bag=80, dense=128, bottom=(64, 32), top=(256, 64, 1),
        interaction="cat",
    ),
    "rmc2": Workload(
        tables=32, rows=500_000, dim=64, ids_per_bag=120, dense=256, bottom=(128, 64), top=(128, 64, 1),
        interaction="cat",
    ),
    "rmc3": Workload(
        tables=10, rows=2_000_000, dim=32, ids_per_bag=20, dense=2560, bottom=(1024, 256, 32), top=(512, 256, 1),
        interaction="cat",
    ),
}  # fmt: skip
BATCH = 512
FP32 = 1e-5  # of the loss of each of the WARM_UP steps, relative
BF16 = (
    1e-3  # of the first loss: Adagrad's first updates are about lr * sign(g), so later ones tell rounding from chance
)
WARM_UP, STEPS, TURNS, TRACED = 4, 5, 6, 5


def main(name: str, *, scale: float, json: bool = False) -> int:
    """Run one of MODELS, print it; the exit code."""
    if not 0 < scale <= 1:
        raise UserError(f"--scale {scale}: give a factor above 0 and up to 1 on the rows of the tables")
    model = MODELS[name]
    workload = replace(model, rows=max(1, round(model.rows * scale)), batch=BATCH)
    auto = precision.choose("auto", torch.device("cpu"))
    with Ranks(ours, 1, workload, "fp32", tuned=True) as mine:
        expected = mine.call("run", WARM_UP)[0][1]
    with (
        Ranks(ours, 1, workload, auto.name, tuned=True) as mine,
        Ranks(ours, 1, workload, "fp32", "fbgemm", tuned=True) as theirs,
    ):
        (_, own), (_, other) = mine.call("run", WARM_UP)[0], theirs.call("run", WARM_UP)[0]
        correct = apart(expected, other) < FP32 and apart(own[:1], other[:1]) < (FP32 if auto.name == "fp32" else BF16)
        turns = [(mine.call("run", STEPS)[0][0], theirs.call("run", STEPS)[0][0]) for _ in range(TURNS)]
        traced, theirs_traced = mine.call("profiled", TRACED)[0], theirs.call("profiled", TRACED)[0]
    shared = {"baseline_name": "ours on FBGEMM's kernels, fp32", "correct": correct}
    each = [[1e3 * s for turn in side for s in turn] for side in zip(*turns, strict=True)]
    rows = [
        _time_row(f"{name} step p50, {auto.name}", *(statistics.median(side) for side in each), **shared),
        _time_row(f"{name} step p99, {auto.name}", *(statistics.quantiles(s, n=100)[98] for s in each), **shared),
        _rate_row(f"{name} samples/s, {auto.name}", *(1e3 * BATCH / statistics.fmean(side) for side in each), **shared),
    ]
    theirs_of = {row["kind"]: row["ms"] for row in theirs_traced["kinds"]}
    shares = []
    for row in traced["kinds"]:
        shares.append(f"{row['kind']} {100 * row['share']:.1f}%")
        if theirs_of.get(row["kind"]) and row["ms"]:
            rows.append(_time_row(f"{name} {row['kind']}", row["ms"], theirs_of[row["kind"]], **shared))
    extra = {"scale": scale, "batch": BATCH, "shares": {row["kind"]: row["share"] for row in traced["kinds"]}}
    return report(name, rows, json=json, notes=("share of a step: " + ", ".join(shares),), extra=extra)


def _time_row(name: str, mine: float, theirs: float, **shared) -> Row:
    return Row(name=name, unit="ms", ours=mine, baseline=theirs, ratio=theirs / mine, **shared)


def _rate_row(name: str, mine: float, theirs: float, **shared) -> Row:
    return Row(name=name, unit="samples/s", ours=mine, baseline=theirs, ratio=mine / theirs, **shared)
