"""A whole training step on made-up batches: ours, and stock TorchRec's, from the same weights on the same batches.

Ids are uniform, labels drawn at random; batches are made before and taken in turns, so that nothing of a step is the
reader's.  Both sides: rowwise Adagrad on the tables, Adagrad on the dense layers, tables one by one on the ranks in
turn, the overlapped pipeline.

Shapes: B rows of a rank, K dense inputs.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from trainer.data.batch import Batch

BATCHES = 4  # of each rank
LR = 0.001
EPS = 1e-8
SEED = 1


@dataclass(frozen=True, kw_only=True)
class Workload:
    """ids_per_bag: of every feature.  interaction: of DLRM, "dot" or "cat".  batch: rows of each rank."""

    tables: int = 26
    rows: int = 100_000
    dim: int = 64
    ids_per_bag: int = 1
    dense: int = 13
    bottom: tuple[int, ...] = (512, 256, 64)
    top: tuple[int, ...] = (512, 512, 256, 1)
    interaction: str = "dot"
    batch: int = 2048

    @property
    def features(self) -> list[str]:
        return [f"f{i}" for i in range(self.tables)]

    def batches(self, rank: int) -> list[tuple[Tensor, KeyedJaggedTensor, Tensor]]:
        """(dense_BK, ids, labels_B) of one rank."""
        rng = torch.Generator().manual_seed(1000 * SEED + rank)
        count = self.tables * self.batch
        return [
            (
                torch.rand(self.batch, self.dense, generator=rng),
                KeyedJaggedTensor(
                    keys=self.features,
                    values=torch.randint(0, self.rows, (count * self.ids_per_bag,), generator=rng),
                    lengths=torch.full((count,), self.ids_per_bag),
                    stride=self.batch,
                ),
                torch.randint(0, 2, (self.batch,), generator=rng).float(),
            )
            for _ in range(BATCHES)
        ]


class Side:
    """A pipeline over a workload, and the losses that it came to."""

    def __init__(self, step: Any, batches: Iterator[Any], pipeline: Any) -> None:
        self._step, self._batches, self.pipeline = step, batches, pipeline

    def run(self, steps: int) -> tuple[list[float], list[float]]:
        """(seconds, loss) of each step."""
        seconds, losses = [], []
        for _ in range(steps):
            started = time.perf_counter()
            loss = self._step(self._batches)
            seconds.append(time.perf_counter() - started)
            losses.append(loss)
        return seconds, [loss.item() for loss in losses]

    def profiled(self, steps: int) -> dict[str, Any]:
        """trainer.profile.summary of some steps."""
        from torch.profiler import ProfilerActivity, profile

        from trainer.profile import summary

        with profile(activities=[ProfilerActivity.CPU]) as traced:
            seconds, _ = self.run(steps)
        return summary(traced.events(), seconds)


def ours(workload: Workload, precision: str = "fp32", kernel: str = "auto") -> "Side":
    """What `tablemesh train` builds, from its own parts."""
    import torch.distributed as dist

    from sharding.embeddings import build_embeddings
    from sharding.parallelize import parallelize
    from sharding.plan import make_plan
    from trainer.config import Optim
    from trainer.models import dlrm
    from trainer.models.base import ModelInputs, init_dense
    from trainer.optim.base import build_optimizer, table_update
    from trainer.pipeline import build_pipeline
    from trainer.task import TrainTask

    cpu, world, rank = torch.device("cpu"), dist.get_world_size(), dist.get_rank()
    config = dlrm.Config(bottom=workload.bottom, top=workload.top, interaction=workload.interaction)
    with torch.device("meta"):
        net = dlrm.build(config, ModelInputs(dense=workload.dense, dims=(workload.dim,) * workload.tables))
    task = TrainTask(
        build_embeddings(tables=_tables(workload), features=workload.features),
        net,
        world_size=world,
        device=cpu,
        bf16=precision == "bf16",
    )
    optim = Optim.model_validate(
        {
            "sparse": {"kind": "rowwise_adagrad", "lr": LR, "eps": EPS},
            "dense": {"kind": "adagrad", "lr": LR, "eps": EPS},
        }
    )
    plan = make_plan(task, world_size=world, local_world_size=world, device=cpu, batch_size=workload.batch)
    update = table_update(optim, plan, device=cpu, kernel=kernel)
    output = torch.bfloat16 if precision == "bf16" else torch.float32
    dmp = parallelize(task, plan, device=cpu, seed=SEED, init_dense=init_dense, output=output, **update)
    pipeline = build_pipeline("overlapped", dmp, build_optimizer(optim, dmp), device=cpu)
    dmp.train()
    batches = [
        Batch(
            dense_BK=dense_BK,
            ids=ids,
            labels_BT=labels_B[:, None],
            weight_B=torch.ones(workload.batch),
            row_B=torch.arange(workload.batch),
            rows_in_step=workload.batch * world,
        )
        for dense_BK, ids, labels_B in workload.batches(rank)
    ]
    return Side(lambda given: pipeline.step(given)[0], cycle(batches), pipeline)


def stock(workload: Workload) -> "Side":
    """TorchRec as it comes: its DLRM, FBGEMM's kernels, DistributedModelParallel, TrainPipelineSparseDist, float32."""
    from functools import partial

    import torch.distributed as dist
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from torchrec.datasets.utils import Batch as StockBatch
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
    from torchrec.distributed.model_parallel import DistributedModelParallel
    from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
    from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
    from torchrec.models.dlrm import DLRM, DLRMTrain
    from torchrec.modules.embedding_configs import EmbeddingBagConfig
    from torchrec.modules.embedding_modules import EmbeddingBagCollection
    from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
    from torchrec.optim.optimizers import in_backward_optimizer_filter

    assert workload.interaction == "dot", "TorchRec's DLRM has dots"
    cpu, world, rank = torch.device("cpu"), dist.get_world_size(), dist.get_rank()
    configs = [
        EmbeddingBagConfig(name=f"t{i}", num_embeddings=workload.rows, embedding_dim=workload.dim, feature_names=[f])
        for i, f in enumerate(workload.features)
    ]
    model = DLRMTrain(
        DLRM(
            EmbeddingBagCollection(tables=configs, device=torch.device("meta")),
            workload.dense,
            list(workload.bottom),
            list(workload.top),
            dense_device=cpu,
        )
    )
    sharder = EmbeddingBagCollectionSharder(
        fused_params={"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": LR, "eps": EPS}
    )
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=world, compute_device="cpu"),
        batch_size=workload.batch,
        constraints={f"t{i}": ParameterConstraints(sharding_types=["table_wise"]) for i in range(workload.tables)},
    )
    plan = planner.collective_plan(model, [sharder], dist.GroupMember.WORLD)
    dmp = DistributedModelParallel(model, device=cpu, plan=plan, sharders=[sharder])
    _same_weights(dmp, workload)
    dense = dict(in_backward_optimizer_filter(dmp.named_parameters()))
    optimizer = CombinedOptimizer(
        [dmp.fused_optimizer, KeyedOptimizerWrapper(dense, partial(torch.optim.Adagrad, lr=LR, eps=EPS))]
    )
    pipeline = TrainPipelineSparseDist(dmp, optimizer, cpu, execute_all_batches=True)
    dmp.train()
    batches = [StockBatch(dense_BK, ids, labels_B) for dense_BK, ids, labels_B in workload.batches(rank)]
    return Side(lambda given: pipeline.progress(given)[0], cycle(batches), pipeline)


def _tables(workload: Workload) -> list[Any]:
    from sharding.tables.base import Table

    return [
        Table(name=f"t{i}", rows=workload.rows, dim=workload.dim, features=(f,), sharding="table_wise")
        for i, f in enumerate(workload.features)
    ]


@torch.no_grad()
def _same_weights(dmp: nn.Module, workload: Workload) -> None:
    """Give stock TorchRec's model the weights that ours starts with.

    Its dots stand in another order, (i, j > i) by rows where ours has (i, j < i), so the top's first layer is permuted.
    """
    from sharding.initial_weights import fill_shard
    from trainer.models import dlrm
    from trainer.models.base import ModelInputs, init_dense

    net = dlrm.build(
        dlrm.Config(bottom=workload.bottom, top=workload.top),
        ModelInputs(dense=workload.dense, dims=(workload.dim,) * workload.tables),
    )
    holder = nn.ModuleDict({"net": net})
    init_dense(holder["net"], seed=SEED)
    vectors, z0 = workload.tables + 1, workload.bottom[-1]
    i_P, j_P = torch.triu_indices(vectors, vectors, offset=1)
    order = torch.cat([torch.arange(z0), z0 + j_P * (j_P - 1) // 2 + i_P])
    net.top[0].weight.copy_(net.top[0].weight[:, order].clone())
    mine = [m for part in (net.bottom, net.top) for m in part if isinstance(m, nn.Linear)]
    dense = dmp.module.model
    theirs = [m for part in (dense.dense_arch, dense.over_arch) for m in part.modules() if isinstance(m, nn.Linear)]
    for to, of in zip(theirs, mine, strict=True):
        to.weight.copy_(of.weight)
        to.bias.copy_(of.bias)
    state = dense.sparse_arch.embedding_bag_collection.state_dict()
    for table in _tables(workload):
        for shard in state[f"embedding_bags.{table.name}.weight"].local_shards():
            row, column = shard.metadata.shard_offsets
            fill_shard(shard.tensor, table, seed=SEED, row=row, column=column)
