"""tablemesh's kernels where TorchRec puts FBGEMM's.

    KernelSharder(backend=..., optimizer=...)                  for DistributedModelParallel
    FusedEmbeddingBag                                          stands for BatchedFusedEmbeddingBag

(For an EmbeddingCollection, which does not pool: sharding/sequence_kernel.py.)

Nothing of TorchRec is patched: the sharder, the sharded collection and the look-up are subclasses, and data-parallel
tables keep TorchRec's dense kernel.  FusedEmbeddingBag gives TorchRec's EmbeddingFusedOptimizer what it asks of
FBGEMM's module (`_Tables`), so that the fused optimizer, the state dict (weights of a shard as (rows, columns), states
under FBGEMM's names) and the pipelines are TorchRec's own; a checkpoint written with one kernel loads with the other.

Shapes: B bags of a feature on this rank, X columns of all features of a group, N ids.
"""

from collections.abc import Iterator
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from torch import Tensor, nn
from torchrec.distributed.batched_embedding_kernel import (
    BaseBatchedEmbeddingBag,
    EmbeddingFusedOptimizer,
)
from torchrec.distributed.composable.table_batched_embedding_slice import TableBatchedEmbeddingSlice
from torchrec.distributed.embedding_lookup import GroupedPooledEmbeddingsLookup
from torchrec.distributed.embedding_types import GroupedEmbeddingConfig
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.sharding.cw_sharding import CwPooledEmbeddingSharding
from torchrec.distributed.sharding.dp_sharding import DpPooledEmbeddingSharding
from torchrec.distributed.sharding.tw_sharding import TwPooledEmbeddingSharding
from torchrec.distributed.types import ParameterSharding, ShardingEnv
from torchrec.modules.embedding_configs import PoolingType, data_type_to_dtype
from torchrec.modules.embedding_modules import EmbeddingBagCollection, get_embedding_names_by_table
from torchrec.optim.fused import EmptyFusedOptimizer, FusedOptimizer, FusedOptimizerModule
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from kernels.ops import Optimizer, Spec, Table, TableBatchedEmbeddingBag
from sharding.plan import AllTypesSharder, embeddings_of
from sharding.pooled_exchange import PooledExchange

# Our states in the order of kernels.ops.STATES, as FBGEMM's get_optimizer_state names them.
STATE_NAMES = {
    "sgd": (),
    "adagrad": ("sum",),
    "rowwise_adagrad": ("sum",),
    "adam": ("exp_avg", "exp_avg_sq"),
    "rowwise_adam": ("exp_avg", "exp_avg_sq"),
}
PRECISIONS = {
    torch.float32: SparseType.FP32,
    torch.bfloat16: SparseType.BF16,
    torch.float16: SparseType.FP16,
    torch.int8: SparseType.INT8,
}


def kernels_of(task: nn.Module) -> list["FusedEmbeddingBag"]:
    """Our kernels of a sharded task; none where the tables have FBGEMM's or a dense one."""
    # _lookups is a plain list, which modules() does not see.
    lookups = [lookup for ebc in embeddings_of(task).collections for lookup in ebc._lookups]
    return [kernel for lookup in lookups for kernel in lookup.modules() if isinstance(kernel, FusedEmbeddingBag)]


class KernelSharder(AllTypesSharder):
    """Shards an EmbeddingBagCollection onto a backend of kernels/backends/, or the fastest ("auto").

    output: dtype of the pooled vectors and of their gradients.  bfloat16 halves what they cost in memory and between
    the ranks; the vectors of tables that are split by rows stay float32, since ranks add those up.
    """

    def __init__(self, *, backend: str, optimizer: Optimizer, output: torch.dtype = torch.float32) -> None:
        super().__init__(fused_params={})
        self.backend, self.optimizer, self.output = backend, optimizer, output

    def shard(
        self,
        module: EmbeddingBagCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> "KernelCollection":
        return KernelCollection(
            module,
            params,
            env,
            self.fused_params,
            device,
            qcomm_codecs_registry=self.qcomm_codecs_registry,
            module_fqn=module_fqn,
            backend=self.backend,
            optimizer=self.optimizer,
            output=self.output,
        )


class KernelCollection(ShardedEmbeddingBagCollection):
    """TorchRec's sharded collection with our kernel in its look-ups."""

    def __init__(
        self,
        module: EmbeddingBagCollection,
        *args: Any,
        backend: str,
        optimizer: Optimizer,
        output: torch.dtype = torch.float32,
        **kwargs: Any,
    ) -> None:
        # First: TorchRec's __init__ creates the look-ups and exchanges.
        self._kernel, self._output = {"backend": backend, "optimizer": optimizer}, output
        names = [name for of_table in get_embedding_names_by_table(module.embedding_bag_configs()) for name in of_table]
        self._places = {name: place for place, name in enumerate(names)}
        super().__init__(module, *args, **kwargs)

    def _create_lookups(self) -> None:
        for sharding in self._embedding_shardings:
            if isinstance(sharding, DpPooledEmbeddingSharding):
                self._lookups.append(sharding.create_lookup())  # dense gradients: nothing is fused
                continue
            whole_rows = isinstance(sharding, (TwPooledEmbeddingSharding, CwPooledEmbeddingSharding))
            self._lookups.append(
                self._lookup(
                    sharding,
                    grouped_configs=sharding._grouped_embedding_configs_per_rank[self._env.rank],
                    device=self._device,
                    pg=self._env.process_group,
                    env=self._env,
                    output=self._output if whole_rows else torch.float32,
                    **self._kernel,
                )
            )

    def _lookup(self, sharding: Any, **kwargs: Any) -> "KernelLookup":
        return KernelLookup(**kwargs)

    def _create_output_dist(self) -> None:
        """TorchRec's, but on a CPU with several ranks `PooledExchange` where the vectors of a type are whole.

        Its columns come in the order of the tables in the collection, whatever ranks they are on, so that where all
        tables are of such a type nothing is left to permute.
        """
        super()._create_output_dist()
        if self._device is None or self._device.type != "cpu" or self._env.world_size == 1:
            return
        names: list[str] = []
        dims: list[int] = []
        for at, sharding in enumerate(self._embedding_shardings):
            if isinstance(sharding, (TwPooledEmbeddingSharding, CwPooledEmbeddingSharding)):
                of_type, self._output_dists[at] = self._exchange(sharding)
            else:
                of_type = dict(zip(sharding.embedding_names(), sharding.embedding_dims(), strict=True))
            names += of_type.keys()
            dims += of_type.values()
        self._embedding_names, self._embedding_dims = names, dims
        self._dim_per_key = torch.tensor(dims, device=self._device)

    def _exchange(self, sharding: Any) -> tuple[dict[str, int], PooledExchange]:
        """Columns of each embedding in the order in which the exchange gives them, and the exchange."""
        names, metadata = sharding.uncombined_embedding_names(), sharding.embedding_shard_metadata()
        widths = sharding.uncombined_embedding_dims()
        first_columns = [0 if part is None else part.shard_offsets[1] for part in metadata]
        order = sorted(range(len(names)), key=lambda part: (self._places[names[part]], first_columns[part]))
        columns: dict[str, int] = {}
        for part in order:
            columns[names[part]] = columns.get(names[part], 0) + widths[part]
        by_rank = sharding._emb_dim_per_rank_per_feature()
        return columns, PooledExchange(self._env.process_group, widths=by_rank, order=order)


class KernelLookup(GroupedPooledEmbeddingsLookup):
    """The look-ups of one sharding type on one rank, one kernel per group of tables."""

    def __init__(self, *, backend: str, optimizer: Optimizer, output: torch.dtype, **kwargs: Any) -> None:
        self._kernel = {"backend": backend, "optimizer": optimizer, "output": output}
        super().__init__(**kwargs)
        # What a rank without tables sends must have the dtype that the others expect.
        self._dummy_embs_tensor = self._dummy_embs_tensor.detach().to(output).requires_grad_()

    def _create_embedding_kernel(
        self, config: GroupedEmbeddingConfig, device: torch.device | None, pg: Any, *_: Any
    ) -> "FusedEmbeddingBag":
        assert device is not None
        return FusedEmbeddingBag(config, pg, device=device, **self._kernel)


class FusedKernel(FusedOptimizerModule):
    """One group of tables of one rank, all looked up, and updated, in one call: what both collections' kernels share.

    Stands before TorchRec's BaseBatchedEmbeddingBag or BaseBatchedEmbedding, whose constructor comes first.
    """

    def _make(
        self, *, pooling: str, device: torch.device, backend: str, optimizer: Optimizer, output: torch.dtype
    ) -> None:
        config = self._config
        spec = Spec(
            tables=tuple(Table(rows=t.local_rows, dim=t.local_cols, name=t.name) for t in config.embedding_tables),
            features=tuple(self._feature_table_map),
            pooling=pooling,
            optimizer=optimizer,
            output=output,
            weighted=config.is_weighted,
            weights=data_type_to_dtype(config.data_type),
            packed=True,  # TorchRec takes the column shards of a table for one contiguous slice
        )
        self.bags = TableBatchedEmbeddingBag(spec, backend=backend, device=device)
        self._emb_module = _Tables(self.bags)
        self._optim = EmbeddingFusedOptimizer(config, self._emb_module, self._pg)

    @property
    def emb_module(self) -> "_Tables":
        return self._emb_module

    @property
    def fused_optimizer(self) -> FusedOptimizer:
        return self._optim

    @property
    def _param_per_table(self) -> dict[str, TableBatchedEmbeddingSlice]:
        """Each table (all its column shards here together) as a slice of the flat weights, with its optimizer."""
        found: dict[str, TableBatchedEmbeddingSlice] = {}
        state = self.bags.state
        for t, table in enumerate(self._config.embedding_tables):
            if table.name in found:
                continue
            size = self.table_name_to_count[table.name] * table.local_rows * table.local_cols
            start = self.bags.spec.starts[t]
            weight = TableBatchedEmbeddingSlice(
                data=self._emb_module.flat,
                start_offset=start,
                end_offset=start + size,
                num_embeddings=-1,
                embedding_dim=table.local_cols,
            )
            weight._in_backward_optimizers = [
                EmbeddingFusedOptimizer(
                    config=self._config,
                    emb_module=self._emb_module,
                    pg=self._pg,
                    create_for_table=table.name,
                    param_weight_for_table=weight,
                    embedding_weights_by_table=list(state.tables),
                    all_optimizer_states=self._emb_module.get_optimizer_state(),
                )
            ]
            found[table.name] = weight
        return found

    @_param_per_table.setter
    def _param_per_table(self, value: dict[str, TableBatchedEmbeddingSlice]) -> None:
        pass  # BaseBatchedEmbeddingBag's constructor sets an empty one

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The tables, marked as updated in the backward: an optimizer outside leaves them alone."""
        for name, tensor in self.named_split_embedding_weights(prefix, recurse, remove_duplicate):
            parameter = _parameter(tensor)
            parameter._in_backward_optimizers = [EmptyFusedOptimizer()]
            yield name, parameter

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        yield from ()


class FusedEmbeddingBag(FusedKernel, BaseBatchedEmbeddingBag[Tensor]):
    """In the place of TorchRec's BatchedFusedEmbeddingBag."""

    def __init__(self, config: GroupedEmbeddingConfig, pg: Any, *, device: torch.device, **kernel: Any) -> None:
        super().__init__(config, pg, device)
        assert config.pooling is PoolingType.SUM, "sharding/embeddings.py divides for the mean itself"
        self._make(pooling="sum", device=device, **kernel)

    def forward(
        self, features: KeyedJaggedTensor, vbe_output: Tensor | None = None, vbe_output_offsets: Tensor | None = None
    ) -> Tensor:
        assert not features.variable_stride_per_key() and vbe_output is None, "one stride for all features"
        weights_N = features.weights() if self.bags.spec.weighted else None
        return self.bags(features.values(), features.offsets(), weights_N)


class _Tables:
    """What TorchRec's EmbeddingFusedOptimizer and look-ups ask of FBGEMM's module, answered from our State."""

    def __init__(self, bags: TableBatchedEmbeddingBag) -> None:
        self._bags = bags
        self.weights_precision = PRECISIONS[bags.spec.weights]
        self.flat = _parameter(bags.state.weights)
        self.feature_table_map = list(bags.spec.features)
        place = EmbeddingLocation.HOST if bags.state.device.type == "cpu" else EmbeddingLocation.DEVICE
        self.embedding_specs = [(t.rows, t.dim, place, None) for t in bags.spec.tables]

    def split_embedding_weights(self) -> list[Tensor]:
        return list(self._bags.state.tables)

    def split_optimizer_states(self) -> list[list[Tensor]]:
        """Per table its states; empty where the optimizer has none."""
        views = [self._bags.state.state_views(name) for name in self._bags.state.states]
        return [list(of_table) for of_table in zip(*views, strict=True)]

    def get_optimizer_state(self) -> list[dict[str, Tensor]]:
        names = STATE_NAMES[self._bags.spec.optimizer.kind]
        return [dict(zip(names, states, strict=True)) for states in self.split_optimizer_states()]

    def get_learning_rate(self) -> float:
        return self._bags.state.lr

    def set_learning_rate(self, lr: float) -> None:
        self._bags.state.lr = lr

    def set_optimizer_step(self, step: int) -> None:
        self._bags.state.step = step


def _parameter(tensor: Tensor) -> nn.Parameter:
    """torch gives gradients to floating-point numbers alone; rows of int8 are updated in the backward all the same."""
    return nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
