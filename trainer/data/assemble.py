"""Decoded rows -> shuffled blocks -> batches: whole columns at a time, all results in recycled memory.

A row group is copied into the blocks it belongs to right after it was decoded, while it is still in the CPU's cache,
and column by column, so that a column's part of a block stays in the cache while it is permuted.  A batch is then made
of slices.  Features are stored one after the other, as KeyedJaggedTensor wants them, so its values are filled by one
strided copy per stream where every bag holds one id.

Letters in shapes: n rows of a block, B rows of this rank's batch, K dense inputs, T labels, M = K + T (+ 1 weight), F
features, G features with one id or none per row, N ids.
"""

import itertools
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from trainer.data.base import Bags, Shape
from trainer.data.batch import Batch
from trainer.data.memory import Pool


@dataclass(frozen=True, kw_only=True)
class Block:
    """n shuffled rows of one stream."""

    ids_Gn: np.ndarray  # int32 (int64 if wide), -1 where the bag is empty
    holes: tuple[bool, ...]  # for each of the G, whether there is a -1
    bags: tuple[Bags, ...]  # of the multi-hot features
    numbers_Mn: np.ndarray  # float32
    row_n: np.ndarray  # int64, row numbers in the split


class Filling:
    """A block into which pieces of row groups are put, each where it stands in the stream, from several threads.

    index: (n,) int64, a permutation: row i of the finished block is row index[i] of what was put; None keeps the order.
    whole: it is all one piece, which is then permuted right on its way from the decoder's memory.  Several pieces are
        first put side by side.

    Example: index 2 0 3 1; rows a b put at 0 and c d at 2 make the block c a d b.
    """

    def __init__(self, shape: Shape, rows: int, index: np.ndarray | None, whole: bool, pool: Pool):
        self._index, self._pool = index, pool
        single = [f for f, many in enumerate(shape.multi_hot) if not many]
        self._place = {f: g for g, f in enumerate(single)}  # of a feature among the G
        self._holes = [False] * len(single)
        self._bags: dict[int, list[tuple[int, Bags]]] = {f: [] for f, many in enumerate(shape.multi_hot) if many}
        self._permuted = whole and index is not None
        self._ids_Gn = pool.array((len(single), rows), np.int64 if shape.wide else np.int32)
        self._numbers_Mn = pool.array((shape.numbers, rows), np.float32)
        self._row_n = pool.array(rows, np.int64)

    def rows(self, first: int, end: int, at: int) -> None:
        """The piece that stands at `at` holds the rows number first .. end-1 of the split."""
        self._row_n[at : at + end - first] = np.arange(first, end)

    def ids(self, feature: int, ids: np.ndarray | Bags, holes: bool, at: int) -> None:
        if isinstance(ids, Bags):
            self._bags[feature].append((at, Bags(self._pool.copy(ids.values), self._pool.copy(ids.offsets))))
        else:
            self._put(ids, self._ids_Gn[self._place[feature]], at)
            if holes:
                self._holes[self._place[feature]] = True

    def numbers(self, column: int, values: np.ndarray, at: int) -> None:
        self._put(values, self._numbers_Mn[column], at)

    def _put(self, values: np.ndarray, out_n: np.ndarray, at: int) -> None:
        if not self._permuted:
            out_n[at : at + len(values)] = values
        elif values.dtype == out_n.dtype:
            np.take(values, self._index, mode="wrap", out=out_n)
        else:
            out_n[:] = values[self._index]

    def finish(self) -> Block:
        """The block, once every piece has been put; called once."""
        ids_Gn, numbers_Mn = self._ids_Gn, self._numbers_Mn
        if not self._permuted and self._index is not None:
            ids_Gn, numbers_Mn = (self._permute(columns) for columns in (ids_Gn, numbers_Mn))
        parts = [sorted(found, key=lambda part: part[0]) for found in self._bags.values()]
        return Block(
            ids_Gn=ids_Gn,
            holes=tuple(self._holes),
            bags=tuple(take_bags(join_bags([b for _, b in p], self._pool), self._index, self._pool) for p in parts),
            numbers_Mn=numbers_Mn,
            row_n=_take(self._row_n, self._index, self._pool),
        )

    def _permute(self, columns: np.ndarray) -> np.ndarray:
        out = self._pool.array(columns.shape, columns.dtype)
        for column_n, out_n in zip(columns, out, strict=True):
            column_n.max()  # reads it in order, which is fast, into the cache for the reads all over the place
            np.take(column_n, self._index, mode="wrap", out=out_n)
        return out


class Target(NamedTuple):
    """Rows start .. stop-1 of a row group go to place `at` of a block."""

    filling: Filling
    start: int
    stop: int
    at: int


class Scatter:
    """The `Sink` of one row group: hands every column on to the blocks that its rows belong to."""

    def __init__(self, targets: list[Target]):
        self._targets = targets

    def ids(self, feature: int, ids: np.ndarray | Bags, holes: bool) -> None:
        for filling, start, stop, at in self._targets:
            part = ids.slice(start, stop) if isinstance(ids, Bags) else ids[start:stop]
            filling.ids(feature, part, holes, at)

    def numbers(self, column: int, values: np.ndarray) -> None:
        for filling, start, stop, at in self._targets:
            filling.numbers(column, values[start:stop], at)


def _take(array: np.ndarray, index: np.ndarray | None, pool: Pool) -> np.ndarray:
    if index is None:
        return array
    # "wrap", as the mode that raises would go through a buffer; the index is a permutation.
    out = pool.array((len(index), *array.shape[1:]), array.dtype)
    return np.take(array, index, axis=0, mode="wrap", out=out)


def join_bags(parts: list[Bags], pool: Pool) -> Bags:
    if len(parts) == 1:
        return parts[0]
    dtype = np.result_type(*(part.values.dtype for part in parts))
    values = pool.array(sum(len(part.values) for part in parts), dtype)
    np.concatenate([part.values for part in parts], out=values)
    return Bags(values, _offsets(np.concatenate([np.diff(part.offsets) for part in parts]), pool))


def take_bags(bags: Bags, index: np.ndarray | None, pool: Pool) -> Bags:
    """The bags in the order of `index`.

    Example: the bags [7 8] [] [9] are values 7 8 9, offsets 0 2 2 3.  Index 2 1 0 gives [9] [] [7 8]: lengths 1 0 2,
    offsets 0 1 1 3.  The values come from the places 2, 0 1, whose differences 2 -2 1 are known from the bags alone.
    """
    if index is None:
        return bags
    length_n = np.diff(bags.offsets)[index]
    offsets = _offsets(length_n, pool)
    filled = length_n > 0
    start_n, length_n = bags.offsets[:-1][index][filled].astype(np.int64), length_n[filled]
    if not len(start_n):
        return Bags(bags.values, offsets)
    place_N = pool.array(int(offsets[-1]), np.int64)
    place_N.fill(1)
    place_N[0] = start_n[0]
    place_N[offsets[:-1][filled][1:]] = start_n[1:] - (start_n[:-1] + length_n[:-1] - 1)
    return Bags(_take(bags.values, np.cumsum(place_N, out=place_N), pool), offsets)


def _offsets(lengths: np.ndarray, pool: Pool) -> np.ndarray:
    out = pool.array(len(lengths) + 1, np.int64)
    out[0] = 0
    np.cumsum(lengths, out=out[1:])
    return out


class Slice(NamedTuple):
    """Rows start .. stop-1 of a block, standing at `at` and after it in the batch."""

    at: int
    block: Block
    start: int
    stop: int


def build(slices: list[Slice], shape: Shape, rows: int, rows_in_step: int, pool: Pool) -> Batch:
    """A batch of `rows` rows out of slices of blocks, in the batch's order; places that none covers are padding."""
    dense_BK = pool.array((rows, shape.dense), np.float32)
    labels_BT = pool.array((rows, shape.labels), np.float32)
    weight_B = pool.array(rows, np.float32)
    row_B = pool.array(rows, np.int64)
    whole = sum(s.stop - s.start for s in slices) == rows
    if not whole:
        for array in (dense_BK, labels_BT, weight_B):
            array.fill(0)
        row_B.fill(-1)
    for at, block, start, stop in slices:
        upto = at + stop - start
        numbers_Mb = block.numbers_Mn[:, start:stop]
        for k in range(shape.dense):
            dense_BK[at:upto, k] = numbers_Mb[k]
        for t in range(shape.labels):
            labels_BT[at:upto, t] = numbers_Mb[shape.dense + t]
        weight_B[at:upto] = numbers_Mb[-1] if shape.weighted else 1
        row_B[at:upto] = block.row_n[start:stop]
    plain = not any(shape.multi_hot) and not any(any(s.block.holes) for s in slices)
    return Batch(
        dense_BK=torch.from_numpy(dense_BK),
        ids=(_one_id_per_bag if whole and plain else _bags)(slices, shape, rows, pool),
        labels_BT=torch.from_numpy(labels_BT),
        weight_B=torch.from_numpy(weight_B),
        row_B=torch.from_numpy(row_B),
        rows_in_step=rows_in_step,
    )


def _one_id_per_bag(slices: list[Slice], shape: Shape, rows: int, pool: Pool) -> KeyedJaggedTensor:
    features = len(shape.features)
    ids_FB = pool.array((features, rows), np.int64)
    for at, block, start, stop in slices:
        ids_FB[:, at : at + stop - start] = block.ids_Gn[:, start:stop]
    return _keyed(shape.features, ids_FB.reshape(-1), _ones(features * rows), [rows] * features, rows)


def _bags(slices: list[Slice], shape: Shape, rows: int, pool: Pool) -> KeyedJaggedTensor:
    length_FB = pool.array((len(shape.features), rows), np.int32)
    length_FB.fill(0)
    parts = []
    ids_per_key = []
    single, many = itertools.count(), itertools.count()
    for length_B, multi_hot in zip(length_FB, shape.multi_hot, strict=True):
        before = len(parts)
        g = next(many if multi_hot else single)
        for at, block, start, stop in slices:
            length_b = length_B[at : at + stop - start]
            if multi_hot:
                bags = block.bags[g]
                offsets = bags.offsets[start : stop + 1]
                np.subtract(offsets[1:], offsets[:-1], out=length_b, casting="same_kind")
                parts.append(bags.values[offsets[0] : offsets[-1]])
            elif block.holes[g]:
                ids = block.ids_Gn[g, start:stop]
                there = ids >= 0
                length_b[:] = there
                parts.append(ids[there])
            else:
                length_b.fill(1)
                parts.append(block.ids_Gn[g, start:stop])
        ids_per_key.append(sum(len(part) for part in parts[before:]))
    values_N = pool.array(sum(ids_per_key), np.int64)
    if parts:
        np.concatenate(parts, out=values_N)
    return _keyed(shape.features, values_N, torch.from_numpy(length_FB.reshape(-1)), ids_per_key, rows)


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
