"""`tablemesh bench plan`: the planner beside TorchRec's stock planner, both plans priced with the same costs.

TorchRec's planner is given the same topology (memory, bandwidths), the tables, their ids per bag and every sharding
type; its plan is then priced by sharding/cost.py as ours is.  A row is the slowest rank's step; it is correct when our
plan fits the memory, is not slower than TorchRec's, and is not below its own bound.  Where TorchRec finds no plan, the
baseline is infinite (null in JSON).
"""

import logging
import math
import time
from collections.abc import Iterator

import numpy as np
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from benchmarks.base import Row, report
from sharding import topology
from sharding.cost import Kind, load_alone
from sharding.plan import AllTypesSharder
from sharding.planner import Limits, solve
from sharding.work import DenseWork, TableLoad, Work

DENSE = DenseWork(flops_per_row=1.5e7, bytes_per_row=6e4, ops=150, parameters=2.5e6)
# Rows of Criteo's 1 TB features (facebookresearch/dlrm's counts, hashed to 40 million) and MLPerf's multi-hot sizes.
CRITEO = (40_000_000, 39_060, 17_295, 7_424, 20_265, 3, 7_122, 1_543, 63, 40_000_000, 3_067_956, 405_282, 10, 2_209,
          11_938, 155, 4, 976, 14, 40_000_000, 40_000_000, 40_000_000, 590_152, 12_973, 108, 36)  # fmt: skip
MULTI_HOT = (3, 2, 1, 2, 6, 1, 1, 1, 1, 7, 3, 8, 1, 6, 9, 5, 1, 1, 1, 12, 100, 27, 10, 3, 1, 1)


def main(*, json: bool = False) -> int:
    """Run every case, print it; the exit code."""
    rows, notes = [], []
    for name, work, cluster in cases():
        started = time.perf_counter()
        ours = solve(work, cluster)
        seconds = time.perf_counter() - started
        theirs = stock(work, cluster)
        step = ours.load.step_seconds
        fits = bool((ours.load.rank_bytes <= Limits().of(cluster)[0] * (1 + 1e-9)).all())
        rows.append(
            Row(
                name=f"{name} on {cluster.title}",
                unit="us",
                ours=1e6 * step,
                baseline=1e6 * theirs,
                baseline_name="TorchRec's planner",
                ratio=theirs / step,
                correct=fits and step <= theirs * (1 + 1e-9) and ours.bound <= step,
            )
        )
        notes.append(f"{rows[-1].name}: within {ours.gap:.2%} of the bound, planned in {seconds:.2f} s")
    return report("plan", rows, json=json, notes=tuple(notes))


def cases() -> Iterator[tuple[str, Work, topology.Topology]]:
    """(name, work, cluster)"""
    for cluster in ("a100-40gb:1x8", "h100-80gb:2x8"):
        yield "Criteo 1 TB", tables_of(CRITEO, 128, [1] * 26), topology.parse(cluster)
        yield "MLPerf DLRM-DCNv2", tables_of(CRITEO, 128, MULTI_HOT, batch=65_536), topology.parse(cluster)
    eight = topology.parse("h100-80gb:1x8")
    yield "RMC1", tables_of([4_000_000] * 8, 32, [80] * 8), eight
    yield "RMC2", tables_of([500_000] * 32, 64, [120] * 32), eight
    yield "RMC3", tables_of([2_000_000] * 10, 32, [20] * 10), eight
    for seed, count in ((1, 26), (2, 60), (3, 120)):
        yield f"random {count}", random_tables(count, seed), topology.parse("h100-80gb:2x8")


def tables_of(rows, dim: int, ids, *, batch: int = 16_384) -> Work:
    tables = [
        TableLoad(name=f"t{i}", rows=n, dim=dim, ids=float(k)) for i, (n, k) in enumerate(zip(rows, ids, strict=True))
    ]
    return Work(tables=tuple(tables), batch_size=batch, dense=DENSE)


def random_tables(count: int, seed: int) -> Work:
    """Like Meta's public DLRM data sets: rows over five decades, dims of 16 to 128, ids per bag with a heavy tail."""
    rng = np.random.default_rng(seed)
    tables = [
        TableLoad(
            name=f"t{i}",
            rows=int(np.exp(rng.uniform(np.log(1e3), np.log(2e7)))),
            dim=int(rng.choice([16, 32, 64, 128])),
            ids=float(min(200.0, 1 + rng.pareto(1.2))),
        )
        for i in range(count)
    ]
    return Work(tables=tuple(tables), batch_size=32_768, dense=DENSE)


def stock(work: Work, cluster: topology.Topology) -> float:
    """Seconds of the slowest rank's step under TorchRec's plan; infinite where it finds none."""
    collection = EmbeddingBagCollection(
        device="meta",
        tables=[
            EmbeddingBagConfig(name=t.name, num_embeddings=t.rows, embedding_dim=t.dim, feature_names=[t.name])
            for t in work.tables
        ],
    )
    described = Topology(
        world_size=cluster.world_size,
        local_world_size=cluster.ranks_per_host,
        compute_device=cluster.device,
        hbm_cap=int(cluster.device_memory),
        ddr_cap=int(cluster.host_memory_per_rank),
        hbm_mem_bw=cluster.memory_bandwidth / 1e3,  # TorchRec counts bytes per millisecond
        ddr_mem_bw=cluster.host_bandwidth / cluster.ranks_per_host / 1e3,
        hbm_to_ddr_mem_bw=cluster.pcie_bandwidth / 1e3,
        intra_host_bw=cluster.intra_bandwidth / 1e3,
        inter_host_bw=cluster.inter_bandwidth / 1e3,
    )
    planner = EmbeddingShardingPlanner(
        topology=described,
        batch_size=work.batch_size // cluster.world_size,
        constraints={t.name: ParameterConstraints(pooling_factors=[t.ids]) for t in work.tables},
        storage_reservation=FixedPercentageStorageReservation(percentage=0.1),
        stats=[],
        debug=False,
    )
    logging.disable(logging.WARNING)
    try:
        found = planner.plan(collection, [AllTypesSharder()])
    except PlannerError:
        return math.inf
    finally:
        logging.disable(logging.NOTSET)
    (placed,) = found.plan.values()
    kinds, ranks = [], []
    for table in work.tables:
        parameter = placed[table.name]
        kind, where = _kind(parameter, cluster.world_size)
        kinds.append(kind)
        ranks.append(where)
    return load_alone(work, cluster, kinds, ranks).step_seconds


def _kind(parameter, world: int) -> tuple[Kind, tuple[int, ...]]:
    if parameter.sharding_spec is None:
        return Kind(sharding=parameter.sharding_type), tuple(range(world))
    shards = sorted(parameter.sharding_spec.shards, key=lambda s: (s.shard_offsets[1], s.shard_offsets[0]))
    kernel = parameter.compute_kernel
    share = parameter.cache_params.load_factor if parameter.cache_params else None
    kind = Kind(
        sharding=parameter.sharding_type,
        tier={"fused_uvm": "host", "fused_uvm_caching": "cache"}.get(kernel, "device"),
        column_parts=len({s.shard_offsets[1] for s in shards}),
        row_parts=len({s.shard_offsets[0] for s in shards}),
        cache_share=(share or 0.2) if kernel == "fused_uvm_caching" else 0.0,
    )
    return kind, tuple(s.placement.rank() for s in shards)
