"""What every embedding-table kind is given.  See `Table`."""

from dataclasses import dataclass, field

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
