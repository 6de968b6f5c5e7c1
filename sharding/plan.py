"""Which rank holds which part of which table: from tables to TorchRec's ShardingPlan, and to plan.json.

    make_plan(task, ...) -> ShardingPlan        a table with an explicit `sharding` has it, "auto" is TorchRec's choice
    describe(plan, task, ...) -> dict           the plan as plan.json has it

The seven sharding types, for a table of E rows and D columns on W ranks, L of them on each of W / L hosts:

    data_parallel       a copy on every rank; the gradients are averaged, so only for small tables
    table_wise          whole, on one rank
    row_wise            rows in W parts              (10 rows, W = 4: 3 3 3 1)
    column_wise         columns in parts, on any ranks
    table_row_wise      rows in L parts on the ranks of one host
    table_column_wise   columns in parts on the ranks of one host
    grid_shard          columns in W / L parts, one per host, and each by rows in L parts over its ranks

A column part has at least 4 columns, and a multiple of 4 (FBGEMM's rule).  A row part has at least one row: FBGEMM's
CPU kernel takes a part without rows for a feature of the next table, with that table's dim wrong.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError
from torchrec.distributed.types import ShardingPlan

from kernels.errors import UserError
from sharding import topology
from sharding.embeddings import Embeddings, stored_dim
from sharding.tables.base import SHARDING_TYPES, Table

# What "auto" may become.  Not data_parallel, whose gradient is as large as the table, and not grid_shard, which
# TorchRec does not propose on its own.
AUTO_TYPES = ("table_wise", "row_wise", "column_wise", "table_row_wise", "table_column_wise")
MIN_COLUMNS = 4
RESERVED_SHARE = 0.15  # of each rank's memory, kept free of tables: activations, ids on their way, the dense layers


class AllTypesSharder(EmbeddingBagCollectionSharder):
    """TorchRec's sharder with every sharding type on every device, the fused kernel for all but data_parallel.

    TorchRec leaves the row-wise types out on the CPU; gloo has the reduce-scatter they need.
    """

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return list(SHARDING_TYPES)

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        kernel = EmbeddingComputeKernel.DENSE if sharding_type == "data_parallel" else EmbeddingComputeKernel.FUSED
        return [kernel.value]


def make_plan(
    task: nn.Module,
    *,
    world_size: int,
    local_world_size: int,
    device: torch.device,
    batch_size: int,
    ids_per_bag: Mapping[str, float] | None = None,
) -> ShardingPlan:
    """The plan of the Embeddings inside `task` (a module still on the meta device).

    batch_size: rows per rank and step.  ids_per_bag: mean number of ids of each feature; 1 where not given.
    With a process group, rank 0 plans and all ranks return its plan.
    Raises UserError, naming the table, when its sharding does not fit its dim or the ranks, or when memory is short.
    """
    assert world_size % local_world_size == 0

    def plan() -> ShardingPlan:
        embeddings = embeddings_of(task)
        _check_rows(embeddings.physical, world_size, local_world_size)
        constraints = {
            t.name: _constraints(t, world_size, local_world_size, ids_per_bag or {}) for t in embeddings.physical
        }
        found = topology.detect(world_size=world_size, local_world_size=local_world_size, device=device)
        enumerator = _OrderedEnumerator(topology=found, batch_size=batch_size, constraints=constraints)
        planner = EmbeddingShardingPlanner(
            topology=found,
            batch_size=batch_size,
            constraints=constraints,
            enumerator=enumerator,
            stats=[],
            storage_reservation=FixedPercentageStorageReservation(percentage=RESERVED_SHARE),
            debug=False,
        )
        try:
            return planner.plan(task, [AllTypesSharder()])
        except PlannerError as error:
            raise UserError(_no_plan(embeddings, world_size, found, error)) from error

    if dist.is_initialized() and dist.get_world_size() > 1:
        return _on_rank_0(plan)
    return plan()


def describe(plan: ShardingPlan, task: nn.Module, *, world_size: int, state_bytes_per_row: Any = None) -> dict:
    """The plan as plan.json has it.

    state_bytes_per_row: (dim) -> bytes of optimizer state of a row of a shard of `dim` columns; None counts none.
    A data_parallel table has one whole shard on every rank.
    """
    embeddings = embeddings_of(task)
    per_row = state_bytes_per_row or (lambda dim: 0)
    placed = _module_plan(plan)
    ranks = [{"rank": r, "device": "", "table_bytes": 0, "optimizer_bytes": 0} for r in range(world_size)]
    tables = []
    for t in embeddings.physical:
        sharding = placed[t.name]
        if sharding.sharding_spec is None:
            whole = (0, t.rows, 0, stored_dim(t.dim))
            shards = [(rank, str(_device_type(plan)), whole) for rank in range(world_size)]
        else:
            shards = [
                (m.placement.rank(), str(m.placement.device()), _extent(m)) for m in sharding.sharding_spec.shards
            ]
        entries, optimizer_bytes = [], 0
        for rank, device, (r0, r1, c0, c1) in shards:
            size, state = 4 * (r1 - r0) * (c1 - c0), (r1 - r0) * per_row(c1 - c0)
            entries.append({"rank": rank, "rows": [r0, r1], "cols": [c0, c1], "bytes": size})
            ranks[rank]["table_bytes"] += size
            ranks[rank]["optimizer_bytes"] += state
            ranks[rank]["device"] = device
            optimizer_bytes += state
        tables.append(
            {
                "name": t.name,
                "rows": t.rows,
                "dim": t.dim,
                "features": list(t.features),
                "kind": embeddings.logical[t.name].kind,
                "sharding": sharding.sharding_type,
                "bytes": sum(e["bytes"] for e in entries),
                "optimizer_bytes": optimizer_bytes,
                "shards": entries,
            }
        )
    for entry in ranks:
        entry["device"] = entry["device"] or str(_device_type(plan))
    auto = sum(t.sharding == "auto" for t in embeddings.physical)
    return {
        "world_size": world_size,
        "planner": f"TorchRec's EmbeddingShardingPlanner; {auto} of {len(tables)} tables by its choice, "
        f"the others as the config says",
        "ranks": ranks,
        "tables": tables,
    }


def embeddings_of(task: nn.Module) -> Embeddings:
    """The one Embeddings in a module."""
    (found,) = (m for m in task.modules() if isinstance(m, Embeddings))
    return found


def has_fused_tables(plan: ShardingPlan) -> bool:
    """Whether any table is updated inside the backward: all but the data_parallel ones are."""
    return any(p.sharding_type != "data_parallel" for p in _module_plan(plan).values())


class _OrderedEnumerator(EmbeddingEnumerator):
    """TorchRec intersects sets of names, whose order differs from process to process: equal plans need an order."""

    def _filter_sharding_types(self, name: str, allowed_sharding_types: list[str], sharder_key: str = "") -> list[str]:
        return sorted(super()._filter_sharding_types(name, allowed_sharding_types, sharder_key))


def _constraints(
    table: Table, world_size: int, local_world_size: int, ids_per_bag: Mapping[str, float]
) -> ParameterConstraints:
    auto = table.sharding == "auto"
    types = AUTO_TYPES if auto else (table.sharding,)
    return ParameterConstraints(
        sharding_types=[t for t in types if _ranks_without_rows(table, t, world_size, local_world_size) == 0],
        min_partition=None if auto else _columns_per_shard(table, world_size, local_world_size),
        pooling_factors=[max(1e-3, float(ids_per_bag.get(f, 1.0))) for f in table.features],
    )


def _row_parts(sharding: str, world_size: int, local_world_size: int) -> int:
    by_host = ("table_row_wise", "grid_shard")
    return world_size if sharding == "row_wise" else local_world_size if sharding in by_host else 1


def _ranks_without_rows(table: Table, sharding: str, world_size: int, local_world_size: int) -> int:
    """Parts that get no row, all the parts before the last having ceil(E / parts): 9 rows in 4 parts are 3 3 3 0."""
    parts = _row_parts(sharding, world_size, local_world_size)
    return parts - -(-table.rows // -(-table.rows // parts))


def _check_rows(tables: Sequence[Table], world_size: int, local_world_size: int) -> None:
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


def _columns_per_shard(table: Table, world_size: int, local_world_size: int) -> int | None:
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


def _no_plan(embeddings: Embeddings, world_size: int, found: Any, error: PlannerError) -> str:
    need = sum(4 * t.rows * stored_dim(t.dim) for t in embeddings.physical)
    largest = max(embeddings.physical, key=lambda t: t.rows * stored_dim(t.dim))
    memory = found.devices[0].storage
    have = memory.hbm if found.compute_device == "cuda" else memory.ddr
    return (
        f"the tables ({need / 2**30:.2f} GiB, the largest {largest.name!r} with "
        f"{4 * largest.rows * stored_dim(largest.dim) / 2**30:.2f} GiB) cannot be placed on {world_size} ranks with "
        f"{have / 2**30:.2f} GiB each ({error.error_type.value if error.error_type else 'planner'}); use more ranks, "
        f'a smaller tables.dim, or sharding = "row_wise" for the large ones'
    )


def _on_rank_0(plan: Any) -> ShardingPlan:
    """Call `plan` on rank 0 and give every rank its result, or its UserError."""
    box: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            box = [plan()]
        except UserError as error:
            box = [error]
    dist.broadcast_object_list(box, src=0)
    if isinstance(box[0], UserError):
        raise box[0]
    return box[0]


def _module_plan(plan: ShardingPlan) -> Any:
    (found,) = plan.plan.values()
    return found


def _extent(metadata: Any) -> tuple[int, int, int, int]:
    (r0, c0), (rows, columns) = metadata.shard_offsets, metadata.shard_sizes
    return r0, r0 + rows, c0, c0 + columns


def _device_type(plan: ShardingPlan) -> str:
    for sharding in _module_plan(plan).values():
        if sharding.sharding_spec is not None:
            return sharding.sharding_spec.shards[0].placement.device().type
    return "cpu"
