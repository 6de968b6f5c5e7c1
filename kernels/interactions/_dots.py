"""The cpu backend's loops in Numba; kernels/interactions/cpu.py calls them, without the GIL, on a range of samples.

A sample's vectors are first copied, as float32, into a small piece of memory of the thread, (vectors, W) with zeros
behind the D columns of each.  Capital arguments are literals.  Arrays are flat; uint16 stands for bfloat16.

Imports Numba, so it is imported when the cpu backend is chosen and not before.
"""

import numpy as np
from llvmlite import ir
from numba import uint64
from numba.extending import intrinsic

from kernels._njit import njit
from kernels.backends._vectors import I32, Vector, add_product, load, store, zeros

LANES = 16  # float32 of one AVX-512 register
BLOCK = 8  # vectors whose dots with one are taken at once: 8 sums in registers, one tree of shuffles for all
ROWS = 4  # rows of the gradient that are summed at once


@intrinsic
def sums8(typing, a, b, c, d, e, f, g, h):
    """(sum of a, sum of b, ..., sum of h) of 8 vectors of 16, always in the same order."""

    def emit(context, builder, signature, args):
        def merge(x, y, low, high):
            n = len(low)
            masks = [ir.Constant(ir.VectorType(I32, n), mask) for mask in (low, high)]
            return builder.fadd(*(builder.shuffle_vector(x, y, mask) for mask in masks))

        lanes = range(0, 16, 4)  # within each 128 bits: a0+a2 b0+b2 a1+a3 b1+b3
        low = [k for q in lanes for k in (q, q + 16, q + 1, q + 17)]
        high = [k for q in lanes for k in (q + 2, q + 18, q + 3, q + 19)]
        pairs = [merge(args[k], args[k + 1], low, high) for k in (0, 2, 4, 6)]
        low = [k for q in lanes for k in (q, q + 1, q + 16, q + 17)]
        high = [k for q in lanes for k in (q + 2, q + 3, q + 18, q + 19)]
        fours = [merge(pairs[k], pairs[k + 1], low, high) for k in (0, 2)]  # a b c d of each 128 bits; e f g h
        half = merge(*fours, [*range(8), *range(16, 24)], [*range(8, 16), *range(24, 32)])
        return merge(half, half, [*range(4), *range(8, 12)], [*range(4, 8), *range(12, 16)])

    return Vector(8)(a, b, c, d, e, f, g, h), emit


@njit
def _copy(source, start, target, at, count):
    """target[at : at + count] = source[start : start + count], between float32 and bfloat16 too."""
    whole = uint64(count) // uint64(LANES) * uint64(LANES)
    for k in range(uint64(0), whole, uint64(LANES)):
        store(target, uint64(at) + k, load(source, uint64(start) + k, LANES))
    for k in range(whole, uint64(count)):
        store(target, uint64(at) + k, load(source, uint64(start) + k, 1))


@njit
def forward(
    dense,  # (B * D,), empty where there is none
    emb,  # (B * F * D,)
    out,  # (B * Y,)
    first,  # sample
    end,
    features,  # F
    joined,  # 1 with dense, else 0
    D,
    W,
):
    """out of the samples first .. end."""
    vectors = features + joined
    pairs = vectors * (vectors - 1) // 2
    width = pairs + joined * D
    v = np.zeros((vectors + BLOCK) * W, np.float32)
    dots = np.empty(pairs + BLOCK, np.float32)
    for b in range(uint64(first), uint64(end)):
        if joined:
            _copy(dense, b * uint64(D), v, 0, D)
            _copy(dense, b * uint64(D), out, b * uint64(width), D)
        for f in range(uint64(features)):
            _copy(emb, (b * uint64(features) + f) * uint64(D), v, (f + uint64(joined)) * uint64(W), D)
        at = uint64(0)
        for i in range(uint64(1), uint64(vectors)):
            for j in range(uint64(0), i, uint64(BLOCK)):
                s0, s1, s2, s3 = zeros(LANES), zeros(LANES), zeros(LANES), zeros(LANES)
                s4, s5, s6, s7 = zeros(LANES), zeros(LANES), zeros(LANES), zeros(LANES)
                row = j * uint64(W)
                for c in range(uint64(0), uint64(W), uint64(LANES)):
                    x = load(v, i * uint64(W) + c, LANES)
                    s0 = add_product(s0, load(v, row + c, LANES), x)
                    s1 = add_product(s1, load(v, row + uint64(W) + c, LANES), x)
                    s2 = add_product(s2, load(v, row + uint64(2 * W) + c, LANES), x)
                    s3 = add_product(s3, load(v, row + uint64(3 * W) + c, LANES), x)
                    s4 = add_product(s4, load(v, row + uint64(4 * W) + c, LANES), x)
                    s5 = add_product(s5, load(v, row + uint64(5 * W) + c, LANES), x)
                    s6 = add_product(s6, load(v, row + uint64(6 * W) + c, LANES), x)
                    s7 = add_product(s7, load(v, row + uint64(7 * W) + c, LANES), x)
                # What is stored past the end of this row is overwritten by the next one.
                store(dots, at + j, sums8(s0, s1, s2, s3, s4, s5, s6, s7))
            at += i
        _copy(dots, 0, out, b * uint64(width) + uint64(joined * D), pairs)


@njit
def backward(
    grad,  # (B * Y,)
    dense,
    emb,
    dense_grad,  # shaped and typed as dense
    emb_grad,  # as emb
    first,
    end,
    features,
    joined,
    D,
    W,
    C,  # columns summed at once; divides W
):
    """dense_grad and emb_grad of the samples first .. end."""
    vectors = features + joined
    pairs = vectors * (vectors - 1) // 2
    width = pairs + joined * D
    v = np.zeros(vectors * W, np.float32)
    g = np.zeros((vectors + ROWS) * vectors, np.float32)  # symmetric; its diagonal and the rows added stay zero
    row = np.empty(width, np.float32)
    sums = np.zeros((vectors + ROWS) * W, np.float32)
    n = uint64(vectors)
    for b in range(uint64(first), uint64(end)):
        if joined:
            _copy(dense, b * uint64(D), v, 0, D)
        for f in range(uint64(features)):
            _copy(emb, (b * uint64(features) + f) * uint64(D), v, (f + uint64(joined)) * uint64(W), D)
        _copy(grad, b * uint64(width), row, 0, width)
        at = uint64(joined * D)
        for i in range(uint64(1), n):
            for j in range(uint64(0), i):
                x = row[at + j]
                g[i * n + j] = x
                g[j * n + i] = x
            at += i
        for i in range(uint64(0), n, uint64(ROWS)):
            one = i * n
            for c in range(uint64(0), uint64(W), uint64(C)):
                s0, s1, s2, s3 = zeros(C), zeros(C), zeros(C), zeros(C)
                for j in range(uint64(0), n):
                    x = load(v, j * uint64(W) + c, C)
                    s0 = add_product(s0, x, g[one + j])
                    s1 = add_product(s1, x, g[one + n + j])
                    s2 = add_product(s2, x, g[one + uint64(2) * n + j])
                    s3 = add_product(s3, x, g[one + uint64(3) * n + j])
                store(sums, i * uint64(W) + c, s0)
                store(sums, (i + uint64(1)) * uint64(W) + c, s1)
                store(sums, (i + uint64(2)) * uint64(W) + c, s2)
                store(sums, (i + uint64(3)) * uint64(W) + c, s3)
        if joined:
            for d in range(uint64(0), uint64(D)):
                sums[d] += row[d]
            _copy(sums, 0, dense_grad, b * uint64(D), D)
        for f in range(uint64(features)):
            _copy(sums, (f + uint64(joined)) * uint64(W), emb_grad, (b * uint64(features) + f) * uint64(D), D)
