"""Triton: the slots of an id map, and its counting filter.  kernels/id_lines.py says how ids lie in the slots.

Order of memory.  `find` reads slots, and writes what is known of an id that is there: whoever meets that word beside it
sees the old clock or the new one, and the same row.  `put` fills empty slots and looks for no id, so it may write an
id after it has claimed the slot: who reads ids is a later launch.  `count` is the one kernel that reads what it has
written itself; a barrier stands between, and what two programs may write at once they only add to.

Shapes: N ids, M occurrences of ids without rows, K ids to put, P parts, G groups of a tile, 4 places of a line, 64
counters of a line of the filter.
"""

import triton
import triton.language as tl

from kernels.backends._triton_update import mix64


@triton.jit
def _home(id_N, seed, lines):
    """The line of an id: the low half of its hash, scaled to 0 .. lines-1."""
    h = mix64(id_N.to(tl.uint64, bitcast=True) ^ seed.to(tl.uint64))
    return (((h & 0xFFFFFFFF) * lines.to(tl.uint64)) >> 32).to(tl.int64)


@triton.jit(do_not_specialize=["lines", "seed", "clock", "ids"])
def find(
    slots,  # (lines, 8) int64
    ids_N,  # int64
    rows_N,  # out, int64: 0 for ids without a row
    uses,  # int32, by row; one more for each occurrence if COUNTING
    lines,
    seed,
    clock,
    ids,
    TOUCH: tl.constexpr,  # whether the ids are seen at `clock`
    COUNTING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_N = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = i_N < ids
    id_N = tl.load(ids_N + i_N, mask=here, other=0)
    line_N = _home(id_N, seed, lines)
    place = tl.arange(0, 4)[None, :]
    known_N = tl.zeros((BLOCK,), dtype=tl.int64)
    slot_N = tl.zeros((BLOCK,), dtype=tl.int64)
    searching = here
    while tl.max(searching.to(tl.int32), axis=0) > 0:
        at = line_N[:, None] * 8 + place
        id_N4 = tl.load(slots + at, mask=searching[:, None], other=0)
        known_N4 = tl.load(slots + at + 4, mask=searching[:, None], other=0)
        same = (id_N4 == id_N[:, None]) & (known_N4 != 0)
        known_N += tl.sum(tl.where(same, known_N4, 0), axis=1)
        slot_N += tl.sum(tl.where(same, at + 4, 0), axis=1)
        searching = searching & (known_N == 0) & (tl.min(known_N4, axis=1) != 0)
        line_N = tl.where(line_N + 1 == lines, 0, line_N + 1)
    row_N = known_N >> 32
    tl.store(rows_N + i_N, row_N, mask=here)
    if TOUCH:
        seen_N = (row_N << 32) | clock
        tl.store(slots + slot_N, seen_N, mask=(known_N != 0) & (known_N != seen_N))
    if COUNTING:
        tl.atomic_add(uses + row_N, 1, mask=known_N != 0, sem="relaxed")


@triton.jit(do_not_specialize=["ids", "most"])
def bound_uses(uses, rows_N, most, ids, BLOCK: tl.constexpr):
    """Counts that have passed 2**31 - 1, and so turned negative, are that again."""
    i_N = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row_N = tl.load(rows_N + i_N, mask=i_N < ids, other=0)
    count_N = tl.load(uses + row_N, mask=row_N > 0, other=0)
    tl.store(uses + row_N, most, mask=count_N < 0)


@triton.jit(do_not_specialize=["lines", "seed", "ids"])
def put(
    slots,  # (lines, 8) int64 with room for all
    ids_K,  # int64, no two alike, none of them there
    known_K,  # int64: row << 32 | clock; 0 for what is to be left out
    lines,
    seed,
    ids,
    BLOCK: tl.constexpr,
):
    """Which of the slots an id gets depends on who comes first; nothing that is looked up does."""
    i_K = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    id_K = tl.load(ids_K + i_K, mask=i_K < ids, other=0)
    known_K = tl.load(known_K + i_K, mask=i_K < ids, other=0)
    empty_K = tl.zeros((BLOCK,), dtype=tl.int64)
    line_K = _home(id_K, seed, lines)
    place_K = tl.zeros((BLOCK,), dtype=tl.int64)
    waiting = known_K != 0
    while tl.max(waiting.to(tl.int32), axis=0) > 0:
        # It has no mask: those that have their slot ask for it again, and find it taken; what is left out puts 0 for 0.
        found_K = tl.atomic_cas(slots + line_K * 8 + 4 + place_K, empty_K, known_K, sem="relaxed")
        waiting = waiting & (found_K != 0)
        next_K = place_K + 1
        full = waiting & (next_K == 4)
        place_K = tl.where(waiting, next_K & 3, place_K)
        line_K = tl.where(full, tl.where(line_K + 1 == lines, 0, line_K + 1), line_K)
    tl.store(slots + line_K * 8 + place_K, id_K, mask=known_K != 0)


@triton.jit(do_not_specialize=["missing", "lines", "first_part", "window", "after"])
def count(
    hash_M,  # int64, of each occurrence's id
    number_M,  # int64: which of the different ids
    order_M,  # int64: the occurrences group by group, in the order of the batch in each
    alone_P,  # int64: not 0 where all occurrences of a part are one group
    firsts,  # (M + 1,) int64: where each group begins in order_M, and past the last one where that ends
    admitted_M,  # int64, by number: out, the occurrence that admitted the id; `missing` where none has
    filter_,  # (P, 2, lines, 64) uint8, changed
    newer_P,  # int64: which half is the newer one, changed
    counted_P,  # int64, changed
    missing,
    lines,
    first_part,
    window,
    after,
    CLEAR: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """One occurrence of each group of the tile after the other.

    Either a group has all occurrences of one part, or its part will not see the end of its window, so that the order of
    the part's groups among each other does not matter: all they share is how many were counted.
    """
    g_G = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    here = g_G < missing
    next_G = tl.load(firsts + g_G, mask=here, other=0)
    end_G = tl.load(firsts + g_G + 1, mask=here, other=0)
    place = tl.arange(0, 64)[None, :]
    byte = tl.arange(0, CLEAR)[None, :]
    half = lines.to(tl.int64) * 64
    while tl.max((end_G - next_G).to(tl.int64), axis=0) > 0:
        live = next_G < end_G
        m_G = tl.load(order_M + next_G, mask=live, other=0)
        number_G = tl.load(number_M + m_G, mask=live, other=0)
        live = live & (tl.load(admitted_M + number_G, mask=live, other=0) == missing)
        h_G = tl.load(hash_M + m_G, mask=live, other=0).to(tl.uint64, bitcast=True)
        line_G = (((h_G >> 32) * (lines.to(tl.uint64) * 256)) >> 32).to(tl.int64)
        part_G = tl.where(live, line_G // lines - first_part, 0)
        newer_G = tl.load(newer_P + part_G, mask=live, other=0)
        within_G = (line_G % lines) * 64
        now = ((part_G * 2 + newer_G) * half + within_G)[:, None] + place
        before = ((part_G * 2 + (newer_G ^ 1)) * half + within_G)[:, None] + place
        mine = place == (h_G & 63).to(tl.int32)[:, None]
        mine = mine | (place == ((h_G >> 6) & 63).to(tl.int32)[:, None])
        mine = mine | (place == ((h_G >> 12) & 63).to(tl.int32)[:, None])
        mine = mine | (place == ((h_G >> 18) & 63).to(tl.int32)[:, None])
        mine = mine & live[:, None]
        now_G64 = tl.load(filter_ + now, mask=mine, other=255).to(tl.int32)
        before_G64 = tl.load(filter_ + before, mask=mine, other=255).to(tl.int32)
        least_G = tl.min(now_G64, axis=1) + 1
        raised_G64 = tl.maximum(now_G64, tl.minimum(least_G, 255)[:, None])
        tl.store(filter_ + now, raised_G64.to(tl.uint8), mask=mine)
        admits = live & (least_G + tl.min(before_G64, axis=1) >= after)
        tl.store(admitted_M + number_G, m_G, mask=admits)
        alone = live & (tl.load(alone_P + part_G, mask=live, other=0) != 0)
        tl.atomic_add(counted_P + part_G, 1, mask=live & (alone == 0), sem="relaxed")
        counted_G = tl.load(counted_P + part_G, mask=alone, other=0) + 1
        ends = alone & (counted_G >= window)
        tl.store(counted_P + part_G, tl.where(ends, 0, counted_G), mask=alone)
        if tl.max(ends.to(tl.int32), axis=0) > 0:
            tl.store(newer_P + part_G, newer_G ^ 1, mask=ends)
            cleared_G = (part_G * 2 + (newer_G ^ 1)) * half
            for k in range(0, half, CLEAR):
                at = k + byte
                nothing = tl.zeros((GROUPS, CLEAR), dtype=tl.uint8)
                tl.store(filter_ + cleared_G[:, None] + at, nothing, mask=ends[:, None] & (at < half))
        next_G += 1
        tl.debug_barrier()
