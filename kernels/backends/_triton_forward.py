"""Triton: looking rows up, and the gradient of the weights of ids.

A program takes BAGS bags of one feature as one tile and goes through their ids four at a time: all four rows are asked
for before the first is added, and the ids of the next four before that, so that much is on its way from memory at once.
The rows of a bag are added one after another whatever the tile, so tuning changes no result.

An id outside its table is never read: `bad` becomes 1, and the host raises.

Letters in shapes: B bags of a feature, F features, G features of one width, N ids, D columns, X columns of
all features.
"""

import triton
import triton.language as tl

from kernels.backends._triton_rows import bags_of, ids_at, load_rows, store_rows


@triton.jit
def _scaled(row, scales_N, at_B, ok_B, WEIGHTED: tl.constexpr):
    if WEIGHTED:
        row = row * tl.load(scales_N + at_B, mask=ok_B, other=0.0)[:, None]
    return row


@triton.jit(do_not_specialize=["bags", "features", "ids", "columns", "length"])
def look_up(
    weights,  # flat, every table
    starts_F,  # int64: where the feature's table starts in it
    rows_F,  # int64: how many rows that table has
    columns_F,  # int64: where the feature's columns start in a row of out
    features_G,  # int32: the features of width D
    ids_N,
    offsets,  # (F * B + 1,)
    scales_N,  # float32 weights of ids; any tensor where not WEIGHTED
    out,  # (B, X), or (N, D) where not POOLED
    bad,  # (1,) int32: set to 1 for an id outside its table and for offsets that do not cut ids_N into bags
    bags,
    features,
    ids,  # N
    columns,  # X
    length,  # about how many ids a bag has: autotuning goes by it, the kernel does not
    WEIGHTED: tl.constexpr,
    MEAN: tl.constexpr,
    POOLED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,  # of rows in weights, elements
    ALIGN_OUT: tl.constexpr,  # of rows in out, elements
    UNROLL: tl.constexpr,  # 1 or 4 ids of each bag at a time
    BAGS: tl.constexpr,
):
    f = tl.load(features_G + tl.program_id(1))
    b_B = tl.program_id(0) * BAGS + tl.arange(0, BAGS)
    d = tl.arange(0, BLOCK_D)
    here = b_B < bags
    q_B = f.to(tl.int64) * bags + b_B
    first_B, length_B, end_B, bad_B = bags_of(offsets, q_B, here, ids)
    bad_B = bad_B | (here & (q_B == 0) & (first_B != 0))
    bad_B = bad_B | (here & (q_B == features.to(tl.int64) * bags - 1) & (end_B != ids))
    start = tl.load(starts_F + f)
    rows = tl.load(rows_F + f)
    longest = tl.max(length_B, axis=0)
    total = tl.zeros((BAGS, BLOCK_D), dtype=tl.float32)

    id0 = ids_at(ids_N, first_B, length_B > 0)
    if UNROLL == 4:
        id1 = ids_at(ids_N, first_B + 1, length_B > 1)
        id2 = ids_at(ids_N, first_B + 2, length_B > 2)
        id3 = ids_at(ids_N, first_B + 3, length_B > 3)
    for k in range(0, longest, UNROLL):
        at = first_B + k
        ok0 = (k < length_B) & (id0 >= 0) & (id0 < rows)
        bad_B = bad_B | ((k < length_B) & (ok0 == 0))
        row0 = load_rows(weights, start + id0 * D, ok0, d, D, BLOCK_D, ALIGN)
        if UNROLL == 4:
            ok1 = (k + 1 < length_B) & (id1 >= 0) & (id1 < rows)
            ok2 = (k + 2 < length_B) & (id2 >= 0) & (id2 < rows)
            ok3 = (k + 3 < length_B) & (id3 >= 0) & (id3 < rows)
            bad_B = bad_B | ((k + 1 < length_B) & (ok1 == 0))
            bad_B = bad_B | ((k + 2 < length_B) & (ok2 == 0))
            bad_B = bad_B | ((k + 3 < length_B) & (ok3 == 0))
            row1 = load_rows(weights, start + id1 * D, ok1, d, D, BLOCK_D, ALIGN)
            row2 = load_rows(weights, start + id2 * D, ok2, d, D, BLOCK_D, ALIGN)
            row3 = load_rows(weights, start + id3 * D, ok3, d, D, BLOCK_D, ALIGN)
        id0 = ids_at(ids_N, at + UNROLL, k + UNROLL < length_B)
        row0 = _scaled(row0, scales_N, at, ok0, WEIGHTED)
        if UNROLL == 4:
            id1 = ids_at(ids_N, at + 5, k + 5 < length_B)
            id2 = ids_at(ids_N, at + 6, k + 6 < length_B)
            id3 = ids_at(ids_N, at + 7, k + 7 < length_B)
            row1 = _scaled(row1, scales_N, at + 1, ok1, WEIGHTED)
            row2 = _scaled(row2, scales_N, at + 2, ok2, WEIGHTED)
            row3 = _scaled(row3, scales_N, at + 3, ok3, WEIGHTED)
        if POOLED:
            total += row0
            if UNROLL == 4:
                total += row1
                total += row2
                total += row3
        else:
            store_rows(out, at * D, k < length_B, row0, d, D, BLOCK_D, ALIGN_OUT)
            if UNROLL == 4:
                store_rows(out, (at + 1) * D, k + 1 < length_B, row1, d, D, BLOCK_D, ALIGN_OUT)
                store_rows(out, (at + 2) * D, k + 2 < length_B, row2, d, D, BLOCK_D, ALIGN_OUT)
                store_rows(out, (at + 3) * D, k + 3 < length_B, row3, d, D, BLOCK_D, ALIGN_OUT)
    if POOLED:
        if MEAN:
            total = total / tl.maximum(length_B, 1).to(tl.float32)[:, None]
        at_B = b_B.to(tl.int64) * columns + tl.load(columns_F + f)
        store_rows(out, at_B, here, total, d, D, BLOCK_D, ALIGN_OUT)
    tl.store(bad + b_B * 0, 1, mask=bad_B)


@triton.jit(do_not_specialize=["bags", "ids", "columns"])
def weight_gradients(
    weights,
    starts_F,
    rows_F,
    columns_F,
    features_G,
    ids_N,
    offsets,
    grad,  # (B, X), or (N, D) where not POOLED
    out_N,  # float32: grad of the bag (over its length where MEAN) . row
    bags,
    ids,
    columns,
    MEAN: tl.constexpr,
    POOLED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
    ALIGN_OUT: tl.constexpr,
    BAGS: tl.constexpr,
):
    """One dot product for each id, from the rows as they are before the update."""
    f = tl.load(features_G + tl.program_id(1))
    b_B = tl.program_id(0) * BAGS + tl.arange(0, BAGS)
    d = tl.arange(0, BLOCK_D)
    here = b_B < bags
    first_B, length_B, _, _ = bags_of(offsets, f.to(tl.int64) * bags + b_B, here, ids)
    start = tl.load(starts_F + f)
    rows = tl.load(rows_F + f)
    of_bag = tl.zeros((BAGS, BLOCK_D), dtype=tl.float32)
    if POOLED:
        at_B = b_B.to(tl.int64) * columns + tl.load(columns_F + f)
        of_bag = load_rows(grad, at_B, here, d, D, BLOCK_D, ALIGN_OUT)
    if MEAN:
        of_bag = of_bag / tl.maximum(length_B, 1).to(tl.float32)[:, None]
    for k in range(tl.max(length_B, axis=0)):
        at = first_B + k
        id_B = ids_at(ids_N, at, k < length_B)
        ok = (k < length_B) & (id_B >= 0) & (id_B < rows)
        row = load_rows(weights, start + id_B * D, ok, d, D, BLOCK_D, ALIGN)
        if not POOLED:
            of_bag = load_rows(grad, at * D, ok, d, D, BLOCK_D, ALIGN_OUT)
        tl.store(out_N + at, tl.sum(row * of_bag, axis=1), mask=k < length_B)
