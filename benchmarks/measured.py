"""`tablemesh bench plan --measure`: steps as the cost model foretells them beside the same steps, really run.

Plans of the quickstart's model and of RMC1 to 3, each of other sharding types, on two ranks of this machine with the
profile that `tablemesh bench calibrate` made (none of these cases is among those that it is fitted to).  A row is
correct when the prediction is within TOLERANCE.  The models' sizes are those of configs/quickstart.toml and
benchmarks/rmc.py, the tables all of one size, the rows of RMC fewer.
"""

import statistics
from typing import Any

import torch

from benchmarks.base import Row, report
from benchmarks.calibrate import in_turns
from benchmarks.planned import Case, Cases, predicted
from benchmarks.ranks import Ranks
from benchmarks.rmc import MODELS
from kernels.errors import UserError
from sharding import topology
from trainer import precision

TOLERANCE, ENOUGH = 0.25, 6  # of seven
RANKS = 2


def main(*, json: bool = False) -> int:
    """Run every case, print it; the exit code."""
    calibrated = topology.calibrated(RANKS)
    if calibrated is None:
        raise UserError(
            f"no profile of this machine for {RANKS} ranks ({topology.calibration_file(RANKS)}): "
            "`tablemesh bench calibrate` makes it in about two minutes"
        )
    cluster = calibrated.sized(hosts=1, ranks_per_host=RANKS)
    found = cases()
    with Ranks(Cases, RANKS, found, tuned=True) as ranks:
        real = {name: statistics.median(steps) for name, steps in in_turns(ranks, found).items()}
    rows = []
    for case in found:
        step = predicted(case, cluster).step_seconds
        rows.append(
            Row(
                name=case.name,
                unit="ms predicted",
                ours=1e3 * step,
                baseline=1e3 * real[case.name],
                baseline_name="measured",
                ratio=step / real[case.name],
                correct=abs(step / real[case.name] - 1) <= TOLERANCE,
            )
        )
    within = sum(row.correct for row in rows)
    note = f"{within} of {len(rows)} steps are foretold within {TOLERANCE:.0%}; {ENOUGH} are asked for"
    report("plan-measured", rows, json=json, notes=(note,), extra={"within": within})
    return 0 if within >= ENOUGH else 1


def cases() -> tuple[Case, ...]:
    """Seven plans, no two with the same sharding types on the same model."""
    bf16 = precision.choose("auto", torch.device("cpu")).is_bf16

    def quickstart(name: str, *shardings: str) -> Case:
        return Case(
            name=f"quickstart, {name}", shardings=shardings, rows=20_000, dim=16, batch=2048, interaction="dot",
            bf16=bf16, ranks=RANKS,
        )  # fmt: skip

    def rmc(name: str, sharding: str) -> Case:
        model: Any = MODELS[name]
        return Case(
            name=f"{name}, {sharding}", shardings=(sharding,) * model.tables, rows=20_000, dim=model.dim, batch=256,
            ids=model.ids_per_bag, dense=model.dense, bottom=model.bottom, top=model.top, bf16=bf16, ranks=RANKS,
        )  # fmt: skip

    return (
        quickstart("all tables whole", *["table_wise"] * 26),
        quickstart("8 tables by rows, 18 whole", *["row_wise"] * 8, *["table_wise"] * 18),
        quickstart("20 copies, 6 by columns", *["data_parallel"] * 20, *["column_wise"] * 6),
        rmc("rmc1", "table_wise"),
        rmc("rmc1", "row_wise"),
        rmc("rmc2", "column_wise"),
        rmc("rmc3", "table_wise"),
    )
