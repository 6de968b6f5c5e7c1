"""A table as it is: one physical table, one row per id."""

from kernels.errors import UserError
from sharding.tables.base import Lowered, Source, Table


def lower(table: Table) -> Lowered:
    """The table itself; UserError for options, of which it has none."""
    if table.options:
        raise UserError(f'table {table.name!r}: kind "standard" has no options, but got {", ".join(table.options)}')
    return Lowered(tables=(table,), sources={name: Source(feature=name) for name in table.features})
