"""The loops of the cpu id map, in Numba.  kernels/id_maps/cpu.py calls them, without the GIL.

Slots: an open-addressing table in cache lines; kernels/id_lines.py says how ids lie in them.  `rebuild` reads and
writes in the order of the lines, and so streams.

Most ids take one line, from anywhere in memory, so lines are asked for AHEAD ids before they are read: two at a time,
since some ids have overflowed into the next one (past the last line there is nothing to ask for, which does no harm).

Imports Numba, so it is imported when the cpu id map is chosen and not before.
"""

import numpy as np
from numba import uint64

from kernels._njit import njit
from kernels.backends._loops import mix
from kernels.backends._vectors import prefetch
from kernels.id_maps.base import MOST_USES

AHEAD = uint64(24)  # ids between a request for a line and its use
RING = uint64(31)  # a mask: more than AHEAD
PLACES = uint64(4)  # of a line
LOW = uint64(0xFFFFFFFF)


@njit(inline="always")
def _home(h, lines):
    """The line of a hash: its low half, scaled to 0 .. lines-1; so lines keep their order when the table grows."""
    return ((h & LOW) * lines) >> uint64(32)


@njit(inline="always")
def _search(slots, key, at):
    """(slot of what is known of key, what is known) in line at; 0 for nothing.  Without branches: which slot it is
    cannot be foretold."""
    known, place = uint64(0), uint64(0)
    for j in range(PLACES):
        here = slots[at + PLACES + j]
        same = slots[at + j] == key
        known |= here if same else uint64(0)
        place = j if same and here != uint64(0) else place
    return at + PLACES + place, known


@njit
def find(slots, lines, seed, ids, first, end, clock, touch, rows):
    """rows[first:end] of ids; if touch, they are seen at clock.  How many have none.

    Threads may run this on the same slots at once: whatever they write there is the same.
    """
    ring = np.empty(RING + uint64(1), np.uint64)
    missing = 0
    stop = uint64(end)
    for i in range(uint64(first), min(uint64(first) + AHEAD, stop)):
        ring[i & RING] = _home(mix(uint64(ids[i]) ^ seed), lines) << uint64(3)
        prefetch(slots, ring[i & RING], 16)
    for i in range(uint64(first), stop):
        later = i + AHEAD
        if later < stop:
            line = _home(mix(uint64(ids[later]) ^ seed), lines) << uint64(3)
            ring[later & RING] = line
            prefetch(slots, line, 16)
        key, at = uint64(ids[i]), ring[i & RING]
        slot, known = _search(slots, key, at)
        while known == uint64(0) and slots[at + uint64(7)] != uint64(0):
            at += uint64(8)
            if at == lines << uint64(3):
                at = uint64(0)
            slot, known = _search(slots, key, at)
        rows[i] = known >> uint64(32)
        if known == uint64(0):
            missing += 1
        elif touch and known & LOW != clock:
            slots[slot] = (known & ~LOW) | clock
    return missing


@njit
def admit(
    slots,
    lines,
    seed,
    ids,  # (N,)
    clock,
    rows,  # (N,) rows of ids, 0 where they have none yet; changed
    misses,  # (M,) where rows is 0, ascending
    first,  # the miss to begin with
    most,  # admissions there is room for in slots
    to_give,  # rows to be given first, the last one first
    top,  # beyond these: top + 1, top + 2, ..., also where that is more than the limit
    given,  # how many rows were given in this call so far
    new,  # (M,) ids admitted in this call; changed
    uses,  # by row, long enough for every miss to get one; changed if counting
    filter_,  # (P * 2 * filter_lines * 64,) uint8, changed
    newer,  # (P,) which half of a part is the newer one, changed
    counted,  # (P,) changed
    first_part,
    filter_lines,
    window,
    after,
    counting,
):
    """One occurrence after the other; (the miss at which slots had no more room, rows given so far)."""
    room = uint64(0)
    half = filter_lines * uint64(64)
    count = uint64(len(misses))
    for m in range(uint64(first), min(uint64(first) + AHEAD, count)):
        h = mix(uint64(ids[uint64(misses[m])]) ^ seed)
        prefetch(slots, _home(h, lines) << uint64(3), 8)
    for m in range(uint64(first), count):
        later = m + AHEAD
        if later < count:
            h = mix(uint64(ids[uint64(misses[later])]) ^ seed)
            prefetch(slots, _home(h, lines) << uint64(3), 8)
            if after > 1:
                line = ((h >> uint64(32)) * (uint64(256) * filter_lines)) >> uint64(32)
                part = line // filter_lines - first_part
                place = (part * uint64(2)) * half + (line % filter_lines) * uint64(64)
                prefetch(filter_, place, 64)
                prefetch(filter_, place + half, 64)
        i = uint64(misses[m])
        key = uint64(ids[i])
        h = mix(key ^ seed)
        at = _home(h, lines) << uint64(3)
        _, known = _search(slots, key, at)
        while known == uint64(0) and slots[at + uint64(7)] != uint64(0):
            at += uint64(8)
            if at == lines << uint64(3):
                at = uint64(0)
            _, known = _search(slots, key, at)
        if known != uint64(0):  # admitted earlier in this call
            rows[i] = known >> uint64(32)
            if counting and uses[known >> uint64(32)] < MOST_USES:
                uses[known >> uint64(32)] += 1
            continue
        if room == uint64(most):  # before it is counted: it is looked at again when slots have grown
            return m, given
        if after > 1:
            line = ((h >> uint64(32)) * (uint64(256) * filter_lines)) >> uint64(32)
            part = line // filter_lines - first_part
            within = (line % filter_lines) * uint64(64)
            now = (part * uint64(2) + uint64(newer[part])) * half + within
            before = (part * uint64(2) + (uint64(newer[part]) ^ uint64(1))) * half + within
            least, least_before = uint64(255), uint64(255)
            for k in range(uint64(4)):
                offset = (h >> (uint64(6) * k)) & uint64(63)
                least = min(least, uint64(filter_[now + offset]))
                least_before = min(least_before, uint64(filter_[before + offset]))
            least += uint64(1)
            for k in range(uint64(4)):
                offset = (h >> (uint64(6) * k)) & uint64(63)
                raised = max(uint64(filter_[now + offset]), min(least, uint64(255)))
                filter_[now + offset] = np.uint8(raised)
            counted[part] += 1
            if counted[part] >= window:
                counted[part] = 0
                newer[part] ^= 1
                cleared = (part * uint64(2) + uint64(newer[part])) * half
                filter_[cleared : cleared + half] = 0
            if least + least_before < uint64(after):
                continue
        free = uint64(len(to_give))
        number = uint64(given)
        row = uint64(to_give[free - uint64(1) - number]) if number < free else uint64(top) + number - free + uint64(1)
        place = uint64(4)
        while slots[at + place] != uint64(0):
            place += uint64(1)
        slots[at + place - uint64(4)] = key
        slots[at + place] = (row << uint64(32)) | clock
        new[number] = key
        given += 1
        room += uint64(1)
        rows[i] = row
        if counting:
            uses[row] = 1
    return count, given


@njit
def count_uses(rows, uses, slice_, slices):
    """One more use of each row of rows that is in this slice: those of one remainder, so threads keep apart."""
    for i in range(uint64(len(rows))):
        row = uint64(rows[i])
        if row != uint64(0) and row % uint64(slices) == uint64(slice_) and uses[row] < MOST_USES:
            uses[row] += 1


@njit
def put(slots, lines, seed, key, known):
    """Put an id that is not there into slots that have room."""
    at = _home(mix(key ^ seed), lines) << uint64(3)
    while slots[at + uint64(7)] != uint64(0):
        at += uint64(8)
        if at == lines << uint64(3):
            at = uint64(0)
    place = uint64(4)
    while slots[at + place] != uint64(0):
        place += uint64(1)
    slots[at + place - uint64(4)] = key
    slots[at + place] = known


@njit
def rebuild(old, slots, lines, seed, leaves, moved, moved_from):
    """Put every id of old into slots, but those whose row has leaves[row]; rows of moved_from and above become
    moved[row - moved_from], and leave where that is 0."""
    for line in range(uint64(len(old)) >> uint64(3)):
        at = line << uint64(3)
        for j in range(PLACES):
            known = old[at + PLACES + j]
            if known == uint64(0):
                break
            row = known >> uint64(32)
            if row >= uint64(moved_from):
                row = uint64(moved[row - uint64(moved_from)])
                if row == uint64(0):
                    continue
            elif row < uint64(len(leaves)) and leaves[row]:
                continue
            put(slots, lines, seed, old[at + j], (row << uint64(32)) | (known & LOW))


@njit
def fill(slots, lines, seed, ids, rows, clocks):
    """Put ids that are not there, with their rows and clocks."""
    for k in range(uint64(len(ids))):
        put(slots, lines, seed, uint64(ids[k]), (uint64(rows[k]) << uint64(32)) | uint64(clocks[k]))


@njit
def spread(slots, ids, clocks):
    """ids[row], clocks[row] of every id; rows outside are left out (they were given in this very call)."""
    for line in range(uint64(len(slots)) >> uint64(3)):
        at = line << uint64(3)
        for j in range(PLACES):
            known = slots[at + PLACES + j]
            if known == uint64(0):
                break
            row = known >> uint64(32)
            if row < uint64(len(clocks)):
                if len(ids):
                    ids[row] = slots[at + j]
                clocks[row] = known & LOW
