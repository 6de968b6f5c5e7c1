"""tablemesh's kernels where TorchRec puts FBGEMM's in an EmbeddingCollection: a vector for each id, nothing is pooled.

    SequenceKernelSharder(backend=..., optimizer=...)          for DistributedModelParallel
    FusedEmbedding                                             stands for BatchedFusedEmbedding

The counterpart of sharding/compute_kernel.py, by the same means and with the same state dict.  A feature's vectors come
back as a JaggedTensor, in the order of its ids, from every sharding type that TorchRec has for them: data_parallel,
table_wise, column_wise and row_wise.  The tables of data_parallel, which nothing fuses, keep TorchRec's dense kernel on
a GPU; on the CPU FBGEMM 1.8's dense kernel sums the bags even when it is told not to, so `DenseEmbedding` stands there.

    ec = EmbeddingCollection(tables=[EmbeddingConfig(...)], device="meta")
    sharder = SequenceKernelSharder(backend="auto", optimizer=Optimizer(kind="rowwise_adagrad", lr=0.02))
    dmp = DistributedModelParallel(Model(ec), sharders=[sharder], plan=...)
    vectors = dmp.module.ec(ids)["feature"]        # .values() (N, D), .lengths() (B,)
"""

from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.distributed.batched_embedding_kernel import BaseBatchedEmbedding, BatchedDenseEmbedding
from torchrec.distributed.embedding import EmbeddingCollectionSharder, ShardedEmbeddingCollection
from torchrec.distributed.embedding_lookup import GroupedEmbeddingsLookup
from torchrec.distributed.embedding_types import GroupedEmbeddingConfig
from torchrec.distributed.sharding.dp_sequence_sharding import DpSequenceEmbeddingSharding
from torchrec.distributed.types import ParameterSharding, ShardingEnv
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from kernels.ops import Optimizer
from sharding.compute_kernel import FusedKernel


class SequenceKernelSharder(EmbeddingCollectionSharder):
    """Shards an EmbeddingCollection onto a backend of kernels/backends/, or the fastest ("auto").

    output: dtype of the vectors and of their gradients, also on their way between the ranks; float32 for data_parallel.
    """

    def __init__(self, *, backend: str, optimizer: Optimizer, output: torch.dtype = torch.float32) -> None:
        super().__init__(fused_params={})
        self.backend, self.optimizer, self.output = backend, optimizer, output

    def shard(
        self,
        module: EmbeddingCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> "SequenceKernelCollection":
        return SequenceKernelCollection(
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


class SequenceKernelCollection(ShardedEmbeddingCollection):
    """TorchRec's sharded collection with our kernel in its look-ups."""

    def __init__(self, *args: Any, backend: str, optimizer: Optimizer, output: torch.dtype, **kwargs: Any) -> None:
        # First: TorchRec's __init__ creates the look-ups.
        self._kernel = {"backend": backend, "optimizer": optimizer, "output": output}
        super().__init__(*args, **kwargs)

    def _create_lookups(self) -> None:
        assert not self.enable_embedding_update, "tables that are written to from outside have no kernel of ours"
        for sharding in self._sharding_type_to_sharding.values():
            replicated = isinstance(sharding, DpSequenceEmbeddingSharding)
            if replicated and self._device.type != "cpu":
                self._lookups.append(sharding.create_lookup())
                continue
            lookup = DenseLookup if replicated else partial(SequenceKernelLookup, **self._kernel)
            self._lookups.append(
                lookup(
                    grouped_configs=sharding._grouped_embedding_configs,
                    pg=self._env.process_group,
                    device=self._device,
                    env=self._env,
                )
            )


class SequenceKernelLookup(GroupedEmbeddingsLookup):
    """The look-ups of one sharding type on one rank, one kernel per group of tables."""

    def __init__(self, *, backend: str, optimizer: Optimizer, output: torch.dtype, **kwargs: Any) -> None:
        self._kernel = {"backend": backend, "optimizer": optimizer, "output": output}
        super().__init__(**kwargs)
        # What a rank without tables sends must have the dtype that the others expect.
        self._dummy_embs_tensor = self._dummy_embs_tensor.detach().to(output).requires_grad_()

    def _create_embedding_kernel(
        self, config: GroupedEmbeddingConfig, pg: Any, device: torch.device | None, *_: Any
    ) -> "FusedEmbedding":
        assert device is not None
        return FusedEmbedding(config, pg, device=device, **self._kernel)


class DenseLookup(GroupedEmbeddingsLookup):
    """The look-up of replicated tables on the CPU; the ranks average its gradient."""

    def _create_embedding_kernel(
        self, config: GroupedEmbeddingConfig, pg: Any, device: torch.device | None, *_: Any
    ) -> "DenseEmbedding":
        return DenseEmbedding(config, pg, device)


class FusedEmbedding(FusedKernel, BaseBatchedEmbedding[Tensor]):
    """In the place of TorchRec's BatchedFusedEmbedding."""

    def __init__(self, config: GroupedEmbeddingConfig, pg: Any, *, device: torch.device, **kernel: Any) -> None:
        super().__init__(config, pg, device)
        self._make(pooling="none", device=device, **kernel)
        self.init_parameters()

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        """(N, D) of all ids of the group's features, in the order of the ids."""
        return self.bags(features.values(), features.offsets())


class DenseEmbedding(BatchedDenseEmbedding):
    """TorchRec's kernel for replicated tables with torch's look-up in it: dense gradients of its flat weights."""

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        """(N, D) of all ids of the group's features, in the order of the ids.

        Rows 0 to 36 of the flat weights are table 0, the next are table 1: id 5 of a feature of table 1 is row 42.
        """
        starts = tuple(accumulate(self._local_rows, initial=0))
        counts = torch.tensor(features.length_per_key())
        firsts_N = torch.tensor([starts[t] for t in self._feature_table_map]).repeat_interleave(counts)
        weights_ED = self.emb_module.weights.view(-1, self._local_cols[0])
        return nn.functional.embedding(features.values() + firsts_N, weights_ED)
