"""Triton: tiles of rows, read and written.

A tile is (R, BLOCK_D): R rows side by side, BLOCK_D the power of two at or above their D columns.  D is a constant of a
compilation; ALIGN, a power of two, divides the place of every row, in elements, so that rows of D = 4 * k float32 move
16 bytes at a time.
"""

import triton
import triton.language as tl


@triton.jit
def load_rows(buffer, at_R, ok_R, d, D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr):
    """(R, BLOCK_D) float32: what is at elements at_R; zeros where not ok and right of D."""
    at = tl.multiple_of(at_R[:, None], [ALIGN, ALIGN])
    mask = ok_R[:, None]
    if BLOCK_D != D:
        mask = mask & (d < D)[None, :]
    return tl.load(buffer + at + d[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_rows(buffer, at_R, ok_R, rows, d, D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr):
    at = tl.multiple_of(at_R[:, None], [ALIGN, ALIGN])
    mask = ok_R[:, None]
    if BLOCK_D != D:
        mask = mask & (d < D)[None, :]
    tl.store(buffer + at + d[None, :], rows, mask=mask)


@triton.jit
def bags_of(offsets, q_B, here_B, ids):
    """First id, number of ids, end, and whether the offsets are wrong, of each bag; wrong ones count as empty."""
    first_B = tl.load(offsets + q_B, mask=here_B, other=0).to(tl.int64)
    end_B = tl.load(offsets + q_B + 1, mask=here_B, other=0).to(tl.int64)
    right_B = (first_B >= 0) & (end_B <= ids) & (first_B <= end_B)
    return first_B, tl.where(right_B, end_B - first_B, 0), end_B, here_B & (right_B == 0)


@triton.jit
def ids_at(ids_N, at_B, ok_B):
    return tl.load(ids_N + at_B, mask=ok_B, other=0).to(tl.int64)
