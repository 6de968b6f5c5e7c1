"""What a data source is, and what it gives.  See `Source`.

The loader (`trainer/data/loader.py`) knows the order, the shuffle, the batches and the threads; a source knows how to
decode one row group.  So a new format is one file here that implements `Source`.

Letters in shapes: n rows, N ids, K dense inputs, T labels.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np


def address(array: np.ndarray) -> int:
    """Of its first element."""
    return array.__array_interface__["data"][0]


@dataclass(frozen=True)
class Bags:
    """Any number of ids per row: row i's are values[offsets[i]:offsets[i+1]]."""

    values: np.ndarray  # (N,) `Shape.id_dtype`, each inside its table
    offsets: np.ndarray  # (n+1,) int64, not falling; need not begin with 0

    def slice(self, start: int, stop: int) -> "Bags":
        """Rows start .. stop-1, without a copy."""
        offsets = self.offsets[start : stop + 1]
        return Bags(self.values[offsets[0] : offsets[-1]], offsets - offsets[0])


ANY_NONE = -(2**63)  # no id, among ids of any other 64 bits


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What the batches of a dataset hold.

    features: names in the dataset's order.
    multi_hot: for each feature, whether it comes as `Bags`; else it is one id, or none, in every row.
    dense, labels: how many, K and T.
    weighted: whether rows have weights; else each counts 1.
    wide: whether an id may exceed int32.
    small: for each feature, whether its ids are below 2**15, which makes them cheaper to move; default none.
    any_id: for each feature, whether its ids are any 64 bits but `ANY_NONE`; default none.
    """

    features: tuple[str, ...]
    multi_hot: tuple[bool, ...]
    dense: int
    labels: int
    weighted: bool = False
    wide: bool = False
    small: tuple[bool, ...] = ()
    any_id: tuple[bool, ...] = ()

    @cached_property
    def none_G(self) -> np.ndarray:
        """int64: what stands for no id, of each feature with one id or none per row."""
        any_id = self.any_id or (False,) * len(self.features)
        return np.array(
            [ANY_NONE if a else -1 for a, many in zip(any_id, self.multi_hot, strict=True) if not many], int
        )

    @property
    def id_dtype(self) -> np.dtype:
        return np.dtype(np.int64 if self.wide else np.int32)

    @property
    def numbers(self) -> int:
        """Columns of float32: dense inputs, labels, weight."""
        return self.dense + self.labels + self.weighted


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The decoded and checked rows of one row group.

    numbers: (n,) finite float32 each: the K dense inputs, the T labels, the weight if any.
    ids: of every feature, each inside its table: (n,) of `Shape.id_dtype`, -1 (any ids: `ANY_NONE`) where the bag is
        empty, or Bags.
    holes: for each feature with one id or none per row (False for the others), whether there may be a
        `Shape.none_G`.

    The arrays have no gaps and may be views of the decoder's memory.
    """

    numbers: list[np.ndarray]
    ids: "list[np.ndarray | Bags]"
    holes: list[bool]

    @cached_property
    def addresses(self) -> tuple[np.ndarray, np.ndarray]:
        """uint64: where each column of numbers begins, and each of ids; 0 for Bags."""
        ids = [0 if isinstance(column, Bags) else address(column) for column in self.ids]
        return np.array([address(column) for column in self.numbers], np.uint64), np.array(ids, np.uint64)


class Source(Protocol):
    """One split of one dataset in one format; this is the whole surface.

    `read` is called from several threads at once.  It is called for each row group once or a few times in an epoch, in
    the order of the epoch's permutation, so it may not rely on going forward.
    """

    @property
    def shape(self) -> Shape: ...

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
        """Row group number `row_group` of the split, decoded, every value checked and the id policy applied.

        The arrays stay as they are while anyone holds them.  Raises UserError naming column, file, row group
        (numbered in its file) and row (numbered in the row group).
        """
        ...
