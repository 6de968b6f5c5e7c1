"""Our kernels in FBGEMM's place in an EmbeddingCollection: plain torch's losses, FBGEMM's state dict, both pipelines.

Shapes: B bags of a feature, E rows, D columns, N ids of a feature.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import (
    column_wise,
    construct_module_sharding_plan,
    data_parallel,
    row_wise,
    table_wise,
)
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.types import ShardingPlan
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from kernels import registry
from kernels.ops import Optimizer
from sharding.fbgemm import fused_params
from sharding.sequence_kernel import FusedEmbedding, SequenceKernelSharder
from tests.ranks import run_ranks

CPU = torch.device("cpu")
TYPES = ("data_parallel", "table_wise", "column_wise", "row_wise")
OWN = sorted(set(registry.names("kernels.backends")) - {"fbgemm", "triton"})
DIM, LR, BATCH, STEPS = 16, 0.1, 8, 20
TABLES = {"ta": (37, ("a",)), "tbc": (101, ("c", "b")), "td": (4, ("d",))}  # rows, features
FEATURES = ("a", "b", "c", "d")
SGD = Optimizer(kind="sgd", lr=LR)


@dataclass
class Batch(Pipelineable):
    """target: what the sum of an id's vector should be, for each id."""

    ids: KeyedJaggedTensor
    target: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        return Batch(self.ids.to(device, non_blocking), self.target.to(device, non_blocking=non_blocking))

    def record_stream(self, stream: torch.Stream) -> None:
        pass


def batches(world_size: int) -> list[list[Batch]]:
    """[step][rank]; the same ids in all, whatever the number of ranks: bags of 0 to 3, many ids more than once."""
    rng = torch.Generator().manual_seed(3)
    rows = {f: rows for rows, features in TABLES.values() for f in features}
    found = []
    for _ in range(STEPS):
        lengths_FB = torch.randint(0, 4, (len(FEATURES), BATCH), generator=rng)
        bags = [
            [(torch.rand(int(n), generator=rng) ** 2 * rows[f]).long() for n in lengths_FB[i]]
            for i, f in enumerate(FEATURES)
        ]
        by_rank = []
        for rank in range(world_size):
            mine = slice(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)
            values = torch.cat([bag for of_feature in bags for bag in of_feature[mine]])
            ids = KeyedJaggedTensor(list(FEATURES), values, lengths=lengths_FB[:, mine].reshape(-1))
            by_rank.append(Batch(ids, (values % 7).float() / 7))
        found.append(by_rank)
    return found


def first_table(name: str) -> Tensor:
    return torch.randn(TABLES[name][0], DIM, generator=torch.Generator().manual_seed(len(name) + TABLES[name][0])) / 8


def loss_of(vectors: dict[str, Tensor], batch: Batch, world_size: int) -> Tensor:
    """Of this rank; the ranks' mean is the loss of the global batch."""
    each_ND = torch.cat([vectors[feature].float() for feature in FEATURES])
    return world_size * (each_ND.sum(1) - batch.target).square().sum() / (4 * BATCH)


class Task(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        configs = [
            EmbeddingConfig(name=name, num_embeddings=rows, embedding_dim=DIM, feature_names=list(features))
            for name, (rows, features) in TABLES.items()
        ]
        self.collection = EmbeddingCollection(tables=configs, device=torch.device("meta"))

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        found = self.collection(batch.ids)
        loss = loss_of({feature: found[feature].values() for feature in FEATURES}, batch, dist.get_world_size())
        return loss, loss.detach()


def sharded(kernel: str, shardings: tuple[str, ...], optimizer: Optimizer, output: torch.dtype) -> Any:
    """The task under DistributedModelParallel, its tables one by one in `shardings`; "fbgemm" is TorchRec's own."""
    world, task = dist.get_world_size(), Task()
    if kernel == "fbgemm":
        sharder = EmbeddingCollectionSharder(fused_params=fused_params(optimizer, device=CPU))
    else:
        sharder = SequenceKernelSharder(backend=kernel, optimizer=optimizer, output=output)
    how = {
        "data_parallel": lambda i: data_parallel(),
        "table_wise": lambda i: table_wise(rank=i % world, compute_kernel="fused"),
        "column_wise": lambda i: column_wise(ranks=[1 % world, 0], compute_kernel="fused"),
        "row_wise": lambda i: row_wise(compute_kernel="fused"),
    }
    of_table = {name: how[sharding](i) for i, (name, sharding) in enumerate(zip(TABLES, shardings, strict=True))}
    plan = construct_module_sharding_plan(
        task.collection, of_table, sharder=sharder, local_size=world, world_size=world, device_type="cpu"
    )
    dmp = DistributedModelParallel(task, device=CPU, plan=ShardingPlan({"collection": plan}), sharders=[sharder])
    own = [k for lookup in dmp.module.collection._lookups for k in lookup.modules() if isinstance(k, FusedEmbedding)]
    assert kernel != "fbgemm" or not own
    assert kernel == "fbgemm" or all(type(k.bags.kernel).__module__.endswith(kernel) for k in own) or kernel == "auto"
    with torch.no_grad():
        for name, weights in dmp.module.collection.state_dict().items():
            whole = first_table(name.split(".")[1])
            for s in weights.local_shards() if isinstance(weights, ShardedTensor) else ():
                row, column = s.metadata.shard_offsets
                s.tensor.copy_(whole[row : row + s.tensor.shape[0], column : column + s.tensor.shape[1]])
            if not isinstance(weights, ShardedTensor):
                weights.copy_(whole)
    return dmp


def train(dmp: Any, steps: slice, *, overlapped: bool = False) -> list[float]:
    """The global loss of each step.  Replicated tables, which nothing fuses, are SGD's."""
    replicated = [p for _, p in in_backward_optimizer_filter(dmp.named_parameters())]
    outside = torch.optim.SGD(replicated or [torch.zeros(1)], lr=LR)
    mine = [by_rank[dist.get_rank()] for by_rank in batches(dist.get_world_size())[steps]]
    losses = []
    if overlapped:
        pipeline, given = TrainPipelineSparseDist(dmp, outside, CPU, execute_all_batches=True), iter(mine)
        losses = [pipeline.progress(given) for _ in mine]
    else:
        for batch in mine:
            outside.zero_grad()
            loss, _ = dmp(batch)
            loss.backward()
            outside.step()
            losses.append(loss.detach())
    total = torch.stack(losses)
    dist.all_reduce(total)
    return (total / dist.get_world_size()).tolist()


def plain() -> list[float]:
    """Whole tables in one process, torch's embedding and autograd."""
    tables = {name: nn.Parameter(first_table(name)) for name in TABLES}
    optimizer = torch.optim.SGD(tables.values(), lr=LR)
    table_of = {f: name for name, (_, features) in TABLES.items() for f in features}
    losses = []
    for (batch,) in batches(1):
        optimizer.zero_grad()
        bags = batch.ids.to_dict()
        vectors = {f: nn.functional.embedding(bags[f].values(), tables[table_of[f]]) for f in FEATURES}
        loss = loss_of(vectors, batch, 1)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def losses_of(kernel: str, output: torch.dtype, overlapped: bool, cases: tuple) -> list[list[float]]:
    return [train(sharded(kernel, c, SGD, output), slice(None), overlapped=overlapped) for c in cases]


CASES = (*((sharding,) * 3 for sharding in TYPES), ("row_wise", "column_wise", "table_wise"))


@pytest.mark.parametrize("kernel", OWN)
@pytest.mark.parametrize(("world_size", "overlapped"), [(1, False), (2, True), (4, False)])
def test_every_sharding_type_has_plain_torchs_losses(world_size, overlapped, kernel):
    expected = plain()
    assert expected[-1] < expected[0]
    for found in run_ranks(losses_of, world_size, kernel, torch.float32, overlapped, CASES):
        for case, losses in zip(CASES, found, strict=True):
            assert losses == pytest.approx(expected, abs=1e-5), case


def test_vectors_of_bfloat16():
    """Table-wise, two of four ranks look up one table or none; what they send must have the others' dtype."""
    cases = (("table_wise",) * 3, ("column_wise", "row_wise", "data_parallel"))
    for found in run_ranks(losses_of, 4, "auto", torch.bfloat16, False, cases):
        assert found[0] == pytest.approx(plain(), rel=0.05) and found[1] == pytest.approx(plain(), rel=0.05)


ADAGRAD = {
    "adagrad": Optimizer(kind="adagrad", lr=LR, eps=1e-6),
    "rowwise_adagrad": Optimizer(kind="rowwise_adagrad", lr=LR, eps=1e-6),
}


def saved(kernel: str, optimizer: Optimizer, shardings: tuple[str, ...], folder: str) -> list[float]:
    dmp = sharded(kernel, shardings, optimizer, torch.float32)
    train(dmp, slice(0, 10))
    state = {"model": dmp.state_dict(), "optimizer": dmp.fused_optimizer.state_dict()}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder))
    return train(dmp, slice(10, STEPS))


def loaded(kernel: str, optimizer: Optimizer, shardings: tuple[str, ...], folder: str) -> list[float]:
    dmp = sharded(kernel, shardings, optimizer, torch.float32)
    state = {"model": dmp.state_dict(), "optimizer": dmp.fused_optimizer.state_dict()}
    dcp.load(state, storage_reader=dcp.FileSystemReader(folder))
    return train(dmp, slice(10, STEPS))


@pytest.mark.parametrize("kernel", OWN)
@pytest.mark.parametrize("kind", ADAGRAD)
def test_a_checkpoint_goes_from_one_kernel_to_the_other(tmp_path, kernel, kind):
    """Saved by FBGEMM on 2 ranks, read by ours in another sharding, and back: the same continuation."""
    here, there = ("row_wise", "table_wise", "table_wise"), ("table_wise", "row_wise", "table_wise")
    if kind == "adagrad":  # rowwise has a state for each row of a column shard: another split trains differently
        here = ("column_wise", "row_wise", "table_wise")
    for wrote, read in (("fbgemm", kernel), (kernel, "fbgemm")):
        folder = str(tmp_path / f"{wrote}-{read}")
        went_on = run_ranks(saved, 2, wrote, ADAGRAD[kind], here, folder)
        resumed = run_ranks(loaded, 2, read, ADAGRAD[kind], there, folder)
        for losses, expected in zip(resumed, went_on, strict=True):
            assert losses == pytest.approx(expected, abs=1e-5), (wrote, read)
