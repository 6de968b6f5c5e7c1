"""The contract of an embedding-table kind: what it is given (`Table`) and what it answers (`Lowered`).

A kind is a file in this folder with one function

    lower(table: Table) -> Lowered

called once per table on every rank, before anything is allocated; it must depend on the table alone.  It says which
plain *physical* tables stand for the logical one, so that the planner can price and shard them:

    ids of a feature -> id map (per physical feature) -> sharded look-ups, summed over a bag -> combine -> (B, D)

It raises UserError, naming the table, for options that make no sense.  The file may import torch, not TorchRec.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

SHARDING_TYPES = (
    "data_parallel",
    "table_wise",
    "row_wise",
    "column_wise",
    "table_row_wise",
    "table_column_wise",
    "grid_shard",
)


@dataclass(frozen=True, kw_only=True)
class Table:
    """One logical embedding table, as the user sees it.

    name: unique among the tables.
    rows: E, ids are 0 .. rows-1.
    dim: D, the width of the vector each of its features gives to the model.
    features: the features that look up in it; one pooled D-vector each.
    pooling: "sum" or "mean" over the ids of a bag; an empty bag gives zeros.
    sharding: one of SHARDING_TYPES, or "auto" for the planner's choice.
    kind: the file in sharding/tables/ that lowers it to physical tables.
    options: the kind's own options.
    init_std: standard deviation of the normal initial values; None for U(-sqrt(1/rows), sqrt(1/rows)) as DLRM's.
    """

    name: str
    rows: int
    dim: int
    features: tuple[str, ...]
    pooling: str = "sum"
    sharding: str = "auto"
    kind: str = "standard"
    options: dict = field(default_factory=dict)
    init_std: float | None = None

    def __post_init__(self) -> None:
        assert self.features and self.pooling in ("sum", "mean") and self.sharding in ("auto", *SHARDING_TYPES)


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the ids of a physical feature come from.

    feature: the logical feature whose bags it takes; every bag keeps its length.
    ids: (N,) int64 -> (N,) int64, element by element, without state; None: the ids as they are.
    """

    feature: str
    ids: Callable[[Any], Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """The physical tables that stand for one logical table.

    tables: physical tables, each of kind "standard"; their features are physical features, unique over the model.
    sources: physical feature -> its Source.
    combine: module from the list of a logical feature's summed vectors [(B, d_1), (B, d_2), ...], in the order of
        `sources`, to its (B, D); None when there is one of them and it is the answer.  For pooling "mean" its result
        is divided by the bag's length afterwards.
    """

    tables: tuple[Table, ...]
    sources: dict[str, Source]
    combine: Any = None
