"""Decoded rows -> shuffled blocks -> batches: whole columns at a time, all results in recycled memory.

A row group is copied into the blocks it belongs to right after it was decoded, column by column, so that a column's
part of a block stays in the CPU's cache while its rows go where the shuffle puts them.  A batch is then made of slices,
which are runs of every column: ids are widened and features stored one after the other, as KeyedJaggedTensor wants
them, numbers become rows.  The loops are in `compiled.py`, one call for all columns.

Letters in shapes: n rows of a block, B rows of this rank's batch, K dense inputs, T labels, M = K + T (+ 1 weight), F
features, G features with one id or none per row, H multi-hot features, S slices, N ids.
"""

import itertools
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from trainer.data import compiled
from trainer.data.base import Bags, Columns, Shape
from trainer.data.batch import Batch
from trainer.data.compiled import NOTHING, addresses, u64
from trainer.data.memory import Pool


@dataclass(frozen=True, kw_only=True)
class Block:
    """n shuffled rows of one stream."""

    ids_Gn: np.ndarray  # `Shape.id_dtype`, -1 where the bag is empty
    holes: bool  # whether there may be a -1
    bags: tuple[Bags, ...]  # of the multi-hot features
    numbers_Mn: np.ndarray  # float32
    row_n: np.ndarray  # int64, row numbers in the split

    @cached_property
    def addresses(self) -> tuple[int, int, int, int, int]:
        """Of ids, numbers and row numbers; n; bytes of an id.  Kept: a batch needs them of every stream's block."""
        ids = self.ids_Gn
        return _address(ids), _address(self.numbers_Mn), _address(self.row_n), len(self.row_n), ids.itemsize


class Filling:
    """A block into which pieces of row groups are put, each where it stands in the stream, from several threads.

    index: (n,) uint32, a permutation: row i of the finished block is row index[i] of what was put; None: as put.
    whole: it is all one piece.

    Example: index 2 0 3 1; rows a b put at 0 and c d at 2 make the block c a d b.
    """

    def __init__(self, shape: Shape, rows: int, index: np.ndarray | None, whole: bool, pool: Pool):
        self._index, self._whole, self._pool = index, whole, pool
        self._single = [f for f, many in enumerate(shape.multi_hot) if not many]
        self._holes = False
        self._bags: dict[int, list[tuple[int, Bags]]] = {f: [] for f, many in enumerate(shape.multi_hot) if many}
        self._ids_Gn, self._numbers_Mn, self._row_n = pool.arrays(
            ((len(self._single), rows), shape.id_dtype), ((shape.numbers, rows), np.float32), (rows, np.int64)
        )

    def put(self, columns: Columns, start: int, stop: int, at: int, first_row: int) -> None:
        """Rows start .. stop-1 of a row group stand at `at`; its first row has the number first_row in the split."""
        rows, index, place, to = u64(stop - start), NOTHING, NOTHING, 0
        if self._index is None:
            to = at
        elif self._whole:
            index = self._index
        else:
            place, index = self._pool.arrays(*[(stop - start + 1, np.uint32)] * 2)
            compiled.pick(self._index, u64(at), u64(at + stop - start), place, index)
        compiled.number_rows(self._row_n, u64(to), rows, u64(first_row + start), index, place)
        single = [columns.ids[f] for f in self._single]
        assert all(column.dtype == self._ids_Gn.dtype for column in single)
        from_C = addresses(columns.numbers) + u64(4 * start)
        to_C = _rows(self._numbers_Mn) + u64(4 * to)
        size = self._ids_Gn.itemsize
        from_G, to_G = addresses(single) + u64(size * start), _rows(self._ids_Gn) + u64(size * to)
        if size == 4:
            from_C, to_C = np.concatenate([from_C, from_G]), np.concatenate([to_C, to_G])
        else:
            compiled.gather_wide(from_G, to_G, rows, index, place)
        compiled.gather(from_C, to_C, rows, index, place, self._pool.array(stop - start, np.uint64))
        for feature, parts in self._bags.items():
            bags = columns.ids[feature].slice(start, stop)
            if self._whole and self._index is not None:
                parts.append((at, take_bags(bags, self._index, self._pool)))
            else:
                parts.append((at, Bags(self._pool.copy(bags.values), self._pool.copy(bags.offsets))))
        if any(columns.holes):
            self._holes = True

    def finish(self) -> Block:
        """The block, once every piece has been put; called once."""
        found = []
        for parts in self._bags.values():
            bags = join_bags([part for _, part in sorted(parts, key=lambda p: p[0])], self._pool)
            done = self._whole or self._index is None
            found.append(bags if done else take_bags(bags, self._index, self._pool))
        return Block(
            ids_Gn=self._ids_Gn,
            holes=self._holes,
            bags=tuple(found),
            numbers_Mn=self._numbers_Mn,
            row_n=self._row_n,
        )


class Target(NamedTuple):
    """Rows start .. stop-1 of a row group go to place `at` of a block."""

    filling: Filling
    start: int
    stop: int
    at: int


class Scatter:
    """The `Sink` of one row group: hands its rows on to the blocks they belong to.

    first_row: number of its first row in the split.
    """

    def __init__(self, targets: list[Target], first_row: int):
        self._targets, self._first_row = targets, first_row

    def put(self, columns: Columns) -> None:
        for filling, start, stop, at in self._targets:
            filling.put(columns, start, stop, at, self._first_row)


def join_bags(parts: list[Bags], pool: Pool) -> Bags:
    if len(parts) == 1:
        return parts[0]
    values = pool.array(sum(len(part.values) for part in parts), parts[0].values.dtype)
    np.concatenate([part.values for part in parts], out=values)
    offsets = pool.array(sum(len(part.offsets) - 1 for part in parts) + 1, np.int64)
    offsets[0] = 0
    np.cumsum(np.concatenate([np.diff(part.offsets) for part in parts]), out=offsets[1:])
    return Bags(values, offsets)


def take_bags(bags: Bags, index: np.ndarray, pool: Pool) -> Bags:
    """The bags in the order of `index`, (n,) uint32.  Example: bags [7 8] [] [9] and index 2 1 0 give [9] [] [7 8]."""
    values = pool.array(len(bags.values), bags.values.dtype)
    offsets = pool.array(len(index) + 1, np.int64)
    compiled.take_bags(u64(_address(bags.values)), bags.offsets, index, bags.values.dtype.type(0), values, offsets)
    return Bags(values, offsets)


class Slice(NamedTuple):
    """Rows start .. stop-1 of a block, standing at `at` and after it in the batch."""

    at: int
    block: Block
    start: int
    stop: int


def build(slices: list[Slice], shape: Shape, rows: int, rows_in_step: int, pool: Pool) -> Batch:
    """A batch of `rows` rows out of slices of blocks, in the batch's order; places that none covers are padding."""
    features, covered = len(shape.features), sum(s.stop - s.start for s in slices) == rows
    one_id_per_bag = covered and not any(shape.multi_hot) and not any(s.block.holes for s in slices)
    dense_BK, labels_BT, weight_B, row_B, id_FB = pool.arrays(
        ((rows, shape.dense), np.float32),
        ((rows, shape.labels), np.float32),
        (rows, np.float32),
        (rows, np.int64),
        ((features if one_id_per_bag else 0, rows), np.int64),
    )
    if not covered:
        for array in (dense_BK, labels_BT, weight_B):
            array.fill(0)
        row_B.fill(-1)
    slice_S = _table(slices)
    compiled.fill_rows(slice_S, dense_BK, labels_BT, weight_B, row_B, shape.weighted)
    if one_id_per_bag:
        compiled.fill_ids(slice_S, shape.id_dtype.type(0), id_FB)
        ids = _keyed(shape.features, id_FB.reshape(-1), _ones(features * rows), [rows] * features, rows)
    else:
        ids = _bags(slices, slice_S, shape, rows, pool)
    return Batch(
        dense_BK=torch.from_numpy(dense_BK),
        ids=ids,
        labels_BT=torch.from_numpy(labels_BT),
        weight_B=torch.from_numpy(weight_B),
        row_B=torch.from_numpy(row_B),
        rows_in_step=rows_in_step,
    )


def _table(slices: list[Slice]) -> np.ndarray:
    """The slices as the kernels know them: (S, 7) uint64, see `compiled.AT` and those after it."""
    table = []
    for at, block, start, stop in slices:
        ids, numbers, row, rows, size = block.addresses
        table.append((at, stop - start, ids + start * size, rows * size, numbers + start * 4, rows, row + start * 8))
    return np.array(table, np.uint64).reshape(-1, 7)


def _rows(matrix: np.ndarray) -> np.ndarray:
    """The addresses of a matrix's rows."""
    return u64(_address(matrix)) + np.arange(len(matrix), dtype=np.uint64) * u64(matrix.strides[0])


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def _bags(slices: list[Slice], slice_S: np.ndarray, shape: Shape, rows: int, pool: Pool) -> KeyedJaggedTensor:
    length_FB = pool.array((len(shape.features), rows), np.int32)
    length_FB.fill(0)
    single, many = itertools.count(), itertools.count()
    column_F = np.array([next(many if multi_hot else single) for multi_hot in shape.multi_hot], np.uint64)
    multi_hot_F = np.array(shape.multi_hot, bool)
    shape_SH = len(slices), sum(shape.multi_hot)
    value_SH = np.array([_address(b.values) for s in slices for b in s.block.bags], np.uint64).reshape(shape_SH)
    offset_SH = np.array([_address(b.offsets[s.start :]) for s in slices for b in s.block.bags], np.uint64).reshape(
        shape_SH
    )
    ids_F = np.empty(len(shape.features), np.uint64)
    word = shape.id_dtype.type(0)
    compiled.bag_lengths(slice_S, word, column_F, multi_hot_F, offset_SH, length_FB, ids_F)
    ids_per_key = ids_F.tolist()
    values_N = pool.array(sum(ids_per_key) + 1, np.int64)
    compiled.fill_bags(slice_S, word, column_F, multi_hot_F, offset_SH, value_SH, values_N)
    return _keyed(shape.features, values_N[:-1], torch.from_numpy(length_FB.reshape(-1)), ids_per_key, rows)


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
