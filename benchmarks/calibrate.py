"""`tablemesh bench calibrate`: measures this machine, and keeps what it found for the planner.

Two stages, both on as many ranks as are asked for, over gloo, all working at once as they do in training:

1. rates, each in a loop of its own (benchmarks/rates.py): reading table rows and updating them by width, from memory
   and from cache; the layers' products; elementwise work; a dense optimizer step; all-to-all and all-reduce over sizes.
2. whole steps of small models, which differ in everything that the cost model counts.  The model is linear in the
   seconds of CONSTANTS, so least squares with a prior finds those that fit the measured steps best: no constant is
   below zero, and each is drawn towards what the first stage measured, or, where that cannot be, to the built-in value.

None of the models is one of those that `bench plan --measure` predicts.  How well the fit foretells a step that it was
not fitted to is measured too: each model in turn is left out.

The profile goes to sharding.topology.calibration_file, where `detect` looks for it.

Shapes: C cases, O constants.
"""

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import tomli_w
import torch
from scipy.optimize import nnls

from benchmarks.base import Row, report, usable_cores
from benchmarks.planned import Case, predicted
from benchmarks.ranks import Ranks
from benchmarks.rates import LEAST, Machine, of_ranks, with_rates
from sharding import topology
from sharding.topology import Topology
from trainer import precision
from trainer.report import hardware, versions

TURNS, STEPS, WARM_UP = 3, 8, 2  # the cases take turns; the first steps of a turn find a cache full of other tables
DRAWN = 24  # cases
PRIOR = 0.05  # weight of a constant's being twice its prior, beside a step's being foretold wrong by all of itself
UNITS = {"reduce_efficiency": ("of the bandwidth", 1.0)}
FASTEST = 10.0  # no rate is fitted above this multiple of what was measured
RATES = (
    "matrix_fp32", "matrix_bf16", "vector_bandwidth", "update_dense_bandwidth", "intra_bandwidth", "row_bandwidth",
    "cached_row_bandwidth", "update_row_bandwidth", "reduce_efficiency",
)  # fmt: skip
SECONDS = (
    "row_seconds", "cached_row_seconds", "update_row_seconds", "id_seconds", "intra_latency", "step_seconds",
    "feature_seconds", "part_seconds", "rows_seconds", "group_seconds", "replica_seconds", "replica_id_seconds",
    "replica_row_seconds", "bucket_seconds", "bag_seconds", "op_seconds",
)  # fmt: skip
CONSTANTS = (*RATES, *SECONDS)
INTRA, REDUCE = CONSTANTS.index("intra_bandwidth"), CONSTANTS.index("reduce_efficiency")


def main(*, nproc: int | None = None, json: bool = False) -> int:
    """Measure, write the profile, print it; the exit code."""
    nproc = nproc or max(1, min(2, usable_cores()))
    base = topology.CPU_HOST.sized(hosts=1, ranks_per_host=nproc)
    started = time.perf_counter()
    cases = (*small_cases(nproc), *drawn_cases(nproc))
    with Ranks(Machine, nproc, cases, tuned=True) as ranks:
        measured = {name: of_ranks(ranks.call("measure", name)) for name in Machine.MEASURES}
        steps = in_turns(ranks, cases)
    rated = with_rates(base, measured)
    real_C = np.array([statistics.median(steps[case.name]) for case in cases])
    found, off_C = fitted(rated, cases, real_C)
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
            ratio=(getattr(found, name) / getattr(base, name)) ** (-1 if name in SECONDS else 1),
            correct=True,
        )
        for name in (*CONSTANTS, "memory_bandwidth")
        for unit, scale in [UNITS.get(name, ("us", 1e6) if name in SECONDS else ("G/s", 1e-9))]
    ]
    fits = [
        {
            "name": c.name,
            "fitted_ms": 1e3 * predicted(c, found).step_seconds,
            "measured_ms": 1e3 * real,
            "left_out": off,
        }
        for c, real, off in zip(cases, real_C.tolist(), off_C.tolist(), strict=True)
    ]
    notes = [
        "{name}: fitted {fitted_ms:.1f} ms, measured {measured_ms:.1f} ms; left out of the fit {left_out:+.0%}".format(
            **f
        )
        for f in fits
    ]
    notes.append(
        f"steps left out of the fit are foretold within {np.median(abs(off_C)):.0%} in the median, "
        f"{(abs(off_C) <= 0.25).sum()} of {len(cases)} within 25%"
    )
    notes.append(f"{file}: used from now on for {nproc} ranks; measured in {time.perf_counter() - started:.0f} s")
    extra = {"file": str(file), "nproc": nproc, "fits": fits}
    return report("calibrate", rows, json=json, notes=tuple(notes), extra=extra)


def small_cases(ranks: int) -> tuple[Case, ...]:
    """Models whose steps are nearly all overhead, and differ in what each overhead is multiplied with."""

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


def drawn_cases(ranks: int, *, number: int = DRAWN, seed: int = 1) -> tuple[Case, ...]:
    """Models of all sizes that a few cores train, drawn from a seed: tables of two sharding types each."""
    rng = random.Random(seed)
    bf16 = precision.choose("auto", torch.device("cpu")).is_bf16
    types = ("table_wise", "row_wise", "column_wise", "data_parallel") if ranks > 1 else ("table_wise", "data_parallel")

    def size(low: int, high: int) -> int:
        return round(low * (high / low) ** rng.random())

    found = []
    for i in range(number):
        tables, dim, batch = size(4, 32), rng.choice([8, 16, 32, 64]), size(128, 2048)
        ids = size(1, max(1, min(100, 1_000_000 // (tables * batch))))
        if rng.random() < 0.3:
            ids = 1
        one, other = types[i % len(types)], rng.choice(types)
        ones = rng.randrange(tables // 2, tables + 1)
        widest = 1024 if batch < 512 else 512
        dense, interaction = size(8, 2 * widest), rng.choice(["dot", "cat"])
        bottom = (*(size(32, widest) for _ in range(rng.randrange(1, 3))), dim)
        top = (*(size(32, widest) for _ in range(rng.randrange(1, 4))), 1)
        found.append(
            Case(
                name=f"drawn {i + 1}: {ones} {one}, {tables - ones} {other}",
                shardings=(one,) * ones + (other,) * (tables - ones),
                rows=size(2000, 50_000), dim=dim, batch=batch, ids=ids, dense=dense, bottom=bottom, top=top,
                interaction=interaction, bf16=bf16 and i % 4 < 2, ranks=ranks,
            )
        )  # fmt: skip
    return tuple(found)


def in_turns(ranks: Ranks, cases: Sequence[Case]) -> dict[str, list[float]]:
    """Seconds of the steps of every case, each that of its slowest rank; a turn's first WARM_UP steps left out.

    In turns, so that what else happens on the machine does not happen to one case alone.
    """
    steps: dict[str, list[float]] = {case.name: [] for case in cases}
    for case in cases:
        ranks.call("build", case.name)
        ranks.call("run", case.name, WARM_UP)
    for _ in range(TURNS):
        for case in cases:
            by_rank = ranks.call("run", case.name, STEPS)
            steps[case.name] += [max(of_step) for of_step in zip(*by_rank, strict=True)][WARM_UP:]
    for case in cases:
        ranks.call("drop", case.name)
    return steps


def fitted(rated: Topology, cases: Sequence[Case], real_C: np.ndarray) -> tuple[Topology, np.ndarray]:
    """(`rated` with the CONSTANTS that come nearest to the measured steps (seconds) and to its own, off_C): off_C is by
    how much of itself each step is foretold wrong by the constants that are fitted to the others alone."""
    found = rated
    for _ in range(2):  # a step is its slowest rank's, and which one that is depends on the constants
        shares_CO = _shares(rated, cases, found, real_C)
        found = _with(rated, _factors(shares_CO))
    off = [shares_CO[c] @ _factors(np.delete(shares_CO, c, axis=0)) - 1 for c in range(len(cases))]
    return found, np.array(off)


def _shares(rated: Topology, cases: Sequence[Case], slowest_by: Topology, real_C: np.ndarray) -> np.ndarray:
    """(C, O) share of its measured step that a case spends on each constant, as `rated` has it."""
    nothing = replace(rated, **dict.fromkeys(RATES, np.inf), **dict.fromkeys(SECONDS, 0.0))
    # An all-reduce takes bytes / (intra_bandwidth * reduce_efficiency): without reduce_efficiency, no time; with it,
    # its own beside what the same bandwidth gives to all-to-alls.
    given = {name: {name: getattr(rated, name)} for name in CONSTANTS}
    given["reduce_efficiency"]["intra_bandwidth"] = rated.intra_bandwidth
    shares_CO = np.empty((len(cases), len(CONSTANTS)))
    for c, case in enumerate(cases):
        slowest = int(predicted(case, slowest_by).rank_seconds.argmax())
        rest = predicted(case, nothing).rank_seconds[slowest]
        for o, name in enumerate(CONSTANTS):
            one = replace(nothing, **given[name])
            shares_CO[c, o] = (predicted(case, one).rank_seconds[slowest] - rest) / real_C[c]
    shares_CO[:, REDUCE] -= shares_CO[:, INTRA]
    return shares_CO


def _factors(shares_CO: np.ndarray) -> np.ndarray:
    """(O,) by what to multiply each constant's seconds."""
    constants = shares_CO.shape[1]
    left = np.vstack([shares_CO, PRIOR * np.eye(constants)])
    right = np.concatenate([np.ones(len(shares_CO)), np.full(constants, PRIOR)])
    return nnls(left, right)[0]


def _with(rated: Topology, factors_O: np.ndarray) -> Topology:
    factors = dict(zip(CONSTANTS, factors_O.tolist(), strict=True))
    changes = {name: getattr(rated, name) / max(factors[name], 1 / FASTEST) for name in RATES}
    changes |= {name: max(LEAST, getattr(rated, name) * factors[name]) for name in SECONDS}
    changes["reduce_efficiency"] *= rated.intra_bandwidth / changes["intra_bandwidth"]
    return replace(rated, **changes, inter_bandwidth=changes["intra_bandwidth"])


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
