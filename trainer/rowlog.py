"""Which rows every step trained on, written down as it happens: how `tablemesh chaos` counts each sample exactly once.

JOB.json of such a run has "rows": a folder for this start of the job. In it every attempt has a folder of its own, and
every rank a file of records, each appended by one write when its step is done, so before any checkpoint that holds it:
    int64 step, int64 n, n * int64 row numbers in the split's file order; padding is left out
What was trained again after a restart is in a later attempt, so the history that the final weights come from is, for
every step, the record of the last attempt that made it, once each attempt has cut off what came after its beginning.

The rows come from the batch that the step trained on, not from the order's arithmetic, which is what is to be proved.
"""

import os
from pathlib import Path

import numpy as np
from torch import Tensor

from kernels.errors import UserError
from trainer import restarts


class RowLog:
    """One rank's file of this attempt."""

    def __init__(self, folder: Path, rank: int) -> None:
        place = folder / f"attempt_{restarts.attempt()}"
        place.mkdir(parents=True, exist_ok=True)
        self._file = os.open(place / f"rank_{rank}.bin", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)

    def add(self, step: int, row_B: Tensor) -> None:
        rows = row_B[row_B >= 0].cpu().numpy()
        record = np.concatenate([np.array([step, len(rows)], np.int64), rows]).tobytes()
        written = os.write(self._file, record)
        assert written == len(record), "a short write to the log of rows"


def read(folder: Path) -> dict[int, np.ndarray]:
    """The surviving history: step -> the sorted rows it trained on, on all ranks together.

    folder: of all starts of the run, in the order of their names, with the attempts of each below.
    Raises UserError when a rank's record of a surviving step is missing.
    """
    history: dict[int, np.ndarray] = {}
    for attempt in sorted(folder.glob("*/attempt_*"), key=lambda p: (p.parent.name, int(p.name.split("_")[1]))):
        by_rank = {path.stem: dict(_records(path)) for path in sorted(attempt.glob("rank_*.bin"))}
        steps = set().union(*by_rank.values())
        if not steps:
            continue
        history = {step: rows for step, rows in history.items() if step < min(steps)}
        for step in sorted(steps):
            missing = [rank for rank, records in by_rank.items() if step not in records]
            if not missing:
                history[step] = np.sort(np.concatenate([records[step] for records in by_rank.values()]))
            elif step < max(steps):  # of the step in which an attempt was killed, some ranks have no record
                raise UserError(f"{attempt}: no record of step {step} by {', '.join(missing)}")
    return history


def _records(path: Path) -> list[tuple[int, np.ndarray]]:
    """The whole records of a file; what a killed rank wrote half of is left out."""
    numbers = np.frombuffer(path.read_bytes()[: path.stat().st_size // 8 * 8], np.int64)
    found, at = [], 0
    while at + 2 <= len(numbers) and at + 2 + numbers[at + 1] <= len(numbers):
        step, count = int(numbers[at]), int(numbers[at + 1])
        found.append((step, numbers[at + 2 : at + 2 + count]))
        at += 2 + count
    return found


def first_fault(
    expected: dict[int, np.ndarray], found: dict[int, np.ndarray], *, rows: int, steps_per_epoch: int
) -> str | None:
    """Where a disturbed history differs from the undisturbed one, or sees a row twice in an epoch; None: nowhere.

    rows: of the split; a whole epoch must have seen each of them exactly once.
    """
    for step in sorted(expected.keys() | found.keys()):
        if step not in found:
            return f"step {step} was lost"
        if step not in expected:
            return f"step {step} is more than was asked for"
        if not np.array_equal(expected[step], found[step]):
            lost = np.setdiff1d(expected[step], found[step])
            extra = np.setdiff1d(found[step], expected[step])
            said = [f"row {lost[0]} was lost"] if len(lost) else []
            said += [f"row {extra[0]} was trained on instead"] if len(extra) else []
            return f"step {step}: {' and '.join(said) or 'a row was seen twice'}"
    steps = sorted(found)
    for epoch in range(steps[-1] // steps_per_epoch if steps else 0):
        counts = np.zeros(rows, np.int64)
        for step in range(epoch * steps_per_epoch + 1, (epoch + 1) * steps_per_epoch + 1):
            np.add.at(counts, found[step], 1)
        if (wrong := np.flatnonzero(counts != 1)).size:
            return f"epoch {epoch}: row {wrong[0]} was seen {counts[wrong[0]]} times"
    return None
