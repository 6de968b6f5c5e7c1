"""Updates of table rows that FBGEMM's fused kernels do not have (L2 on the CPU, say), in plain torch.

    replace_update(ebc, update)

hooks into the backward of every fused look-up of a sharded EmbeddingBagCollection.  Just before FBGEMM would update a
table from the gradient of the pooled vectors, the hook sums that gradient by row, lets `update` change the rows that
the batch touches, and hands FBGEMM zeros, with which its own update changes nothing.  It is slower than a fused update
and right for every sharding type, since each rank sees its own shards only.

Two bags [4 7] and [7] of one feature, with gradients g0 and g1 of their sums: row 4 gets g0, row 7 gets g0 + g1.

Shapes: B bags of a feature, N ids, U different rows among them, D columns of a shard.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.distributed.batched_embedding_kernel import BatchedFusedEmbeddingBag

# update(w_UD, g_UD, states, lr=...): changes the weights and each (U, ...) state in place.
Update = Callable[..., None]


def replace_update(ebc: nn.Module, update: Update) -> None:
    """`update` instead of FBGEMM's optimizer in every fused kernel of a sharded EmbeddingBagCollection."""
    for lookup in ebc._lookups:
        for kernel in lookup.modules():
            if isinstance(kernel, BatchedFusedEmbeddingBag):
                kernel.register_forward_hook(_Hook(update))


class _Hook:
    def __init__(self, update: Update) -> None:
        self.update = update

    def __call__(self, kernel: BatchedFusedEmbeddingBag, inputs: tuple[Any, ...], pooled_BX: Tensor) -> None:
        if pooled_BX.requires_grad:
            ids = inputs[0]
            pooled_BX.register_hook(lambda grad_BX: self._apply(kernel, ids.values(), ids.offsets(), grad_BX))

    @torch.no_grad()
    def _apply(self, kernel: BatchedFusedEmbeddingBag, ids_N: Tensor, offsets: Tensor, grad_BX: Tensor) -> Tensor:
        tbe = kernel.emb_module
        weights = tbe.split_embedding_weights()
        states = tbe.split_optimizer_states() or [[]] * len(weights)  # SGD has none
        bags = grad_BX.shape[0]
        columns = 0
        per_table: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for feature, table in enumerate(tbe.feature_table_map):
            starts = offsets[feature * bags : (feature + 1) * bags + 1]
            bag_N = torch.repeat_interleave(torch.arange(bags, device=ids_N.device), starts.diff())
            grad_BD = grad_BX[:, columns : columns + weights[table].shape[1]]
            per_table.setdefault(table, []).append((ids_N[starts[0] : starts[-1]], grad_BD[bag_N].float()))
            columns += weights[table].shape[1]
        for table, parts in per_table.items():
            rows_U, at_N = torch.unique(torch.cat([ids for ids, _ in parts]), return_inverse=True)
            if not len(rows_U):
                continue
            w_ED = weights[table]
            g_UD = torch.zeros(len(rows_U), w_ED.shape[1], device=w_ED.device)
            g_UD.index_add_(0, at_N, torch.cat([grads for _, grads in parts]))
            # .data: autograd would refuse to go on after a change it can see, as FBGEMM's own is not.
            whole = [w_ED.data, *(state.data.view(w_ED.shape[0], -1) for state in states[table])]
            w_UD, *states_U = (tensor[rows_U] for tensor in whole)
            self.update(w_UD, g_UD, states_U, lr=tbe.get_learning_rate())
            for tensor, new in zip(whole, (w_UD, *states_U), strict=True):
                tensor[rows_U] = new
        return torch.zeros_like(grad_BX)
