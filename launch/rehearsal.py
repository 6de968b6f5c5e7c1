"""`tablemesh train --preflight --world-size N`: everything that can be known of a run on N ranks, in this one process.

    rehearse(config, cluster=..., ...) -> dict      what --json prints: every check, in order

    data     the batch, the streams and the rows divide over the ranks
    plan     a plan exists, by the planner or from a file, that keeps every rank's memory limit
    model    dense layers forward and backward with a rank's rows, on meta tensors (trainer/dense_work.py)
    sharding TorchRec shards the tables as one of the ranks would, on meta tensors, in a process group of N ranks that
             has only this one; what it would allocate is compared with the plan's bytes

No GPU, no network, no table is allocated.  What only a cluster can show is left to `python -m launch.preflight` there.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torchrec.distributed.types import ShardingEnv

from kernels.errors import UserError
from launch import plan as plans
from sharding import planner, topology
from sharding.compute_kernel import KernelSharder
from sharding.fbgemm import fused_params
from sharding.plan import AllTypesSharder, to_torchrec
from sharding.planner import Infeasible, Solution
from sharding.tables.base import ROW_TYPES
from sharding.topology import Topology
from trainer import planning
from trainer.config import Config
from trainer.optim.base import table_update

META = torch.device("meta")
DEFAULT_PROFILE = "h100-80gb"


def rehearse(
    config: Config,
    *,
    cluster: str,
    dataset: Path | None = None,
    plan_file: Path | None = None,
    rank: int | None = None,
) -> dict[str, Any]:
    """cluster: such as "h100-80gb:128x8".  rank: whose part is built; the fullest when None."""
    checks: list[dict[str, Any]] = []
    found: dict[str, Any] = {"cluster": cluster, "checks": checks, "ok": False}

    def check(name: str, attempt: Any) -> Any:
        """Adds a check; None where it failed."""
        try:
            said, result = attempt()
        except UserError as error:
            checks.append({"name": name, "ok": False, "said": str(error)})
            return None
        checks.append({"name": name, "ok": True, "said": said})
        return result

    asked = check("model", lambda: _model(config, dataset, cluster))
    if asked is not None:
        found |= {"cluster": asked.cluster.title, "world_size": asked.cluster.world_size}
        check("data", lambda: _data(config, asked, dataset))
        solution = check("plan", lambda: _plan(asked, plan_file))
        if solution is not None:
            check("memory", lambda: _memory(solution))
            whose = int(solution.load.rank_bytes.argmax()) if rank is None else rank
            found["rank"] = whose
            check("sharding", lambda: _sharding(config, asked, dataset, solution, whose))
    return found | {"ok": all(c["ok"] for c in checks)}


def cluster_for(world_size: int | None, cluster: str | None, known: Mapping[str, Topology]) -> str:
    """The cluster that is meant, as text: whole hosts of a profile, by default h100-80gb, with this many ranks.

    1024, None -> "h100-80gb:128x8"; 16, "a100-40gb" -> "a100-40gb:2x8".  UserError where the two contradict.
    """
    if cluster is not None and (":" in cluster or world_size is None):
        found = topology.parse(cluster, known)
        if world_size not in (None, found.world_size):
            raise UserError(f"--cluster {cluster} has {found.world_size} ranks, --world-size is {world_size}; give one")
        return found.title
    if world_size is None:
        raise UserError("--preflight: needs --world-size N, --cluster PROFILE:HOSTSxRANKS, or both")
    profile = topology.parse(cluster or DEFAULT_PROFILE, known)
    local = min(world_size, profile.ranks_per_host)
    if world_size % local:
        raise UserError(f"--world-size {world_size}: {profile.name} has {local} ranks a host; use a multiple of it")
    return f"{profile.name}:{world_size // local}x{local}"


def _model(config: Config, dataset: Path | None, cluster: str) -> tuple[str, Any]:
    asked = plans.make(config, dataset=dataset, cluster=cluster)
    dense, tables = asked.work.dense, asked.work.tables
    rows = config.train.batch_size / asked.cluster.world_size
    return (
        f"{len(tables)} tables of {sum(t.rows for t in tables):,} rows, {dense.parameters:,} dense parameters; forward "
        f"and backward fit together, {dense.flops_per_row * rows:.3g} FLOP a rank",
        asked,
    )


def _data(config: Config, asked: Any, dataset: Path | None) -> tuple[str, None]:
    world, batch = asked.cluster.world_size, config.train.batch_size
    config.check_world_size(world)
    rows = plans.opened(config, dataset).split("train").rows
    steps = -(-rows // batch)
    if batch % world:
        raise UserError(f"train.batch_size = {batch} does not divide over {world} ranks")
    if rows < batch:
        raise UserError(
            f"the train split has {rows:,} rows, fewer than train.batch_size = {batch:,}; use a smaller batch"
        )
    streams = config.data.streams // world
    return f"{batch // world:,} rows of each batch and {streams} of the streams a rank, {steps:,} steps", None


def _plan(asked: Any, file: Path | None) -> tuple[str, Solution]:
    if file is not None:
        solution = plans.plan_of(asked, str(file))
        return f"{file}, {1e3 * solution.load.step_seconds:.2f} ms a step by the cost model", solution
    try:
        solution = planner.solve(asked.work, asked.cluster, rules=asked.rules, limits=asked.limits)
    except Infeasible as short:
        ways = plans.answer(asked)["ways_out"]
        listed = "".join(f"\n  - {way['how']}" for way in ways) or " none was found"
        raise UserError(f"{short.words}\nways out:{listed}") from short
    return (
        f"{1e3 * solution.load.step_seconds:.2f} ms a step by the cost model, within {solution.gap:.1%} of the best",
        solution,
    )


def _memory(solution: Solution) -> tuple[str, None]:
    used, limit = solution.load.rank_bytes, solution.options.device_limit + solution.prices.base_bytes
    fullest = int(used.argmax())
    told = f"rank {fullest}, the fullest, needs {planner.gib(used[fullest])} of {planner.gib(limit)}"
    if used[fullest] > limit * (1 + 1e-9):
        raise UserError(f"{told}: short by {int(used[fullest] - limit):,} bytes; take another plan, or more ranks")
    return told, None


def _sharding(config: Config, asked: Any, dataset: Path | None, solution: Solution, rank: int) -> tuple[str, None]:
    """Shard the collections as `rank` would, and compare what it would allocate with the plan."""
    world, local = asked.cluster.world_size, asked.cluster.ranks_per_host
    if not 0 <= rank < world:
        raise UserError(f"--rank {rank}: ranks of {asked.cluster.title} are 0 .. {world - 1}")
    embeddings = planning.on_meta(config, plans.opened(config, dataset)).embeddings
    plan = to_torchrec(solution, embeddings)
    update = table_update(config.optim, plan, device=META, kernel=config.kernels.embedding_bag)
    optimizer = update["optimizer"]
    if update["kernel"] == "fbgemm" or optimizer is None:
        sharder: Any = AllTypesSharder(fused_params=fused_params(optimizer, device=META) if optimizer else {})
    else:
        sharder = KernelSharder(backend=update["kernel"], optimizer=optimizer)
    size = parts = 0
    with _alone_of(world, local, rank):
        for path, of_collection in plan.plan.items():
            module = embeddings.get_submodule(path.partition(".")[2])
            sharded = sharder.shard(
                module, of_collection, ShardingEnv.from_process_group(dist.group.WORLD), device=META, module_fqn=path
            )
            for lookup in sharded._lookups:
                for kernel in getattr(lookup, "module", lookup)._emb_modules:
                    for table in kernel.config.embedding_tables:
                        parts += 1
                        size += table.local_rows * table.local_cols * ROW_TYPES[_row_type(embeddings, table.name)]
    planned = round(float((solution.load.device[0] + solution.load.host[0])[rank]))
    if size != planned:
        raise UserError(
            f"rank {rank}: TorchRec would allocate {size:,} bytes of table rows, the plan has {planned:,} there; the "
            "plan is of another model or cluster"
        )
    return (
        f"rank {rank} of {world:,} would hold {planner.gib(size)} of rows, as planned; parts of tables: {parts}",
        None,
    )


def _row_type(embeddings: Any, table: str) -> str:
    return next(t.row_type for t in embeddings.physical if t.name == table)


@contextmanager
def _alone_of(world: int, local: int, rank: int) -> Iterator[None]:
    """A default process group of `world` ranks of which this process is `rank` and the others do not exist: its
    collectives do nothing."""
    wanted: Mapping[str, str] = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(local), "RANK": str(rank),
                                 "LOCAL_RANK": str(rank % local)}  # fmt: skip
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
