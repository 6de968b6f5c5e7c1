"""Triton: the dots of a sample's vectors, and their backward, a sample a program.

The vectors of a sample fill a tile (BLOCK_I, BLOCK_D), I <= BLOCK_I, of which the matrix units make all I * I dots at
once: half of them are not needed, but what has to be moved is moved once.  Wide vectors are taken BLOCK_D columns at a
time.  PRECISION is that of the products: "tf32" loses nothing of bfloat16, "ieee" nothing of float32.
"""

import triton
import triton.language as tl


@triton.jit
def load_vectors(dense_BD, emb_BX, b, i, d, VECTORS: tl.constexpr, D: tl.constexpr, DENSE: tl.constexpr):
    """(BLOCK_I, BLOCK_D) float32 of sample b; zeros below its vectors and right of their columns."""
    here = (i < VECTORS)[:, None] & (d < D)[None, :]
    if DENSE:
        emb_ID = tl.load(
            emb_BX + b * ((VECTORS - 1) * D) + (i[:, None] - 1) * D + d[None, :], here & (i > 0)[:, None], 0.0
        )
        dense_ID = tl.load(dense_BD + b * D + i[:, None] * 0 + d[None, :], here & (i == 0)[:, None], 0.0)
        return emb_ID.to(tl.float32) + dense_ID.to(tl.float32)
    return tl.load(emb_BX + b * (VECTORS * D) + i[:, None] * D + d[None, :], here, 0.0).to(tl.float32)


@triton.jit
def dots(
    out_BY,
    dense_BD,
    emb_BX,
    VECTORS: tl.constexpr,
    D: tl.constexpr,
    DENSE: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    i, j, d = tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_D)
    first: tl.constexpr = D if DENSE else 0
    row = out_BY + b * (first + VECTORS * (VECTORS - 1) // 2)
    dots_II = tl.zeros((BLOCK_I, BLOCK_I), tl.float32)
    for start in tl.static_range(0, D, BLOCK_D):
        vectors_ID = load_vectors(dense_BD, emb_BX, b, i, start + d, VECTORS, D, DENSE)
        dots_II = tl.dot(vectors_ID, tl.trans(vectors_ID), dots_II, input_precision=PRECISION)
        if DENSE:
            inside = start + d < D
            tl.store(row + start + d, tl.load(dense_BD + b * D + start + d, inside, 0.0), inside)
    below = (i < VECTORS)[:, None] & (j[None, :] < i[:, None])
    tl.store(row + first + i[:, None] * (i[:, None] - 1) // 2 + j[None, :], dots_II, below)


@triton.jit
def gradients(
    dense_grad_BD,
    emb_grad_BX,
    grad_BY,
    dense_BD,
    emb_BX,
    VECTORS: tl.constexpr,
    D: tl.constexpr,
    DENSE: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    i, j, d = tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_D)
    first: tl.constexpr = D if DENSE else 0
    row = grad_BY + b * (first + VECTORS * (VECTORS - 1) // 2)
    high, low = tl.maximum(i[:, None], j[None, :]), tl.minimum(i[:, None], j[None, :])
    pair = (high < VECTORS) & (high != low)
    g_II = tl.load(row + first + high * (high - 1) // 2 + low, pair, 0.0).to(tl.float32)
    for start in tl.static_range(0, D, BLOCK_D):
        column = start + d
        vectors_ID = load_vectors(dense_BD, emb_BX, b, i, column, VECTORS, D, DENSE)
        grad_ID = tl.dot(g_II, vectors_ID, input_precision=PRECISION)
        here = (i < VECTORS)[:, None] & (column < D)[None, :]
        if DENSE:
            copied_D = tl.load(row + column, column < D, 0.0).to(tl.float32)
            grad_ID += tl.where((i == 0)[:, None], copied_D[None, :], 0.0)
            tl.store(dense_grad_BD + b * D + i[:, None] * 0 + column[None, :], grad_ID, here & (i == 0)[:, None])
            place = emb_grad_BX + b * ((VECTORS - 1) * D) + (i[:, None] - 1) * D + column[None, :]
            tl.store(place, grad_ID, here & (i > 0)[:, None])
        else:
            tl.store(emb_grad_BX + b * (VECTORS * D) + i[:, None] * D + column[None, :], grad_ID, here)
