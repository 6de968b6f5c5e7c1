"""The cpu backend's loops in Numba.  kernels/backends/cpu.py says who does which part and calls them, without the GIL.

Capital arguments are literals: a kernel is compiled for each D and each set of them, once, and kept on disk.  Arrays
are flat.  Letters: B bags of a feature, F features, T tables, N ids, D columns of a table, X of all features.

Imports Numba, so it is imported when the cpu backend is chosen and not before.
"""

import math

import numpy as np
from numba import int64, uint64
from numpy import float32

from kernels._njit import njit
from kernels.backends._vectors import (
    add,
    add_product,
    divide,
    dot,
    least,
    load,
    load_row,
    most,
    multiply,
    prefetch,
    prefetch_scale,
    root,
    store,
    store_row,
    store_row_at_random,
    zeros,
)

AHEAD = 16  # rows between a prefetch and the use; 8 to 32 were alike
DIGIT = 11  # bits; more than 2048 counters fall out of the first cache
SGD, ADAGRAD, ROWWISE_ADAGRAD, ADAM, ROWWISE_ADAM = range(5)
NO_DECAY, L2, DECOUPLED = range(3)


@njit
def pool(
    weights,  # flat tables
    row_scales,  # flat float32, read if weights are int8
    starts,  # (F,) uint64, where the table of each feature starts in weights
    row_starts,  # (F,) uint64, where it starts in row_scales
    rows,  # (F,) uint64, rows of it
    columns,  # (F,) uint64, first column of each feature in out
    ids,  # (N,)
    offsets,  # (F * B + 1,) int64
    scales,  # (N,) float32, read if WEIGHTED
    out,  # (B * X,)
    bags,  # B
    width,  # X
    parts,  # (P, 3) int64: feature, first bag, end; all of width D
    mean,  # bool
    D,
    WEIGHTED,
):
    """out of some bags; False where an id or an offset is not what it must be."""
    fine = True
    count = uint64(len(ids))
    for p in range(len(parts)):
        f = uint64(parts[p, 0])
        start, row_start, limit, column = starts[f], row_starts[f], rows[f], columns[f]
        last = min(uint64(offsets[f * uint64(bags) + uint64(parts[p, 2])]), count)
        for b in range(uint64(parts[p, 1]), uint64(parts[p, 2])):
            bag = f * uint64(bags) + uint64(b)
            first, end = uint64(offsets[bag]), uint64(offsets[bag + uint64(1)])
            if end > last or first > end:
                return False
            total = zeros(D)
            for i in range(first, end):
                if i + uint64(AHEAD) < last:
                    coming = uint64(ids[i + uint64(AHEAD)])
                    prefetch(weights, start + coming * uint64(D), D)
                    prefetch_scale(weights, row_scales, row_start + coming)
                row = uint64(ids[i])
                if row >= limit:
                    fine = False
                    row = uint64(0)
                values = load_row(weights, row_scales, start + row * uint64(D), row_start + row, D)
                if WEIGHTED:
                    total = add_product(total, values, scales[i])
                else:
                    total = add(total, values)
            if mean and end > first:
                total = multiply(total, float32(1.0) / float32(end - first))
            store(out, uint64(b) * uint64(width) + column, total)
    return fine


@njit
def gather(weights, row_scales, start, row_start, limit, ids, scales, out, first, end, D, WEIGHTED):
    """out[i] = row of ids[i], times its scale, for first <= i < end; False where an id is outside the table."""
    fine = True
    for i in range(uint64(first), uint64(end)):
        if i + uint64(AHEAD) < uint64(end):
            coming = uint64(ids[i + uint64(AHEAD)])
            prefetch(weights, uint64(start) + coming * uint64(D), D)
            prefetch_scale(weights, row_scales, uint64(row_start) + coming)
        row = uint64(ids[i])
        if row >= uint64(limit):
            fine = False
            row = uint64(0)
        values = load_row(weights, row_scales, uint64(start) + row * uint64(D), uint64(row_start) + row, D)
        if WEIGHTED:
            values = multiply(values, scales[i])
        store(out, i * uint64(D), values)
    return fine


@njit
def sort(pairs, spare, count, low, high, counts):
    """Sort count numbers by their bits low to high - 1, equal ones in their order; the array that holds the result.

    A least-significant-digit radix sort whose digits are as even as the bits allow: 18 bits are two digits of 9.
    """
    widest = 4
    while widest < DIGIT and (1 << widest) < count:
        widest += 1
    passes = max(1, -(-(high - low) // widest))
    here, there = pairs, spare
    for p in range(passes):
        shift = uint64(low + (high - low) * p // passes)
        bits = low + (high - low) * (p + 1) // passes - int(shift)
        mask = uint64((1 << bits) - 1)
        counts[: 1 << bits] = 0
        for i in range(uint64(count)):
            counts[(here[i] >> shift) & mask] += 1
        at = 0
        for digit in range(uint64(1 << bits)):
            size = counts[digit]
            counts[digit] = at
            at += size
        for i in range(uint64(count)):
            digit = (here[i] >> shift) & mask
            there[uint64(counts[digit])] = here[i]
            counts[digit] += 1
        here, there = there, here
    return here


@njit
def collect(
    features, columns, ids, offsets, bags, width, limit, slice_, slices, shift, scratch, pooled, mean, dim, SCALED
):
    """pairs[k] = row << shift | place of its gradient, of the rows of one slice; how many, or -1 for a bad id.

    place: where the gradient starts in grad; if SCALED the number i of the id, and places[i] is that place.
    dim: D, not as a literal, so that one compilation serves all widths.
    """
    pairs, places, inverses = scratch
    count, total = uint64(0), uint64(len(ids))
    for k in range(len(features)):
        f = uint64(features[k])
        for b in range(uint64(bags)):
            bag = f * uint64(bags) + b
            first, end = uint64(offsets[bag]), uint64(offsets[bag + uint64(1)])
            if end > total or first > end:
                return -1
            place = b * uint64(width) + columns[f]
            for i in range(first, end):
                row = uint64(ids[i])
                if row >= limit:
                    return -1
                if slices > uint64(1) and ((row * uint64(0x9E3779B97F4A7C15)) >> uint64(40)) % slices != slice_:
                    continue
                if not pooled:
                    place = i * dim
                if SCALED:
                    places[i] = place
                    inverses[i] = float32(1.0) / float32(end - first) if mean else float32(1.0)
                    pairs[count] = (row << shift) | i
                else:
                    pairs[count] = (row << shift) | place
                count += uint64(1)
    return int64(count)


@njit
def learn(
    weights,  # flat tables, changed
    row_scales,  # flat float32, changed if weights are int8
    first_state,  # flat momentum1, changed
    second_state,  # flat momentum2, changed
    grad,  # (B * X,) or (N * D,)
    ids,  # (N,)
    offsets,  # (F * B + 1,) int64
    scales,  # (N,) float32 weights of ids, read if weighted
    scale_grads,  # (N,) float32, their gradient, written if wanted
    parts,  # (P, 3) int64: table, slice, slices; all of width D
    tables,  # (T, 6) uint64: start in weights, start in states by row, rows, bits of a row, first feature, end
    features,  # the features of table 0, of table 1, ...
    columns,  # (F,) uint64, first column of each feature in grad
    row_keys,  # (T,) uint64, of this step
    bags,  # B
    width,  # X
    scratch,  # pairs, spare: uint64, long enough for a part; places (N,) uint64, inverses (N,) float32 if SCALED
    numbers,  # (11,) float32, see Numbers in cpu.py
    flags,  # (9,) int64, see Flags in cpu.py
    D,
    SCALED,
):
    """Update the rows of some slices of tables; False where an id or an offset is not what it must be.

    A slice of a table that has much of the work holds the rows of one remainder of a hash: neighbours are often alike
    in frequency, so ranges of rows would be uneven.  Every row is in one slice, so results do not depend on slices.
    """
    optimizer, decay_mode, clamped, normed = flags[0], flags[1], flags[2], flags[3]
    stochastic, weighted, wanted, pooled, mean = flags[4], flags[5], flags[6], flags[7], flags[8]
    lr, eps, beta1, beta2, rest1, rest2 = numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5]
    correction1, correction2, decay, most_g, most_norm = numbers[6], numbers[7], numbers[8], numbers[9], numbers[10]
    counts = np.empty(1 << DIGIT, np.int64)
    pairs, spare, places, inverses = scratch
    for p in range(len(parts)):
        t = uint64(parts[p, 0])
        start, row_start, limit = tables[t, 0], tables[t, 1], tables[t, 2]
        shift = uint64(64) - tables[t, 3]
        low = (uint64(1) << shift) - uint64(1)
        of = features[tables[t, 4] : tables[t, 5]]
        slice_, slices = uint64(parts[p, 1]), uint64(parts[p, 2])
        room = (pairs, places, inverses)
        found = collect(
            of, columns, ids, offsets, bags, width, limit, slice_, slices, shift, room, pooled, mean, uint64(D), SCALED
        )
        if found < 0:
            return False
        order = sort(pairs, spare, found, int64(shift), 64, counts)
        count = uint64(found)
        i = uint64(0)
        while i < count:
            row = order[i] >> shift
            at = start + row * uint64(D)
            w = load_row(weights, row_scales, at, row_start + row, D)
            g = zeros(D)
            while i < count and order[i] >> shift == row:
                if i + uint64(AHEAD) < count:
                    coming = order[i + uint64(AHEAD)]
                    later = start + (coming >> shift) * uint64(D)
                    prefetch(weights, later, D)
                    prefetch_scale(weights, row_scales, row_start + (coming >> shift))
                    if optimizer == ROWWISE_ADAGRAD:
                        prefetch(first_state, row_start + (coming >> shift), 1)
                    elif optimizer != SGD:
                        prefetch(first_state, later, D)
                        if optimizer == ADAM:
                            prefetch(second_state, later, D)
                        elif optimizer == ROWWISE_ADAM:
                            prefetch(second_state, row_start + (coming >> shift), 1)
                    prefetch(grad, places[coming & low] if SCALED else coming & low, D)
                number = order[i] & low
                one_g = load(grad, places[number] if SCALED else number, D)
                if SCALED and wanted:
                    scale_grads[number] = dot(one_g, w) * inverses[number]
                if clamped:
                    one_g = most(least(one_g, most_g), -most_g)
                if SCALED:
                    g = add_product(g, one_g, inverses[number] * scales[number] if weighted else inverses[number])
                else:
                    g = add(g, one_g)
                i += uint64(1)
            if decay_mode == L2:
                g = add_product(g, w, decay)
            elif decay_mode == DECOUPLED:
                w = multiply(w, float32(1.0) - lr * decay)
            if optimizer == SGD:
                w = add_product(w, g, -lr)
            elif optimizer == ADAGRAD:
                sums = add_product(load(first_state, at, D), g, g)
                store(first_state, at, sums)
                w = add_product(w, divide(g, add(root(sums), eps)), -lr)
            elif optimizer == ROWWISE_ADAGRAD:
                total = first_state[row_start + row] + dot(g, g) / float32(D)
                first_state[row_start + row] = total
                w = add_product(w, g, -lr / (math.sqrt(total) + eps))
            else:
                m = add_product(multiply(load(first_state, at, D), beta1), g, rest1)
                store(first_state, at, m)
                if optimizer == ADAM:
                    v = add_product(multiply(load(second_state, at, D), beta2), multiply(g, g), rest2)
                    store(second_state, at, v)
                    w = add_product(w, divide(m, add(root(divide(v, correction2)), eps)), -lr / correction1)
                else:
                    total = beta2 * second_state[row_start + row] + rest2 * (dot(g, g) / float32(D))
                    second_state[row_start + row] = total
                    w = add_product(w, m, -lr / correction1 / (math.sqrt(total / correction2) + eps))
            if normed:
                norm = math.sqrt(dot(w, w))
                if norm > most_norm:
                    w = multiply(w, most_norm / norm)
            if stochastic:
                store_row_at_random(weights, row_scales, at, row_start + row, w, mix(row_keys[t] ^ row))
            else:
                store_row(weights, row_scales, at, row_start + row, w)
    return True


@njit
def mix(x):
    """splitmix64's finaliser, as in kernels.ops."""
    x = (x ^ (x >> uint64(30))) * uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> uint64(27))) * uint64(0x94D049BB133111EB)
    return x ^ (x >> uint64(31))
