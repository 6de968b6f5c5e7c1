"""A small model in three forms: plain torch, on one rank, sharded; and batches for it.

Shapes: B rows, K dense inputs, F features, D dim, T tasks.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from kernels import registry
from sharding.embeddings import build_embeddings
from sharding.initial_weights import full_table
from sharding.parallelize import parallelize
from sharding.plan import embeddings_of, make_plan
from sharding.tables.base import Table
from trainer.config import Optim, Plugin
from trainer.data.batch import Batch
from trainer.models.base import ModelInputs, init_dense
from trainer.optim.base import RowOptimizer, build_optimizer, plugin, table_update
from trainer.pipeline import build_pipeline
from trainer.task import Loss, TrainTask

CPU = torch.device("cpu")


def inputs_of(tables: Sequence[Table], features: Sequence[str], *, dense: int, tasks: int = 1) -> ModelInputs:
    dim_of = {f: t.dim for t in tables for f in t.features}
    return ModelInputs(dense=dense, dims=tuple(dim_of[f] for f in features), tasks=tasks, features=tuple(features))


def build_sharded(
    tables: Sequence[Table],
    features: Sequence[str],
    model: Plugin,
    optim: Optim,
    *,
    dense: int,
    tasks: int = 1,
    seed: int = 7,
    pipeline: str = "plain",
    local_world_size: int | None = None,
    loss: str = "bce",
    bf16: bool = False,
    task_weights: Sequence[float] | None = None,
    kernel: str = "fbgemm",
    id_map: str = "auto",
) -> Any:
    """A pipeline over the sharded model, in the process group that is up."""
    world = dist.get_world_size()
    with torch.device("meta"):
        net = registry.load("trainer.models", model.kind).build(
            model, inputs_of(tables, features, dense=dense, tasks=tasks)
        )
    task = TrainTask(
        build_embeddings(tables=tables, features=features),
        net,
        world_size=world,
        device=CPU,
        loss=loss,
        bf16=bf16,
        task_weights=task_weights,
    )
    plan = make_plan(task, world_size=world, local_world_size=local_world_size or world, device=CPU, batch_size=8)
    update = table_update(optim, plan, device=CPU, kernel=kernel)
    output = torch.bfloat16 if bf16 else torch.float32
    update |= {"output": output, "id_map": id_map}
    dmp = parallelize(task, plan, device=CPU, seed=seed, init_dense=init_dense, **update)
    optimizer = build_optimizer(optim, dmp)
    return build_pipeline(pipeline, dmp, optimizer, device=CPU, schedule=optim.schedule, clip=optim.clip_grad_norm)


class PlainModel(nn.Module):
    """The same model with whole tables in one process: torch's embedding_bag and autograd, nothing sharded or fused."""

    def __init__(
        self,
        tables: Sequence[Table],
        features: Sequence[str],
        model: Plugin,
        *,
        dense: int,
        tasks: int = 1,
        seed: int = 7,
        loss: str = "bce",
        task_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.features = list(features)
        self.table_of = {f: t for t in tables for f in t.features}
        self.weights = nn.ParameterDict({t.name: nn.Parameter(full_table(t, seed=seed)) for t in tables})
        self.net = registry.load("trainer.models", model.kind).build(
            model, inputs_of(tables, features, dense=dense, tasks=tasks)
        )
        init_dense(self.net, seed=seed)
        self.loss = Loss(kind=loss, world_size=1, task_weights=tuple(task_weights) if task_weights else None)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        bags = batch.ids.to_dict()
        vectors = []
        for feature in self.features:
            table = self.table_of[feature]
            vectors.append(
                nn.functional.embedding_bag(
                    bags[feature].values(), self.weights[table.name], bags[feature].offsets()[:-1], mode=table.pooling
                )
            )
        logits_BT = self.net(batch.dense_BK, torch.cat(vectors, dim=1))
        return self.loss(logits_BT, batch.labels_BT, batch.weight_B, batch.rows_in_step, True), logits_BT.detach()

    def optimizers(self, optim: Optim) -> list[torch.optim.Optimizer]:
        tables, dense = list(self.weights.values()), list(self.net.parameters())
        return [RowOptimizer(optim.sparse, tables), plugin(optim.dense).dense(optim.dense, dense)]


def make_batches(
    tables: Sequence[Table],
    features: Sequence[str],
    *,
    steps: int,
    rows: int,
    dense: int,
    tasks: int = 1,
    last_rows: int | None = None,
    seed: int = 0,
) -> list[Batch]:
    """Global batches: bags of 0 to 4 ids (some empty, some with repeats), weights, and a last batch of which only
    `last_rows` are not padding."""
    generator = torch.Generator().manual_seed(seed)
    table_of = {f: t for t in tables for f in t.features}
    batches = []
    for step in range(steps):
        real = last_rows if last_rows is not None and step == steps - 1 else rows
        is_real_B = torch.arange(rows) < real
        values, lengths = [], []
        for feature in features:
            length_B = torch.randint(0, 5, (rows,), generator=generator) * is_real_B
            skewed = torch.rand(int(length_B.sum()), generator=generator) ** 2
            values.append((skewed * table_of[feature].rows).long())
            lengths.append(length_B)
        batches.append(
            Batch(
                dense_BK=torch.randn(rows, dense, generator=generator) * is_real_B[:, None],
                ids=KeyedJaggedTensor(keys=list(features), values=torch.cat(values), lengths=torch.cat(lengths)),
                labels_BT=(torch.rand(rows, tasks, generator=generator) < 0.3).float() * is_real_B[:, None],
                weight_B=(0.5 + torch.rand(rows, generator=generator)) * is_real_B,
                row_B=torch.where(is_real_B, torch.arange(rows) + step * rows, -1),
                rows_in_step=real,
            )
        )
    return batches


def part(batch: Batch, rank: int, world_size: int) -> Batch:
    """Rank `rank`'s rows of a global batch."""
    rows = len(batch.weight_B) // world_size
    mine = slice(rank * rows, (rank + 1) * rows)
    bags = batch.ids.to_dict()
    keys = batch.ids.keys()
    values = [bags[k].values()[bags[k].offsets()[mine.start] : bags[k].offsets()[mine.stop]] for k in keys]
    lengths = [bags[k].lengths()[mine] for k in keys]
    return Batch(
        dense_BK=batch.dense_BK[mine],
        ids=KeyedJaggedTensor(keys=keys, values=torch.cat(values), lengths=torch.cat(lengths)),
        labels_BT=batch.labels_BT[mine],
        weight_B=batch.weight_B[mine],
        row_B=batch.row_B[mine],
        rows_in_step=batch.rows_in_step,
    )


def train_sharded(pipeline: Any, batches: Sequence[Batch]) -> list[float]:
    """The global loss of every step (the mean over ranks of the rank losses)."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = iter([part(batch, rank, world) for batch in batches])
    losses = []
    with_end = True
    while with_end:
        try:
            loss, _, _ = pipeline.step(mine)
        except StopIteration:
            with_end = False
        else:
            total = loss.clone()
            dist.all_reduce(total)
            losses.append(total.item() / world)
    return losses


def train_plain(model: PlainModel, optim: Optim, batches: Sequence[Batch]) -> list[float]:
    optimizers = model.optimizers(optim)
    rates = [group["lr"] for o in optimizers for group in o.param_groups]
    losses = []
    for step, batch in enumerate(batches):
        groups = [group for o in optimizers for group in o.param_groups]
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate * optim.schedule.factor(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss, _ = model(batch)
        loss.backward()
        if optim.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(model.net.parameters(), optim.clip_grad_norm)
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    return losses


def table_shards(dmp: nn.Module) -> list[tuple[str, int, int, Tensor]]:
    """(table, first row, first column, values) of every part of a table on this rank, the values not copied."""
    found = []
    state = [item for ebc in embeddings_of(dmp.module).collections for item in ebc.state_dict().items()]
    for name, weights in state:
        table = name.split(".")[1]
        if isinstance(weights, ShardedTensor):
            found += [(table, *s.metadata.shard_offsets, s.tensor) for s in weights.local_shards()]
        else:
            found.append((table, 0, 0, weights))
    return found


def set_tables(dmp: nn.Module, tables: Mapping[str, Tensor]) -> None:
    """Put the whole (E, D) tables into this rank's shards; padding columns become zero."""
    for name, row, column, shard in table_shards(dmp):
        whole = nn.functional.pad(tables[name], (0, 8))
        shard.copy_(whole[row : row + shard.shape[0], column : column + shard.shape[1]])


def whole_tables(tables: Sequence[Table], shards_by_rank: Sequence[Sequence[tuple[str, int, int, Tensor]]]) -> dict:
    """Table name -> (E, D), put together from the `table_shards` of all ranks."""
    whole = {t.name: torch.full((t.rows, t.dim + 8), torch.nan) for t in tables}
    for shards in shards_by_rank:
        for name, row, column, shard in shards:
            whole[name][row : row + shard.shape[0], column : column + shard.shape[1]] = shard
    return {t.name: whole[t.name][:, : t.dim] for t in tables}
