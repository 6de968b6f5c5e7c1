"""Unbounded 64-bit ids, no two of which share a row; a row is given when an id has come often enough, and taken back.

    ids = { kind = "collisionless", options = { rows = 1_000_000, admit_after = 10, expire_steps = 100_000 } }

Ids travel as they are to the rank that has their part of the table (sharding/by_id.py), and an id map there
(kernels/id_map.py) says which row each has.  Until an id has a row it reads, and trains, the table's default row, which
all such ids share.  A row begins with the weights that `sharding.initial_weights.fresh_rows` gives its id, and with
optimizer states of zero: an id that lost its row and comes back starts like one that was never seen.

Options:

    rows           the most ids that have rows at a time (default: the table's rows); at least 256
    admit_after    the occurrence of an id, counted from 1, that gets it a row
    window         occurrences of ids without rows that the counting filter remembers, one to two times (default: rows,
                   at least 65,536); it takes 16 bytes for each
    expire_steps   ids unseen for more than so many steps lose their rows
    expire_hours   the same in hours of training: hours in which the run stands still do not count
    evict          at the limit "lru" takes the rows of the ids unseen for longest, "lfu" of those that came least often
                   since they were admitted; "off" is an error
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field, model_validator
from torch import Tensor

from kernels.errors import UserError
from kernels.id_maps.base import EVICT, MOST_OCCURRENCES, MOST_ROWS, PARTS, Policy
from sharding.tables.base import ById, Lowered, Options, Source, Table, shares, too_small

# The conformance suite gives every id the row that `lower` says; here that depends on what came before:
# tests/sharding/test_by_id.py.
VARIANTS = ()
FITTED = ("rows",)
LARGEST_LIMIT = MOST_ROWS - PARTS
SHARDINGS = ("auto", "table_wise", "row_wise")
REFUSED = {
    "data_parallel": "every rank would need the id map of all ids",
    "column_wise": "the ranks that have an id's columns would each need its id map",
    "table_column_wise": "the ranks that have an id's columns would each need its id map",
    "table_row_wise": "ids are spread over all ranks by their hash, not over those of one host",
    "grid_shard": "ids are spread over all ranks by their hash, not over those of one host",
}
# Of `fit`: with a window of once the limit few ids come often enough inside it to be admitted, and rows stay empty;
# with more the filter takes what rows could have.  docs/tables.md has the figures.
WINDOW_PER_ROW = 4
assert set(EVICT) == {"off", "lru", "lfu"}


class CollisionlessOptions(Options):
    rows: int | None = Field(None, ge=PARTS, le=LARGEST_LIMIT)
    admit_after: int = Field(1, ge=1, le=MOST_OCCURRENCES)
    window: int | None = Field(None, ge=1, le=MOST_ROWS)
    expire_steps: int | None = Field(None, ge=1)
    expire_hours: float | None = Field(None, gt=0)
    evict: Literal["off", "lru", "lfu"] = "lru"

    @model_validator(mode="after")
    def _one_clock(self) -> "CollisionlessOptions":
        if self.expire_steps is not None and self.expire_hours is not None:
            raise ValueError("expire_steps and expire_hours are both given; give one of them")
        return self


def lower(table: Table) -> Lowered:
    """One physical table of `rows` rows and PARTS more, among which are the ranks' copies of the default row."""
    options = _options(table)
    if table.sharding not in SHARDINGS:
        raise UserError(
            f"table {table.name!r}, kind 'collisionless': sharding = {table.sharding!r} cannot be: "
            f'{REFUSED[table.sharding]}; use "row_wise" (ids by hash over all ranks), "table_wise" or "auto"'
        )
    limit = _limit(table, options)
    bound = math.sqrt(1.0 / limit) if table.init_bound is None else table.init_bound
    physical = replace(
        table, kind="standard", options={}, rows=limit + PARTS, init_bound=bound, head=(), by_popularity=False
    )
    by_id = ById(
        policy=Policy(limit=limit, admit_after=options.admit_after, window=options.window, evict=options.evict),
        expire_steps=options.expire_steps,
        expire_hours=options.expire_hours,
    )
    sources = {name: Source(feature=name) for name in table.features}
    return Lowered(tables=(physical,), sources=sources, by_id=by_id)


def reference(table: Table, feature: str, id: int, weights: Mapping[str, Any]) -> Tensor:
    """weights: the table's name -> a dict of id -> (D,), with the default row under None."""
    rows = weights[table.name]
    return rows[id] if id in rows else rows[None]


def fit(tables: Sequence[Table], budget: int) -> tuple[Table, ...]:
    """The tables with limits, and filters in proportion, such that rows, id map and filter take the budget together."""
    fitted = []
    for table, share in zip(tables, shares(tables, budget), strict=True):
        low, high = PARTS, max(PARTS, min(table.rows, LARGEST_LIMIT))
        smallest = whole_bytes(_limited(table, low))
        if share < smallest:
            why = f"rows, id map{' and filter' if _options(table).admit_after > 1 else ''} of {PARTS} ids"
            raise too_small([table], share, smallest, f"{why}, and a default row for each of {PARTS} ranks")
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if whole_bytes(_limited(table, middle)) <= share else (low, middle - 1)
        fitted.append(_limited(table, low))
    return tuple(fitted)


def whole_bytes(table: Table) -> int:
    """Bytes that the table has at its limit: rows, id map and filter; without optimizer state."""
    lowered = lower(table)
    return lowered.tables[0].bytes + lowered.by_id.map_bytes + lowered.by_id.filter_bytes


def _limited(table: Table, rows: int) -> Table:
    """The table with this limit and, unless its options say how large, a filter that is in proportion."""
    options = table.options | {"rows": rows}
    if _options(table).admit_after > 1 and "window" not in table.options:
        options["window"] = min(MOST_ROWS, WINDOW_PER_ROW * rows)
    return replace(table, options=options)


def _options(table: Table) -> CollisionlessOptions:
    return table.read(CollisionlessOptions)


def _limit(table: Table, options: CollisionlessOptions) -> int:
    limit = table.rows if options.rows is None else options.rows
    if not PARTS <= limit <= LARGEST_LIMIT:
        raise UserError(
            f"table {table.name!r}, kind 'collisionless': room for {limit:,} ids (the table's rows); give the option "
            f'rows, from {PARTS:,} to {LARGEST_LIMIT:,}, or take kind = "standard" for a table as small as this'
        )
    return limit
