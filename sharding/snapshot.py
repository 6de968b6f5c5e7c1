"""Table parts as they are at one moment, copied while the training goes on.

    snapshot.begin()                      from here on the rows that a step is about to change are kept as they were
    copy every table part somewhere       in another thread; it may see rows half changed
    for kept in snapshot.end(): ...       put the kept rows over the copy, in this order: it is the tables at `begin`

A row can only change after its kernel has been called with its id, so what a call's rows hold when it begins is kept,
for as long as the copy takes; the step stops for that and not for the copy.  A row that is kept twice has its oldest
values last in `end`.

Shapes: U different rows of a call.
"""

import threading
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sharding.table_state import Fused


class Kept(NamedTuple):
    tensor: int  # data_ptr of the weights or the state whose rows they are
    rows_U: Tensor
    values: Tensor


class Snapshot:
    def __init__(self, kernels: Iterable[Fused]) -> None:
        self._lock = threading.Lock()
        self._kept: list[Kept] | None = None  # None: nothing is being copied
        for kernel in kernels:
            kernel.register_forward_pre_hook(self._before)

    def begin(self) -> None:
        self._kept = []

    def end(self) -> list[Kept]:
        """What was kept, newest first; nothing more is."""
        with self._lock:
            kept, self._kept = self._kept, None
        return kept[::-1] if kept else []

    def _before(self, kernel: Fused, inputs: tuple[Any, ...]) -> None:
        if self._kept is None or not torch.is_grad_enabled():
            return
        ids, ends = inputs[0].values(), inputs[0].offset_per_key()
        of_table: dict[int, list[Tensor]] = {}
        for table, start, end in zip(kernel.emb_module.feature_table_map, ends, ends[1:], strict=False):
            of_table.setdefault(table, []).append(ids[start:end])
        weights = kernel.emb_module.split_embedding_weights()
        states = kernel.emb_module.split_optimizer_states() or [[]] * len(weights)
        found = []
        for table, parts in of_table.items():
            rows_U = torch.unique(torch.cat(parts)).long()
            for tensor in (weights[table], *states[table]):
                found.append(Kept(tensor.data_ptr(), rows_U, tensor.detach().index_select(0, rows_U)))
        with self._lock:
            if self._kept is not None:
                self._kept += found
