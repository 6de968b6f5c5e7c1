"""Which rank holds which part of which table: from tables to TorchRec's ShardingPlan, and to plan.json.

    plan_task(task, ...) -> Planned             planned by sharding/planner.py, or read from an earlier plan.json
    make_plan(task, ...) -> ShardingPlan        the plan alone
    describe(plan, embeddings, ...) -> dict     a plan as plan.json has it
    from_file(path, ...) -> ShardingPlan        and back

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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard.sharding_spec import EnumerableShardingSpec, ShardMetadata
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.types import CacheParams, EmbeddingModuleShardingPlan, ParameterSharding, ShardingPlan

from kernels.errors import UserError
from sharding import planner, topology
from sharding.cost import Choice, Kind
from sharding.embeddings import Embeddings
from sharding.logical import logical_tables
from sharding.own_sharding import check_row_types, check_rows, columns_per_shard, shardable
from sharding.plan_file import read
from sharding.planner import Limits, Rule, Solution
from sharding.skew import Skew
from sharding.tables.base import ROW_SCALES, ROW_TYPES, SHARDING_TYPES, Table, stored_dim
from sharding.work import ELEMENT, DenseWork, Readers, TableLoad, Work

# Of the EmbeddingBagCollections in a task: tables looked up by bag, id by id, and by rows that are given to ids.
COLLECTION, COLLECTION_PER_ID, COLLECTION_BY_ID = "embeddings.ebc", "embeddings.ebc_per_id", "embeddings.ebc_by_id"
TIER_KERNELS = {"device": "fused", "cache": "fused_uvm_caching", "host": "fused_uvm"}


class AllTypesSharder(EmbeddingBagCollectionSharder):
    """TorchRec's sharder with every sharding type on every device, the fused kernel for all but data_parallel.

    TorchRec leaves the row-wise types out on the CPU; gloo has the reduce-scatter they need.
    """

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return list(SHARDING_TYPES)

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        if sharding_type == "data_parallel":
            return [EmbeddingComputeKernel.DENSE.value]
        return list(TIER_KERNELS.values()) if compute_device_type == "cuda" else [EmbeddingComputeKernel.FUSED.value]


@dataclass(frozen=True)
class Figures:
    """What is known of a feature's ids.  ids_per_bag: mean.  skew: over the rows of its table, where it is known."""

    ids_per_bag: float = 1.0
    skew: Skew | None = None


@dataclass(frozen=True)
class Planned:
    """sharding: what TorchRec takes.  described: what plan.json says."""

    sharding: ShardingPlan
    described: dict[str, Any]


def make_plan(
    task: nn.Module,
    *,
    world_size: int,
    local_world_size: int,
    device: torch.device,
    batch_size: int,
    ids_per_bag: Mapping[str, float] | None = None,
) -> ShardingPlan:
    """The plan of the Embeddings inside `task` (a module still on the meta device) on this machine.

    batch_size: rows per rank and step.  ids_per_bag: mean number of ids of each feature; 1 where not given.
    With a process group, rank 0 plans and all ranks return its plan.
    Raises UserError, naming the table, when its sharding does not fit its dim or the ranks, or when memory is short.
    """
    assert world_size % local_world_size == 0
    cluster = topology.detect(world_size=world_size, local_world_size=local_world_size, device=device.type)
    work = work_of(
        embeddings_of(task),
        batch_size=batch_size * world_size,
        figures={name: Figures(ids_per_bag=n) for name, n in (ids_per_bag or {}).items()},
    )
    return plan_task(task, work, cluster).sharding


def plan_task(
    task: nn.Module,
    work: Work,
    cluster: topology.Topology,
    *,
    constraints: Sequence[tuple[Sequence[str], Rule]] = (),
    limits: Limits = Limits(),
    file: Path | None = None,
) -> Planned:
    """The plan of `task` and what plan.json says about it.

    work: from `work_of`.  constraints: (table names or patterns, rule) beside the tables' own `sharding`.
    file: a plan.json to take instead of planning.  With a process group, rank 0 plans and all ranks return its plan.
    """
    embeddings = embeddings_of(task)

    def plan() -> Planned:
        if file is not None:
            sharding = from_file(file, embeddings, cluster, constraints)
            loads = {t.name: t for t in work.tables}
            words = f"as {file} says"
            return Planned(
                sharding, describe(sharding, embeddings, world_size=cluster.world_size, loads=loads, planner=words)
            )
        rules = rules_of(embeddings, cluster, constraints)
        solution = planner.solve(work, cluster, rules=rules, limits=limits)
        return Planned(to_torchrec(solution, embeddings), describe_solution(solution, embeddings))

    if dist.is_initialized() and dist.get_world_size() > 1:
        return _on_rank_0(plan)
    return plan()


def describe_solution(solution: Solution, embeddings: Embeddings) -> dict[str, Any]:
    """plan.json of a plan of our planner, with what it is predicted to take."""
    described = describe(
        to_torchrec(solution, embeddings),
        embeddings,
        world_size=solution.prices.topology.world_size,
        loads={t.name: t for t in solution.prices.tables},
        planner=said(solution, sum(t.sharding == "auto" for t in embeddings.physical)),
    )
    return described | predicted(solution)


def work_of(
    embeddings: Embeddings,
    *,
    batch_size: int,
    figures: Mapping[str, Figures] | None = None,
    dense: DenseWork = DenseWork(),
    state_bytes_per_row: Callable[[int], int] | None = None,
    overlapped: bool = True,
    bf16: bool = False,
    vector_element: int = ELEMENT,
    readers: Readers = Readers(),
) -> Work:
    """What the planner prices: the physical tables with the ids that reach them, and the dense work.

    batch_size: global.  figures: by logical feature.  state_bytes_per_row: (columns) -> bytes of optimizer state of a
    row, linear in the columns; that of row-wise Adagrad when None.
    """
    figures = figures or {}
    per_row = state_bytes_per_row or (lambda columns: 4)
    per_column = (per_row(8) - per_row(4)) / 4
    tables = []
    for table in embeddings.physical:
        known, by_id = [], embeddings.by_id.get(table.name)
        for name in table.features:
            source = embeddings.sources[name]
            known.append((figures.get(source.feature, Figures()), source.ids is None and source.keep is None))
        ids = [max(1e-3, f.ids_per_bag) for f, _ in known]
        busiest, plain = known[ids.index(max(ids))]
        skew = busiest.skew if plain and busiest.skew is not None and busiest.skew.rows == table.rows else None
        tables.append(
            TableLoad(
                name=table.name,
                rows=table.rows,
                dim=stored_dim(table.dim),
                bags=len(table.features),
                ids=sum(ids),
                state_per_row=per_row(4) - 4 * per_column,
                state_per_column=per_column,
                map_per_row=0.0 if by_id is None else (by_id.map_bytes + by_id.filter_bytes) / table.rows,
                skew=skew,
                element=ROW_TYPES[table.row_type],
                scale=ROW_SCALES[table.row_type],
            )
        )
    return Work(
        tables=tuple(tables),
        batch_size=batch_size,
        dense=dense,
        overlapped=overlapped,
        bf16=bf16,
        vector_element=vector_element,
        readers=readers,
    )


def rules_of(
    embeddings: Embeddings, cluster: topology.Topology, constraints: Sequence[tuple[Sequence[str], Rule]] = ()
) -> dict[str, Rule]:
    """The planner's rules: the tables' own `sharding`, and the constraints."""
    world, local = cluster.world_size, cluster.ranks_per_host
    tables = [shardable(t, embeddings.logical[t.name], world, local) for t in embeddings.physical]
    check_row_types(embeddings.tables)
    check_rows(tables, world, local)
    rules = {t.name: _own_rule(t, embeddings, world, local) for t in tables}
    own = {name: rule for name, rule in rules.items() if rule != Rule()}
    return planner.rules_from([t.name for t in embeddings.physical], constraints, own)


def _can_be(table: Table, embeddings: Embeddings) -> Rule:
    """What the table can be at all."""
    if table.name in embeddings.by_id:  # the id map and the rows that it gives are on the device
        can, tiers = frozenset({"table_wise", "row_wise"}), frozenset({"device"})
        said = f"kind = {embeddings.logical[table.name].kind!r}"
        return Rule(shardings=can, tiers=tiers, can_shardings=can, can_tiers=tiers, said=said)
    if table.row_type != "fp32":
        can = frozenset(SHARDING_TYPES) - {"data_parallel"}
        return Rule(shardings=can, can_shardings=can, said=f"row_type = {table.row_type!r}")
    return Rule()


def check_can_be(where: str, name: str, rule: Rule, *, sharding: str, tier: str) -> None:
    """UserError for a plan's choice that the table cannot be, whatever anybody asks for."""
    because = f" with {rule.said}" if rule.said else ""
    for what, chosen, can in (("sharding", sharding, rule.can_shardings), ("tier", tier, rule.can_tiers)):
        if chosen not in can:
            raise UserError(
                f"{where}: table {name!r} has {what} {chosen!r} there, which cannot be{because}; it can have "
                f"{', '.join(sorted(can))}: plan again with `tablemesh plan CONFIG --out FILE`, or change this table's "
                f"{what} in the file"
            )


def _own_rule(table: Table, embeddings: Embeddings, world: int, local: int) -> Rule:
    """What the table can be at all, and what of it its own `sharding` asks for."""
    rule = _can_be(table, embeddings)
    asked = [rule.said] if rule.said else []
    if table.sharding != "auto":
        columns = columns_per_shard(table, world, local)
        parts = None if columns is None else stored_dim(table.dim) // columns
        rule = replace(rule, shardings=frozenset([table.sharding]), column_parts=parts)
        asked.append(f"sharding = {table.sharding!r}")
    return replace(rule, said=f"tables: {', '.join(asked)}") if asked else rule


def to_torchrec(solution: Solution, embeddings: Embeddings) -> ShardingPlan:
    """An ordinary TorchRec plan of the collection inside `embeddings`."""
    prices = solution.prices
    cluster = prices.topology
    placed: dict[str, ParameterSharding] = {}
    for table, choice in zip(embeddings.physical, solution.choices, strict=True):
        kind = prices.kinds[choice.kind].kind
        extents = _extents(table, kind, choice)
        if table.name in embeddings.by_id and kind.sharding == "row_wise":
            blocks = embeddings.by_id[table.name].blocks(kind.row_parts)
            extents = [(first, end, 0, stored_dim(table.dim)) for first, end in blocks]
        parts = [(rank, *extent) for rank, extent in zip(choice.ranks, extents, strict=True)]
        placed[table.name] = _parameter(kind.sharding, kind.tier, kind.cache_share, parts, cluster)
    return _of_collections(placed, embeddings)


def _of_collections(placed: Mapping[str, ParameterSharding], embeddings: Embeddings) -> ShardingPlan:
    """Each table's sharding under the collection that holds it."""
    found: dict[str, EmbeddingModuleShardingPlan] = {}
    for name, sharding in placed.items():
        path = COLLECTION_PER_ID if name in embeddings.tables_per_id else COLLECTION
        path = COLLECTION_BY_ID if name in embeddings.by_id else path
        found.setdefault(path, EmbeddingModuleShardingPlan())[name] = sharding
    return ShardingPlan(found)


def _extents(table: Table, kind: Kind, choice: Choice) -> list[tuple[int, int, int, int]]:
    """(first row, end, first column, end) of every part, in the order of `Choice.ranks`."""
    if kind.sharding == "data_parallel":
        return [(0, table.rows, 0, stored_dim(table.dim))] * len(choice.ranks)
    columns, block = stored_dim(table.dim) // kind.column_parts, -(-table.rows // kind.row_parts)
    return [
        (i * block, min(table.rows, (i + 1) * block), c * columns, (c + 1) * columns)
        for c in range(kind.column_parts)
        for i in range(kind.row_parts)
    ]


def _parameter(
    sharding: str,
    tier: str,
    cache_share: float,
    parts: Sequence[tuple[int, int, int, int, int]],
    cluster: topology.Topology,
) -> ParameterSharding:
    """parts: (rank, first row, end, first column, end)."""
    ranks = [part[0] for part in parts]
    if sharding == "data_parallel":
        return ParameterSharding(sharding_type=sharding, compute_kernel="dense", ranks=ranks, sharding_spec=None)
    shards = [
        ShardMetadata(
            shard_offsets=[r0, c0],
            shard_sizes=[r1 - r0, c1 - c0],
            placement=f"rank:{rank}/{_device(cluster, rank)}",
        )
        for rank, r0, r1, c0, c1 in parts
    ]
    return ParameterSharding(
        sharding_type=sharding,
        compute_kernel=TIER_KERNELS[tier],
        ranks=ranks,
        sharding_spec=EnumerableShardingSpec(shards),
        cache_params=CacheParams(load_factor=cache_share) if tier == "cache" else None,
    )


def _device(cluster: topology.Topology, rank: int) -> str:
    return f"cuda:{rank % cluster.ranks_per_host}" if cluster.device == "cuda" else "cpu"


def said(solution: Solution, auto: int) -> str:
    """How the plan came about, in a sentence."""
    prices = solution.prices
    tables = len(prices.tables)
    reached = (
        "no plan is faster by this cost model" if solution.proved
        else f"within {100 * solution.gap:.1f}% of the best possible by this cost model"
    )  # fmt: skip
    return (
        f"tablemesh's planner for {prices.topology.title}; {auto} of {tables} tables by its choice, the others as the "
        f"config says; {reached}"
    )


def predicted(solution: Solution) -> dict[str, Any]:
    """What plan.json says about the price of the plan."""
    step = solution.load.step_seconds
    return {
        "cluster": solution.prices.topology.title,
        "guessed": solution.prices.topology.guessed,
        "predicted": {
            "step_ms": 1e3 * step,
            "samples_per_second": solution.prices.work.batch_size / step,
            "table_and_state_bytes": [int(n) for n in solution.load.device[:2].sum(0) + solution.load.host[:2].sum(0)],
            "rank_bytes": [int(n) for n in solution.load.rank_bytes],
            "rank_step_ms": [1e3 * float(n) for n in solution.load.rank_seconds],
        },
        "bound": {"step_ms": 1e3 * solution.bound},
        "gap": solution.gap,
    }


def from_file(
    path: Path,
    embeddings: Embeddings,
    cluster: topology.Topology,
    constraints: Sequence[tuple[Sequence[str], Rule]] = (),
) -> ShardingPlan:
    """The plan of a plan.json, which sharding/plan_file.py reads.  UserError, too, where a table is as it cannot be.

    constraints: as for `plan_task`.  Of what they ask for the file is free, but not of what tables can be at all.
    """
    found = read(path, embeddings, cluster.world_size)
    placed: dict[str, ParameterSharding] = {}
    for table in embeddings.physical:
        name, of_file = table.name, found[table.name]
        tier = "device" if cluster.device == "cpu" else of_file.tier
        asked = (rule for patterns, rule in constraints if any(fnmatchcase(name, p) for p in patterns))
        for rule in (_can_be(table, embeddings), *asked):
            check_can_be(str(path), name, rule, sharding=of_file.sharding, tier=tier)
        placed[name] = _parameter(of_file.sharding, tier, of_file.cache_share, of_file.parts, cluster)
    return _of_collections(placed, embeddings)


def describe(
    plan: ShardingPlan, embeddings: Embeddings, *, world_size: int, loads: Mapping[str, TableLoad], planner: str
) -> dict:
    """The plan as plan.json has it.

    loads: by table, for the optimizer's state.  planner: how the plan came about.
    A data_parallel table has one whole shard on every rank.
    """
    placed = _module_plan(plan)
    counted = {"table_bytes": 0, "optimizer_bytes": 0, "id_map_bytes": 0, "filter_bytes": 0}
    ranks = [{"rank": r, "device": "", **counted} for r in range(world_size)]
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
        by_id = embeddings.by_id.get(t.name)
        beside = {"id_map_bytes": by_id.map_bytes if by_id else 0, "filter_bytes": by_id.filter_bytes if by_id else 0}
        for rank, device, (r0, r1, c0, c1) in shards:
            of_row = loads[t.name].state_per_row + (c1 - c0) * loads[t.name].state_per_column
            size, state = (r1 - r0) * t.row_bytes(c1 - c0), round((r1 - r0) * of_row)
            entries.append({"rank": rank, "rows": [r0, r1], "cols": [c0, c1], "bytes": size})
            ranks[rank]["table_bytes"] += size
            ranks[rank]["optimizer_bytes"] += state
            for key, whole in beside.items():
                ranks[rank][key] += whole * (r1 - r0) // t.rows
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
                "tier": next((k for k, v in TIER_KERNELS.items() if v == sharding.compute_kernel), "device"),
                "cache_share": (sharding.cache_params.load_factor or 0.0) if sharding.cache_params else 0.0,
                "bytes": sum(e["bytes"] for e in entries),
                "optimizer_bytes": optimizer_bytes,
                **beside,
                "shards": entries,
            }
        )
    for entry in ranks:
        entry["device"] = entry["device"] or str(_device_type(plan))
    logical = logical_tables(embeddings, tables)
    return {"world_size": world_size, "planner": planner, "ranks": ranks, "tables": tables, "logical": logical}


def embeddings_of(task: nn.Module) -> Embeddings:
    """The one Embeddings in a module."""
    (found,) = (m for m in task.modules() if isinstance(m, Embeddings))
    return found


def has_fused_tables(plan: ShardingPlan) -> bool:
    """Whether any table is updated inside the backward: all but the data_parallel ones are."""
    return any(p.sharding_type != "data_parallel" for p in _module_plan(plan).values())


def _on_rank_0(plan: Callable[[], Planned]) -> Planned:
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


def _module_plan(plan: ShardingPlan) -> dict[str, Any]:
    """Table -> its sharding, over the collections of the model."""
    return {name: sharding for of_module in plan.plan.values() for name, sharding in of_module.items()}


def _extent(metadata: Any) -> tuple[int, int, int, int]:
    (r0, c0), (rows, columns) = metadata.shard_offsets, metadata.shard_sizes
    return r0, r0 + rows, c0, c0 + columns


def _device_type(plan: ShardingPlan) -> str:
    for sharding in _module_plan(plan).values():
        if sharding.sharding_spec is not None:
            return sharding.sharding_spec.shards[0].placement.device().type
    return "cpu"
