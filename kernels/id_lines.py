"""How many lines of slots an id map has; a line has room for PLACES ids.

A line is eight 64-bit words: four ids, then what is known of each of them, row << 32 | clock; 0 there is an empty slot,
since rows start at 1.  An id lives in its home line (`home` in the loops: the low half of its hash, scaled) or, where
that is full, in the next one with room; a line fills from the left, so a search ends at the first line whose last slot
is empty.  Nothing is ever taken out: what frees rows builds the slots anew.
"""

LOAD = 0.8  # of slots that hold an id, at most; lines of 4 then overflow into the next one for some ids in ten
FEWEST_LINES = 64
PLACES = 4
WORDS = 2 * PLACES  # of a line


def room(lines: int) -> int:
    """Ids that so many lines may hold: one slot stays free in any case, or a search would not end."""
    return min(int(lines * PLACES * LOAD), lines * PLACES - 1)


def lines_for(size: int, *, lines: int, limit: int) -> int:
    """As many as there are if that will do, else twice as many, but no more than the limit needs, or the size."""
    enough = -(-limit * 5 // 16) + 1
    lines = max(lines, FEWEST_LINES)
    while room(lines) < size and lines < enough:
        lines = min(2 * lines, enough)
    while room(lines) < size:  # ids beyond the limit, for which others are about to leave
        lines += lines // 4
    return min(lines, enough) if room(min(lines, enough)) >= size else lines
