"""The tables of the config beside the physical ones that they became: the part "logical" of plan.json.

logical_tables(embeddings, described) -> [{"name", "kind", ..., "physical", "bytes", "standard_bytes", ...}]
"""

from collections.abc import Sequence
from typing import Any

from sharding.embeddings import Embeddings
from sharding.tables.base import ROW_TYPES, Table, stored_dim

SUMMED = ("bytes", "optimizer_bytes", "id_map_bytes", "filter_bytes")


def logical_tables(embeddings: Embeddings, described: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry for each table of the config, in order.

    described: the physical tables as plan.json has them.  rows, dim, options: as asked for.  physical: names.
    dense_bytes: of the parameters that combine its rows, a copy on every rank, here counted once.
    standard_bytes: what one table of rows x dim in fp32 would take, without optimizer state.
    """
    by_name = {entry["name"]: entry for entry in described}
    found = []
    for table in embeddings.tables:
        parts = [by_name[p.name] for p in embeddings.physical if embeddings.logical[p.name] is table]
        found.append(
            {
                "name": table.name,
                "kind": table.kind,
                "options": dict(table.options),
                "row_type": table.row_type,
                "rows": table.rows,
                "dim": table.dim,
                "pooling": table.pooling,
                "features": list(table.features),
                "physical": [part["name"] for part in parts],
                "physical_rows": sum(part["rows"] for part in parts),
                "sharding": list(dict.fromkeys(part["sharding"] for part in parts)),
                "tier": list(dict.fromkeys(part["tier"] for part in parts)),
                **{key: sum(part[key] for part in parts) for key in SUMMED},
                "dense_bytes": _dense_bytes(embeddings, table),
                "standard_bytes": table.rows * stored_dim(table.dim) * ROW_TYPES["fp32"],
            }
        )
    return found


def _dense_bytes(embeddings: Embeddings, table: Table) -> int:
    name = embeddings.combine.combine_of.get(table.features[0])
    parameters = embeddings.combine.combines[name].parameters() if name else ()
    return sum(p.numel() * p.element_size() for p in parameters)
