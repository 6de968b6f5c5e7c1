"""Which split a row goes to.

random: by a hash of (seed, place of the file among all files, line or row number), so neither content nor threads
    matter and each row goes to exactly one split.
time: train before valid before test; cut at given times, or at quantiles of the times in the source, rows with a time
    equal to a cut going to the later split.
files: the files given for a split go there whole.
"""

from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from kernels.errors import UserError
from trainer.data.dataset import SPLITS
from trainer.prepare.blocks import Rows
from trainer.prepare.ids import Sample, mix64
from trainer.prepare.spec import SplitSpec

TRAIN, VALID, TEST = range(3)


@dataclass(frozen=True)
class Splitter:
    """spec: as chosen; cuts: times from which valid and test begin (None: no such split), for by = "time"."""

    spec: SplitSpec
    seed: int
    cuts: tuple[int | None, int | None] = (None, None)

    def assign(self, rows: Rows, times: np.ndarray | None) -> np.ndarray:
        """int8 N: TRAIN, VALID or TEST of each row."""
        file = rows.block.file
        if file.split is not None:
            return np.full(len(rows), SPLITS.index(file.split), np.int8)
        found_N = np.zeros(len(rows), np.int8)
        if self.spec.by == "time":
            valid, test = self.cuts
            if valid is not None:
                found_N[times >= valid] = VALID
            if test is not None:
                found_N[times >= test] = TEST
            return found_N
        valid, test = (s if isinstance(s, float) else 0.0 for s in (self.spec.valid, self.spec.test))
        key_N = row_keys(rows, self.seed)
        found_N[key_N < _bound(valid + test)] = VALID
        found_N[key_N < _bound(test)] = TEST
        return found_N

    def expected(self) -> list[str]:
        """The splits that rows of the source are drawn for."""
        names = ["train"]
        for name, cut in zip(SPLITS[1:], self.cuts, strict=True):
            if isinstance(getattr(self.spec, name), float) or cut is not None:
                names.append(name)
        return names


def row_keys(rows: Rows, seed: int) -> np.ndarray:
    """uint64 N, random and fixed for (seed, file, row)."""
    file = mix64(np.uint64(rows.block.file.number) ^ mix64(seed))
    return mix64(rows.row.astype(np.uint64) ^ file)


def given_cut(value: int | str | None, *, iso: bool, key: str) -> int | None:
    """A cut as the user wrote it -> the number that timestamps are compared with."""
    if value is None or isinstance(value, int):
        return value
    try:
        if not iso:
            return int(value)
        moment = datetime.fromisoformat(value)
    except ValueError as error:
        wanted = "a date and time such as 2024-05-01T00:00:00" if iso else "an integer as the timestamp column has"
        raise UserError(f"split: {key} = {value!r}: give {wanted}") from error
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())


def quantile_cuts(spec: SplitSpec, sample: Sample) -> tuple[int | None, int | None]:
    """Times that leave the shares that `spec` asks for to valid and test."""
    valid = spec.valid if isinstance(spec.valid, float) else None
    test = spec.test if isinstance(spec.test, float) else None
    test_cut = None if test is None else int(sample.quantiles([1.0 - test])[0])
    valid_cut = None if valid is None else int(sample.quantiles([1.0 - valid - (test or 0.0)])[0])
    return valid_cut, test_cut


def _bound(share: float) -> np.uint64:
    return np.uint64(min(2**64 - 1, int(share * 2**64)))
