"""What a data source is, and what it gives.  See `Source`.

The loader (`trainer/data/loader.py`) knows the order, the shuffle, the batches and the threads; a source knows how to
decode one row group.  So a new format is one file here that implements `Source`.

Letters in shapes: n rows, K dense inputs, T labels, N ids.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Ids:
    """The bags of one feature.  Row i's ids are values[offsets[i]:offsets[i+1]], or values[i] where offsets is None."""

    values: np.ndarray  # (N,) int32 or int64
    offsets: np.ndarray | None = None  # (n+1,) int32 or int64, beginning with 0; None: one id in every row

    def slice(self, start: int, stop: int) -> "Ids":
        """Rows start .. stop-1, without a copy of the values."""
        if self.offsets is None:
            return Ids(self.values[start:stop])
        offsets = self.offsets[start : stop + 1]
        return Ids(self.values[offsets[0] : offsets[-1]], offsets - offsets[0] if offsets[0] else offsets)


@dataclass(frozen=True, kw_only=True)
class Columns:
    """n decoded rows, column by column, everything checked: what is here can be trained on.  Never changed in place."""

    rows: int  # n
    ids: tuple[Ids, ...]  # one per feature, in the dataset's order
    dense_nK: np.ndarray  # float32, contiguous, finite
    labels_nT: np.ndarray  # float32, contiguous, finite
    weight_n: np.ndarray | None  # float32, finite, >= 0; None: all 1


class Source(Protocol):
    """One split of one dataset in one format; this is the whole surface.

    `read` is called from several threads at once.  It is called for each row group once or a few times in an epoch, in
    the order of the epoch's permutation, so it may not rely on going forward.
    """

    @property
    def row_groups(self) -> tuple[int, ...]:
        """Rows of every row group, in file order: the unit that is decoded at once.  Known without reading any data."""
        ...

    def check(self) -> None:
        """Cheap look at every file before training starts: present, whole, all columns there with usable types.

        Raises UserError naming file, column, the type found and the types that would do.
        """
        ...

    def read(self, row_group: int) -> Columns:
        """Decode row group number `row_group` of the split, every value checked and the id policy applied.

        Raises UserError naming column, file, row group (numbered in its file) and row (numbered in the row group).
        """
        ...
