"""How every benchmark measures and reports: paired runs, medians, a correctness check in the same run."""

import json as json_module
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from trainer.report import hardware, versions


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a benchmark.

    ours, baseline: medians, in `unit`.
    ratio: median over the pairs; > 1 means that ours is better.
    correct: whether the results of both were equal in this very run.
    """

    name: str
    unit: str
    ours: float
    baseline: float
    baseline_name: str
    ratio: float
    correct: bool


@dataclass(frozen=True)
class Timed:
    """What one run took: on the clock, and of the CPU in all threads of this process."""

    seconds: float
    cpu_seconds: float


def timed(work: Callable[[], object]) -> Timed:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Timed(time.perf_counter() - wall, time.process_time() - cpu)


def paired(ours: Callable[[], object], baseline: Callable[[], object], *, pairs: int) -> list[tuple[Timed, Timed]]:
    """Ours and the baseline in turns, after one run of each that does not count.

    What disturbs the machine for a while then disturbs both sides of a pair, and the ratio little.
    """
    ours()
    baseline()
    return [(timed(ours), timed(baseline)) for _ in range(pairs)]


def rate_row(
    name: str,
    runs: list[tuple[Timed, Timed]],
    *,
    count: int,
    unit: str,
    baseline_name: str,
    correct: bool,
    cpu: bool = False,
) -> Row:
    """A row of rates out of paired runs that each did `count` things; cpu: per second of CPU, not of the clock."""
    spent = [tuple(t.cpu_seconds if cpu else t.seconds for t in pair) for pair in runs]
    return Row(
        name=name,
        unit=unit,
        ours=count / statistics.median(ours for ours, _ in spent),
        baseline=count / statistics.median(baseline for _, baseline in spent),
        baseline_name=baseline_name,
        ratio=statistics.median(baseline / ours for ours, baseline in spent),
        correct=correct,
    )


@contextmanager
def cores(count: int) -> Iterator[None]:
    """Only `count` of the cores this process may use, for its new threads too."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[-count:])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def report(
    bench: str, rows: list[Row], *, json: bool, notes: tuple[str, ...] = (), extra: dict[str, object] | None = None
) -> int:
    """Print the rows with hardware and versions; the exit code: 1 when a row is not correct.

    notes: further lines for people.  extra: further keys for programs.
    """
    if json:
        result = {"bench": bench, "hardware": hardware(), "versions": versions(), "rows": [asdict(r) for r in rows]}
        result |= extra or {}
        print(json_module.dumps(result))
    else:
        machine = hardware()
        gpus = ", ".join(gpu["name"] for gpu in machine["gpus"]) or "no GPU"
        print(f"{bench}: {machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 1e9:.0f} GB, {gpus}")
        print(", ".join(f"{name} {version}" for name, version in versions().items()))
        width = max(len(row.name) for row in rows)
        for row in rows:
            state = "correct" if row.correct else "NOT CORRECT"
            print(
                f"{row.name:{width}}  {_shown(row.ours):>12} {row.unit}  {row.ratio:5.2f} of {row.baseline_name} "
                f"({_shown(row.baseline)})  {state}"
            )
        for note in notes:
            print(note)
    return 0 if all(row.correct for row in rows) else 1


def _shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.2f}"
