"""What an id map is: the policy, its results, and the contract of a backend, a module kernels/id_maps/NAME.py.

An id map gives 64-bit ids rows of a table: no two ids the same row, no id two.  Row 0 is the default row, which all ids
share that have none of their own; an id's own row is 1 .. limit.

SPEED, `supports(policy, device)`: as in kernels/interactions/base.py.

`Store(policy, first_part, parts, name, device)`: the methods of `Store` below; device: where ids come from and rows go.
Equal calls give equal results on every backend, row numbers included, whatever the number of threads and whichever of
them comes first; tests/kernels/test_id_map.py runs every backend beside `reference`.

Parts.  A hash of the id (kernels.hashing.mix64(id ^ seed)) cuts the ids into PARTS parts of about equal size, which are
what moves when a table goes to another number of ranks.  The counting filter has its own piece for each part, so
whether and when an id is admitted does not depend on who has which parts.  A map of some parts has its share of the
limit.

The counting filter counts occurrences of ids that have no row.  A part's piece is two halves of `lines` lines of 64
counters of 8 bits; an id has one line, and there 4 counters (one place may be drawn twice).  It counts into the newer
half: its least counters are raised by one (conservative update: Estan and Varghese, 2002).  Its count is the least of
its counters in the newer half plus that of the older one.  Once a half has counted `window` / PARTS occurrences it
becomes the older one, and the one before it is cleared; so the filter has seen the last one to two windows.

Its error: a count is never too low for what happened inside the window, and too high only when other ids have raised
all 4 counters of an id.  A half has 8 counters for each occurrence that it counts, so others add at most 1/2 to a
counter on average, and a count exceeds the truth by c or more with a probability of at most 1/c (Markov, one counter,
both halves).  With 4 counters it is far rarer: in a filter whose halves are both full of ids that occurred once, 5.1%
of new ids are counted one too high and 0.09% two (tests/kernels/test_id_map.py).  Memory: 16 bytes times window.

Shapes: N ids of a call, K rows given or freed by it.
"""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from kernels.errors import UserError
from kernels.hashing import mix64

PARTS = 256  # so at most as many ranks; at 3 ranks shares differ by 1 in 85
COUNTERS = 64  # of a line, of 8 bits: a cache line
HASHES = 4
PER_OCCURRENCE = 8  # counters of a half per occurrence it counts
MOST_OCCURRENCES = 255  # a counter holds no more
MOST_ROWS = (1 << 31) - 1
MOST_USES = (1 << 31) - 1  # counted no further: an id in every row of the data reaches it, and is kept all the same
LAST_CLOCK = (1 << 32) - 1
EVICT = ("off", "lru", "lfu")
HOST = torch.device("cpu")
EVICTED_AT_LEAST = 64  # an eviction frees at least limit / 64 rows, since it passes over the whole map once


@dataclass(frozen=True, kw_only=True)
class Policy:
    """limit: the most ids that have rows; with row 0 the table has limit + 1 rows.
    admit_after: the occurrence of an id, counted from 1, that gets it a row; earlier ones get row 0.
    window: occurrences of ids without rows until the filter's halves change places; None: max(limit, 65,536).
    evict: what happens when the limit is reached: "off", an error; "lru", the ids unseen for longest lose their rows;
        "lfu", those that occurred least often since they were admitted; of equals the longest unseen, then the lowest
        row.
    seed: of the hash.
    """

    limit: int
    admit_after: int = 1
    window: int | None = None
    evict: str = "off"
    seed: int = 0

    def __post_init__(self) -> None:
        _check("limit", self.limit, 1, MOST_ROWS)
        _check("admit_after", self.admit_after, 1, MOST_OCCURRENCES)
        if self.window is not None:
            _check("window", self.window, 1, MOST_ROWS)
        _check("seed", self.seed, 0, (1 << 64) - 1)
        if self.evict not in EVICT:
            raise UserError(f'id map: evict = "{self.evict}"; it is one of {", ".join(EVICT)}')

    @property
    def part_window(self) -> int:
        """Occurrences that a half of one part's piece of the filter counts."""
        return -(-self.whole_window // PARTS)

    @property
    def whole_window(self) -> int:
        return self.window or max(self.limit, 1 << 16)

    @property
    def lines(self) -> int:
        """Of a half of one part; 0 where ids are admitted at once, and nothing is counted."""
        return -(-self.part_window * PER_OCCURRENCE // COUNTERS) if self.admit_after > 1 else 0

    def share(self, first_part: int, parts: int) -> int:
        """The limit of a map of some parts: together those of all ranks make up the limit, if none is left without."""
        end = first_part + parts
        return max(1, self.limit * end // PARTS - self.limit * first_part // PARTS)


def _check(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise UserError(f"id map: {name} = {value:,}; it is from {low:,} to {high:,}")


def part_of(ids_N: Tensor, *, seed: int) -> Tensor:
    """(N,) int64 ids -> (N,) int64 in 0 .. PARTS-1: the hash's highest 8 bits."""
    return (mix64(ids_N ^ (seed - (1 << 64) if seed >> 63 else seed)) >> 56) & (PARTS - 1)


@dataclass
class Counts:
    """What has happened to a map since it was made; occurrences are of ids in `admit`.

    defaulted: occurrences that got row 0.
    """

    occurrences: int = 0
    defaulted: int = 0
    admitted: int = 0
    expired: int = 0
    evicted: int = 0


@dataclass(frozen=True, kw_only=True)
class Admitted:
    """rows_N: (N,) int64.  new_ids_K, new_rows_K: int64, the ids that got a row in this call and their rows, in the
    order of their admission: whatever lay in these rows belonged to others, or to nobody."""

    rows_N: Tensor
    new_ids_K: Tensor
    new_rows_K: Tensor


@dataclass(frozen=True, kw_only=True)
class State:
    """All that a map is; a backend that loads it goes on as the one that gave it would have.

    ids_K, rows_K, clocks_K, uses_K: int64, of each id that has a row, by ascending row: when it was last seen, and how
        often since it was admitted (0 unless evict is "lfu", at most MOST_USES).
    free_J: rows given before and free now; the last one is given first.
    top: the highest row ever given.
    filter_PHLC: uint8, the counters (P parts, 2 halves, lines, 64), the newer half first.
    counted_P: int64, occurrences in the newer half.
    """

    ids_K: Tensor
    rows_K: Tensor
    clocks_K: Tensor
    uses_K: Tensor
    free_J: Tensor
    top: int
    filter_PHLC: Tensor
    counted_P: Tensor
    counts: Counts = field(default_factory=Counts)


class Store(Protocol):
    """Callers have checked dtypes, that the ids belong to the map's parts, and clocks.

    device: of all tensors that its methods take and give; HOST for a map that lives there, wherever its ids come from.
    limit: of this map.  size: ids that have rows.  top: the highest row ever given, so a table of top + 1 rows will do;
    it grows only when no freed row is left.  counts: a Counts.
    """

    device: torch.device
    limit: int
    size: int
    top: int
    counts: Counts

    def find(self, ids_N: Tensor) -> Tensor:
        """(N,) int64 rows, 0 for ids without one; changes nothing."""
        ...

    def admit(self, ids_N: Tensor, clock: int) -> Admitted:
        """In this order: ids that have rows get them, their clock becomes `clock`, their uses grow; the other
        occurrences are counted one after the other, each id admitted with its occurrence number admit_after, and rows
        given from the free ones, last freed first, then from top + 1 upwards, up to the limit.

        Rows missing then are evicted from ids whose clock is lower than `clock`: at least so many, at least limit / 64
        where there are; they go to the ids that miss them in ascending order, and what is left is free, the lowest to
        be given first.  UserError when eviction is off, or too few ids are old enough: then no id of this call was
        admitted and none lost its row; its occurrences have been counted.
        """
        ...

    def expire(self, before: int) -> Tensor:
        """Takes the rows of all ids whose clock is lower than `before`; (K,) int64, ascending: lowest goes first."""
        ...

    def state(self) -> State: ...

    def load(self, state: State) -> None: ...


def full(name: str, *, wanted: int, limit: int, top_up: int, evict: str) -> UserError:
    """The error of a map that is full.  wanted: ids this call admits; top_up: rows it could have had."""
    start = f"id map of table {name!r}" if name else "id map"
    missing = f"{start}: {wanted:,} new ids want rows, {top_up:,} of its {limit:,} can be had"
    if evict == "off":
        return UserError(
            f'{missing}, and eviction is off; raise the limit, set evict = "lru" or "lfu", expire ids sooner, or admit '
            f"them later"
        )
    return UserError(
        f"{missing}: the others belong to ids of this very batch, which cannot be evicted; raise the limit, or make "
        f"batches smaller"
    )
