"""Pieces of decoded row groups -> shuffled rows of batches, all results in recycled memory.

A block, a run of consecutive rows of one stream, is shuffled straight into the batches that its rows belong to: those
are `Frame`s until every stream's rows are in.  Ids are widened and stored feature by feature, as KeyedJaggedTensor
wants them; numbers become rows.  The loops are in `compiled.py`, a call for all columns of a block.

Letters in shapes: n rows of a block, B rows of this rank's batch, K dense inputs, T labels, M = K + T (+ 1 weight), F
features, G features with one id or none per row, H multi-hot features, P pieces, C and S runs of rows, J groups of
columns, N ids.
"""

import itertools
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from trainer.data import compiled
from trainer.data.base import Bags, Columns, Shape, address
from trainer.data.batch import Batch
from trainer.data.compiled import IN_ORDER, u64
from trainer.data.memory import Pool


class Piece(NamedTuple):
    """Rows start .. stop-1 of a row group, which stand at place `at` and after it of a block before its shuffle."""

    columns: Columns
    start: int
    stop: int
    at: int
    first_row: int  # number of the row group's first row in the split

    def copy(self, pool: Pool) -> "Piece":
        """The same rows in memory of their own: what else the row group holds need not be kept for them."""

        def kept(column: np.ndarray | Bags) -> np.ndarray | Bags:
            if isinstance(column, np.ndarray):
                return pool.copy(column[self.start : self.stop])
            bags = column.slice(self.start, self.stop)
            return Bags(pool.copy(bags.values), pool.copy(bags.offsets))

        columns = Columns(
            numbers=[kept(column) for column in self.columns.numbers],
            ids=[kept(column) for column in self.columns.ids],
            holes=self.columns.holes,
        )
        return Piece(columns, 0, self.stop - self.start, self.at, self.first_row + self.start)


class BagRun(NamedTuple):
    """Rows first .. first+rows-1 of the shuffled multi-hot features of a block are the batch's rows from `at` on."""

    at: int
    bags: tuple[Bags, ...]
    first: int
    rows: int


class Frame:
    """A batch that is being filled, by several threads, each at rows of its own.

    covered: whether every row will be filled; if not, those that are left are padding: weight 0, row -1, empty bags.
    """

    def __init__(self, shape: Shape, rows: int, covered: bool, pool: Pool):
        self._shape, self.rows, self._pool = shape, rows, pool
        self._id_GB, self._dense_BK, self._labels_BT, self._weight_B, self._row_B = pool.arrays(
            ((shape.multi_hot.count(False), rows), np.int64),
            ((rows, shape.dense), np.float32),
            ((rows, shape.labels), np.float32),
            (rows, np.float32),
            (rows, np.int64),
        )
        self._holes = [not covered] * len(self._id_GB)
        self._bags: list[BagRun] = []
        if not covered:
            self._id_GB[:] = shape.none_G[:, None]
            self._row_B.fill(-1)
            for array in (self._dense_BK, self._labels_BT, self._weight_B):
                array.fill(0)
        arrays = self._id_GB, self._dense_BK, self._labels_BT, self._weight_B, self._row_B
        self.addresses = tuple(address(array) for array in arrays)  # in the order of `compiled.IDS` and those after it

    def add_bags(self, run: BagRun) -> None:
        self._bags.append(run)

    def add_holes(self, hole_G: list[bool]) -> None:
        for g, hole in enumerate(hole_G):
            if hole:
                self._holes[g] = True

    def batch(self, rows_in_step: int) -> Batch:
        """The finished batch; called once, when every block it lies in has been filled in."""
        shape, rows = self._shape, self.rows
        if not any(shape.multi_hot) and not any(self._holes):
            count = len(shape.features)
            ids = _keyed(shape.features, self._id_GB.reshape(-1), _ones(count * rows), [rows] * count, rows)
        else:
            ids = self._jagged()
        return Batch(
            dense_BK=torch.from_numpy(self._dense_BK),
            ids=ids,
            labels_BT=torch.from_numpy(self._labels_BT),
            weight_B=torch.from_numpy(self._weight_B),
            row_B=torch.from_numpy(self._row_B),
            rows_in_step=rows_in_step,
        )

    def _jagged(self) -> KeyedJaggedTensor:
        shape, rows = self._shape, self.rows
        runs = sorted(self._bags, key=lambda run: run.at)
        single, many = itertools.count(), itertools.count()
        column_F = np.array([next(many if multi_hot else single) for multi_hot in shape.multi_hot], np.uint64)
        multi_hot_F, hole_G = np.array(shape.multi_hot, bool), np.array(self._holes, bool)
        at_S = np.array([run.at for run in runs], np.uint64)
        rows_S = np.array([run.rows for run in runs], np.uint64)
        shape_SH = len(runs), sum(shape.multi_hot)
        value_SH = np.array([address(b.values) for run in runs for b in run.bags], np.uint64).reshape(shape_SH)
        offset_SH = np.array([address(b.offsets) + 8 * run.first for run in runs for b in run.bags], np.uint64).reshape(
            shape_SH
        )
        length_FB = self._pool.array((len(shape.features), rows), np.int32)
        ids_F = np.empty(len(shape.features), np.uint64)
        none_G = shape.none_G
        compiled.bag_lengths(
            column_F, multi_hot_F, self._id_GB, hole_G, none_G, at_S, rows_S, offset_SH, length_FB, ids_F
        )
        ids_per_key = ids_F.tolist()
        values_N = self._pool.array(sum(ids_per_key) + 1, np.int64)
        word = shape.id_dtype.type(0)
        compiled.fill_bags(
            column_F, multi_hot_F, self._id_GB, hole_G, none_G, rows_S, offset_SH, value_SH, word, values_N
        )
        lengths = torch.from_numpy(length_FB.reshape(-1))
        return _keyed(shape.features, values_N[:-1], lengths, ids_per_key, rows)


class Run(NamedTuple):
    """Places first .. first+rows-1 of a shuffled block are the frame's rows from `at` on."""

    frame: Frame
    at: int
    first: int
    rows: int


def fill(pieces: list[Piece], index: np.ndarray | None, runs: list[Run], shape: Shape, pool: Pool) -> None:
    """Shuffle a block into the frames of the batches that its rows belong to.

    pieces: of row groups, that together are the block.
    index: (n,) uint32, a permutation: place i takes row index[i] of the block; None: row i.
    runs: where its places belong, in any order.

    Example: pieces [a b] and [c d], index 2 0 3 1: the shuffled block is c a d b.
    """
    pieces = sorted(pieces, key=lambda piece: piece.at)
    rows_P = np.array([piece.stop - piece.start for piece in pieces], np.uint64)
    rows = int(rows_P.sum())
    index_n = IN_ORDER if index is None else index
    assert index is None or len(index) == rows
    layout = _layout(shape)
    run_C = np.array([(run.first, run.rows, *run.frame.addresses) for run in runs], np.uint64)
    run_C[:, 2:] += np.array([run.at for run in runs], np.uint64)[:, None] * layout.bytes_to_next_row
    dtype = shape.id_dtype
    word_n, part_64, record_n, number_n = pool.arrays(
        (rows, np.uint64),
        (64, np.uint64),
        ((rows + 1) * -(-shape.numbers // 16) * 16, np.float32),
        (rows, np.int64),
    )
    addresses_P = [piece.columns.addresses for piece in pieces]
    start_P1 = np.array([[piece.start] for piece in pieces], np.uint64)
    column_PG = np.stack([ids[layout.single] for _, ids in addresses_P]) + start_P1 * u64(dtype.itemsize)
    column_PM = np.stack([numbers for numbers, _ in addresses_P]) + start_P1 * u64(4)
    stride = 8 * runs[0].frame.rows
    compiled.fill_ids(
        column_PG,
        rows_P,
        index_n,
        run_C,
        u64(stride),
        layout.lanes_J,
        layout.column_J4,
        dtype.type(0),
        word_n,
        part_64,
    )
    first_P = np.array([piece.first_row + piece.start for piece in pieces], np.uint64)
    compiled.fill_rows(
        column_PM, rows_P, first_P, index_n, run_C, u64(shape.dense), u64(shape.labels), record_n, number_n
    )
    bags = tuple(_take_bags([_piece_of_bags(piece, f) for piece in pieces], index_n, pool) for f in layout.multi_hot)
    holes = [any(flags) for flags in zip(*(piece.columns.holes for piece in pieces), strict=True)]
    for run in runs if bags else ():
        run.frame.add_bags(BagRun(run.at, bags, run.first, run.rows))
    for run in runs if any(holes) else ():
        run.frame.add_holes([holes[f] for f in layout.single])


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """What follows from a shape.

    single, multi_hot: the features with at most one id in a row, and the others.
    bytes_to_next_row: (5,) uint64, in a frame's arrays.
    lanes_J, column_J4: see `compiled.fill_ids`.
    """

    single: np.ndarray
    multi_hot: tuple[int, ...]
    bytes_to_next_row: np.ndarray
    lanes_J: np.ndarray
    column_J4: np.ndarray


@lru_cache(maxsize=16)
def _layout(shape: Shape) -> _Layout:
    single = tuple(f for f, many in enumerate(shape.multi_hot) if not many)
    small = [g for g, f in enumerate(single) if shape.small and shape.small[f]]
    other = [g for g in range(len(single)) if g not in small]
    groups = [(4, group) for group in _in_groups(small, 4)]
    size = 1 if shape.wide else 2
    groups += [(size, group) for group in _in_groups(other, size)]
    return _Layout(
        single=np.array(single, np.int64),
        bytes_to_next_row=np.array([8, 4 * shape.dense, 4 * shape.labels, 4, 8], np.uint64),
        multi_hot=tuple(f for f, many in enumerate(shape.multi_hot) if many),
        lanes_J=np.array([lanes for lanes, _ in groups], np.uint64),
        column_J4=np.array([(*group, *[group[-1]] * (4 - len(group))) for _, group in groups], np.uint64).reshape(
            -1, 4
        ),
    )


def _in_groups(columns: list[int], size: int) -> list[list[int]]:
    return [columns[i : i + size] for i in range(0, len(columns), size)]


def _piece_of_bags(piece: Piece, feature: int) -> Bags:
    bags = piece.columns.ids[feature]
    return Bags(bags.values, bags.offsets[piece.start : piece.stop + 1])


def _take_bags(parts: list[Bags], index_n: np.ndarray, pool: Pool) -> Bags:
    """The bags of all parts, in the order of `index_n`.  Example: bags [7 8] [] [9], index 2 1 0: [9] [] [7 8]."""
    dtype = parts[0].values.dtype
    rows_P = np.array([len(part.offsets) - 1 for part in parts], np.uint64)
    count = sum(int(part.offsets[-1] - part.offsets[0]) for part in parts)
    rows = int(rows_P.sum())
    values_N, offsets_n, start_n, count_n = pool.arrays(
        (count, dtype), (rows + 1, np.int64), (rows, np.uint64), (rows, np.int64)
    )
    compiled.take_bags(
        np.array([address(part.values) for part in parts], np.uint64),
        np.array([address(part.offsets) for part in parts], np.uint64),
        rows_P,
        index_n,
        dtype.type(0),
        start_n,
        count_n,
        values_N,
        offsets_n,
    )
    return Bags(values_N, offsets_n)


@lru_cache(maxsize=4)
def _ones(count: int) -> torch.Tensor:
    """Lengths of bags with one id each, shared by all batches of one size: nobody changes lengths in place."""
    return torch.ones(count, dtype=torch.int32)


def _keyed(
    features: tuple[str, ...], values_N: np.ndarray, length_FB: torch.Tensor, ids_per_key: list[int], rows: int
) -> KeyedJaggedTensor:
    """Ids per key are given along, or TorchRec would sum the lengths, on a GPU with a wait for the device.

    Lengths are int32, which is what the sharded input distribution sends; values int64, which is what FBGEMM looks up.
    """
    return KeyedJaggedTensor(
        keys=list(features),
        values=torch.from_numpy(values_N),
        lengths=length_FB,
        stride=rows,
        length_per_key=ids_per_key,
        offset_per_key=[0, *itertools.accumulate(ids_per_key)],
    )
