"""A task on the meta device and a plan -> a running DistributedModelParallel, in one fixed order.

    1. shard       the EmbeddingBagCollection becomes its sharded form, tables allocated where the plan says
    2. materialise everything else leaves the meta device, uninitialised
    3. init        tables: a pure function of (seed, table, row, column); dense: of (seed, parameter name)
    4. replicate   dense layers under DistributedDataParallel

so that the values after it are the same for every plan and world size.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.model_parallel import DefaultDataParallelWrapper, DistributedModelParallel
from torchrec.distributed.types import ModuleSharder, ShardingEnv, ShardingPlan

from kernels.errors import UserError
from kernels.ops import Optimizer
from sharding.by_id import ByIdSharder
from sharding.compute_kernel import KernelSharder
from sharding.fbgemm import fused_params
from sharding.initial_weights import fill_shard
from sharding.plan import AllTypesSharder, embeddings_of
from sharding.row_update import replace_update
from sharding.table_state import SCALE, held_parts


def parallelize(
    task: nn.Module,
    plan: ShardingPlan,
    *,
    device: torch.device,
    seed: int,
    kernel: str,
    optimizer: Optimizer | None,
    init_dense: Callable[..., None],
    row_update: Callable[..., None] | None = None,
    output: torch.dtype = torch.float32,
    id_map: str = "auto",
) -> DistributedModelParallel:
    """Shard `task` over the ranks of the default process group.

    task: a module on the meta device, with an Embeddings inside; changed in place.
    kernel: "fbgemm" for TorchRec's own kernel, else a backend of kernels/backends/, or "auto" for the fastest of them.
    optimizer: the update of the tables; None when all tables are data_parallel.
    init_dense(module, seed=...): fills the parameters of everything outside the tables, kinds' projections included.
    row_update: replaces FBGEMM's update where that cannot do what is asked; these three are what `table_update` of
        trainer/optim/base.py gives.
    output: dtype of the pooled vectors that our own kernels give, float32 or bfloat16; FBGEMM's give float32.
    id_map: a backend of kernels/id_maps/ for the tables whose rows are given to ids, or "auto" for the fastest.
    """
    if kernel == "fbgemm":
        _check_fbgemm(task)
    if kernel == "fbgemm" or optimizer is None:
        sharder = AllTypesSharder(fused_params=fused_params(optimizer, device=device) if optimizer else {})
    else:
        sharder = KernelSharder(backend=kernel, optimizer=optimizer, output=output)
    sharders: list[ModuleSharder] = [sharder]
    embeddings = embeddings_of(task)
    if embeddings.by_id:
        assert optimizer is not None, "such tables are never data_parallel"
        sharders.append(
            ByIdSharder(
                tables={table.name: table for table in embeddings.physical},
                by_id=embeddings.by_id,
                seed=seed,
                id_map=id_map,
                backend="auto" if kernel == "fbgemm" else kernel,  # FBGEMM's does not write fresh rows
                optimizer=optimizer,
                output=output,
            )
        )
    dmp = DistributedModelParallel(
        module=task,
        device=device,
        plan=plan,
        sharders=sharders,
        init_data_parallel=False,
        data_parallel_wrapper=_Replicas(static_graph=False),
    )
    if row_update is not None:
        for ebc in embeddings_of(dmp.module).collections:
            replace_update(ebc, row_update)
    init_tables(dmp, seed=seed)
    for name, child in dmp.module.named_children():
        init_dense(child.combine if name == "embeddings" else child, seed=seed)
    dmp.init_data_parallel()
    return dmp


def _check_fbgemm(task: nn.Module) -> None:
    scaled = [t.name for t in embeddings_of(task).tables if t.row_type == "int8"]
    if scaled:
        raise UserError(
            f'tables {", ".join(map(repr, scaled))}: row_type = "int8", and FBGEMM updates no rows of int8; use '
            f'kernels.embedding_bag = "cpu" (or "reference" on a GPU), or row_type = "fp16"'
        )


class _Replicas(DefaultDataParallelWrapper):
    """DistributedDataParallel where there are several ranks; one alone has nobody to average its gradients with."""

    def wrap(self, dmp: DistributedModelParallel, env: ShardingEnv, device: torch.device) -> None:
        if env.world_size == 1:
            dmp._dmp_wrapped_module.to(device)
        else:
            super().wrap(dmp, env, device)


@torch.no_grad()
def init_tables(dmp: DistributedModelParallel, *, seed: int) -> None:
    """Fill this rank's part of every table."""
    embeddings = embeddings_of(dmp.module)
    state = {name: weights for ebc in embeddings.collections for name, weights in ebc.state_dict().items()}
    if embeddings.ebc_by_id is not None:
        for given in (given for kernel in embeddings.ebc_by_id.kernels for given in kernel.rows):
            given.start()
    scales = {(h.table, h.row, h.column): h.tensor for h in held_parts(dmp.module) if h.what == SCALE}
    for table in embeddings.physical:
        if table.name in embeddings.by_id:
            continue
        weights = state[f"embedding_bags.{table.name}.weight"]
        if isinstance(weights, ShardedTensor):
            for shard in weights.local_shards():
                row, column = shard.metadata.shard_offsets
                at = {"row": row, "column": column}
                fill_shard(shard.tensor, table, seed=seed, **at, scales=scales.get((table.name, row, column)))
        else:
            fill_shard(weights, table, seed=seed)


@torch.no_grad()
def average_buffers(dmp: DistributedModelParallel) -> None:
    """Give every rank the mean over ranks of each floating-point buffer outside the tables: batch norm's running
    statistics, which each rank gathers from its own rows.  Call it before an evaluation or a checkpoint."""
    for name, child in dmp.module.named_children():
        if name == "embeddings":
            continue
        for buffer in child.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= dist.get_world_size()
