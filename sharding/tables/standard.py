"""A table as it is: one physical table, one row per id."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from sharding.tables.base import Lowered, Options, Source, Table, too_small

VARIANTS = ({},)


def lower(table: Table) -> Lowered:
    """The table itself; UserError for options, of which it has none."""
    table.read(Options)
    return Lowered(tables=(table,), sources={name: Source(feature=name) for name in table.features})


def reference(table: Table, feature: str, id: int, weights: Mapping[str, Tensor]) -> Tensor:
    return weights[table.name][id]


def fit(tables: Sequence[Table], budget: int) -> tuple[Table, ...]:
    """The tables as they are, or UserError: there is nothing to choose, and there are no options."""
    for table in tables:
        table.read(Options)
    size = sum(table.bytes for table in tables)
    if size > budget:
        raise too_small(tables, budget, size, "a row for every id")
    return tuple(tables)
