"""Whether the `sharding` that a config gives a table can be, on so many ranks.

shardable(table, logical, ...) -> Table      the table, left to the planner where its kind made parts too small
check_rows, check_row_types                  UserError where it cannot be
columns_per_shard(table, ...)                how wide its parts by columns are
"""

from collections.abc import Sequence
from dataclasses import replace

from kernels.errors import UserError
from sharding.tables.base import Table, stored_dim

MIN_COLUMNS = 4  # of a part by columns, which has a multiple of it


def shardable(table: Table, logical: Table, world_size: int, local_world_size: int) -> Table:
    """The table, left to the planner where the sharding that the user gave its logical table cannot be: a kind's small
    parts, such as a remainder table of 5 rows, cannot all be cut as the large one can."""
    if logical.kind == "standard" or table.sharding == "auto":
        return table
    try:
        check_rows([table], world_size, local_world_size)
        columns_per_shard(table, world_size, local_world_size)
    except UserError:
        return replace(table, sharding="auto")
    return table


def check_row_types(tables: Sequence[Table]) -> None:
    wrong = [t for t in tables if t.sharding == "data_parallel" and t.row_type != "fp32"]
    if wrong:
        raise UserError(
            f"tables {', '.join(repr(t.name) for t in wrong)}: a data_parallel table, which has a copy on every rank "
            f"and dense gradients, stores its rows in fp32, not in {wrong[0].row_type}; use "
            f'row_type = "fp32" for it, or sharding = "table_wise"'
        )


def _row_parts(sharding: str, world_size: int, local_world_size: int) -> int:
    by_host = ("table_row_wise", "grid_shard")
    return world_size if sharding == "row_wise" else local_world_size if sharding in by_host else 1


def _ranks_without_rows(table: Table, sharding: str, world_size: int, local_world_size: int) -> int:
    """Parts that get no row, all the parts before the last having ceil(E / parts): 9 rows in 4 parts are 3 3 3 0."""
    parts = _row_parts(sharding, world_size, local_world_size)
    return parts - -(-table.rows // -(-table.rows // parts))


def check_rows(tables: Sequence[Table], world_size: int, local_world_size: int) -> None:
    few = [t for t in tables if _ranks_without_rows(t, t.sharding, world_size, local_world_size)]
    if few:
        parts = _row_parts(few[0].sharding, world_size, local_world_size)
        names = ", ".join(f'"{t.name}"' for t in few)
        counts = ", ".join(str(t.rows) for t in few)
        raise UserError(
            f"sharding = {few[0].sharding!r} would cut {len(few)} tables into {parts} parts of which some have no row: "
            f"{names} ({counts} rows); give them another sharding in the config, such as\n"
            f'[[tables.override]]\nmatch = [{names}]\nsharding = "table_wise"'
        )


def columns_per_shard(table: Table, world_size: int, local_world_size: int) -> int | None:
    """Columns of a part of a table that is split by columns; None for the other types.

    As many parts as there are ranks (hosts, for grid_shard), or the next smaller number that divides the columns.
    16 columns on 2 ranks: 8; 12 columns on 4 ranks: 4 (three parts).
    """
    parts = {
        "column_wise": world_size,
        "table_column_wise": local_world_size,
        "grid_shard": world_size // local_world_size,
    }.get(table.sharding)
    if parts is None:
        return None
    columns = stored_dim(table.dim)
    fits = [c for c in range(MIN_COLUMNS, columns + 1, MIN_COLUMNS) if columns % c == 0 and columns // c <= parts]
    if parts > 1 and fits[0] == columns:
        raise UserError(
            f"table {table.name!r}: sharding = {table.sharding!r} on {world_size} ranks ({local_world_size} a host) "
            f"would cut its dim {table.dim} into parts, but a part has a multiple of {MIN_COLUMNS} columns, so that "
            f'there is only one; use a dim that is a multiple of {2 * MIN_COLUMNS}, or "table_wise" or "row_wise"'
        )
    return fits[0]
