"""Decoded rows -> shuffled blocks -> batches: whole columns at a time, all results in recycled memory.

A block is gathered column by column, so that a column's part of it stays in the CPU's cache while it is permuted; a
batch is then made of slices.  Features are stored one after the other, as KeyedJaggedTensor wants them, so its values
are filled by one strided copy per stream where every bag holds one id.

Letters in shapes: n rows of a block, B rows of this rank's batch, K dense inputs, T labels, F features, N ids.
"""

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from trainer.data.base import Columns, Ids
from trainer.data.batch import Batch
from trainer.data.memory import Pool


class Piece(NamedTuple):
    """Rows start .. stop-1 of decoded columns, whose first row is row number `base` of the split."""

    columns: Columns
    base: int
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Block:
    """n shuffled rows of one stream."""

    columns: Columns
    row_n: np.ndarray  # int64, row numbers in the split
    ids_Fn: np.ndarray | None  # all ids, where every bag of every feature holds one; columns.ids are its rows


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a batch has even if all its rows are padding."""

    features: tuple[str, ...]
    dense: int  # K
    labels: int  # T


class Slice(NamedTuple):
    """Rows start .. stop-1 of a block, standing at `at` and after it in the batch."""

    at: int
    block: Block
    start: int
    stop: int


def gather(pieces: list[Piece], index: np.ndarray | None, pool: Pool) -> Block:
    """Join the pieces, then take their rows in the order of `index`.

    index: (n,) int64, a permutation of the joined rows; None leaves them as they are.

    Example: pieces of rows a b c d [1:3) and e f [0:2) join to b c e f; index 2 0 3 1 gives e b f c.
    """
    parts = [p.columns for p in pieces]
    rows = sum(p.stop - p.start for p in pieces)

    def numbers(arrays: list[np.ndarray]) -> np.ndarray:
        return _take(_join([a[p.start : p.stop] for a, p in zip(arrays, pieces, strict=True)], pool), index, pool)

    bags = [[p.columns.ids[f].slice(p.start, p.stop) for p in pieces] for f in range(len(parts[0].ids))]
    ids_Fn = None
    if all(part.offsets is None for parts_of_f in bags for part in parts_of_f):
        dtype = np.result_type(np.int32, *(part.values.dtype for parts_of_f in bags for part in parts_of_f))
        ids_Fn = pool.array((len(bags), rows), dtype)
        for out_n, parts_of_f in zip(ids_Fn, bags, strict=True):
            joined = _join([part.values for part in parts_of_f], pool)
            if index is not None and joined.dtype == dtype:
                np.take(joined, index, mode="wrap", out=out_n)
            else:
                out_n[:] = joined if index is None else joined[index]
        ids = tuple(Ids(values) for values in ids_Fn)
    else:
        ids = tuple(take_bags(_join_bags(parts_of_f, pool), index, pool) for parts_of_f in bags)
    return Block(
        columns=Columns(
            rows=rows,
            ids=ids,
            dense_nK=numbers([c.dense_nK for c in parts]),
            labels_nT=numbers([c.labels_nT for c in parts]),
            weight_n=None if parts[0].weight_n is None else numbers([c.weight_n for c in parts]),
        ),
        row_n=_take(_join([np.arange(p.base + p.start, p.base + p.stop) for p in pieces], pool), index, pool),
        ids_Fn=ids_Fn,
    )


def _join(arrays: list[np.ndarray], pool: Pool) -> np.ndarray:
    if len(arrays) == 1:
        return arrays[0]
    rows = sum(len(a) for a in arrays)
    out = pool.array((rows, *arrays[0].shape[1:]), np.result_type(*(a.dtype for a in arrays)))
    return np.concatenate(arrays, out=out)


def _take(array: np.ndarray, index: np.ndarray | None, pool: Pool) -> np.ndarray:
    if index is None:
        return array
    # "wrap", as the mode that raises would go through a buffer; the index is a permutation.
    out = pool.array((len(index), *array.shape[1:]), array.dtype)
    return np.take(array, index, axis=0, mode="wrap", out=out)


def _join_bags(parts: list[Ids], pool: Pool) -> Ids:
    if len(parts) == 1:
        return parts[0]
    values = _join([part.values for part in parts], pool)
    if all(part.offsets is None for part in parts):
        return Ids(values)
    lengths = [np.ones(len(p.values), np.int64) if p.offsets is None else np.diff(p.offsets) for p in parts]
    return Ids(values, _offsets(np.concatenate(lengths), pool))


def take_bags(ids: Ids, index: np.ndarray | None, pool: Pool) -> Ids:
    """The bags in the order of `index`.

    Example: the bags [7 8] [] [9] are values 7 8 9, offsets 0 2 2 3.  Index 2 1 0 gives [9] [] [7 8]: lengths 1 0 2,
    offsets 0 1 1 3.  The values come from the places 2, 0 1, whose differences 2 -2 1 are known from the bags alone.
    """
    if index is None:
        return ids
    if ids.offsets is None:
        return Ids(_take(ids.values, index, pool))
    length_n = np.diff(ids.offsets)[index]
    offsets = _offsets(length_n, pool)
    filled = length_n > 0
    start_n, length_n = ids.offsets[:-1][index][filled], length_n[filled]
    if length_n.max(initial=1) == 1:
        return Ids(_take(ids.values, start_n, pool), offsets)
    place_N = pool.array(int(offsets[-1]), np.int64)
    place_N.fill(1)
    place_N[0] = start_n[0]
    place_N[offsets[:-1][filled][1:]] = start_n[1:] - (start_n[:-1] + length_n[:-1] - 1)
    return Ids(_take(ids.values, np.cumsum(place_N, out=place_N), pool), offsets)


def _offsets(lengths: np.ndarray, pool: Pool) -> np.ndarray:
    out = pool.array(len(lengths) + 1, np.int64)
    out[0] = 0
    np.cumsum(lengths, out=out[1:])
    return out


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
        dense_BK[at:upto] = block.columns.dense_nK[start:stop]
        labels_BT[at:upto] = block.columns.labels_nT[start:stop]
        weight_B[at:upto] = 1 if block.columns.weight_n is None else block.columns.weight_n[start:stop]
        row_B[at:upto] = block.row_n[start:stop]
    if whole and all(s.block.ids_Fn is not None for s in slices):
        ids = _one_id_per_bag(slices, shape.features, rows, pool)
    else:
        ids = _bags(slices, shape.features, rows, pool)
    return Batch(
        dense_BK=torch.from_numpy(dense_BK),
        ids=ids,
        labels_BT=torch.from_numpy(labels_BT),
        weight_B=torch.from_numpy(weight_B),
        row_B=torch.from_numpy(row_B),
        rows_in_step=rows_in_step,
    )


def _one_id_per_bag(slices: list[Slice], features: tuple[str, ...], rows: int, pool: Pool) -> KeyedJaggedTensor:
    ids_FB = pool.array((len(features), rows), np.int64)
    for at, block, start, stop in slices:
        ids_FB[:, at : at + stop - start] = block.ids_Fn[:, start:stop]
    length_FB = pool.array(ids_FB.size, np.int32)
    length_FB.fill(1)
    return _keyed(features, ids_FB.reshape(-1), length_FB, [rows] * len(features), rows)


def _bags(slices: list[Slice], features: tuple[str, ...], rows: int, pool: Pool) -> KeyedJaggedTensor:
    length_FB = pool.array((len(features), rows), np.int32)
    length_FB.fill(0)
    parts = []
    ids_per_key = []
    for f in range(len(features)):
        before = len(parts)
        for at, block, start, stop in slices:
            ids, length_b = block.columns.ids[f], length_FB[f, at : at + stop - start]
            if ids.offsets is None:
                length_b.fill(1)
                parts.append(ids.values[start:stop])
            else:
                offsets = ids.offsets[start : stop + 1]
                np.subtract(offsets[1:], offsets[:-1], out=length_b, casting="same_kind")
                parts.append(ids.values[offsets[0] : offsets[-1]])
        ids_per_key.append(sum(len(part) for part in parts[before:]))
    values_N = pool.array(sum(ids_per_key), np.int64)
    if parts:
        np.concatenate(parts, out=values_N)
    return _keyed(features, values_N, length_FB.reshape(-1), ids_per_key, rows)


def _keyed(
    features: tuple[str, ...], values_N: np.ndarray, length_FB: np.ndarray, ids_per_key: list[int], rows: int
) -> KeyedJaggedTensor:
    """Ids per key are given along, or TorchRec would sum the lengths, on a GPU with a wait for the device.

    Lengths are int32, which is what the sharded input distribution sends; values int64, which is what FBGEMM looks up.
    """
    return KeyedJaggedTensor(
        keys=list(features),
        values=torch.from_numpy(values_N),
        lengths=torch.from_numpy(length_FB),
        stride=rows,
        length_per_key=ids_per_key,
        offset_per_key=[0, *itertools.accumulate(ids_per_key)],
    )
