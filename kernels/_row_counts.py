"""The loop of kernels/row_counts.py in Numba.  Imports Numba, so it is imported at the first count and not before."""

from numba import uint64
from numpy import int32

from kernels._njit import njit

MOST = int32(2**31 - 1)
SEEN = int32(-(2**31))  # the sign says that the row was counted in this very call


@njit
def count(
    counts,  # (R,) int32, of all tables
    ids,  # (N,)
    starts,  # (F,) int64, where each feature's table begins in counts; negative: it is not counted
    rows,  # (F,) int64, rows of it; ids beyond are left to the look-up's own check
    ends,  # (F + 1,) int64, where each feature begins in ids
    first,  # these features, which share no table with others
    end,
):
    """One more for every row of the features first .. end-1, once for each; then again, to take the signs off."""
    for again in (False, True):
        for f in range(first, end):
            if starts[f] < 0:
                continue
            start, limit = uint64(starts[f]), uint64(rows[f])
            for i in range(uint64(ends[f]), uint64(ends[f + 1])):
                row = uint64(ids[i])
                if row >= limit:
                    continue
                old = counts[start + row]
                if again:
                    counts[start + row] = old & MOST
                elif old >= 0:
                    counts[start + row] = (old if old == MOST else old + int32(1)) | SEEN
